"""From measured cells to a table with intervals, differences between configurations, and what is worth its bits.

A configuration is all cells that differ in their seed only. Its value is the mean over seeds and pictures; its interval is a
bootstrap that draws seeds, and the same pictures for all seeds and all configurations. Differences of two configurations are
taken seed by seed and picture by picture before they are averaged, so what pictures have in common does not blur them. With
three seeds an interval over seeds is a rough one; it is never narrower for that than the pictures allow.

Letters: S seeds, R pictures, B resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dina.config import InputError

RESAMPLES = 2000
FIDELITY = ("psnr_db", "ssim")
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """All seeds of one configuration.

    Attributes:
        name: in words.
        axes: config path -> value, without the seed.
        cells: records of tools/sweep/execute.py, by seed.
    """

    name: str
    axes: dict[str, Any]
    cells: tuple[Record, ...]

    @property
    def levels(self) -> int:
        """Levels of its codes; 0 if it has none."""
        return int(self.cells[0]["levels"])

    @property
    def depths(self) -> list[int]:
        """Depths at which it was measured."""
        return list(self.cells[0]["depths"])

    def values(self, score: str, depth: int) -> Float[np.ndarray, "S R"] | None:
        """A score of each seed and picture at a depth, or None where it was not measured.

        Args:
            score: 'psnr_db', 'ssim' or 'language', bits of an image's first `depth` levels under the language model.
            depth: levels used.
        """
        if score != "language":
            return np.array([cell[score][str(depth)] for cell in self.cells]) if str(depth) in self.cells[0][score] else None
        if not all(cell["language"] for cell in self.cells):
            return None
        return np.array([np.array(cell["language"]["bits"])[:, :depth].sum(1) for cell in self.cells])


def groups(records: Iterable[Record]) -> list[Group]:
    """Records by configuration, in order of appearance.

    Raises:
        InputError: two records were measured on different pictures.
    """
    found: dict[str, list[Record]] = {}
    seen: dict[str, str] = {}
    for record in records:
        found.setdefault(record["group"], []).append(record)
        seen.setdefault(record["pictures"]["identity"], record["key"])
    if len(seen) > 1:
        raise InputError(
            f"cells {' and '.join(seen.values())} were measured on different pictures, so they cannot be compared; "
            "sweep over bases with equal data, one sweep each otherwise"
        )
    bare = lambda axes: {path: value for path, value in axes.items() if path != "seed"}
    return [Group(name, bare(cells[0]["axes"]), tuple(sorted(cells, key=lambda c: c["seed"]))) for name, cells in found.items()]


@dataclasses.dataclass(frozen=True)
class Draws:
    """Resamples of pictures, as each one's share [B, R], and uniform numbers for seeds [B, most seeds]; the same for every
    interval of a page."""

    share_BR: Float[np.ndarray, "B R"]
    seed_BS: Float[np.ndarray, "B S"]

    def interval(self, value_SR: Float[np.ndarray, "S R"]) -> dict[str, float]:
        """{value, low, high}: the mean, and the middle 95 % of its resampled ones."""
        seeds = len(value_SR)
        pick_BS = (self.seed_BS[:, :seeds] * seeds).astype(int)
        mean_B = np.take_along_axis(self.share_BR @ value_SR.T, pick_BS, 1).mean(1)
        low, high = np.percentile(mean_B, [2.5, 97.5])
        return {"value": float(value_SR.mean()), "low": float(low), "high": float(high)}


def draws(found: Sequence[Group], seed: int = 0, resamples: int = RESAMPLES) -> Draws:
    """The resamples of a page."""
    rng = np.random.default_rng(seed)
    pictures = int(found[0].cells[0]["pictures"]["count"])
    most = max(len(group.cells) for group in found)
    shares = rng.multinomial(pictures, np.full(pictures, 1 / pictures), resamples) / pictures
    return Draws(shares, rng.random((resamples, most)))


@dataclasses.dataclass
class Point:
    """One configuration at one depth: everything that the page's table shows of it."""

    group: Group
    depth: int
    scores: dict[str, dict[str, float]]  # psnr_db, ssim, language (bits an image), each {value, low, high}
    bits_cell: float
    bits_image: float
    numbers: dict[str, float]  # usage, perplexity, dead, energy, encode_us, mib, head_mflops; means over seeds
    front: set[str] = dataclasses.field(default_factory=set)  # of which fronts it is a part: 'bits', 'language'


def points(found: Sequence[Group], drawn: Draws) -> list[Point]:
    """Every configuration at every depth."""
    out = []
    for group in found:
        for depth in group.depths:
            values = {score: group.values(score, depth) for score in (*FIDELITY, "language")}
            scores = {score: drawn.interval(value_SR) for score, value_SR in values.items() if value_SR is not None}
            cell = group.cells[0]
            bits = float(sum(cell["bits"][:depth]))
            image = bits * float(np.mean(cell["pictures"]["cells"]))
            out.append(Point(group, depth, scores, bits, image, _means([numbers(c, depth) for c in group.cells])))
    for name, cost in (("bits", lambda p: p.bits_cell), ("language", lambda p: p.scores.get("language", {}).get("value"))):
        costs = [cost(p) for p in out]
        # Without codes there is nothing to pay: such a point bounds the others, and is in no front.
        valid = [i for i, c in enumerate(costs) if c is not None and out[i].depth]
        front = pareto(np.array([costs[i] for i in valid]), np.array([out[i].scores["psnr_db"]["value"] for i in valid]))
        for i, in_front in zip(valid, front, strict=True):
            out[i].front |= {name} if in_front else set()
    return out


def numbers(cell: Record, depth: int) -> dict[str, float]:
    """What one cell has at a depth besides scores of pictures; only what was measured."""
    out: dict[str, float] = {}
    if not depth:
        return out
    books, latency = cell["codebooks"], cell["latency"]
    for name in ("usage", "perplexity", "dead", "energy"):
        out[name] = float(books[name][depth - 1])
    out["perplexity_share"] = out["perplexity"] / cell["sizes"][depth - 1]
    out["head_mflops"] = cell["head_flops"][depth - 1] / 1e6
    timed = latency["search"].get(str(depth))
    if timed:
        out["search_us"] = timed["us_cell"][1]
        out["encode_us"] = timed["us_cell"][1] + latency["encoder"]["us_cell"][1]
        out["mib"] = max(timed["mib"], latency["encoder"]["mib"])
    return out


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def pareto(cost_P: Float[np.ndarray, " P"], gain_P: Float[np.ndarray, " P"]) -> Bool[np.ndarray, " P"]:
    """Which points no other one beats: none costs at most as much and gains at least as much, one of them strictly."""
    better = (cost_P[None] <= cost_P[:, None]) & (gain_P[None] >= gain_P[:, None])
    strictly = (cost_P[None] < cost_P[:, None]) | (gain_P[None] > gain_P[:, None])
    return ~(better & strictly).any(1)
