"""Tensors as they were saved, in both formats, strided views too; every foreign name and every lie about sizes is refused.

The files are written by hand, with the opcodes that torch writes: no torch is needed.
"""

import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dina.config import InputError
from dina.data import torch_weights

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=24).astype(np.float32)


class Named:
    """Pickles as the global `module.name`."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Tensor:
    """Pickles as torch pickles a tensor over storage `key`."""

    def __init__(self, key, kind, size, offset, shape, strides):
        self.args = key, kind, size, offset, shape, strides

    def __reduce__(self):
        key, kind, size, offset, shape, strides = self.args
        storage = Reference(("storage", Named("torch", kind), key, "cpu", size))
        return Call("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, {})


class Reference:
    def __init__(self, parts):
        self.parts = parts


class Call(Named):
    def __call__(self):
        raise AssertionError("never called: only its name is written")


class Pickler(pickle._Pickler):
    """Writes names that do not exist here, and references to storages."""

    legacy = False

    def persistent_id(self, obj):
        if isinstance(obj, Reference):
            return (*obj.parts, None) if self.legacy else obj.parts
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)


def _pickled(tree, legacy):
    out = io.BytesIO()
    pickler = Pickler(out, 2)
    pickler.legacy = legacy
    pickler.dump(tree)
    return out.getvalue()


def _write(path, tree, storages, form):
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", _pickled(tree, False))
            archive.writestr("model/byteorder", "little")
            for key, data in storages.items():
                archive.writestr(f"model/data/{key}", data.tobytes())
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
        parts = [_pickled(x, True) for x in (*head, tree, list(storages))]
        parts += [struct.pack("<q", data.size) + data.tobytes() for data in storages.values()]
        path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_values_shapes_and_types_come_back(tmp_path, form):
    half, long = RNG.normal(size=6).astype(ml_dtypes.bfloat16), np.arange(5)
    tree = {
        "plain": Tensor("0", "FloatStorage", 24, 0, (2, 3, 4), (12, 4, 1)),
        "turned": Tensor("0", "FloatStorage", 24, 4, (4, 2), (1, 4)),
        "state": {"half": Tensor("1", "BFloat16Storage", 6, 0, (6,), (1,)), "epoch": 3},
        "count": [Tensor("2", "LongStorage", 5, 2, (), ())],
        "none": Tensor("2", "LongStorage", 5, 5, (0, 3), (3, 1)),
    }
    found = torch_weights.read(_write(tmp_path / "a.pth", tree, {"0": BASE, "1": half, "2": long}, form))
    np.testing.assert_array_equal(found["plain"], BASE.reshape(2, 3, 4))
    np.testing.assert_array_equal(found["turned"], BASE[4:12].reshape(2, 4).T)
    np.testing.assert_array_equal(found["state"]["half"], half)
    assert found["state"]["epoch"] == 3 and found["count"][0] == 2 and found["count"][0].dtype == np.int64
    assert found["none"].shape == (0, 3)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("module, name", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("collections", "deque")])
def test_foreign_names_are_refused(tmp_path, form, module, name):
    path = _write(tmp_path / "a.pth", {"x": Named(module, name)}, {}, form)
    with pytest.raises(InputError, match=f"{module}.{name}, which is no part of a tensor"):
        torch_weights.read(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    "size, offset, shape, strides",
    [
        (24, 1, (24,), (1,)), (24, 0, (2, 2), (23, 2)), (24, 0, (9, 9), (0, 0)), (24, 0, (2,), (-1,)),
        (24, -1, (2,), (1,)), (25, 0, (25,), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, form, size, offset, shape, strides):
    tree = {"x": Tensor("0", "FloatStorage", size, offset, shape, strides)}
    with pytest.raises(InputError, match="values"):
        torch_weights.read(_write(tmp_path / "a.pth", tree, {"0": BASE}, form))


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_damaged_files_are_refused_at_every_length(tmp_path, form):
    tree = {"x": Tensor("0", "FloatStorage", 24, 0, (24,), (1,))}
    whole = _write(tmp_path / "a.pth", tree, {"0": BASE}, form).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "b.pth").write_bytes(whole[:length])
        with pytest.raises(InputError, match="b.pth"):
            torch_weights.read(tmp_path / "b.pth")
    with pytest.raises(InputError, match="no such weight file"):
        torch_weights.read(tmp_path / "c.pth")
