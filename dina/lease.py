"""Who may work in a folder: a lease with a heartbeat, and a fencing token that grows with every holder.

A claim is an object whose name is its token, made by a conditional write, so one of several contenders gets it. The
holder rewrites `<token>.beat`; who wants the folder watches that object by its own clock, so clocks need not agree: a
beat that stands still for `seconds` is of a dead holder, one that moves is of a live one. Where the holder's machine is
this one, a process that is gone is dead at once. A holder that slept too long finds a higher token and must stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Iterator

import jax

from dina import files
from dina.config import InputError
from dina.interrupt import abandonable, last_act

SECONDS = 30.0  # a holder that has not moved for so long is dead
BEATS = 6  # heartbeats in that time
_RELEASED = b"released"


class Fenced(InputError):
    """Another process has taken the folder over; this one may write nothing more to it."""


class Lease:
    """A held lease; made by `acquire`.

    Attributes:
        token: grows with every holder of the folder.
    """

    def __init__(self, store: files.Store, place: str, token: int, seconds: float):
        self.store, self.place, self.token, self.seconds = store, place, token, seconds
        self._lost, self._count, self._done = False, 0, threading.Event()
        self._turn = threading.Lock()
        self._beaten = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether nobody else can have taken the folder over; asks the storage only where the last heartbeat is old."""
        if not self._lost and time.monotonic() - self._beaten > self.seconds / 2:
            self._beat()
        return not self._lost

    def check(self) -> None:
        """Raises Fenced unless `held`."""
        if not self.held():
            raise Fenced(f"{self.place}: another process took this folder over while this one stood still; it writes no more here")

    def release(self) -> None:
        """Ends the lease; the folder is free at once."""
        if not self._done.is_set():
            self._done.set()
            with self._turn:
                if not self._lost:
                    with contextlib.suppress(OSError):  # then it is free once its heartbeat has stood still
                        self.store.write(f"{self.token:08d}.beat", _RELEASED)

    def _keep(self) -> None:
        while not self._done.wait(self.seconds / BEATS):
            try:
                self._beat()
            except OSError as error:  # a storage that comes back in time costs nothing
                print(f"dina: {self.place}: heartbeat failed ({error})", flush=True)

    def _beat(self) -> None:
        with self._turn:
            if self._done.is_set():
                return
            at = time.monotonic()  # before the write: the time others count from is not earlier
            if _newest(self.store)[0] == self.token:
                self._count += 1
                self.store.write(f"{self.token:08d}.beat", str(self._count).encode())
            # A claim made while the beat was written shows now, or its maker has seen the beat move.
            if _newest(self.store)[0] != self.token:
                self._lost = True
            else:
                self._beaten = at


def acquire(place: pathlib.Path | str, seconds: float = SECONDS) -> Lease:
    """Takes the lease of a folder, waiting up to `seconds` to see whether its last holder lives.

    Args:
        place: a local folder or an address of a bucket; objects of the lease are right in it.
        seconds: how long a heartbeat may stand still; all users of the folder must say the same.

    Raises:
        InputError: its holder lives.
    """
    store = files.open_store(place)
    token, claim = _newest(store)
    if claim is not None and not _dead(store, token, claim, seconds):
        raise _taken(place, claim)
    mine = json.dumps(_self() | {"nonce": secrets.token_hex(8)}).encode()
    if not store.create(f"{token + 1:08d}", mine):
        raise _taken(place, _newest(store)[1] or {})
    lease = Lease(store, str(place), token + 1, seconds)
    for name in store.names():
        if name.split(".")[0].isdigit() and int(name.split(".")[0]) < lease.token:
            store.delete(name)
    return lease


@contextlib.contextmanager
def alone(folder: pathlib.Path, seconds: float = SECONDS) -> Iterator[Lease | None]:
    """Holds a local folder; the processes of one distributed run share it, so the first of them has its lease.

    Raises:
        InputError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:
        yield None
        return
    with abandonable("waiting for the folder"):
        lease = acquire(folder / "lease", seconds)
    with last_act(lease.release):
        try:
            yield lease
        finally:
            lease.release()


def _newest(store: files.Store) -> tuple[int, dict | None]:
    """(highest token, its claim), (0, None) if nobody ever held the lease."""
    token = max((int(name) for name in store.names() if name.isdigit()), default=0)
    if not token:
        return 0, None
    try:
        return token, json.loads(store.read(f"{token:08d}") or b"{}")
    except ValueError:
        return token, {}


def _dead(store: files.Store, token: int, claim: dict, seconds: float) -> bool:
    """Watches the holder until its heartbeat moves, or has stood still for `seconds`."""
    name = f"{token:08d}.beat"
    first, begun = store.read(name), time.monotonic()
    while True:
        beat = store.read(name)
        if beat == _RELEASED or _gone(claim):
            return True
        if beat != first:
            return False
        if time.monotonic() - begun > seconds:
            return True
        time.sleep(min(0.2, seconds / 20))


def _self() -> dict:
    """This process, as only its own machine can look it up."""
    try:
        machine = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        machine = ""
    return {"host": os.uname().nodename, "pid": os.getpid(), "machine": machine, "born": _born(os.getpid())}


def _born(pid: int) -> str:
    """When a process of this machine began, '' if there is none or it is a zombie."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _gone(claim: dict) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    own = _self()["machine"]
    return bool(own) and claim.get("machine") == own and _born(claim["pid"]) != claim["born"]


def _taken(place, claim: dict) -> InputError:
    who = f"process {claim.get('pid', '?')} on {claim.get('host', '?')}"
    return InputError(f"another process is training in {place} ({who}): wait until it ends, stop it, or choose another --workdir")
