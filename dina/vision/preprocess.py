"""From image files and frames to packs of patches, and back (numpy, host side).

An image keeps its own resolution: it is rounded to multiples of 28 px, cut into 14-px patches in merge-group order
(groups of 2x2 patches raster, row-major inside a group) and laid beside other images in one row, a pack, that the
encoder reads with segment masks. A patch covers two frames: a video is a list of pairs of frames, each of which takes the
place of one image and is seen by itself; a still image is a pair of itself. Rules: reference/tokenizers.md A.1.

Letters: H, W pixels; T = 2 frames of a pair; P patches of a pack; N = P/4 merged cells; D = 3*2*14*14 = 1176 values of a
patch in the order (C, T, y, x); I images of a pack.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32, UInt8

from dina.config import InputError

PATCH, MERGE, TEMPORAL = 14, 2, 2
CELL = PATCH * MERGE
PATCH_DIM = 3 * TEMPORAL * PATCH * PATCH
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
MIN_PIXELS, MAX_PIXELS = 224 * 224, 1792 * 1792
SMALLEST_PIXELS, LARGEST_ASPECT = 256, 200


def check_size(height: int, width: int, name: str) -> None:
    """Refuses images that the released preprocessing refuses (tokenizers.md A.1 step 1).

    Raises:
        InputError: empty, at most 256 pixels in all, or an aspect ratio above 200.
    """
    if height * width == 0:
        raise InputError(f"{name}: the image is empty ({height}x{width} pixels)")
    if max(height, width) > LARGEST_ASPECT * min(height, width):
        raise InputError(
            f"{name}: {height}x{width} pixels has an aspect ratio above {LARGEST_ASPECT}; crop or pad it first"
        )
    if height * width <= SMALLEST_PIXELS:
        raise InputError(f"{name}: {height}x{width} is at most {SMALLEST_PIXELS} pixels; give a larger image")


def smart_resize(
    height: int, width: int, factor: int = CELL, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size in pixels, multiples of `factor`, at which an image is read.

    Python's `round` (half to even) is part of the rule, and the scale uses the original size (tokenizers.md A.1).

    Returns:
        (height, width). A very long image over `max_pixels` may get a side of 0: `check_size` refuses such input.
    """
    rounded_h, rounded_w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rounded_h * rounded_w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        return tuple(math.floor(side / scale / factor) * factor for side in (height, width))
    if rounded_h * rounded_w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * scale / factor) * factor for side in (height, width))
    return rounded_h, rounded_w


def resize_image(
    image_HWC: UInt8[np.ndarray, "H W 3"],
    factor: int = CELL,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    name: str = "image",
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Bicubic resize by PIL on uint8 (antialiased, rounded to uint8) to the size of `smart_resize`.

    Raises:
        InputError: `check_size` refuses the image, or it is too long for `max_pixels`.
    """
    height, width = image_HWC.shape[:2]
    check_size(height, width, name)
    target = smart_resize(height, width, factor, min_pixels, max_pixels)
    if 0 in target:
        raise InputError(f"{name}: {height}x{width} pixels cannot be fitted into {max_pixels} pixels; crop it first")
    if target == (height, width):
        return image_HWC
    return np.asarray(PIL.Image.fromarray(image_HWC).resize(target[::-1], PIL.Image.Resampling.BICUBIC))


def open_image(path: str | pathlib.Path) -> UInt8[np.ndarray, "H W 3"]:
    """Reads an image file as RGB at its own size.

    Raises:
        InputError: missing, truncated, not an image, empty, tiny or too elongated; the message names the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the image file is empty (0 bytes)")
    try:
        with PIL.Image.open(path) as file:
            check_size(file.height, file.width, str(path))
            return np.array(file.convert("RGB"))
    except PIL.UnidentifiedImageError:
        raise InputError(f"{path}: not an image file that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"{path}: the image is truncated or damaged ({error})") from None


@functools.cache
def _normalised_levels() -> Float32[np.ndarray, "256 3"]:
    """(u/255 - mean)/std in float64 for every uint8 value u, then float32: exact and 5x faster than arithmetic."""
    return ((np.arange(256)[:, None] / 255.0 - CLIP_MEAN) / CLIP_STD).astype(np.float32)


def normalize(image: UInt8[np.ndarray, "*H 3"]) -> Float32[np.ndarray, "*H 3"]:
    """CLIP normalisation of uint8 pixels."""
    table = _normalised_levels()
    return np.stack([table[:, c][image[..., c]] for c in range(3)], axis=-1)


def frame_pairs(frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> list[UInt8[np.ndarray, "2 H W 3"]]:
    """The frames of a video in pairs, the last one repeated where their number is odd (tokenizers.md A.1 step 5).

    Raises:
        InputError: frames of different sizes.
    """
    for number, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            raise InputError(f"video: frame {number} is {frame.shape}, frame 0 {frames[0].shape}: give frames of one size")
    return [np.stack([frames[at], frames[min(at + 1, len(frames) - 1)]]) for at in range(0, len(frames), TEMPORAL)]


def image_to_patches(image: UInt8[np.ndarray, "*T H W 3"]) -> Float32[np.ndarray, "P 1176"]:
    """Cuts an image [H, W, 3] or a pair of frames [2, H, W, 3] into normalised patches in merge-group order.

    Raises:
        ValueError: another shape, or a side is no multiple of 28 (use `resize_image` first).
    """
    height, width = image.shape[-3:-1]
    if height % CELL or width % CELL or height * width == 0:
        raise ValueError(f"image of {height}x{width} pixels: both sides must be positive multiples of {CELL}")
    if image.shape not in ((height, width, 3), (TEMPORAL, height, width, 3)):
        raise ValueError(f"array {image.shape}: give an image [H, W, 3] or a pair of frames [{TEMPORAL}, H, W, 3]")
    h, w = height // CELL, width // CELL
    x = normalize(image).reshape(-1, h, MERGE, PATCH, w, MERGE, PATCH, 3)
    x = x.transpose(1, 4, 2, 5, 7, 0, 3, 6)  # cell row, cell col, row in group, col in group, C, T, y, x
    x = np.broadcast_to(x, (*x.shape[:5], TEMPORAL, PATCH, PATCH))
    return x.reshape(h * w * MERGE * MERGE, PATCH_DIM)


def patches_to_pixels(
    patches_PD: Float32[np.ndarray, "P 1176"], grid: tuple[int, int], frame: int = 0
) -> Float32[np.ndarray, "H W 3"]:
    """One frame of an image's patches, CLIP-normalised as they are; arguments as in `patches_to_image`."""
    h, w = (int(side) for side in grid)
    x = np.asarray(patches_PD, np.float32)[: h * w * MERGE * MERGE]
    x = x.reshape(h, w, MERGE, MERGE, 3, TEMPORAL, PATCH, PATCH)[:, :, :, :, :, frame]
    return x.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * CELL, w * CELL, 3)


def patches_to_image(
    patches_PD: Float32[np.ndarray, "P 1176"], grid: tuple[int, int], frame: int = 0
) -> UInt8[np.ndarray, "H W 3"]:
    """The inverse of `image_to_patches`: one frame, un-normalised, clipped to uint8.

    Args:
        patches_PD: at least 4*h*w patches; further ones (padding, other images) are ignored.
        grid: (h, w) of the image in merged cells.
        frame: of the pair, 0 or 1; the same for a still image.
    """
    x = patches_to_pixels(patches_PD, grid, frame)
    return np.clip(np.rint((x * CLIP_STD + CLIP_MEAN) * 255.0), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4096)
def patch_positions(h: int, w: int, window_cells: int) -> Int32[np.ndarray, "P 3"]:
    """(row, col, window) of each patch of an image of h x w merged cells, in merge-group order.

    Row and col count patches; windows are squares of `window_cells` merged cells a side, numbered raster from 0
    and cut off at the right and bottom edge (tokenizers.md A.2).
    """
    cell_row, cell_col, in_row, in_col = np.indices((h, w, MERGE, MERGE)).reshape(4, -1)
    window = cell_row // window_cells * -(-w // window_cells) + cell_col // window_cells
    positions = np.stack([cell_row * MERGE + in_row, cell_col * MERGE + in_col, window], axis=1).astype(np.int32)
    positions.setflags(write=False)
    return positions


def pack_layout(
    grids: Sequence[tuple[int, int]], cells: int, max_images: int, window_cells: int
) -> dict[str, np.ndarray]:
    """Everything about a pack but its pixels.

    Args:
        grids: (h, w) in merged cells of each image, in pack order.
        cells: merged cells of the pack; the pack has P = 4*cells patches.
        max_images: length I of the per-image arrays.
        window_cells: side of an attention window in merged cells.

    Returns:
        segment, row, col, window [P] int32 (segment 1..I, 0 = padding; window ids unique within the pack, padding
        has its own), cell_segment [P/4] int32, grid [I, 2] int32 (0 = no image).

    Raises:
        ValueError: the images do not fit.
    """
    areas = [h * w for h, w in grids]
    if sum(areas) > cells or len(grids) > max_images:
        raise ValueError(f"{len(grids)} images of {areas} cells do not fit {cells} cells and {max_images} images")
    group = MERGE * MERGE
    out = {name: np.zeros(cells * group, np.int32) for name in ("segment", "row", "col", "window")}
    out["grid"] = np.zeros((max_images, 2), np.int32)
    start, windows = 0, 1
    for number, (h, w) in enumerate(grids):
        positions = patch_positions(h, w, window_cells)
        stop = start + len(positions)
        out["segment"][start:stop] = number + 1
        out["row"][start:stop], out["col"][start:stop] = positions[:, 0], positions[:, 1]
        out["window"][start:stop] = positions[:, 2] + windows
        out["grid"][number] = h, w
        start, windows = stop, windows + int(positions[-1, 2]) + 1
    out["cell_segment"] = out["segment"][::group].copy()
    return out


def pack_images(
    images: Sequence[UInt8[np.ndarray, "*T H W 3"]], cells: int, max_images: int, window_cells: int = 4
) -> dict[str, np.ndarray]:
    """One row of the encoder's input: whole images laid one after the other.

    Args:
        images: uint8 images, or pairs of frames of a video, whose sides are multiples of 28.
        cells, max_images, window_cells: as in `pack_layout`.

    Returns:
        `pack_layout`'s arrays and patches [P, 1176] float32 (0 in padding).

    Raises:
        ValueError: an image's size is no multiple of 28, or the images do not fit.
    """
    parts = [image_to_patches(image) for image in images]
    pack = pack_layout(
        [(image.shape[-3] // CELL, image.shape[-2] // CELL) for image in images], cells, max_images, window_cells
    )
    patches_PD = np.zeros((cells * MERGE * MERGE, PATCH_DIM), np.float32)
    if parts:
        used = np.concatenate(parts)
        patches_PD[: len(used)] = used
    return pack | {"patches": patches_PD}
