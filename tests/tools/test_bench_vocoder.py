"""The vocoder's benchmark: the peer's formulas give our samples, and its arithmetic is counted by hand."""

import json
import pathlib
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from dina.config import InputError
from tools.bench import harness, vocoder

SMALL = {"channels": 16, "f0_channels": 8, "kernels": (3, 5), "dilations": (1, 3)}
SCRIPT = """
import json, sys, safetensors.torch, torch
sys.path.insert(0, sys.argv[1])
import peer_audio
with torch.inference_mode():
    work = peer_audio.Vocoder(json.loads(sys.argv[2]), safetensors.torch.load_file(sys.argv[3]))
    safetensors.torch.save_file({"result": work.run({}).contiguous()}, sys.argv[3])
"""


def peer():
    try:
        return harness.peer_python()
    except InputError:
        return None


@pytest.mark.skipif(peer() is None, reason="no peer: run `make peers`")
def test_the_peer_computes_the_same_samples(tmp_path):
    work, file = vocoder.vocoder(5, **SMALL), tmp_path / "tensors.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in work.tensors.items()}, file)
    bench = pathlib.Path(vocoder.__file__).parent
    subprocess.run([peer(), "-c", SCRIPT, str(bench), json.dumps(work.config), str(file)], check=True, timeout=300)
    theirs = safetensors.numpy.load_file(file)["result"]
    ours = np.asarray(work.ours())
    assert ours.shape == theirs.shape == (1, 2400) and np.std(theirs) > 0.01
    work.check(ours, theirs)
    with pytest.raises(AssertionError):
        work.check(ours, theirs[:, ::-1])


def test_arithmetic_is_counted_by_hand():
    work = vocoder.vocoder(2, channels=8, f0_channels=4, kernels=(3,), dilations=(1,))
    pitch = 80 * 4 * 3 + 4 * 4 * 4 * 3 + 4
    first = 80 * 8 * 7 + 8 * 4 * 16 + 8 * (18 * 4 * 30 + 2 * 4 * 4 * (7 + 3))
    second = 8 * 4 * 2 * 11 + 40 * (18 * 2 * 6 + 2 * 2 * 2 * (7 + 3))
    third = 40 * 2 * 1 * 7 + 120 * (18 + 2 * (11 + 3) + 18 * 7)
    assert work.flops == 2 * 2 * (pitch + first + second + third + 480 * 9)
