"""Names of TPU slices as people write them, and what a chip of each generation can do.

`v5p-128` is a product name: v2 to v5p and tpu7x count TensorCores, two a chip, so it has 64 chips; v5e and v6e count chips.
`v5p:4x4x4` is a shape in chips. Several slices are `v5e:16x16*2`; where a product name is larger than a slice can be, it is
as many slices. JAX shows one device a chip, but two on v4 (without megacore, as this compiler does it) and tpu7x.

Peaks and memory are the vendor's data sheets; link rates are one direction of one link, as the public "How to Scale Your
Model" (scaling-book) has them; what a slice can send to others is for one chip.
"""

from __future__ import annotations

import dataclasses
import math
import re

from dina.config import InputError, check_name

GIB = 2**30
CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
         1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24"}
SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Generation:
    """One chip.

    Attributes:
        counted: units of a product name's number in a chip.
        devices: that JAX shows for a chip.
        flops: bf16, a second.
        hbm_gib, hbm_rate: memory, and bytes a second.
        link: bytes a second in one direction of one link.
        dims: of the torus.
        dcn: bytes a second to other slices.
        shapes: product sizes in chips.
    """

    name: str
    counted: int
    devices: int
    flops: float
    hbm_gib: float
    hbm_rate: float
    link: float
    dims: int
    dcn: float
    shapes: dict[int, str] = dataclasses.field(hash=False, compare=False)

    @property
    def largest(self) -> int:
        """Chips of the largest slice."""
        return max(self.shapes)


GENERATIONS = {g.name: g for g in (
    Generation("v4", 2, 2, 275e12, 32, 1.228e12, 45e9, 3, 6.25e9, CUBES),
    Generation("v5e", 1, 1, 197e12, 16, 0.819e12, 45e9, 2, 3.125e9, SQUARES),
    Generation("v5p", 2, 1, 459e12, 95, 2.765e12, 90e9, 3, 6.25e9, CUBES),
    Generation("v6e", 1, 1, 918e12, 32, 1.640e12, 90e9, 2, 12.5e9, SQUARES),
    Generation("tpu7x", 2, 2, 2307e12, 192, 7.370e12, 100e9, 3, 12.5e9, CUBES),
)}
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several.

    Attributes:
        generation: of the chips.
        shape: of one slice in chips, '4x4x4'.
        slices: how many, connected by the data-centre network.
    """

    generation: Generation
    shape: str
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(map(int, self.shape.split("x"))) * self.slices

    @property
    def devices(self) -> int:
        """What jax.devices() shows."""
        return self.chips * self.generation.devices

    @property
    def compiler_name(self) -> str:
        """As libtpu names one slice."""
        return f"{self.generation.name}:{self.shape}"

    @property
    def name(self) -> str:
        """Canonical."""
        return self.compiler_name + (f"*{self.slices}" if self.slices > 1 else "")

    @property
    def per_device(self) -> Generation:
        """What one device has of a chip."""
        g, n = self.generation, self.generation.devices
        return dataclasses.replace(g, flops=g.flops / n, hbm_gib=g.hbm_gib / n, hbm_rate=g.hbm_rate / n, link=g.link / n, dcn=g.dcn / n)


def parse(text: str) -> Topology:
    """Reads a topology.

    Args:
        text: 'v5p-128', 'v5p:4x4x4', either with '*2' for two slices.

    Raises:
        InputError: names the generations or sizes that exist.
    """
    found = re.fullmatch(r"(?P<name>[a-z0-9]+)(-(?P<count>\d+)|:(?P<shape>\d+(x\d+)*))(\*(?P<slices>\d+))?", text.strip().lower())
    if not found:
        raise InputError(f"--topology={text!r} is not a topology; write v5p-128 (a product name), v5p:4x4x4 (chips) or v5e:16x16*2 (slices)")
    name = ALIASES.get(found["name"], found["name"])
    check_name(name, GENERATIONS, f"--topology={text!r}: TPU generation")
    generation, slices = GENERATIONS[name], int(found["slices"] or 1)
    if slices < 1:
        raise InputError(f"--topology={text!r}: a pod has at least one slice")
    if found["count"]:
        return _product(text, generation, int(found["count"]), slices)
    sides = [int(side) for side in found["shape"].split("x")]
    _check_shape(text, generation, sides)
    return Topology(generation, "x".join(map(str, sides)), slices)


def _product(text: str, g: Generation, count: int, slices: int) -> Topology:
    chips, rest = divmod(count, g.counted)
    pieces = -(-chips // g.largest)
    if rest or not chips or chips % pieces or chips // pieces not in g.shapes:
        names = ", ".join(f"{g.name}-{n * g.counted}" for n in g.shapes)
        unit = "TensorCores, two a chip" if g.counted == 2 else "chips"
        raise InputError(f"--topology={text!r} does not exist (the number counts {unit}); there are {names}, and multiples of the largest as slices")
    return Topology(g, g.shapes[chips // pieces], slices * pieces)


def _check_shape(text: str, g: Generation, sides: list[int]) -> None:
    """A host has 2x2 chips, so sides are even except for a single chip, and of a single host's third side."""
    known = ", ".join(f"{g.name}:{shape}" for shape in g.shapes.values())
    size = math.prod(sides)
    whole = size == 1 or all(side % 2 == 0 for side in sides[:2])
    if len(sides) != g.dims or not size or not whole or size > g.largest:
        raise InputError(f"--topology={text!r} does not exist: {g.name} has {g.dims} sides, the first two even, at most {g.largest} chips a slice;"
                         f" common: {known}")
