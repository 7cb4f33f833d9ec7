"""Numbers with their uncertainty: accuracies, means, picture and spectrogram distances, codebook statistics.

Every score leaves here as `{value, low, high, n}`, so that no report shows a number without its interval. All numpy.

Letters: H, W pixels; F frames; M mel bands; N vectors; L levels; C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from skimage.metrics import structural_similarity

from dina.quantize.usage import usage

Score = dict[str, float]
_SILENCE = float(np.log(1e-5))  # floor of the decoders' mel (reference/tokenizers.md B.7)
_SSIM_WINDOW = 7  # skimage's default, and Wang et al. 2004 use windows of this order


def wilson(correct: int, n: int, z: float = 1.96) -> Score:
    """An accuracy with its Wilson score interval (95 % by default), which stays inside [0, 1] at the ends.

    Args:
        correct: right answers.
        n: answers.
        z: normal quantile.

    Returns:
        {value, low, high, n}; NaN values if n is 0.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} right answers of {n}")
    if n == 0:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    p, zz = correct / n, z * z / n
    middle = (p + zz / 2) / (1 + zz)
    half = z * np.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    # At 0 and n the exact ends are 0 and 1; rounding must not push the value outside its own interval.
    low, high = (0.0 if correct == 0 else middle - half), (1.0 if correct == n else middle + half)
    return {"value": float(p), "low": float(low), "high": float(high), "n": int(n)}


def bootstrap(values: Sequence[float], seed: int, resamples: int = 1000) -> Score:
    """A mean with its 95 % percentile bootstrap interval.

    Args:
        values: one number per item; not finite ones are an error.
        seed: of the resampling.
        resamples: how many.

    Returns:
        {value, low, high, n}; NaN values if there are none.
    """
    values_N = np.asarray(values, np.float64)
    if not np.isfinite(values_N).all():
        raise ValueError(f"item {int(np.flatnonzero(~np.isfinite(values_N))[0])} is not finite")
    if not values_N.size:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    rng = np.random.default_rng(seed)
    means = [values_N[rng.integers(0, values_N.size, values_N.size)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(values_N.mean()), "low": float(low), "high": float(high), "n": int(values_N.size)}


def psnr_db(image_HWC: UInt8[np.ndarray, "H W 3"], truth_HWC: UInt8[np.ndarray, "H W 3"]) -> float:
    """Peak signal-to-noise ratio in dB, peak 255. Identical pictures give 100 dB, so that means stay finite."""
    error = image_HWC.astype(np.float64) - truth_HWC.astype(np.float64)
    mse = float(np.mean(error**2))
    return 100.0 if mse == 0 else min(100.0, float(10 * np.log10(255.0**2 / mse)))


def ssim(image_HWC: UInt8[np.ndarray, "H W 3"], truth_HWC: UInt8[np.ndarray, "H W 3"]) -> float:
    """Structural similarity (Wang et al. 2004) as scikit-image computes it, mean over channels; 1 is identical."""
    return float(structural_similarity(image_HWC, truth_HWC, channel_axis=-1, win_size=_SSIM_WINDOW, data_range=255))


def mel_l1(mel_FM: Float[np.ndarray, "F M"], truth_FM: Float[np.ndarray, "F M"]) -> float:
    """Mean absolute difference of two natural-log mel spectrograms, in nepers.

    The shorter one is continued with silence: a clip that ends early pays for what it left out.
    """
    frames = max(len(mel_FM), len(truth_FM))
    pad = lambda x_FM: np.pad(np.asarray(x_FM, np.float64), ((0, frames - len(x_FM)), (0, 0)), constant_values=_SILENCE)
    return float(np.mean(np.abs(pad(mel_FM) - pad(truth_FM))))


def codebook_statistics(codes_NL: Int[np.ndarray, "N L"], sizes: Sequence[int]) -> dict[str, list[float] | int]:
    """How evenly codes are used over a window of data.

    Args:
        codes_NL: codes of the window's vectors; -1 is absent and not counted.
        sizes: codes of each level's codebook.

    Returns:
        usage [L] (share of the codes that occur at least once), perplexity [L] (exp of the entropy of their
        frequencies, at most the size), sizes [L], window (vectors).
    """
    codes_NL = np.asarray(codes_NL)
    for level, size in enumerate(sizes):
        if codes_NL[:, level].max(initial=-1) >= size:
            raise ValueError(f"level {level + 1}: code {codes_NL[:, level].max()} in a codebook of {size}")
    found = usage(codes_NL, np.ones(len(codes_NL)), tuple(int(size) for size in sizes))
    return {name: [float(v) for v in found[name]] for name in ("usage", "perplexity")} | {
        "sizes": [int(size) for size in sizes], "window": len(codes_NL)}


def confusion(truth: Sequence[int], predicted: Sequence[int | None], classes: int) -> Int[np.ndarray, "C C_plus_1"]:
    """Counts [truth, predicted]; the last column counts answers that name no class (None)."""
    table = np.zeros((classes, classes + 1), np.int64)
    for t, p in zip(truth, predicted, strict=True):
        table[t, classes if p is None else p] += 1
    return table
