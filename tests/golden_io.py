"""Reads golden cases: safetensors weights, npz arrays, and the comparison that golden/README.md prescribes."""

import json
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}


def read_safetensors(path):
    """All tensors of a safetensors file as float32: an 8-byte header length, a JSON header, then raw data."""
    raw = pathlib.Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = array.astype(np.float32)
    return tensors


def read_case(name):
    """(config, weights, data) of tests/golden/<name>."""
    folder = GOLDEN / name
    with np.load(folder / "data.npz") as npz:
        data = {key: npz[key] for key in npz.files}
    return json.loads((folder / "config.json").read_text()), read_safetensors(folder / "weights.safetensors"), data


def relative_error(ours, golden):
    """Max abs error over the golden tensor's own max abs; the README's tolerance for it is 1e-4."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    return float(np.max(np.abs(ours - golden)) / np.max(np.abs(golden)))
