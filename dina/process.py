"""Settings of the whole process, made before its first use of a device."""

from __future__ import annotations

import ctypes
import os
import sys


def keep_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it and faulting each page in again, on Linux.

    XLA on CPU does so with its large temporaries at every step, which took 22 to 31 % of the CPU time of the backbone's
    training step; an import of released weights does so with every tensor (50 against 44 s for 12.5 GB).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):  # no mmap, no trim, grow by 256 MiB, one arena
            libc.mallopt(option, value)


def set_cpu_effort(level: int) -> None:
    """Sets LLVM's optimization level of programs for the CPU, unless XLA_FLAGS already does; after the first use of a
    device it is too late, and nothing changes.

    One core, pretrain's step, one run each: level 3 (XLA's own) compiles in 46 s, level 1 in 32 s; steps take the same.
    """
    flag, flags = "--xla_backend_optimization_level", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={level}".strip()
