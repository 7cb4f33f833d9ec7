"""Rewrites the results table of the README, between two marker comments, from report.json."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from dina.config import InputError
from tools.report.table import LOWER_IS_BETTER, MAIN, OTHER, SECOND, number, show

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def markdown(scores: Mapping[str, Any]) -> str:
    """The table as Markdown, one line per score that the run has."""
    lines = ["| score | key in report.json | value | 95 % interval | n | bar |", "|---|---|---|---|---|---|"]
    for row in (*MAIN, *SECOND, *OTHER):
        if row.key not in scores:
            continue
        score = scores[row.key]
        interval, n = "", ""
        if isinstance(score, Mapping):
            interval, n = f"{show(row.key, score['low'])} to {show(row.key, score['high'])}", str(score["n"])
        sign = "≤" if row.key in LOWER_IS_BETTER else "≥"
        bar = "" if row.bar is None else f"{sign} {row.bar:g}"
        lines.append(f"| {row.title} | `{row.key}` | {show(row.key, number(score))} | {interval} | {n} | {bar} |")
    return "\n".join(lines)


def rewrite(path: pathlib.Path, scores: Mapping[str, Any]) -> None:
    """Puts the table between the markers of the file at `path`.

    Raises:
        InputError: the file or a marker is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file to write the results table into")
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{path}: the lines {BEGIN!r} and {END!r} are missing; the results table goes between them")
    path.write_text(f"{before}{BEGIN}\n{markdown(scores)}\n{END}{after}")
