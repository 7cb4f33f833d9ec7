"""What all benchmarks share: the peer's process, interleaved timing, medians, ratios, and how fast the machine is itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dina.config import InputError
from tools.bench import peak

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One case of a benchmark.

    Attributes:
        name: of the case.
        ours: runs once and returns a result that `jax.block_until_ready` takes.
        peer: name of the peer's workload in `peer.py`.
        config: for it.
        tensors: its weights and inputs, in the peer's names; emptied when the peer has them.
        amount: units of work in a run, for rates.
        check: raises if the two results differ.
        flops, bytes: arithmetic and memory traffic that the work needs at least, for the floor.
        threads: how the peer is timed: 'each' (with one thread and with all; small work may be faster with one) or 'all'.
    """

    name: str
    ours: Callable[[], Any]
    peer: str
    config: dict
    tensors: dict[str, np.ndarray]
    amount: float
    check: Callable[[np.ndarray, np.ndarray], None]
    flops: float = 0.0
    bytes: float = 0.0
    threads: str = "each"


class Peer:
    """A child process with the peer's interpreter."""

    def __init__(self):
        self.process = subprocess.Popen(
            [peer_python(), str(pathlib.Path(__file__).with_name("peer.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | ({} if on_gpu() else {"CUDA_VISIBLE_DEVICES": ""}),
        )  # fmt: skip

    def ask(self, **command: Any) -> dict:
        """One command and its answer. Raises RuntimeError if the peer died."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with code {self.process.wait()}; its message is above")
        return json.loads(line)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def on_gpu() -> bool:
    """Whether both sides run on a GPU: where JAX does."""
    return jax.default_backend() == "gpu"


def exactly() -> None:
    """Products of float32 in float32 on a GPU too, as the peer's are, and room there for the peer; call before anything runs."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_default_matmul_precision", "highest")


def peer_python() -> str:
    """The interpreter that has torch: this one, or the one that `make peers` made. Raises InputError without either."""
    if importlib.util.find_spec("torch"):
        return sys.executable
    other = ROOT / ".peers" / "bin" / "python"
    if other.exists():
        return str(other)
    raise InputError("no peer to measure: this interpreter has no torch and there is no .peers; run `make peers` or install the extra `bench`")


def compare(workload: Workload, rounds: int, warm: int = 1) -> dict:
    """Runs ours and the peer in turn, the peer with one thread and with all (on a GPU: with all), and keeps its better median.

    Returns:
        name, ours and peer (median seconds), their samples, floor (seconds), versions, and `peak`: the bytes that one run of each
        needs over what it held before, on a CPU.
    """
    machine = [Machine.measure()]
    cores = os.cpu_count() or 1
    ours, threads = [], [cores] if on_gpu() or workload.threads == "all" else sorted({1, cores})
    peers: dict[int, list[float]] = {n: [] for n in threads}
    with tempfile.TemporaryDirectory() as folder, Peer() as peer:
        weights = pathlib.Path(folder) / "weights.safetensors"
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in workload.tensors.items()}, weights)
        workload.tensors.clear()  # a second copy of large weights may not fit
        versions = peer.ask(setup=workload.peer, config=workload.config, weights=str(weights), device="cuda" if on_gpu() else "cpu")
        for _ in range(warm):
            result = jax.block_until_ready(workload.ours())
            peer.ask(run=True)
        peer.ask(result=str(weights))
        workload.check(np.asarray(result), safetensors.numpy.load_file(weights)["result"])
        del result
        peaks = None if on_gpu() else (peak.above(lambda: jax.block_until_ready(workload.ours()))[1], peer.ask(peak=True)["bytes"])
        peaks = None if peaks is None or None in peaks else peaks
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(workload.ours())
            ours.append(time.perf_counter() - start)
            for n in threads:
                peers[n].append(peer.ask(threads=n, run=True)["seconds"])
        machine.append(Machine.measure())
    best = min(peers, key=lambda n: statistics.median(peers[n]))
    floor = min(m.seconds(workload.flops, workload.bytes) for m in machine)
    return {
        "case": workload.name, "ours": statistics.median(ours), "peer": statistics.median(peers[best]), "floor": floor,
        "amount": workload.amount, "peer_threads": best, "samples": {"ours": ours, "peer": {str(n): s for n, s in peers.items()}},
        "peak": peaks,
        "peer_version": ", ".join(f"{k} {v}" for k, v in versions.items() if v),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this machine does at best with nothing around it."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls) -> "Machine":
        """FLOP/s of a square float32 product, and bytes/s of summing an array that no cache holds; best of five."""
        size, length = (8192, 2**29) if on_gpu() else (1024, 2**26)
        product = _best(jax.jit(lambda x: x @ x), jnp.ones((size, size), jnp.float32))
        reading = _best(jax.jit(jnp.sum), jnp.ones(length, jnp.float32))
        return cls(2 * size**3 / product, 4 * length / reading)

    def seconds(self, flops: float, bytes_: float) -> float:
        """The larger of both times."""
        return max(flops / self.flops, bytes_ / self.bandwidth)


def _best(f, x) -> float:
    jax.block_until_ready(f(x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(f(x))
        times.append(time.perf_counter() - start)
    return min(times)


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds to copy the files of a folder to new files, each with fsync; the copy is removed."""
    start = time.perf_counter()
    target.mkdir()
    for path in (path for path in source.rglob("*") if path.is_file()):
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, (target / path.relative_to(source)).open("wb") as write:
            shutil.copyfileobj(read, write, 16 * 2**20)
            write.flush()
            os.fsync(write.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def machine_name() -> str:
    """The device and, on a CPU, its model and number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"
