"""Several processes that train together, one a host: joining, agreeing, and ending together.

JAX's own runtime connects the devices. What it lacks is an end that a launcher can act upon: a process whose neighbour is
gone waits in a collective, or is aborted. So every process holds a connection to process 0 (`Channel`): one that ends says
why and with which code, one that is killed closes its end at once, one that stands still is silent; the others then leave
with that code, or 75, and the last committed step stands. The same connection carries what process 0 alone decides. Stopping
between two steps is agreed upon by the devices themselves (`Vote`), so that all stop after the same step.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import pathlib
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from dina import interrupt, sharding
from dina.config import EXIT_BUG, EXIT_INPUT, EXIT_RESTART, InputError

JOIN_SECONDS = 300  # for all processes to be there
SILENCE = 60.0  # a process that says nothing for so long stands still
VERDICT = 5.0  # for word of a neighbour's end to arrive, when an error may be its consequence
_ADDRESSES = 4
_channel: Channel | None = None
_unanimous = False  # all processes stop, and each knows it
_on_abort: Any = None  # kept, for C has only its address


# ------------------------------------------------------------------------------------------------------------- joining
def join(coordinator: str, processes: int | None = None, process: int | None = None, wait: float = JOIN_SECONDS) -> None:
    """Makes this process one of several; does nothing without a coordinator. To be called before the first use of a device.

    Args:
        coordinator: HOST:PORT of process 0; 'auto' where JAX finds the others itself (TPU slices, Slurm, Open MPI); '' = alone.
        processes, process: how many there are and which this is, where they are not found.
        wait: seconds for all to be there; then this process ends with 75.

    Raises:
        InputError: the three do not go together.
    """
    if not coordinator and processes is None and process is None:
        return
    if coordinator == "auto":
        if processes is not None or process is not None:
            raise InputError("--coordinator=auto finds --processes and --process itself: leave them out")
        where = {}
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise InputError(f"--coordinator={coordinator!r} is neither HOST:PORT of process 0 nor 'auto'")
        if processes is None or process is None or not 0 <= process < processes:
            raise InputError(f"--process={process} of --processes={processes}: give both, counted from 0, with --coordinator=HOST:PORT")
        where = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process, "cluster_detection_method": "deactivate"}
    late = threading.Timer(wait, interrupt.leave, [f"not all processes had joined {coordinator} after {wait:g} s"])
    late.daemon = True
    late.start()
    try:
        with interrupt.abandonable("joining the other processes"):
            jax.distributed.initialize(**where, initialization_timeout=int(wait) + 60)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator={coordinator}: {str(error).splitlines()[0]}") from error
    finally:
        late.cancel()


def check() -> None:
    """Raises InputError where there are several hosts and this process was not told to join the others."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(f"this host is one of {jax.process_count()}: give --coordinator=auto, on all of them")


def first() -> bool:
    """Whether this process is the one that commits, logs and holds the lease."""
    return jax.process_index() == 0


def own_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where this process writes what only it knows: a stage's folder, or one below it for all but process 0."""
    own = folder if first() else folder / "hosts" / str(jax.process_index())
    own.mkdir(parents=True, exist_ok=True)
    return own


# ------------------------------------------------------------------------------------------------------------- channel
class Channel:
    """Connections between process 0 and each other one; made by `connect`.

    Args:
        links: number of a process -> its socket.
    """

    def __init__(self, links: Mapping[int, socket.socket]):
        self.links, self.turns = dict(links), {other: threading.Lock() for other in links}
        self.parted: set[int] = set()
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closed = threading.Event()
        for other in links:
            threading.Thread(target=self._listen, args=(other,), name=f"process {other}", daemon=True).start()
        threading.Thread(target=self._keep, name="pulse", daemon=True).start()

    def tell(self, message: dict, but: int = -1) -> None:
        """Sends to all that are there."""
        data = json.dumps(message).encode() + b"\n"
        for other, link in self.links.items():
            if other != but and other not in self.parted:
                with self.turns[other], contextlib.suppress(OSError):  # its listener says so
                    link.sendall(data)

    def end(self, code: int, why: str, of: int, but: int = -1) -> None:
        """Tells the others that process `of` has ended."""
        self.tell({"end": [code, why, of]}, but)

    def close(self) -> None:
        """Ends without anybody minding."""
        self._closed.set()
        self.tell({"bye": True})

    def _keep(self) -> None:
        while not self._closed.wait(SILENCE / 6):
            self.tell({})

    def _listen(self, other: int) -> None:
        link, why = self.links[other], "was killed, or its machine is gone"
        link.settimeout(SILENCE)
        try:
            for line in link.makefile("rb"):
                message = json.loads(line)
                if "said" in message:
                    self.said.put(message["said"])
                elif "bye" in message:
                    self.parted.add(other)
                    return
                elif "end" in message:
                    code, why, of = message["end"]
                    self._follow(other, code, why, of)
        except TimeoutError:
            why = f"stood still for {SILENCE:g} s"
        except (OSError, ValueError):
            pass
        self._follow(other, EXIT_RESTART, why, other)

    def _follow(self, other: int, code: int, why: str, of: int) -> None:
        if not self._closed.is_set():
            self.end(code, why, of, but=other)
            interrupt.leave(f"process {of} of {jax.process_count()} {why}; this one ends too, what was last committed stands", code)


def _connect(coordinator: str, wait: float = 60.0) -> Channel:
    """The channel; process 0 listens, and says where through the devices.

    Raises:
        InputError: process 0 cannot be reached.
    """
    count, me = jax.process_count(), jax.process_index()
    with socket.create_server(("", 0), backlog=count) if me == 0 else contextlib.nullcontext() as server:
        told = np.zeros(_ADDRESSES + 2, np.uint32)
        if me == 0:
            found = _own_addresses(coordinator)
            told[: len(found)], told[-2:] = found, (server.getsockname()[1], secrets.randbits(32))
        *addresses, port, password = (int(x) for x in multihost_utils.broadcast_one_to_all(told))
        if me == 0:
            return Channel(_welcome(server, count, password, wait))
    for address in dict.fromkeys(filter(None, addresses)):
        host = str(ipaddress.IPv4Address(address))
        with contextlib.suppress(OSError):
            link = socket.create_connection((host, port), timeout=wait / _ADDRESSES)
            link.sendall(json.dumps([password, me]).encode() + b"\n")
            if link.recv(3) == b"ok\n":
                return Channel({0: link})
    raise InputError(f"process {me} cannot reach process 0 at port {port}: let the hosts of a run connect to each other at any port")


def _welcome(server: socket.socket, count: int, password: int, wait: float) -> dict[int, socket.socket]:
    """Connections of all other processes; whoever does not know the password is turned away."""
    links: dict[int, socket.socket] = {}
    until = time.monotonic() + wait
    while len(links) < count - 1:
        server.settimeout(max(0.01, until - time.monotonic()))
        try:
            link, _ = server.accept()
            link.settimeout(5.0)
            said, number = json.loads(link.makefile("rb").readline(64))
            if said == password and 0 < number < count:
                link.sendall(b"ok\n")
                links[number] = link
        except (OSError, ValueError, TypeError):
            if time.monotonic() > until:
                missing = sorted(set(range(1, count)) - set(links))
                raise InputError(f"processes {missing} cannot reach process 0: let the hosts of a run connect to each other") from None
    return links


def _own_addresses(coordinator: str) -> list[int]:
    """IPv4 addresses at which others may find this host, the likeliest first."""
    names = [coordinator.rpartition(":")[0], socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel chooses the way out
        names.append(probe.getsockname()[0])
    found = []
    for name in filter(None, names):
        with contextlib.suppress(OSError):
            found.append(int(ipaddress.IPv4Address(socket.gethostbyname(name))))
    return list(dict.fromkeys(found))[:_ADDRESSES]


# -------------------------------------------------------------------------------------------------------------- ending
@contextlib.contextmanager
def together(coordinator: str = "") -> Iterator[None]:
    """While inside, the processes of a run end together: with the exit code of the first that ends, 75 if it was killed.

    That begins with `connect`; before, one that ends does so at once, instead of waiting for the others as JAX does.
    """
    if not coordinator:
        yield
        return
    try:
        yield
    except InputError as error:
        _part(EXIT_INPUT, f"ended: {error}")
    except KeyboardInterrupt:
        if not _unanimous:
            _part(EXIT_RESTART, "was asked to stop")
        _close()
        raise
    except Exception:  # maybe of a collective whose other side is gone
        time.sleep(VERDICT)
        traceback.print_exc()
        _part(EXIT_BUG, "ended with an error of its own")
    _close()


def connect(coordinator: str) -> None:
    """From here on the processes know of each other's end. To be called by all, once their devices are set up."""
    global _channel
    if jax.process_count() > 1:
        try:
            _channel = _connect(coordinator)
        except RuntimeError as error:  # JAX's: the others joined, and are gone again
            interrupt.leave(f"the other processes do not answer ({str(error).splitlines()[0]})")
        _await_verdict_of_aborts()


def _close() -> None:
    if _channel is not None:
        _channel.close()


def _part(code: int, why: str) -> None:
    if _channel is not None:
        _channel.end(code, why, jax.process_index())
        interrupt.leave(f"process {jax.process_index()} of {jax.process_count()} {why}", code)
    interrupt.leave(f"this process {why}", code)


def _await_verdict_of_aborts() -> None:
    """JAX aborts the process when process 0's end reaches it first; this leaves time to end with the right code instead."""
    global _on_abort
    if sys.platform == "linux":
        _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: time.sleep(VERDICT))
        ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)


# ------------------------------------------------------------------------------------------------------------ agreeing
def agreed(decide: Callable[[], Any]) -> Any:
    """What process 0 finds, on every process; the others wait for it. It must be JSON; all processes must call in one order."""
    if _channel is None:
        return decide()
    if first():
        found = decide()
        _channel.tell({"said": found})
        return found
    return _channel.said.get()


class Vote:
    """Whether any process was asked to stop, known to all of them after the same step.

    Args:
        mesh: of the run.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self.alone, self.asked = jax.process_count() == 1, None
        self.place = jax.sharding.NamedSharding(mesh, P(mesh.axis_names))
        one = lambda x: jax.lax.pmax(x[0], mesh.axis_names)
        self.count = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P()))

    def cast(self, asked: bool) -> bool:
        """Votes; returns what came of the vote before this one, so that no step waits for it. Alone, what was asked."""
        global _unanimous
        if self.alone:
            return asked
        before = self.asked
        self.asked = self.count(jax.make_array_from_callback((self.place.mesh.size,), self.place, lambda _: np.full(1, asked, np.int32)))
        passed = before is not None and bool(jax.device_get(before))
        _unanimous = _unanimous or passed
        return passed


# ---------------------------------------------------------------------------------------------------------------- data
def own_rows(mesh: jax.sharding.Mesh, size: int) -> np.ndarray:
    """Numbers of the rows, of a global batch of `size`, that this process's devices hold, in order."""
    place = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
    held = (range(*index[0].indices(size)) for index in place.addressable_devices_indices_map((size,)).values())
    return np.array(sorted({row for rows in held for row in rows}))


def put_rows(rows: np.ndarray, size: int, part: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Places a global batch of which this process has `rows` only (see `own_rows`); leading dimension over the batch axes."""
    place = jax.sharding.NamedSharding(mesh, sharding.batch_spec())

    def shard(x):
        at = lambda index: x[np.searchsorted(rows, np.arange(*index[0].indices(size)))]
        return jax.make_array_from_callback((size, *x.shape[1:]), place, at)

    return {name: shard(x) for name, x in part.items()}
