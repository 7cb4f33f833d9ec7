"""Pictures of the page as data addresses: learning curves, spectrograms, media files, and small bars drawn as SVG."""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import soundfile
from scipy import signal

matplotlib.use("Agg")
from matplotlib import pyplot as plt, ticker  # noqa: E402

INK, MUTED, RULE = "#1d2129", "#6b7280", "#d9dce1"
COLOURS = ("#22577a", "#d1495b", "#3a7d44", "#b07d2b", "#6d597a", "#2a9d8f", "#8d6e63", "#5c6bc0")
GOOD, BAD = "#2f7d4f", "#c0392b"
TOP_HERTZ, SPAN_SECONDS = 8000, 1.28  # what every spectrogram spans at least; one chunk of the tokenizer
_TYPES = {".png": "image/png", ".wav": "audio/wav", ".svg": "image/svg+xml"}
_MAX_TERMS = 6
STYLE = {"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "axes.edgecolor": RULE, "axes.labelcolor": MUTED,
       "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
       "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.hashsalt": "dina",
       "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"]}


def data_address(path: pathlib.Path) -> str:
    """A file as a data address."""
    return f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def address(figure, kind: str, **options) -> str:
    """A figure as a data address; it is closed."""
    out = io.BytesIO()
    # A fixed creation date, so that equal runs give equal pages.
    figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    plt.close(figure)
    return f"data:{_TYPES['.' + kind]};base64,{base64.b64encode(out.getvalue()).decode()}"


def numbers(lines: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, finite values) of one key."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the run, shorter at the ends."""
    width = max(1, len(values) // 20)
    kernel = np.ones(2 * width + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def curves(name: str, lines: Sequence[dict[str, Any]]) -> str:
    """Learning curves of one stage: losses on a log axis, and shares (accuracies and the like) where there are any."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    terms = sorted(key for key in keys if key.startswith("loss/"))[:_MAX_TERMS]
    shares = [key for key in keys if "accuracy" in key] + [key for key in keys if "cosine" in key or key.startswith("usage")]
    shares = [key for key in shares if not key.startswith("loss")][:_MAX_TERMS]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.2, 2.45), layout="constrained")
        _panel(axes[0], lines, (["loss"] if terms != ["loss"] else []) + terms, f"{name}: loss")
        values = np.concatenate([numbers(lines, key)[1] for key in ["loss", *terms]] or [np.zeros(0)])
        if values.size and values.min() > 0:
            _log(axes[0])
        if shares:
            _panel(axes[1], lines, shares, f"{name}: accuracies and shares")
            axes[1].set_ylim(top=1.02)
        else:
            _panel(axes[1], lines, ["grad_norm"], f"{name}: gradient norm")
            if (numbers(lines, "grad_norm")[1] > 0).any():
                _log(axes[1])
        return address(figure, "svg")


def points(series: Sequence[tuple[str, *tuple[Sequence[float], ...]]], x_name: str, y_name: str) -> str:
    """Lines of (name, x, y), or (name, x, y, low, high) with bars from low to high, over a logarithmic x axis."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
        for (name, x, y, *ends), colour in zip(series, COLOURS, strict=False):
            axis.plot(x, y, "o-", color=colour, linewidth=1.5, markersize=4, label=name)
            if ends:
                axis.vlines(x, *ends, color=colour, linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel(x_name)
        axis.set_ylabel(y_name)
        axis.grid(True, color=RULE, linewidth=0.6)
        axis.legend(frameon=False)
        return address(figure, "svg")


def _log(axis) -> None:
    """A log axis with plain numbers, at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _panel(axis, lines, keys, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(True, axis="y", color=RULE, linewidth=0.6)
    for key, colour in zip(keys, (INK, *COLOURS) if keys and keys[0] == "loss" else COLOURS, strict=False):
        steps, values = numbers(lines, key)
        if not len(steps):
            continue
        label = "total" if key == "loss" else key.removeprefix("loss/").replace("_", " ")
        axis.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        axis.plot(steps, smooth(values), color=colour, linewidth=1.5, label=label)
    if axis.lines:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, handlelength=1.1)


def spectrogram(path: pathlib.Path) -> str:
    """Spectrogram of a WAV, 80 dB deep, as a bare picture; short clips end in silence, so that all have one time axis."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = wave.mean(1)
    wave = np.pad(wave, (0, max(0, int(SPAN_SECONDS * rate) - len(wave))))
    size = 512 if rate <= 16000 else 768
    frequency, _, power = signal.spectrogram(wave, rate, nperseg=size, noverlap=size * 7 // 8, mode="psd")
    level = 10 * np.log10(power[frequency <= TOP_HERTZ] + 1e-14)
    level = np.clip(level - level.max(), -80, 0)
    colours = plt.get_cmap("magma")((level[::-1] + 80) / 80)[..., :3]
    out = io.BytesIO()
    image = PIL.Image.fromarray((colours * 255).astype(np.uint8)).resize((450, 130), PIL.Image.Resampling.BILINEAR)
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def interval_bar(value: float, low: float, high: float, bar: float | None, ceiling: float | None, start: float = 0.0) -> str:
    """A score between `start` and 1 as inline SVG: interval band, value, bar (dark tick), judge's ceiling (dashed)."""
    at = lambda v: 4 + 232 * (min(1.0, max(start, v)) - start) / (1 - start)
    good = bar is None or value >= bar
    colour = COLOURS[0] if bar is None else (GOOD if good else BAD)
    parts = [
        '<line x1="4" y1="10" x2="236" y2="10" stroke="#e5e7eb" stroke-width="6" stroke-linecap="round"/>',
        f'<line x1="{at(low):.1f}" y1="10" x2="{at(high):.1f}" y2="10" stroke="{colour}" stroke-opacity=".32" stroke-width="6"/>',
    ]
    if ceiling is not None:
        parts.append(f'<line x1="{at(ceiling):.1f}" y1="2" x2="{at(ceiling):.1f}" y2="18" stroke="{MUTED}" '
                     'stroke-width="1.4" stroke-dasharray="2.5 2"/>')
    if bar is not None:
        parts.append(f'<line x1="{at(bar):.1f}" y1="2" x2="{at(bar):.1f}" y2="18" stroke="{INK}" stroke-width="1.6"/>')
    parts.append(f'<circle cx="{at(value):.1f}" cy="10" r="4.2" fill="{colour}"/>')
    return f'<svg viewBox="0 0 240 20" width="240" height="20" role="img" aria-label="{value:.3f}">{"".join(parts)}</svg>'


def share_bar(share: float, label: str, mark: float | None = None) -> str:
    """A share of 1 as a horizontal bar with a label at its end."""
    at = "" if mark is None else f'x1="{2 + 180 * mark:.1f}" y1="1" x2="{2 + 180 * mark:.1f}" y2="17"'
    tick = at and f'<line {at} stroke="#fff" stroke-width="4"/><line {at} stroke="{INK}" stroke-width="1.6"/>'
    return (f'<svg viewBox="0 0 300 18" width="300" height="18" role="img" aria-label="{label}">'
            f'<rect x="2" y="4" width="180" height="10" rx="2" fill="#eceff3"/>'
            f'<rect x="2" y="4" width="{180 * share:.1f}" height="10" rx="2" fill="{COLOURS[0]}"/>{tick}'
            f'<text x="190" y="13" font-size="11.5" fill="{MUTED}">{label}</text></svg>')
