"""What a score was measured with, as an id: scores of different ids are not compared (reference/peers.md §6, FID traps).

Crop, resizer, feature network and reference set each move a picture metric by more than papers differ. So each is part of
the id, and `compare` says which one differs instead of subtracting.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np

from dina.config import InputError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a number came about.

    Attributes:
        metric: name and version of the formula, e.g. 'ssim/1 (window 7)'.
        reference: hash of the reference set (`reference_hash`).
        geometry: crop and resizer.
        network: hash of the feature network's weights, '' where there is none.
        seed: of the resampling.
    """

    metric: str
    reference: str
    geometry: str
    network: str
    seed: int

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def stamp(self, score: Mapping) -> dict:
        """The score with `protocol`, the id, and `measured`, the settings behind it."""
        return dict(score) | {"protocol": self.id, "measured": dataclasses.asdict(self)}


def reference_hash(images: Iterable[np.ndarray]) -> str:
    """Hash of uint8 pictures of any sizes, in their order."""
    found = hashlib.sha256()
    for image in images:
        found.update(f"{image.shape}{image.dtype}".encode() + np.ascontiguousarray(image).tobytes())
    return found.hexdigest()[:16]


def compare(first: Mapping, second: Mapping) -> float:
    """Value of `first` minus value of `second`.

    Raises:
        InputError: a score without protocol, or scores of different protocols; the message names what differs.
    """
    for number, score in enumerate((first, second)):
        if "protocol" not in score:
            which = ("first", "second")[number]
            raise InputError(f"the {which} score carries no protocol id: measure it with dina.eval.fidelity")
    if first["protocol"] != second["protocol"]:
        fields = [
            f"{name} ({first['measured'][name]!r} and {second['measured'][name]!r})"
            for name in first["measured"]
            if first["measured"][name] != second["measured"].get(name)
        ]
        raise InputError(f"scores of different protocols are not compared: they differ in {', '.join(fields)}")
    return first["value"] - second["value"]
