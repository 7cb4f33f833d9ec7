"""How near reconstructions are to their originals: PSNR, SSIM, a perceptual distance and KID, pictures of any sizes.

Every score is `{value, low, high, n}` with a protocol id (dina/eval/protocol.py). No FID: with fewer pictures than the
1,280 features its covariance is singular, and the number says how many pictures there were.

Letters: N pictures, H, W pixels, D features, T tiles, S side of a tile, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from dina.config import InputError
from dina.data import feature_weights
from dina.eval.metrics import Score, bootstrap, psnr_db, ssim, wilson
from dina.eval.protocol import Protocol, reference_hash
from dina.vision import perceptual

TILE = 224  # side of what the feature network sees, the size that it was trained at
BATCH = 8  # tiles at once
Picture = UInt8[np.ndarray, "H W 3"]


class Fidelity:
    """Scores of sets of reconstructions against one set of originals.

    Args:
        truth: the originals, uint8, each side at least 7 pixels.
        network: name of the feature network (dina/vision/perceptual.py).
        params: its weights (dina/data/feature_weights.py).
        seed: of the intervals' resampling.

    Raises:
        InputError: no pictures, or one that is no uint8 RGB picture of that size.
    """

    def __init__(self, truth: Sequence[Picture], network: str, params: Mapping, seed: int = 0):
        if not truth:
            raise InputError("fidelity: the reference set is empty")
        for number, image in enumerate(truth):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 7:
                raise InputError(f"fidelity: original {number} is {image.dtype} {image.shape}: give uint8 RGB, 7 pixels or more")
        self.truth, self.network, self.params, self.seed = list(truth), perceptual.network(network), params, seed
        self.reference = reference_hash(self.truth)
        self.weights = feature_weights.digest(network, params)

    @functools.cached_property
    def features(self) -> Float[np.ndarray, "N D"]:
        """Pooled features of the originals."""
        return pooled(self.network, self.params, self.truth)

    def scores(self, made: Sequence[Picture]) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
        """Scores of reconstructions, in the order of the originals and of their sizes.

        Returns:
            (metric -> stamped score, metric -> value of each picture): psnr_db, ssim, lpips_like and, in the first only
            and from 4 pictures on, kid.

        Raises:
            InputError: another number of pictures, or one of another size.
        """
        if len(made) != len(self.truth):
            raise InputError(f"fidelity: {len(made)} reconstructions of {len(self.truth)} originals")
        for number, (image, original) in enumerate(zip(made, self.truth)):
            if image.shape != original.shape or image.dtype != np.uint8:
                what = f"{image.dtype} {image.shape}"
                raise InputError(f"fidelity: reconstruction {number} is {what}, its original {original.shape}")
        pairs = list(zip(made, self.truth))
        values = {
            "psnr_db": np.array([psnr_db(*pair) for pair in pairs]),
            "ssim": np.array([ssim(*pair) for pair in pairs]),
            "lpips_like": distances(self.network, self.params, made, self.truth),
        }
        scores = {name: self.protocol(name).stamp(bootstrap(value, self.seed)) for name, value in values.items()}
        if len(made) >= 4:
            scores["kid"] = self.protocol("kid").stamp(kid(pooled(self.network, self.params, made), self.features, "paired"))
        return scores, values

    def protocol(self, metric: str) -> Protocol:
        """How `metric` is measured here."""
        formula, geometry = {
            "psnr_db": ("psnr/1 (peak 255, at most 100 dB)", "native size"),
            "ssim": ("ssim/1 (scikit-image, window 7, mean of channels)", "native size"),
            "lpips_like": ("unit feature distance/1 (not LPIPS: no learnt weights)", f"native size, tiles of {TILE}"),
            "kid": ("kid/1 (cubic kernel, paired, jackknife)", f"whole picture, bicubic by Pillow to {TILE}x{TILE}"),
        }[metric]
        deep = metric in ("lpips_like", "kid")
        return Protocol(formula, self.reference, geometry, f"{self.network.name}:{self.weights}" if deep else "", self.seed)


@functools.partial(jax.jit, static_argnums=0)
def _tile_sums(net, params, a_TSS3, b_TSS3, mask_TSS):
    weights = perceptual.cell_weights(mask_TSS, net.strides)
    return perceptual.layer_sums(net.run(params, a_TSS3)[0], net.run(params, b_TSS3)[0], weights)


def _tiles(image: Picture) -> tuple[np.ndarray, np.ndarray]:
    """([T, S, S, 3] in [0, 1], masks [T, S, S]): the picture in squares side by side, grey beyond its edges."""
    rows, cols = (-(-side // TILE) for side in image.shape[:2])
    whole = np.full((rows * TILE, cols * TILE, 3), perceptual.FILL, np.float32)
    mask = np.zeros(whole.shape[:2], np.float32)
    whole[: image.shape[0], : image.shape[1]] = image.astype(np.float32) / 255
    mask[: image.shape[0], : image.shape[1]] = 1
    cut = lambda x: x.reshape(rows, TILE, cols, TILE, -1).swapaxes(1, 2).reshape(rows * cols, TILE, TILE, -1)
    return cut(whole), cut(mask)[..., 0]


def distances(
    net: perceptual.FeatureNetwork, params: Mapping, made: Sequence[Picture], truth: Sequence[Picture]
) -> Float[np.ndarray, " N"]:
    """`perceptual.lpips_like` of each pair at its own size, in tiles, so that one program serves every size."""
    sums, weights = np.zeros((2, len(made), len(net.strides)))
    queue: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []

    def flush(part):
        owner, *arrays = zip(*part)
        for total, value in zip((sums, weights), _tile_sums(net, params, *map(_filled, arrays))):
            np.add.at(total, list(owner), np.asarray(value, np.float64)[: len(part)])

    for number, (image, original) in enumerate(zip(made, truth, strict=True)):
        tiles, mask = _tiles(image)
        queue += [(number, *tile) for tile in zip(tiles, _tiles(original)[0], mask)]
        while len(queue) >= BATCH:
            flush(queue[:BATCH])
            del queue[:BATCH]
    if queue:
        flush(queue)
    return (sums / weights).mean(1)


def _filled(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stacked and filled up with zeros to `BATCH`."""
    return np.concatenate([np.stack(rows), np.zeros((BATCH - len(rows), *rows[0].shape), np.float32)])


def pooled(net: perceptual.FeatureNetwork, params: Mapping, images: Sequence[Picture]) -> Float[np.ndarray, "N D"]:
    """Feature vectors of whole pictures, resized to one square."""
    found = []
    for start in range(0, len(images), BATCH):
        part = [PIL.Image.fromarray(image) for image in images[start : start + BATCH]]
        squares = [np.float32(image.resize((TILE, TILE), PIL.Image.Resampling.BICUBIC)) / 255 for image in part]
        found.append(np.asarray(perceptual.features(net, params, jnp.asarray(_filled(squares))))[: len(part)])
    return np.concatenate(found)


def kid(x_ND: Float[np.ndarray, "N D"], y_ND: Float[np.ndarray, "N D"], pairing: str) -> Score:
    """Kernel inception distance (Binkowski et al. 2018): unbiased squared MMD with the kernel (x y / D + 1) ** 3.

    The interval is the value +- 1.96 standard errors of the jackknife; a bootstrap would draw pictures twice, and the kernel
    of a picture with itself is what an unbiased estimate leaves out. Unbiased estimates may be negative.

    Args:
        x_ND, y_ND: features of the two sets.
        pairing: 'paired' (row i of both is one picture: it is never compared with itself), or 'independent'.

    Returns:
        {value, low, high, n}, n the smaller set.

    Raises:
        InputError: fewer than 4 pictures, or paired sets of different sizes.
    """
    n, m, d = len(x_ND), len(y_ND), x_ND.shape[1]
    if min(n, m) < 4 or pairing not in ("paired", "independent") or (pairing == "paired" and n != m):
        raise InputError(f"kid: {n} and {m} pictures, pairing={pairing!r}: give 4 or more, as many of both if they are 'paired'")
    kernel = lambda a, b: (a.astype(np.float64) @ b.astype(np.float64).T / d + 1) ** 3
    xx, yy, xy = kernel(x_ND, x_ND), kernel(y_ND, y_ND), kernel(x_ND, y_ND)
    for square in (xx, yy):
        np.fill_diagonal(square, 0)
    jackknife = lambda left: (len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()
    if pairing == "paired":
        np.fill_diagonal(xy, 0)
        h = xx + yy - xy - xy.T
        value = h.sum() / (n * (n - 1))
        variance = jackknife((h.sum() - 2 * h.sum(1)) / ((n - 1) * (n - 2)))
    else:
        value = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.mean()
        without = lambda own, cross: (own.sum() - 2 * own.sum(1)) / ((len(own) - 1) * (len(own) - 2)) - 2 * (
            (cross.sum() - cross.sum(1)) / ((len(own) - 1) * cross.shape[1]))
        variance = jackknife(without(xx, xy)) + jackknife(without(yy, xy.T))
    half = 1.96 * variance**0.5
    return {"value": float(value), "low": float(value - half), "high": float(value + half), "n": min(n, m)}


def same_text(made: Sequence[Picture], truth: Sequence[Picture], read: Callable[[Picture], str]) -> Score:
    """Share of pictures of text whose reconstruction is read as the original is, of those where anything is read.

    Args:
        made, truth: pictures in the same order.
        read: a reader, e.g. `text_reader()`.
    """
    wanted = [read(image) for image in truth]
    right = [read(image) == text for image, text in zip(made, wanted, strict=True) if text]
    return wilson(sum(right), len(right))


def text_reader() -> Callable[[Picture], str]:
    """Reads all text of a picture, boxes from top to bottom and left to right, without blanks.

    Raises:
        InputError: rapidocr is not installed.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        raise InputError("reading text needs rapidocr: `uv pip install rapidocr-onnxruntime==1.4.4`") from None
    engine = RapidOCR()

    def read(image: Picture) -> str:
        boxes = engine(np.ascontiguousarray(image[..., ::-1]))[0] or []  # it wants BGR, as OpenCV reads files
        return in_reading_order([(np.asarray(corners, float), text) for corners, text, *_ in boxes])

    return read


def in_reading_order(boxes: Sequence[tuple[Float[np.ndarray, "4 2"], str]]) -> str:
    """Texts of boxes (corners x, y), line by line: a box is on the line of the one above it if its centre is within half that one's height."""
    lines: list[list[tuple[np.ndarray, str]]] = []
    middle = lambda corners: corners[:, 1].mean()
    for corners, text in sorted(boxes, key=lambda box: middle(box[0])):
        first = lines[-1][0][0] if lines else None
        if first is not None and middle(corners) - middle(first) <= np.ptp(first[:, 1]) / 2:
            lines[-1].append((corners, text))
        else:
            lines.append([(corners, text)])
    return "".join("".join(text.split()) for line in lines for _, text in sorted(line, key=lambda box: box[0][:, 0].min()))
