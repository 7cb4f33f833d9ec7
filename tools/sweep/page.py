"""The sweep's page: one self-contained file from the records of measured cells."""

from __future__ import annotations

import dataclasses
import html
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tools.report.inputs import machine, packages
from tools.report.page import TEMPLATE
from tools.sweep import compare, figures, summary
from tools.sweep.figures import number, score
from tools.sweep.plan import short

SHOWN = (0, 1, 2, 4, 8, 12, 16)  # depths of the page's tables; the CSV has all
_UNIT = {"psnr_db": "dB", "ssim": "", "language": "bits an image"}


@dataclasses.dataclass(frozen=True)
class Study:
    """All that the page shows."""

    sweep: ConfigDict
    records: list[Mapping[str, Any]]
    missing: int
    groups: list[summary.Group]
    drawn: summary.Draws
    points: list[summary.Point]

    @property
    def shown(self) -> list[summary.Point]:
        """Points of the tables: some depths, and the last of each configuration."""
        return [p for p in self.points if p.depth in SHOWN or p.depth == p.group.depths[-1]]

    def label(self, path: str) -> str:
        """A config path as the page names it."""
        return {path: name for path, name, _ in self.sweep.labels}.get(path, short(path))


def study(sweep: ConfigDict, records: Sequence[Mapping[str, Any]], missing: int) -> Study:
    """Groups, intervals and fronts of some records; `missing` cells are not there yet."""
    found = summary.groups(records)
    drawn = summary.draws(found)
    return Study(sweep, list(records), missing, found, drawn, summary.points(found, drawn))


def build(made: Study) -> str:
    """The whole page as text; it refers to nothing outside itself."""
    shown = [(anchor, heading, text) for anchor, heading, make in SECTIONS if (text := make(made))]
    nav = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in shown)
    parts = [_header(made), f"<nav>{nav}</nav>", _tiles(made)]
    parts += [f'<h2 id="{anchor}">{heading}</h2>\n{text}' for anchor, heading, text in shown]
    parts.append("<footer>Every cell and every depth is in table.csv beside this page. Written by tools.sweep.</footer>")
    page = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return page.substitute(title=html.escape(f"dina: {made.sweep.title or made.sweep.name}"), body="\n".join(parts))


def _header(made: Study) -> str:
    lead = "".join(f'<p class="lead">{html.escape(text)}</p>' for text in made.sweep.lead)
    left = f'<p class="note miss">{made.missing} cells are not finished; run the sweep again.</p>' if made.missing else ""
    return f"<h1>{html.escape(made.sweep.title or made.sweep.name)}</h1>{lead}{left}"


def _tiles(made: Study) -> str:
    pictures = made.records[0]["pictures"]
    best = max(made.points, key=lambda p: p.scores["psnr_db"]["value"])
    seconds = sum(sum(record["seconds"].values()) for record in made.records)
    cells = [
        (f"{len(made.records)}", "cells trained and measured"), (f"{len(made.groups)}", "configurations"),
        (f"{pictures['count']}", f"held-out pictures ({html.escape(pictures['split'])})"),
        (f"{seconds / 60:.0f} min", "of work on cells"), (f"{best.scores['psnr_db']['value']:.1f} dB", f"best: {html.escape(best.group.name)}"),
    ]  # fmt: skip
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in cells) + "</div>"


def _figure(alt: str, address: str) -> str:
    return f'<div class="curves"><figure><img alt="{html.escape(alt)}" src="{address}"></figure></div>'


def _has_codes(made: Study) -> bool:
    return any(point.depth for point in made.points)


def notes(made: Study) -> str:
    """What whoever looked at the page wrote."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in made.sweep.notes)


def fidelity(made: Study) -> str:
    """Curves over bits, and all configurations at their last depth."""
    parts = []
    coded = [p for p in made.points if p.depth]
    if coded:
        bits = lambda p: p.bits_cell
        panels = [(figures.NAMES[name], "bits a cell", bits, "", score(name)) for name in summary.FIDELITY]
        parts.append(_figure("fidelity over bits a cell", figures.curves(coded, panels, log_x=True)))
        parts.append('<p class="note">A cell is 28 x 28 pixels. Bands are 95 % intervals over pictures and seeds. Hollow, dashed: '
                     "trained with that many levels alone.</p>")  # fmt: skip
    parts.append(_figure("fidelity of all configurations", figures.dots(made.points, summary.FIDELITY)))
    return "".join(parts)


def fronts(made: Study) -> str:
    """What is worth its bits: in codes, and under a language model."""
    if not _has_codes(made):
        return ""
    parts = [_figure("PSNR over bits a cell", figures.front(made.points, "bits", "PSNR over the bits of the codes", "bits a cell", lambda p: p.bits_cell))]
    if any("language" in p.scores for p in made.points):
        title = "PSNR over what a language model needs for the codes"
        parts.append(_figure(title, figures.front(made.points, "language", title, figures.NAMES["language"], score("language"))))
    lines = []
    for point in sorted((p for p in made.points if p.front), key=lambda p: p.bits_cell):
        marks = " ".join(f"<td class=n>{'yes' if name in point.front else ''}</td>" for name in ("bits", "language"))
        lines.append(f"<tr><td>{html.escape(point.group.name)}</td><td class=n>{point.depth}</td><td class=n>{point.bits_cell:.0f}</td>"
                     f"<td class=n>{_interval(point.scores.get('language'), 0)}</td><td class=n>{_interval(point.scores['psnr_db'], 2)}</td>{marks}</tr>")  # fmt: skip
    head = _head("configuration", "depth*", "bits a cell*", "bits an image, language model*", "PSNR, dB*", "front of bits*", "front of the language model*")
    return (f'{"".join(parts)}<p class="note">The line joins what no other point beats in both; numbers are depths.</p><table>{head}{"".join(lines)}</table>')


def table(made: Study) -> str:
    """Configurations at some depths."""
    lines, last = [], ""
    for p in made.shown:
        if p.group.name != last:
            seeds = ", ".join(str(cell["seed"]) for cell in p.group.cells)
            lines.append(f'<tr class="group"><td colspan="12">{html.escape(p.group.name)} · seeds {seeds}</td></tr>')
            last = p.group.name
        cells = [p.depth or "–", f"{p.bits_cell:.0f}", _interval(p.scores["psnr_db"], 2), _interval(p.scores["ssim"], 3), _interval(p.scores.get("language"), 0)]
        cells += [_number(p, "usage", 2), _number(p, "perplexity", 0), _number(p, "dead", 0), _number(p, "energy", 4), _number(p, "encode_us", 1),
                  _number(p, "mib", 1), _number(p, "head_mflops", 2)]  # fmt: skip
        lines.append("<tr>" + "".join(f"<td class=n>{cell}</td>" for cell in cells) + "</tr>")
    head = _head("depth*", "bits a cell*", "PSNR, dB*", "SSIM*", "bits an image, language model*", "usage*", "perplexity*", "dead codes*", "energy left*",
                 "encode, µs a cell*", "memory, MiB*", "depth head, MFLOP a cell*")  # fmt: skip
    return f'<div style="overflow-x:auto"><table>{head}{"".join(lines)}</table></div>{_explained(made)}'


def _explained(made: Study) -> str:
    record = made.records[0]
    window = record["codebooks"].get("window")
    texts = ["In brackets: 95 % interval over pictures, the same for all configurations, and seeds."]
    if window:
        texts.append(f"Usage, perplexity, dead codes and energy are those of the last level counted, over {window:,} held-out cells; dead: never chosen there.")
        texts.append("Encode: medians of the encoder and of projection and search, timed one after the other; memory: the larger of both programs, "
                     "arguments, results and temporaries as the compiler counts them.")  # fmt: skip
        texts.append("Depth head: multiplications and additions of one forward pass for one cell, counted from its sizes.")
    return f'<p class="note">{" ".join(html.escape(text) for text in texts)}</p>'


def comparisons(made: Study) -> str:
    """Differences in pairs, by axis."""
    names = [name for name in (*summary.FIDELITY, "language") if any(name in p.scores for p in made.points)]
    found = compare.differences(made.groups, made.drawn, SHOWN, names)
    parts = []
    for axis in dict.fromkeys(difference.axis for difference in found):
        rows: dict[tuple, dict[str, compare.Difference]] = {}
        for d in (d for d in found if d.axis == axis):
            rows.setdefault((d.first.name, d.second.name, d.depth), {})[d.score] = d
        head = _head("from", "to", "depth*", *(f"{figures.NAMES[name].split(',')[0]}*" for name in names))
        lines = "".join(
            f"<tr><td>{html.escape(first)}</td><td>{html.escape(second)}</td><td class=n>{depth or '–'}</td>"
            + "".join(_difference(row.get(name)) for name in names) + "</tr>" for (first, second, depth), row in rows.items()
        )  # fmt: skip
        title = "Trained with few levels instead of read off" if axis == compare.NESTING else made.label(axis)
        parts.append(f"<h3>{html.escape(title)}</h3><table>{head}{lines}</table>")
    note = '<p class="note">"To" minus "from", picture by picture and seed by seed; bold where the 95 % interval leaves zero out.</p>'
    return note + "".join(parts) if parts else ""


def _difference(found: compare.Difference | None) -> str:
    if found is None:
        return "<td class=n></td>"
    digits = {"ssim": 3, "psnr_db": 2}.get(found.score, 0)
    text = f"{found.interval['value']:+.{digits}f} ({found.interval['low']:+.{digits}f} to {found.interval['high']:+.{digits}f})"
    return f"<td class=n>{f'<b>{text}</b>' if found.is_clear else text}</td>"


def checks(made: Study) -> str:
    """What should hold of the table."""
    lines = []
    for check in compare.checks(made.points, made.drawn):
        colour = "ok" if check.holds == check.total else "miss"
        more = "; ".join(check.exceptions[:6]) + (f"; {len(check.exceptions) - 6} more" if len(check.exceptions) > 6 else "")
        lines.append(f'<tr><td class="strong">{html.escape(check.claim)}</td><td class="n {colour}">{check.holds} of {check.total}</td>'
                     f'<td class="judge">{html.escape(more)}</td></tr>')  # fmt: skip
    return f"<table>{_head('claim', 'holds*', 'where it does not')}{''.join(lines)}</table>" if lines else ""


def codebooks(made: Study) -> str:
    """Usage, perplexity and energy over depth."""
    coded = [p for p in made.points if p.depth]
    if not coded:
        return ""
    depth = lambda p: float(p.depth)
    panels = [(title, "level", depth, "", number(name)) for title, name in
              (("Share of codes used", "usage"), ("Perplexity over size", "perplexity_share"), ("Energy left", "energy"))]  # fmt: skip
    return _figure("codebooks by level", figures.curves(coded, panels, log_x=False))


def cost(made: Study) -> str:
    """Time, memory and depth-head arithmetic over depth, and the language model's bits."""
    coded = [p for p in made.points if p.depth]
    if not coded:
        return ""
    depth = lambda p: float(p.depth)
    panels = [("Search, µs a cell", "depth", depth, "", number("search_us")), ("Memory, MiB", "depth", depth, "", number("mib")),
              ("Depth head, MFLOP a cell", "depth", depth, "", number("head_mflops"))]  # fmt: skip
    parts = [_figure("cost by depth", figures.curves(coded, panels, log_x=True, log_y="all"))]
    if any("language" in p.scores for p in coded):
        share = lambda p: p.scores["language"]["value"] / p.bits_image if "language" in p.scores else None
        panels = [("Bits an image under the language model", "depth", depth, "", score("language")),
                  ("… over the bits of the codes", "depth", depth, "", share)]  # fmt: skip
        parts.append(_figure("language model by depth", figures.curves(coded, panels, log_x=False)))
        parts.append(_language(made))
    return "".join(parts)


def _language(made: Study) -> str:
    options = made.sweep.measure.get("language", {})
    text = (
        f"One model for all cells: width {options.get('width')}, {options.get('layers')} layer, depth head of width {options.get('head_width')}; {options.get('steps')} "
        f"steps on the codes of {options.get('images')} training pictures. It is trained on all levels of a cell; the bits of depth d are those of its first "
        "d levels, predicted with all levels of the cells before in view."
    )
    return f'<p class="note">{html.escape(text)}</p>'


def time_and_machine(made: Study) -> str:
    """Seconds a cell, and where it ran."""
    names = list(dict.fromkeys(name for record in made.records for name in record["seconds"]))
    lines = []
    for group in made.groups:
        values = [sum(cell["seconds"].get(name, 0) for cell in group.cells) / len(group.cells) for name in names]
        lines.append(f"<tr><td>{html.escape(group.name)}</td>" + "".join(f"<td class=n>{v:.0f}</td>" for v in (*values, sum(values))) + "</tr>")
    facts = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in (*machine(), *packages()))
    head = _head("seconds, mean of seeds", *(f"{html.escape(name)}*" for name in names), "sum*")
    return f"<table>{head}{''.join(lines)}</table><h3>The machine that wrote this page</h3><table>{facts}</table>"


def _head(*names: str) -> str:
    """A header row; a name that ends in * is of a column of numbers."""
    return "<tr>" + "".join(f"<th class=n>{n[:-1]}</th>" if n.endswith("*") else f"<th>{n}</th>" for n in names) + "</tr>"


def _interval(found: Mapping[str, float] | None, digits: int) -> str:
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})" if found else ""


def _number(point: summary.Point, name: str, digits: int) -> str:
    return f"{point.numbers[name]:,.{digits}f}" if name in point.numbers else ""


SECTIONS: tuple[tuple[str, str, Callable[[Study], str]], ...] = (
    ("fidelity", "Fidelity", fidelity),
    ("notes", "What to see here", notes),
    ("fronts", "What is worth its bits", fronts),
    ("differences", "Differences", comparisons),
    ("table", "Table", table),
    ("codebooks", "Codebooks", codebooks),
    ("cost", "Cost", cost),
    ("checks", "Does it behave?", checks),
    ("time", "Time and machine", time_and_machine),
)
