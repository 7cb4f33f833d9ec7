"""Rewrites the results table of the README, between two marker comments, from report.json."""

from __future__ import annotations

import itertools
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


def _split(path: pathlib.Path) -> tuple[str, str, str]:
    """The file before, between and after the markers."""
    if not path.is_file():
        raise InputError(f"{path}: no such file with a results table")
    before, begin, rest = path.read_text().partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{path}: the lines {BEGIN!r} and {END!r} are missing; the results table goes between them")
    return before, table, after


def rewrite(path: pathlib.Path, scores: Mapping[str, Any]) -> None:
    """Puts the table between the markers of the file at `path`.

    Raises:
        InputError: the file or a marker is missing.
    """
    before, _, after = _split(path)
    path.write_text(f"{before}{BEGIN}\n{markdown(scores)}\n{END}{after}")


def check(path: pathlib.Path, scores: Mapping[str, Any]) -> None:
    """Raises InputError, naming the first line that differs, unless the table in the file at `path` is that of `scores`."""
    stands, wanted = _split(path)[1].strip().splitlines(), markdown(scores).splitlines()
    for old, new in itertools.zip_longest(stands, wanted, fillvalue="(nothing)"):
        if old != new:
            raise InputError(f"{path}: the results table is not that of report.json: {old!r} should be {new!r}; --readme rewrites it")
