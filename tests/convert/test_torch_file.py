"""What is written as a PyTorch file is read back, and by PyTorch itself where there is one."""

import subprocess

import numpy as np
import pytest

from dina.config import InputError
from dina.convert import torch_file
from dina.data import torch_weights
from tools.bench import harness

TENSORS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a.bias": np.full(3, 0.1, np.float32),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "none": np.zeros((0, 2), np.float32),
    "scalar": np.float32(3.5),
}
SCRIPT = """
import sys, torch
found = torch.load(sys.argv[1], weights_only=True)
assert list(found) == ["a.weight", "a.bias", "turned", "none", "scalar"], list(found)
assert torch.equal(found["turned"], torch.arange(6.0).reshape(2, 3).T) and found["scalar"].item() == 3.5
assert found["a.weight"].shape == (2, 3, 4) and found["a.weight"].flatten()[-1] == 23 and found["none"].shape == (0, 2)
"""


def test_tensors_come_back(tmp_path):
    torch_file.write(tmp_path / "a.pt", TENSORS)
    found = torch_weights.read(tmp_path / "a.pt")
    assert list(found) == list(TENSORS)
    for name, array in TENSORS.items():
        assert found[name].shape == np.shape(array) and found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)


def test_pytorch_reads_it(tmp_path):
    try:
        python = harness.peer_python()
    except InputError:
        pytest.skip("no torch: run `make peers`")
    torch_file.write(tmp_path / "a.pt", TENSORS)
    subprocess.run([python, "-c", SCRIPT, str(tmp_path / "a.pt")], check=True, timeout=300)
