"""Names of TPU slices."""

import pytest

from dina.config import InputError
from tools.aot import topology

# As people write it: shape of a slice, slices, chips, devices.
TABLE = {
    "v5p-128": ("4x4x4", 1, 64, 64),  # TensorCores are counted
    "v5p-8": ("2x2x1", 1, 4, 4),
    "v5p:4x4x4": ("4x4x4", 1, 64, 64),
    "v5p:16x16x16": ("16x16x16", 1, 4096, 4096),
    "v4-128": ("4x4x4", 1, 64, 128),
    "v5e-256": ("16x16", 1, 256, 256),
    "v5litepod-8": ("2x4", 1, 8, 8),
    "v5e:16x16*2": ("16x16", 2, 512, 512),
    "v5e-1024": ("16x16", 4, 1024, 1024),  # more than a slice has
    "v6e-256": ("16x16", 1, 256, 256),
    "v6e-1024": ("16x16", 4, 1024, 1024),
    "v6e-16*3": ("4x4", 3, 48, 48),
    "trillium-64": ("8x8", 1, 64, 64),
    "tpu7x:4x4x4": ("4x4x4", 1, 64, 128),  # two devices a chip
    "tpu7x-128": ("4x4x4", 1, 64, 128),
    "V5P-128": ("4x4x4", 1, 64, 64),
}


@pytest.mark.parametrize("text", TABLE)
def test_names_as_people_write_them(text):
    pod = topology.parse(text)
    assert (pod.shape, pod.slices, pod.chips, pod.devices) == TABLE[text]
    assert topology.parse(pod.name) == pod


@pytest.mark.parametrize("text,words", [
    ("v5q-128", "'v5q-128'.*did you mean 'v5p'"),
    ("h100-8", "'h100-8'.*v4, v5e, v5p, v6e"),
    ("v5p-9", "TensorCores, two a chip.*v5p-8, v5p-16"),
    ("v5e-12", "counts chips.*v5e-8, v5e-16"),
    ("v5p:4x4", "v5p has 3 sides.*v5p:4x4x4"),
    ("v5e:3x3", "first two even"),
    ("v5e:32x32", "at most 256 chips a slice"),
    ("v5e:0x2", "does not exist"),
    ("v5e:2x4*0", "at least one slice"),
    ("128", "write v5p-128"),
    ("v5p", "write v5p-128"),
])
def test_what_does_not_exist_is_told_what_does(text, words):
    with pytest.raises(InputError, match=words):
        topology.parse(text)


def test_a_device_is_its_part_of_a_chip():
    pod = topology.parse("tpu7x:2x2x1")
    assert pod.per_device.flops * pod.devices == pod.generation.flops * pod.chips
    assert topology.parse("v5p:2x2x1").per_device.hbm_gib == 95
