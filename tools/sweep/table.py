"""The sweep's CSV: every cell and every configuration at every depth."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from tools.sweep.summary import FIDELITY, Draws, Point, numbers

COLUMNS = (
    "group", "seed", "key", "depth", "levels", "bits_cell", "bits_image", "psnr_db", "psnr_db_low", "psnr_db_high", "ssim", "ssim_low", "ssim_high",
    "language_bits_image", "language_bits_image_low", "language_bits_image_high", "usage", "perplexity", "dead", "energy", "window", "search_us",
    "encode_us", "mib", "head_mflops", "front_bits", "front_language", "seconds",
)  # fmt: skip


def table(found: Sequence[Point], drawn: Draws) -> str:
    """The CSV: a line for each cell and depth, whose intervals are over pictures, and one for each configuration and depth
    (seed 'all'), whose intervals are over pictures and seeds."""
    axes = list(dict.fromkeys(path for point in found for path in point.group.axes))
    out = io.StringIO()
    writer = csv.DictWriter(out, [*axes, *COLUMNS], lineterminator="\n")
    writer.writeheader()
    for point in found:
        for cell in point.group.cells:
            alone = dataclasses.replace(point.group, cells=(cell,))
            scores = {s: drawn.interval(v) for s in (*FIDELITY, "language") if (v := alone.values(s, point.depth)) is not None}
            line = dataclasses.replace(point, group=alone, scores=scores, numbers=numbers(cell, point.depth))
            own = {"seed": cell["seed"], "key": cell["key"], "seconds": round(sum(cell["seconds"].values()), 1)}
            writer.writerow(_line(line) | own)
        writer.writerow(_line(point) | {"seed": "all", "front_bits": int("bits" in point.front), "front_language": int("language" in point.front)})
    return out.getvalue()


def _line(point: Point) -> dict[str, Any]:
    line: dict[str, Any] = {path: _plain(value) for path, value in point.group.axes.items()}
    line |= {"group": point.group.name, "depth": point.depth, "levels": point.group.levels}
    line |= {"bits_cell": round(point.bits_cell, 4), "bits_image": round(point.bits_image, 3)}
    for score, interval in point.scores.items():
        name = "language_bits_image" if score == "language" else score
        line |= {name if key == "value" else f"{name}_{key}": round(v, 5) for key, v in interval.items()}
    line |= {name: round(value, 5) for name, value in point.numbers.items() if name in COLUMNS}
    window = point.group.cells[0]["codebooks"].get("window")
    return line | ({"window": window} if window else {})


def _plain(value: Any) -> Any:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else value
