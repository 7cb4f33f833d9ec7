"""From counts to seconds: what each network, the memory and the arithmetic would take at their data sheets' rates.

    arithmetic   all counted FLOPs, remat included, over the peak
    memory       arguments and results once, every temporary written and read once a micro-batch
    ICI          of one collective: bytes sent over both directions of one link; an all-to-all in a ring of n devices passes
                 n/4 links on average, so it takes max(1, n/4) times that; over several sides of a torus, n is the longest
    DCN          bytes sent over the chip's share of its host's network
A step is max(arithmetic, memory) + ICI + DCN: the compiler printed most collectives as synchronous. All of it is a
prediction: nothing here has run on a TPU.
"""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

from tools.aot.count import Collective, Counts
from tools.aot.topology import Topology


def seconds(collective: Collective, topology: Topology) -> float:
    """Of all its runs in a step."""
    device, sent = topology.per_device, collective.sent * collective.times
    if collective.axes == "dcn":
        return sent / device.dcn
    hops = max(1.0, longest_side(collective.group, topology) / 4) if "all-to-all" in collective.kind else 1.0
    return hops * sent / (2 * device.link)


def longest_side(group: int, topology: Topology) -> int:
    """Of the sides of the slice that a group of devices lies on; all of it where no sides multiply to that."""
    sides = [int(side) for side in topology.shape.split("x")] + [topology.generation.devices]
    some = [chosen for n in range(1, len(sides) + 1) for chosen in itertools.combinations(sides, n) if math.prod(chosen) == group]
    return min((max(chosen) for chosen in some), default=group)


def table(counts: Counts, topology: Topology) -> list[dict[str, Any]]:
    """Collectives by kind and axis, the longest first: bytes that a device sends in a step, runs, and seconds."""
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in counts.collectives:
        row = found[one.kind, one.axes]
        for place, value in enumerate((one.sent * one.times, one.times, seconds(one, topology))):
            row[place] += value
    rows = [{"kind": kind, "axis": axis, "network": "DCN" if axis == "dcn" else "ICI", "bytes": sent, "runs": int(runs), "seconds": time}
            for (kind, axis), (sent, runs, time) in found.items() if sent]
    return sorted(rows, key=lambda row: -row["seconds"])


def terms(counts: Counts, unseen_flops: float, traffic: float, topology: Topology) -> dict[str, float]:
    """Seconds of a step by what they are for.

    Args:
        counts: of the program.
        unseen_flops: of one device in kernels, whose text shows none.
        traffic: bytes between the chip and its memory.
        topology: where it runs.
    """
    device = topology.per_device
    sent = table(counts, topology)
    return {
        "arithmetic": (sum(counts.flops.values()) + counts.remat + unseen_flops) / device.flops,
        "memory": traffic / device.hbm_rate,
        "ici": sum(row["seconds"] for row in sent if row["network"] == "ICI"),
        "dcn": sum(row["seconds"] for row in sent if row["network"] == "DCN"),
    }


def step_seconds(found: dict[str, float]) -> float:
    """Of the sum in the module's text."""
    return max(found["arithmetic"], found["memory"]) + found["ici"] + found["dcn"]
