"""The library that makes storage go wrong (shim.c): built once by the C compiler, preloaded, armed by a call."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from dina.config import InputError

SOURCE = pathlib.Path(__file__).with_name("shim.c")
ACTIONS = ("count", "kill", "tear", "full", "fail", "slow")
_MARK = "DINA_FAULTS_SHIM"


def build() -> pathlib.Path:
    """The library, compiled unless this source was before. Raises InputError where there is no C compiler, or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        raise InputError("tools.faults makes storage fail through a preloaded library, which needs Linux and a C compiler (`apt install gcc`)")
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = pathlib.Path(tempfile.gettempdir()) / f"dina-faults-{os.getuid()}-{name}.so"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(part), str(SOURCE), "-ldl"], check=True)
        part.replace(path)
    return path


def preload() -> None:
    """Starts this process again with the library preloaded, unless it is."""
    if os.environ.get(_MARK) != "1":
        before = os.environ.get("LD_PRELOAD", "")
        variables = {_MARK: "1", "LD_PRELOAD": f"{build()}:{before}".rstrip(":")}
        os.execve(sys.executable, sys.orig_argv, os.environ | variables)


def arm(folder: pathlib.Path, classes: str, action: str, number: int, report: pathlib.Path, millis: int = 0) -> None:
    """From now on, this process's operations below `folder` are counted, and one goes wrong.

    Args:
        folder: absolute; a path that begins so.
        classes: 'w' (make, write, flush), 'c' (rename, link, remove), or both.
        action: 'count' (writes down all), 'kill' before it, 'tear' (half a write, then killed), 'full' (no space left from
            it on), 'fail' (an input/output error, once), 'slow' (all of them).
        number: of the operation, from 1.
        report: gets a line `FIRED path` when it happens.
        millis: of 'slow'.
    """
    library = ctypes.CDLL(None)
    library.fault_arm(str(folder).encode(), classes.encode(), ACTIONS.index(action), ctypes.c_long(number), millis, str(report).encode())
