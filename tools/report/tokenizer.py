"""The page of a visual tokenizer: pictures through it at several depths beside JPEG and WebP of the same size.

Reads `eval/pictures.jsonl`, one line a picture and codec (dina/eval/codec.py has its fields), `eval/pictures/`, and
`eval/scores.json` for what is a number of a whole set.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from dina.eval import metrics
from tools.report import figures, sections
from tools.report.inputs import Run, read_json, read_lines

SETS = (
    ("Held-out pictures", lambda row: row["split"] == "test"),
    ("Of these, not enlarged to be read", lambda row: row["split"] == "test" and row["native"]),
    ("Photographs, another domain", lambda row: row["split"] == "photos"),
)
COLUMNS = (("psnr_db", "PSNR, dB", 1), ("ssim", "SSIM", 3), ("lpips_like", "feature distance", 3))
NAMES = {"dina": "dina", "jpeg": "JPEG", "webp": "WebP", "refined": "dina, refined"}
OURS = ("dina", "refined")
USAGE_BARS = ((4, 0.8), (8, 0.6))  # share of codes in use: of the first so many levels, and of those after them
_STRIPS = 10


def header(run: Run) -> str:
    """Title and what was measured."""
    return (f"<h1>A picture in codes</h1>\n"
            f'<p class="lead">Experiment <b>{html.escape(run.title)}</b>: every 28 × 28 pixels become one position of residual codes. '
            "Everything below was measured on pictures that no stage has seen.</p>")


def tiles(run: Run) -> str:
    """The few numbers to see first."""
    rows, found = _scored(run), []
    whole = [row for row in rows if row["codec"] == "dina" and row["split"] == "test"]
    if whole:
        deepest = max(row["levels"] for row in whole)
        best = [row for row in whole if row["levels"] == deepest]
        mean = lambda key: sum(row[key] for row in best) / len(best)
        found += [(f"{mean('psnr_db'):.1f} dB", f"PSNR, {deepest} levels"), (f"{mean('ssim'):.3f}", "SSIM"),
                  (f"{mean('bytes'):,.0f} bytes", "a picture"), (f"{len(best)}", "held-out pictures")]
    spent = read_json(run.workdir / "processor.json")
    if spent:
        found.append((f"{spent['train'] / 60:.0f} min", "of one processor: pictures and training"))
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in found) + "</div>"


def fidelity(run: Run) -> str:
    """Distances of every codec and depth, with intervals, and the figure of fidelity against size."""
    rows = _scored(run)
    if not rows:
        return ""
    blocks = [_table(run, title, [row for row in rows if chosen(row)]) for title, chosen in SETS]
    note = ('<p class="note">Means with 95 % bootstrap intervals over pictures. JPEG and WebP are given as many bytes as the codes of the '
            "same picture take at that depth (headers count; smaller pictures, enlarged again, where the lowest quality is still larger). "
            "Feature distance: unit-normalised maps of EfficientNet-Lite0, not LPIPS. KID: kernel distance of its pooled features.</p>")
    address = figures.points([_series(rows, codec) for codec in NAMES if codec in {row["codec"] for row in rows}], "bytes a picture", "PSNR, dB")
    figure = f'<figure><img alt="fidelity against size" src="{address}" style="max-width:560px"></figure>'
    return note + figure + "".join(blocks)


def _rows(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.media("pictures.jsonl"))


def _scored(run: Run) -> list[dict[str, Any]]:
    return [row for row in _rows(run) if row["codec"] != "original"]


def _series(rows: Sequence[dict], codec: str) -> tuple[str, list[float], list[float]]:
    """(name, bytes, PSNR), a point a depth, of the held-out pictures."""
    own = [row for row in rows if row["codec"] == codec and row["split"] == "test"]
    points = []
    for level in sorted({row["levels"] for row in own}):
        part = [row for row in own if row["levels"] == level]
        points.append([sum(row[key] for row in part) / len(part) for key in ("bytes", "psnr_db")])
    return NAMES[codec], [p[0] for p in points], [p[1] for p in points]


def _table(run: Run, title: str, rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    lines = []
    for codec, level in sorted({(row["codec"], row["levels"]) for row in rows}):
        part = [row for row in rows if (row["codec"], row["levels"]) == (codec, level)]
        size = sum(row["bytes"] for row in part) / len(part)
        bits = 8 * sum(row["bytes"] for row in part) / sum(row["height"] * row["width"] for row in part)
        cells = "".join(f'<td class="n">{_interval([row[key] for row in part], digits)}</td>' for key, _, digits in COLUMNS)
        kid = run.scores.get(f"kid_{part[0]['split']}_{codec}_{level}") if title != SETS[1][0] else None
        shown = "" if kid is None else f'<b>{kid["value"]:.4f}</b> <span class="note">{kid["low"]:.4f} to {kid["high"]:.4f}</span>'
        lines.append(f'<tr><td class="strong">{NAMES[codec]}, {level} level{"s" if level > 1 else ""}{"" if codec in OURS else "’ size"}</td>'
                     f'<td class="n">{size:,.0f}</td><td class="n">{bits:.3f}</td>{cells}<td class="n">{shown}</td></tr>')
    head = "".join(f"<th class=n>{name}</th>" for name in ("bytes", "bits/px", *(name for _, name, _ in COLUMNS), "KID"))
    count = len({row["index"] for row in rows})
    return f'<h3>{title}</h3><p class="note">{count} pictures.</p><table><tr><th>codec</th>{head}</tr>{"".join(lines)}</table>'


def _interval(values: Sequence[float], digits: int) -> str:
    score = metrics.bootstrap(values, seed=0)
    return f'<b>{score["value"]:.{digits}f}</b> <span class="note">{score["low"]:.{digits}f} to {score["high"]:.{digits}f}</span>'


def strips(run: Run) -> str:
    """Originals beside what is left of them."""
    kept = [row for row in _rows(run) if row.get("file")]
    if not kept:
        return ""
    kinds = [("original", 0), *sorted({(row["codec"], row["levels"]) for row in kept if row["codec"] != "original"})]
    heading = lambda codec, level: "original" if codec == "original" else f"{NAMES[codec]}, {level}"
    blocks = []
    for split in ("test", "photos"):
        numbers = list(dict.fromkeys(row["index"] for row in kept if row["split"] == split))[:_STRIPS]
        cells = "".join(f'<span class="head">{heading(*kind)}</span>' for kind in kinds)
        for number in numbers:
            files = {(row["codec"], row["levels"]): row["file"] for row in kept if (row["split"], row["index"]) == (split, number)}
            cells += "".join(_image(run, files.get(kind)) for kind in kinds)
        if numbers:
            title = "Held-out pictures" if split == "test" else "Photographs"
            blocks.append(f'<h3>{title}</h3><div class="strip" style="grid-template-columns:repeat({len(kinds)},max-content)">{cells}</div>')
    return '<p class="note">Levels of codes; JPEG and WebP at the size of as many levels.</p>' + "".join(blocks)


def _image(run: Run, name: str | None) -> str:
    if name is None:
        return "<span></span>"
    return f'<img alt="" width="104" src="{figures.data_address(run.media(name))}" style="image-rendering:auto">'


def health(run: Run) -> str:
    """Usage of the codebooks against its bars, and how far perplexity could go."""
    bars: Callable[[int], float] = lambda level: next(bar for last, bar in USAGE_BARS if level <= last or last == USAGE_BARS[-1][0])
    return sections.codebooks(run, bars) + _bounds(run.codebooks)


def _bounds(codebooks: dict[str, dict]) -> str:
    """What the many cells that are alike leave of perplexity."""
    windows = {"visual": "all cells", "visual_busy": "cells of more than one colour"}
    parts = [f'{max(found["bound"]):,.0f} over {windows[name]}' for name, found in codebooks.items() if name in windows and "bound" in found]
    if not parts:
        return ""
    return (f'<p class="note">Many cells are equal: plain ground above all. If equal cells had equal codes, perplexity could be at most '
            f'{" and ".join(parts)}, however the other codes were used.</p>')


SECTIONS = (
    ("fidelity", "Fidelity", fidelity),
    ("pictures", "Pictures", strips),
    ("codebooks", "Codebooks", health),
    ("curves", "Learning curves", sections.curves),
    ("cost", "Time and memory", sections.cost),
    ("environment", "Environment", sections.environment),
)
