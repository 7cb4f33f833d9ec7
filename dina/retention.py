"""Which checkpoints a stage keeps, as a pure function of what there is."""

from __future__ import annotations

from collections.abc import Mapping

from dina.config import InputError


def parse_best(text: str) -> tuple[str, int]:
    """(metric, sign) of 'min:METRIC' or 'max:METRIC'. Raises InputError for anything else."""
    way, _, metric = text.partition(":")
    if way not in ("min", "max") or not metric:
        raise InputError(f"config key checkpoint.keep_best: {text!r} is neither min:METRIC nor max:METRIC nor empty")
    return metric, 1 if way == "min" else -1


def kept(steps: Mapping[int, Mapping[str, float]], last: int, every: int = 0, best: str = "") -> set[int]:
    """The steps to keep.

    Args:
        steps: committed step -> its logged metrics.
        last: this many of the newest; at least one is kept.
        every: and all that are multiples of this, 0 = none.
        best: and the one whose metric is least ('min:loss') or greatest ('max:accuracy'); '' = none. Of equals the newest.
    """
    ordered = sorted(steps)
    found = set(ordered[-max(1, last):])
    if every:
        found |= {step for step in ordered if step % every == 0}
    if best:
        metric, sign = parse_best(best)
        scored = [(sign * steps[step][metric], -step) for step in ordered if metric in steps[step]]
        if scored:
            found.add(-min(scored)[1])
    return found
