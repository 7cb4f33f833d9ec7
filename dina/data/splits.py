"""Splits that share neither a picture nor a caption: pictures that are alike form a group, and a group is in one split.

Legend: R pictures, F bytes of a fingerprint.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

_ROWS = 256  # of the table of distances that is in memory at a time


def group(keys: Sequence[Sequence[str]], prints_RF: UInt8[np.ndarray, "R F"], near: int) -> list[int]:
    """Groups pictures that share a key or whose fingerprints differ in few bits, directly or through others.

    Args:
        keys: the keys of each picture, such as its caption.
        prints_RF: fingerprints.
        near: most bits by which two pictures of a group differ.

    Returns:
        For each picture the first of its group.
    """
    parent = list(range(len(keys)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    first: dict[str, int] = {}
    for index, own in enumerate(keys):
        for key in own:
            join(first.setdefault(key, index), index)
    for start in range(0, len(keys), _ROWS):
        block = prints_RF[start : start + _ROWS]
        distance = sum(np.bitwise_count(block[:, None, f] ^ prints_RF[None, :, f]).astype(np.int32)
                       for f in range(prints_RF.shape[1]))
        for row, other in np.argwhere(distance <= near):
            join(start + int(row), int(other))
    return [root(index) for index in range(len(keys))]


def assign(groups: Sequence[int], names: Sequence[str], strata: Sequence[str], shares: Mapping[str, float],
           seed: int) -> list[str]:
    """Gives every group a split, in proportion in each stratum.

    Groups are taken in an order drawn by (seed, name), and go where they fit: a group that is larger than what a split
    still lacks goes to 'train', so that no split but that one is made of one picture many times.

    Args:
        groups: the group of each picture.
        names: the unique name of each picture; a group has the smallest of its names, and is in that one's stratum.
        strata: what each picture belongs to, such as its package.
        shares: split -> share of every stratum's pictures, rounded down.
        seed: of the order.

    Returns:
        The split of each picture.
    """
    members = collections.defaultdict(list)
    for index, one in enumerate(groups):
        members[one].append(index)
    order = collections.defaultdict(list)
    for own in members.values():
        head = min(own, key=lambda index: names[index])
        order[strata[head]].append((hashlib.sha256(f"{seed}/{names[head]}".encode()).hexdigest(), own))
    result = ["train"] * len(groups)
    for drawn in order.values():
        total = sum(len(own) for _, own in drawn)
        lacks = {split: int(share * total) for split, share in shares.items()}
        for _, own in sorted(drawn):
            split = next((name for name, left in lacks.items() if len(own) <= left), "train")
            if split != "train":
                lacks[split] -= len(own)
            for index in own:
                result[index] = split
    return result
