"""Figures of a sweep's page as data addresses: curves over depth and bits with their intervals, and what is worth its bits.

Colour tells the size of the codebooks, or the first axis where there is none; the line tells the other axes. A training of
fewer levels than the longest one is a hollow dashed line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt, ticker  # noqa: E402

from tools.report.figures import COLOURS, INK, MUTED, RULE, STYLE, address  # noqa: E402
from tools.sweep.plan import describe  # noqa: E402
from tools.sweep.summary import Group, Point  # noqa: E402

STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
Value = Callable[[Point], float | tuple[float, float, float] | None]
NAMES = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "language": "bits an image under the language model"}


def score(name: str) -> Value:
    """(value, low, high) of a score of pictures."""
    return lambda point: tuple(point.scores[name].values()) if name in point.scores else None


def number(name: str, scale: float = 1.0) -> Value:
    """A number of the cell itself."""
    return lambda point: point.numbers[name] * scale if name in point.numbers else None


class Look:
    """Which colour and line each configuration has."""

    def __init__(self, groups: Sequence[Group]):
        self.longest = max(group.levels for group in groups)
        self.colours = {key: COLOURS[i % len(COLOURS)] for i, key in enumerate(sorted({self.size(g) for g in groups}))}
        self.styles = {key: STYLES[i % len(STYLES)] for i, key in enumerate(dict.fromkeys(self.other(g) for g in groups))}

    @staticmethod
    def size(group: Group) -> tuple[int, str]:
        """What its colour tells."""
        first = next(iter(group.axes.values()), "")
        return max(group.cells[0]["sizes"], default=0), "" if isinstance(first, (list, tuple)) else describe(first)

    @staticmethod
    def other(group: Group) -> tuple[str, ...]:
        """What its line tells."""
        values = list(group.axes.values())
        return tuple(describe(value) for value in values[1:])

    def line(self, group: Group) -> dict:
        """Arguments of a plot."""
        short = group.levels < self.longest
        return {"color": self.colours[self.size(group)], "linestyle": (0, (2, 2)) if short else self.styles[self.other(group)],
                "linewidth": 1.1 if short else 1.5, "marker": "o", "markersize": 4.2 if short else 2.6,
                "markerfacecolor": "white" if short else self.colours[self.size(group)]}  # fmt: skip


def curves(points: Sequence[Point], panels: Sequence[tuple[str, str, Value, str, Value]], log_x: bool, log_y: str = "") -> str:
    """Panels of lines, one a configuration, and one legend.

    Args:
        points: all of them; a configuration's in order of depth.
        panels: (title, x label, x, y label, y).
        log_x: whether x is on a log axis of base 2.
        log_y: 'all' panels or '' none on a log axis.
    """
    groups = list({point.group.name: point.group for point in points}.values())
    look = Look(groups)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(9.6, 3.4), layout="constrained", squeeze=False)
        for axis, (title, x_label, x, y_label, y) in zip(axes[0], panels, strict=True):
            _panel(axis, title, x_label, y_label)
            for group in groups:
                _line(axis, [p for p in points if p.group.name == group.name], x, y, look.line(group), group.name)
            if log_x:
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
            if log_y:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
                axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        _legend(figure, axes[0][0])
        return address(figure, "svg")


def _line(axis, row: Sequence[Point], x: Value, y: Value, style: dict, label: str) -> None:
    """One configuration, with a band where y has an interval."""
    shown = [(x(point), y(point)) for point in row]
    shown = [(a[0] if isinstance(a, tuple) else a, b) for a, b in shown if a is not None and b is not None]
    if not shown:
        return
    xs = [a for a, _ in shown]
    ys = [b[0] if isinstance(b, tuple) else b for _, b in shown]
    axis.plot(xs, ys, label=label, **style)
    if isinstance(shown[0][1], tuple):
        axis.fill_between(xs, [b[1] for _, b in shown], [b[2] for _, b in shown], color=style["color"], alpha=0.13, linewidth=0)


def front(points: Sequence[Point], name: str, title: str, x_label: str, x: Value) -> str:
    """All points of PSNR over a cost, those of the front joined by a step and named by their depth."""
    groups = list({point.group.name: point.group for point in points}.values())
    look = Look(groups)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9.6, 3.8), layout="constrained")
        _panel(axis, title, x_label, NAMES["psnr_db"])
        first = lambda v: v[0] if isinstance(v, tuple) else v
        for group in groups:
            row = [p for p in points if p.group.name == group.name and x(p) is not None]
            style = look.line(group) | {"linestyle": "none", "markersize": 4.5}
            axis.plot([first(x(p)) for p in row], [p.scores["psnr_db"]["value"] for p in row], label=group.name, **style)
        best = sorted((p for p in points if name in p.front), key=lambda p: first(x(p)))
        axis.step([first(x(p)) for p in best], [p.scores["psnr_db"]["value"] for p in best], where="post", color=INK, linewidth=0.9, zorder=0)
        for point in best:
            axis.annotate(str(point.depth), (first(x(point)), point.scores["psnr_db"]["value"]), xytext=(-2, 5), textcoords="offset points",
                          ha="right", fontsize=7, color=MUTED)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        _legend(figure, axis)
        return address(figure, "svg")


def dots(points: Sequence[Point], names: Sequence[str]) -> str:
    """Each configuration at its largest depth: value and interval of some scores, one panel a score."""
    last = list({point.group.name: point for point in points}.values())
    look = Look([point.group for point in last])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(names), figsize=(9.6, 0.9 + 0.24 * len(last)), layout="constrained", squeeze=False, sharey=True)
        for axis, name in zip(axes[0], names, strict=True):
            _panel(axis, NAMES[name], "", "")
            for place, point in enumerate(last):
                if name not in point.scores:
                    continue
                value, low, high = point.scores[name].values()
                colour = look.line(point.group)["color"]
                axis.plot([low, high], [place, place], color=colour, linewidth=4, alpha=0.3, solid_capstyle="round")
                axis.plot([value], [place], "o", color=colour, markersize=4.5)
        axes[0][0].set_yticks(range(len(last)), [f"{p.group.name}" + (f", depth {p.depth}" if p.depth else "") for p in last], fontsize=8)
        axes[0][0].invert_yaxis()
        return address(figure, "svg")


def _panel(axis, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(True, color=RULE, linewidth=0.5)
    axis.set_axisbelow(True)


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(4, max(1, len(labels))), frameon=False, fontsize=7.5, handlelength=2.6)
