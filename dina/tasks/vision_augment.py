"""More pictures from the same records: smaller canvases around a digit, digits redrawn by a smooth map, parts of any image.

Letters: n images, S side of a digit's box in pixels.
"""

from __future__ import annotations

import functools

import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32, UInt8

from dina.data import phrases

ZOOM = 2.0  # most pixels of the image, along a side, that go into one of a part


def crop_views(
    images: list[np.ndarray], fields: dict[str, np.ndarray], views: int, seed: int
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Parts of the images that hold the whole digit: the same strokes on fewer cells, so at a fraction of the cost.

    Each view is one of the grammar's canvases cut out so that a digit on a named place is on a named place again;
    (digit, canvas) pairs that training must not show are left out, as are views equal to the whole image.

    Args:
        images: uint8 [H, W, 3], sides multiples of 28.
        fields: digit, size, top, left, aligned and others [n].
        views: how many are drawn for each image; small ones more often.
        seed: of the draw.

    Returns:
        (images, fields) of the views; the images share memory with the originals.
    """
    rng = np.random.default_rng(seed)
    crops, origins, changed = [], [], {"top": [], "left": [], "aligned": []}
    for index, image in enumerate(images):
        digit, size, named = (int(fields[name][index]) for name in ("digit", "size", "aligned"))
        corner = (int(fields["top"][index]), int(fields["left"][index]))
        full = (image.shape[0] // phrases.CELL, image.shape[1] // phrases.CELL)
        for draw in rng.random((views, 2, 2)):
            (h, top), (w, left) = (
                _cut_axis(full[axis], size, corner[axis], bool(named), *draw[axis]) for axis in range(2)
            )
            canvas = (h, w)
            if canvas == full or canvas not in phrases.CANVASES or phrases.is_held_out(digit, canvas):
                continue
            y, x = corner[0] - top, corner[1] - left
            crops.append(image[y : y + h * phrases.CELL, x : x + w * phrases.CELL])
            origins.append(index)
            has_words = phrases.words(canvas, size, top, left) is not None
            for name, value in (("top", top), ("left", left), ("aligned", int(has_words))):
                changed[name].append(value)
    kept = {name: values[origins] for name, values in fields.items()}
    return crops, kept | {name: np.array(values, np.int32) for name, values in changed.items()}


def _cut_axis(cells: int, size: int, start: int, named: bool, which: float, where: float) -> tuple[int, int]:
    """(cells, digit's offset) of a part of an axis that holds the digit; `which` and `where` are uniform in [0, 1)."""
    fewest = -(-size // phrases.CELL)
    fewer = fewest + int((cells - fewest + 1) * which * which)
    low, high = max(0, start - phrases.CELL * (cells - fewer)), min(start, phrases.CELL * fewer - size)
    choices = [p for p in phrases.positions(fewer, size) if low <= p <= high] if named else range(low, high + 1)
    return (fewer, choices[int(where * len(choices))]) if len(choices) else (cells, start)


def bend_digits(images: list[np.ndarray], fields: dict[str, np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the images with the digit of each redrawn inside its own box by a random smooth map.

    Turns up to 12 degrees, shears up to 0.15, scales 0.87 to 1.13 per axis, shifts up to 8 % of the box and bends by
    a random 4x4 displacement grid: what keeps a handwritten digit itself. Position and size words stay true.

    Args:
        images: uint8 [H, W, 3], not modified.
        fields: size, top, left [n] px of each digit's box.
        rng: consumed in one fixed order, so that the result is a function of its state alone.
    """
    n = len(images)
    angle, shear = rng.uniform(-0.21, 0.21, n), rng.uniform(-0.15, 0.15, n)
    scale, shift = rng.uniform(0.87, 1.13, (n, 2)), rng.uniform(-0.08, 0.08, (n, 2))
    bend = rng.normal(0.0, 0.035, (n, 2, 4, 4))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cos, sin + shear], -1), np.stack([-sin, cos], -1)], 1) / scale[:, :, None]
    out = [image.copy() for image in images]
    for size in np.unique(fields["size"]):
        chosen = np.flatnonzero(fields["size"] == size)
        corners = [(i, fields["top"][i], fields["left"][i]) for i in chosen]
        boxes = np.stack([images[i][t : t + size, l : l + size] for i, t, l in corners])
        warped = _warp(boxes, turn[chosen], shift[chosen], bend[chosen])
        for (i, top, left), box in zip(corners, warped, strict=True):
            out[i][top : top + size, left : left + size] = box
    return out


def zoom_views(
    images: list[np.ndarray], grid: Int32[np.ndarray, "n 2"], rng: np.random.Generator
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """A part of each image at its own scale (1 to `ZOOM` pixels in one, log-uniform), anywhere in it.

    Args:
        images: uint8 [H, W, 3].
        grid: size of the part in cells of 28 px; an image of that size comes back as it is.
        rng: three numbers an image are drawn, whether used or not.
    """
    out = []
    for image, (h, w), (zoom, y, x) in zip(images, grid * phrases.CELL, rng.random((len(images), 3)), strict=True):
        height, width = image.shape[:2]
        zoom = min(ZOOM, height / h, width / w) ** zoom
        top, left = y * (height - h * zoom), x * (width - w * zoom)
        if (h, w) == (height, width):
            out.append(image)
            continue
        box = (left, top, min(width, left + w * zoom), min(height, top + h * zoom))
        part = PIL.Image.fromarray(image).resize((int(w), int(h)), PIL.Image.Resampling.BICUBIC, box=box)
        out.append(np.asarray(part))
    return out


@functools.cache
def _interpolation(size: int) -> Float32[np.ndarray, "S 4"]:
    """Linear interpolation from 4 knots to `size` pixels."""
    at = np.linspace(0.0, 3.0, size)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(4))).astype(np.float32)


def _warp(boxes: UInt8[np.ndarray, "n S S 3"], turn, shift, bend) -> UInt8[np.ndarray, "n S S 3"]:
    """Bilinear resampling at affine + bent coordinates; the box's edge is repeated outside."""
    n, size = boxes.shape[:2]
    grey = bool((boxes == boxes[..., :1]).all())
    channels = 1 if grey else 3
    unit = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, size)] * 2, indexing="ij")).astype(np.float32)
    knots = _interpolation(size)
    moved = np.einsum("nij,jyx->niyx", turn.astype(np.float32), unit) + shift.astype(np.float32)[:, :, None, None]
    moved += np.einsum("ya,niab,xb->niyx", knots, bend.astype(np.float32), knots, optimize=True)
    at = np.clip((moved + 0.5) * (size - 1), 0, size - 1.001)
    low = at.astype(np.int32)
    fraction = at - low
    flat = boxes[..., :channels].reshape(n * size * size, channels).astype(np.float32)
    index = (np.arange(n, dtype=np.int32)[:, None, None] * size + low[:, 0]) * size + low[:, 1]
    fy, fx = fraction[:, 0, :, :, None], fraction[:, 1, :, :, None]
    above = flat[index] * (1 - fx) + flat[index + 1] * fx
    below = flat[index + size] * (1 - fx) + flat[index + size + 1] * fx
    value = np.rint(above * (1 - fy) + below * fy).astype(np.uint8)
    return np.broadcast_to(value, (n, size, size, 3)) if grey else value
