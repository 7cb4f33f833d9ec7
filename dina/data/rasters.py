"""From picture files to pixels: drawings rasterised at the size asked for, transparency on white, empty margins cut.

SVG is drawn by resvg, which a wheel brings whole. It is given no fonts, so that all machines draw the same: a drawing with text
in it is refused. Letters: H, W pixels.
"""

from __future__ import annotations

import io
import pathlib
import struct

import numpy as np
import PIL.ExifTags
import PIL.Image
from jaxtyping import UInt8

from dina.config import InputError

CELL = 28  # px: preprocessing rounds sides to multiples of it
FITS = ("longest", "shortest", "area")
_PROBE = 256  # longest side in px of the first drawing, which tells where on the page something is
_DPI = 96  # px an inch, as CSS has it: pages are often given in points or millimetres
_TRIES, _EXACT = 4, 0.02  # a small drawing is measured in few pixels, so it takes more than one step to get its size right
# EXIF orientation -> what makes the picture upright.
_TURNS = {2: PIL.Image.Transpose.FLIP_LEFT_RIGHT, 3: PIL.Image.Transpose.ROTATE_180, 4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
          5: PIL.Image.Transpose.TRANSPOSE, 6: PIL.Image.Transpose.ROTATE_270, 7: PIL.Image.Transpose.TRANSVERSE,
          8: PIL.Image.Transpose.ROTATE_90}
_LARGEST = 4096  # longest side in px of a page: a small drawing on a large page comes out smaller than asked


class Unusable(Exception):
    """A picture that is left out: `args` are the reason, one of a few words that are counted, and what exactly is wrong."""


def load(path: pathlib.Path, side: int, fit: str) -> UInt8[np.ndarray, "H W 3"]:
    """Reads or draws a picture.

    Args:
        path: SVG, or anything that Pillow reads.
        side: size in px. A drawing gets it within a few pixels; pixels are reduced to it, never enlarged.
        fit: what `side` is: the 'longest' side, the 'shortest', or the root of the 'area'.

    Raises:
        Unusable: 'corrupt', 'text' (a drawing that needs fonts) or 'blank'.
        InputError: `fit` is unknown.
    """
    if fit not in FITS:
        raise InputError(f"config key data.fit: {fit!r} must be one of {', '.join(FITS)}")
    if path.suffix == ".svg":
        picture = _draw(path, side, fit)
    else:
        picture = _trim(_open(path))
        scale = _scale(picture.size, side, fit)
        if scale < 1:
            size = [max(1, round(scale * length)) for length in picture.size]
            picture = picture.resize(size, PIL.Image.Resampling.LANCZOS)
    pixels = _flat(picture)
    if (pixels == pixels[0, 0]).all():
        raise Unusable("blank", "nothing is to be seen on white")
    return pixels


def on_white(picture: PIL.Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a picture on a white ground, upright as its EXIF says."""
    return _flat(_upright(picture))


def fingerprint(pixels_HWC: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "16"]:
    """128 bits that near-identical pictures share, whatever their size and white margin (a difference hash both ways).

    A bit tells whether the mean grey of a cell of an 8x8 grid is more than 2 of 255 above that of its neighbour.
    """
    drawn_HW = (pixels_HWC < 250).any(2)
    rows, columns = (np.flatnonzero(drawn_HW.any(axis)) for axis in (1, 0))
    if len(rows):
        pixels_HWC = pixels_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    grey = PIL.Image.fromarray(pixels_HWC).convert("L")
    across, down = (np.asarray(grey.resize(size, PIL.Image.Resampling.BOX), np.int16) for size in ((9, 8), (8, 9)))
    return np.packbits(np.concatenate([(np.diff(across, axis=1) > 2).ravel(), (np.diff(down, axis=0) > 2).ravel()]))


def is_native(height: int, width: int, pixels: int) -> int:
    """1 if preprocessing (dina/vision/preprocess.py) with `min_pixels` = `pixels` does not enlarge such a picture, else 0."""
    rounded = [max(CELL, round(side / CELL) * CELL) for side in (height, width)]
    return int(rounded[0] * rounded[1] >= pixels)


def _flat(picture: PIL.Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if picture.mode == "RGB":
        return np.array(picture)
    white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.array(PIL.Image.alpha_composite(white, _rgba(picture)).convert("RGB"))


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Turned as its EXIF says. The result has the EXIF still: once is enough."""
    try:
        turn = _TURNS.get(picture.getexif().get(PIL.ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, struct.error):  # damaged notes are no damage of the picture
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _rgba(picture: PIL.Image.Image) -> PIL.Image.Image:
    """In 8 bits; Pillow's own conversion of 16-bit grey cuts off at 255 instead of scaling."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture).clip(0, 65535)
        picture = PIL.Image.fromarray((grey / 257).round().astype(np.uint8))
    return picture.convert("RGBA")


def _scale(size: tuple[int, int], side: int, fit: str) -> float:
    now = {"longest": max(size), "shortest": min(size), "area": (size[0] * size[1]) ** 0.5}[fit]
    return side / now


def _open(path: pathlib.Path) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as file:
            return _rgba(_upright(file))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise Unusable("corrupt", str(error)) from None


def _trim(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Without margins that are transparent."""
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise Unusable("blank", "all of it is transparent")
    return picture.crop(box)


def _draw(path: pathlib.Path, side: int, fit: str) -> PIL.Image.Image:
    """Pages are often far larger than the drawing on them, so where it is must be known before it can be drawn in size."""
    source = path.read_bytes()
    if b"<text" in source or b"<flowRoot" in source:
        raise Unusable("text", "it has text, and is drawn without fonts")
    longest = _PROBE
    for _ in range(_TRIES):
        drawing = _trim(_render(path, longest))
        scale = _scale(drawing.size, side, fit)
        wanted = min(_LARGEST, round(longest * scale))
        if abs(wanted / longest - 1) < _EXACT:
            break
        longest = wanted
    return drawing


def _render(path: pathlib.Path, longest: int) -> PIL.Image.Image:
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_path=str(path), width=longest, height=longest, dpi=_DPI, skip_system_fonts=True)
    except ValueError as error:
        raise Unusable("corrupt", str(error)) from None
    except BaseException as error:  # a panic of the Rust library is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise Unusable("corrupt", f"resvg broke off: {error}") from None
    return PIL.Image.open(io.BytesIO(png)).convert("RGBA")
