"""The page's sections of numbers: header, score table, confusions, codebooks, curves, cost, environment."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from dina.data.phrases import DIGIT_WORDS
from dina.eval import metrics
from tools.report import figures, table
from tools.report.inputs import Run

CONFUSIONS = (("image_to_text", "Picture → text"), ("text_to_image", "Text → picture"),
              ("speech_to_text", "Speech → text"), ("text_to_speech", "Text → speech"))
USAGE_BAR = 0.9


def header(run: Run) -> str:
    """Title and what was run."""
    facts = dict(next((rows for name, rows in run.environment if name == "Experiment"), ()))
    origin = f" Seed {facts['seed']}, config {facts['config hash']}." if facts else ""
    return (f"<h1>One model that sees, paints, hears and talks</h1>\n"
            f'<p class="lead">Experiment <b>{html.escape(run.title)}</b>: text, pictures and speech become discrete codes, one sparse '
            f"decoder predicts them all. Everything below was measured on held-out pictures and unseen voices, the first "
            f"sample of each prompt, and decided by judges that never saw the model.{origin}</p>")


def tiles(run: Run) -> str:
    """The few numbers to see first."""
    main = [(row, run.scores[row.key]) for row in table.MAIN if row.key in run.scores]
    parts = {}
    for stage in run.stages:
        parts |= stage.record.get("parameters", {})
    cells = []
    if main:
        cells.append((f"{sum(bool(table.reached(row, score)) for row, score in main)} of {len(main)}", "accuracies that reach their bar"))
    if "demo_minutes" in run.scores:
        cells.append((f"{run.scores['demo_minutes']:.1f} min", "wall clock after installation"))
    if parts:
        cells.append((f"{sum(parts.values()) / 1e6:.1f} M", "parameters, all parts"))
    if run.answers:
        cells.append((f"{sum(map(len, run.answers.values())):,}", "judged answers"))
    if "codebook_usage" in run.scores:
        cells.append((f"{100 * run.scores['codebook_usage']:.0f} %", "codes in use, lowest level"))
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in cells) + "</div>"


def scores(run: Run) -> str:
    """The score table with intervals, bars and judges' ceilings, then the other numbers and the judges themselves."""
    accuracies = [row for row in (*table.MAIN, *table.SECOND) if row.key in run.scores]
    lowest = min((run.scores[row.key]["low"] for row in accuracies), default=0.0)
    start = 0.5 if lowest >= 0.5 else 0.0
    head = ("<tr><th>score</th><th>decided by</th>"
            f"<th>{start:g} to 1, with 95 % interval</th><th class=n>value</th><th class=n>bar</th><th class=n>judge on real data</th><th class=n>n</th></tr>")
    body = []
    for title, rows in (("With a bar", table.MAIN), ("Reported beside", table.SECOND)):
        rows = [row for row in rows if row.key in run.scores]
        if rows:
            body.append(f'<tr class="group"><td colspan="7">{title}</td></tr>')
            body += [_score_line(run.scores, row, start) for row in rows]
    skipped = f'<p class="note">Left out: {html.escape(run.skipped)}</p>' if run.skipped else ""
    return (f"<table>{head}{''.join(body)}</table>{_legend()}{skipped}"
            f'<div class="two"><div><h3>Other numbers</h3>{_other(run)}</div><div><h3>The judges themselves</h3>{_judges(run)}</div></div>')


def _legend() -> str:
    line = lambda style: f'<svg width="14" height="18"><line x1="7" y1="2" x2="7" y2="16" {style}/></svg>'
    dot = lambda colour: f'<svg width="14" height="18"><circle cx="7" cy="9" r="4.2" fill="{colour}"/></svg>'
    items = (line(f'stroke="{figures.INK}" stroke-width="1.6"') + "bar to reach", dot(figures.GOOD) + "reached", dot(figures.BAD) + "missed",
             line(f'stroke="{figures.MUTED}" stroke-width="1.4" stroke-dasharray="2.5 2"') + "the judge's own accuracy on real held-out data, its ceiling")
    return '<p class="legend">' + "".join(f"<span>{item}</span>" for item in items) + "</p>"


def _score_line(found: Mapping, row: table.Row, start: float) -> str:
    score = found[row.key]
    ceiling = table.number(found[row.ceiling]) if row.ceiling in found else None
    good = table.reached(row, score)
    mark = "" if good is None else (' class="n ok"' if good else ' class="n miss"')
    bar = "" if row.bar is None else f"{row.bar:.2f}"
    shown_ceiling = "" if ceiling is None else f"{ceiling:.3f}"
    picture = figures.interval_bar(score["value"], score["low"], score["high"], row.bar, ceiling, start)
    return (f'<tr><td class="strong">{html.escape(row.title)}</td><td class="judge">{html.escape(row.judge)}</td><td>{picture}</td>'
            f'<td{mark or " class=n"}><b>{score["value"]:.3f}</b></td><td class="n">{bar}</td><td class="n">{shown_ceiling}</td>'
            f'<td class="n">{score["n"]:,}</td></tr>')


def _other(run: Run) -> str:
    lines = []
    for row in table.OTHER:
        if row.key not in run.scores:
            continue
        score = run.scores[row.key]
        good = table.reached(row, score)
        colour = "" if good is None else (" ok" if good else " miss")
        bar = "" if row.bar is None else f"{'≤' if row.key in table.LOWER_IS_BETTER else '≥'} {row.bar:g}"
        lines.append(f'<tr><td>{html.escape(row.title)}<br><span class="note">{html.escape(row.judge)}</span></td>'
                     f'<td class="n{colour}"><b>{table.show(row.key, table.number(score))}</b></td><td class="n">{bar}</td></tr>')
    return f"<table><tr><th>number</th><th class=n>value</th><th class=n>bar</th></tr>{''.join(lines)}</table>"


def _judges(run: Run) -> str:
    lines = [f'<tr><td>{html.escape(title)}</td><td class="n"><b>{s["value"]:.3f}</b></td>'
             f'<td class="n">{s["low"]:.3f} to {s["high"]:.3f}</td><td class="n">{s["n"]:,}</td></tr>'
             for key, title in table.JUDGES if (s := run.scores.get(key))]
    return f"<table><tr><th>judge</th><th class=n>accuracy</th><th class=n>95 % interval</th><th class=n>n</th></tr>{''.join(lines)}</table>"


def confusions(run: Run) -> str:
    """Digit against digit for the four tasks between text and another modality."""
    found = []
    for task, title in CONFUSIONS:
        records = [r for r in run.answers.get(task, ()) if r["group"] == "main"]
        if records:
            counts = metrics.confusion([r["truth"] for r in records], [r["predicted"] for r in records], len(DIGIT_WORDS))
            found.append(f"<div><h3>{title}</h3>{_grid(counts)}</div>")
    if not found:
        return ""
    return ('<p class="note">Rows: the right digit. Columns: the digit that the answer names, in the judge\'s eyes or ears; – none '
            f'or several. Shaded by share of the row.</p><div class="two">{"".join(found)}</div>')


def _grid(counts) -> str:
    size = len(counts)
    head = "<tr><th></th>" + "".join(f"<th>{c if c < size else '–'}</th>" for c in range(size + 1)) + "</tr>"
    rows = []
    for truth, row in enumerate(counts):
        cells = []
        for column, count in enumerate(row):
            share = count / max(1, row.sum())
            if not count:
                cells.append('<td class="zero">0</td>')
                continue
            base = (34, 87, 122) if column == truth else (193, 57, 43)
            strength = 0.15 + 0.85 * math.sqrt(share)
            colour = "#fff" if strength > 0.55 else figures.INK
            cells.append(f'<td style="background:rgba({base[0]},{base[1]},{base[2]},{strength:.2f});color:{colour}">{count}</td>')
        rows.append(f"<tr><th>{truth}</th>{''.join(cells)}</tr>")
    return f'<table class="grid">{head}{"".join(rows)}</table>'


def codebooks(run: Run, bar_of: Callable[[int], float] = lambda level: USAGE_BAR) -> str:
    """Usage with its bar (`bar_of` a level, from 1) and perplexity per level."""
    found = []
    names = {"visual": ("Visual codes", "picture cells"), "visual_busy": ("Visual codes", "picture cells of more than one colour"),
             "audio": ("Audio codes", "80 ms frames")}
    for name, statistics in run.codebooks.items():
        title, unit = names.get(name, (name, "vectors"))
        lines = []
        levels = zip(statistics["usage"], statistics["perplexity"], statistics["sizes"], strict=True)
        for level, (usage, perplexity, size) in enumerate(levels, 1):
            bar = figures.share_bar(usage, f"{usage:.3f} of {size}", bar_of(level))
            lines.append(f'<tr><td class="n">{level}</td><td>{bar}</td><td class="n">{perplexity:.0f}</td></tr>')
        found.append(f'<div><h3>{title}</h3><p class="note">Window: {statistics["window"]:,} held-out {unit}.</p><table>'
                     f"<tr><th class=n>level</th><th>share of codes used</th><th class=n>perplexity</th></tr>{''.join(lines)}</table></div>")
    if not found:
        return ""
    return (f'<p class="note">Perplexity is the number of codes that would be in use if all were used equally often. The tick '
            f'marks the level\'s bar.</p><div class="two">{"".join(found)}</div>')


def curves(run: Run) -> str:
    """One figure a stage."""
    images = "".join(f'<figure><img alt="learning curves of stage {html.escape(s.name)}" src="{figures.curves(s.name, s.lines)}"></figure>'
                     for s in run.stages if s.lines)
    return images and f'<p class="note">Pale: as logged. Bold: running mean over a tenth of the stage.</p><div class="curves">{images}</div>'


def cost(run: Run) -> str:
    """Time, memory and parameters per stage, and the demo's phases on the wall clock."""
    lines = []
    longest = max((s.record.get("seconds", 0) for s in run.stages), default=0) or 1
    for stage in run.stages:
        record = stage.record
        seconds, trained = record.get("seconds", 0), record.get("trained_parameters")
        total = sum(record.get("parameters", {}).values())
        lines.append(
            f'<tr><td class="strong">{html.escape(stage.name)}</td><td class="judge">{html.escape(str(record.get("task", "")))}</td>'
            f'<td class="n">{record.get("steps", 0):,}</td><td class="n">{record.get("examples", 0):,}</td>'
            f'<td class="n">{"" if trained is None else _count(trained)}</td><td class="n">{_count(total) if total else ""}</td>'
            f'<td>{figures.share_bar(seconds / longest, f"{seconds:.0f} s")}</td><td class="n">{record.get("peak_memory_mib", 0):,} MiB</td></tr>')
    if "seconds_eval" in run.scores:
        lines.append(f'<tr><td class="strong">eval</td><td class="judge">judging, not training</td><td></td><td></td><td></td><td></td>'
                     f'<td>{figures.share_bar(min(1, run.scores["seconds_eval"] / longest), f"{run.scores["seconds_eval"]:.0f} s")}</td>'
                     f'<td class="n">{run.scores.get("peak_memory_mib_eval", 0):,} MiB</td></tr>')
    if not lines:
        return ""
    head = ("<tr><th>stage</th><th>task</th><th class=n>steps</th><th class=n>rows seen</th><th class=n>trained</th>"
            "<th class=n>in memory</th><th>seconds, compilation included</th><th class=n>peak memory</th></tr>")
    return f"<table>{head}{''.join(lines)}</table>{_phases(run)}"


def _phases(run: Run) -> str:
    if not run.phases:
        return ""
    longest = max(run.phases.values()) or 1
    lines = [f'<tr><td class="strong">{html.escape(name)}</td><td>{figures.share_bar(s / longest, f"{s:.0f} s")}</td></tr>'
             for name, s in run.phases.items()]
    return (f'<h3>Wall clock of the demo</h3><p class="note">Vision and audio tokenizers train side by side, so their stages add up to '
            f'more than their phase.</p><table style="width:auto">{"".join(lines)}</table>')


def _count(parameters: float) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"


def environment(run: Run) -> str:
    """Versions, machine, seeds, hashes."""
    blocks = []
    for heading, rows in run.environment:
        lines = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
        blocks.append(f"<div><h3>{html.escape(heading)}</h3><table>{lines}</table></div>")
    return blocks and f'<div class="two">{"".join(blocks)}</div>'


def footer(run: Run) -> str:
    """Where the numbers come from."""
    keys: Sequence[str] = sorted(run.scores)
    return f"<footer>The same {len(keys)} numbers, machine-readable, are in report.json beside this page. Written by tools.report.</footer>"
