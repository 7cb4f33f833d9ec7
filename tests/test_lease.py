"""One holder at a time, in a folder and in a bucket; a dead one's place is free, a late one is fenced."""

import json
import subprocess
import sys
import time

import pytest

from dina import files, lease
from dina.config import InputError

SHORT = 0.6


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    return tmp_path / "lease" if request.param == "folder" else f"memory://{tmp_path.name}/lease"


def _still(held):
    """As a process that stands still: no more heartbeats, but the lease was not given back."""
    held._done.set()
    held._thread.join()
    held._done.clear()


def test_a_living_holder_keeps_others_out_and_a_released_lease_is_free_at_once(place):
    first = lease.acquire(place, SHORT)
    with pytest.raises(InputError, match="another process is training in"):
        lease.acquire(place, SHORT)
    assert first.held()
    first.release()
    begun = time.monotonic()
    second = lease.acquire(place, 1e6)
    assert second.token == first.token + 1 and time.monotonic() - begun < 1e6
    second.release()


def test_a_holder_that_stands_still_is_replaced_and_fenced(place):
    """Its machine is another one, so that only the heartbeat tells; its clock is never read."""
    first = lease.acquire(place, SHORT)
    _still(first)
    claim = json.loads(first.store.read(f"{first.token:08d}"))
    first.store.write(f"{first.token:08d}", json.dumps(claim | {"machine": "another"}).encode())
    second = lease.acquire(place, SHORT)
    assert second.token == first.token + 1 and second.held()
    with pytest.raises(lease.Fenced, match="another process took this folder over"):
        first.check()
    assert not first.held() and second.held()
    first.release()  # of what it does not have any more
    assert second.held() and second.store.read(f"{second.token:08d}.beat") != b"released"
    second.release()


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(tmp_path):
    code = "import sys; from dina import lease; lease.acquire(sys.argv[1], 1e6); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        holder.kill()
        holder.wait()
    held = lease.acquire(tmp_path, 1e6)  # any waiting would be for ever
    assert held.token == 2
    held.release()


def test_damaged_claims_and_beats_stop_nobody(tmp_path):
    store = files.Folder(tmp_path)
    store.write("00000007", b"{")
    store.write("00000007.beat", b"\xff")
    held = lease.acquire(tmp_path, SHORT)
    assert held.token == 8 and store.names() in (["00000008"], ["00000008", "00000008.beat"])
    held.release()
