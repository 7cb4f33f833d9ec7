"""JPEG and WebP at a given number of bytes a picture: what 28x reconstruction is shown beside.

Below some tenths of a bit per pixel a codec does better on a smaller picture that is enlarged again, and below its lowest
quality it has no other way. So sizes and qualities are searched, and the best PSNR within the budget is taken.
"""

from __future__ import annotations

import dataclasses
import io
import struct

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from dina.config import check_name
from dina.eval.metrics import psnr_db

SCALES = (1.0, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16)
QUALITIES = {"jpeg": (1, 95), "webp": (0, 100)}
_WEBP_HEADER = 12 + 8 + 10  # RIFF, chunk, and the frame's tag, start code and size
_BICUBIC = PIL.Image.Resampling.BICUBIC


@dataclasses.dataclass(frozen=True)
class Coded:
    """A picture after a codec.

    Attributes:
        image: as decoded, at the original size.
        file_bytes: of the file.
        payload_bytes: of its compressed pixels alone, without headers and tables.
        quality, scale: what was chosen.
        fits: whether the budget was kept; else this is the smallest file there is.
    """

    image: np.ndarray
    file_bytes: int
    payload_bytes: int
    quality: int
    scale: float
    fits: bool


def payload_bytes(data: bytes, codec: str) -> int:
    """Bytes of compressed pixels in a JPEG (what follows the headers of its scans) or lossy WebP file."""
    if codec == "webp":
        return len(data) - _WEBP_HEADER
    at, total = 2, 0
    while data[at + 1] != 0xD9:
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] == 0xDA:
            start = end
            # In a scan 0xFF is data if 0 or a restart marker follows.
            while data[end] != 0xFF or data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end += 1
            total += end - start
        at = end
    return total


def encode(image: UInt8[np.ndarray, "H W 3"], codec: str, quality: int, scale: float) -> tuple[bytes, np.ndarray]:
    """(file, decoded picture at the original size) at `scale` of the sides."""
    whole = PIL.Image.fromarray(image)
    small = whole.resize([max(1, round(side * scale)) for side in whole.size], _BICUBIC) if scale < 1 else whole
    out = io.BytesIO()
    options = {"jpeg": {"optimize": True}, "webp": {"method": 6}}[codec]
    small.save(out, codec, quality=quality, **options)
    decoded = PIL.Image.open(io.BytesIO(out.getvalue())).convert("RGB")
    return out.getvalue(), np.asarray(decoded.resize(whole.size, _BICUBIC) if scale < 1 else decoded)


def at_bytes(image: UInt8[np.ndarray, "H W 3"], codec: str, budget: int, count: str = "payload") -> Coded:
    """The codec's best picture of at most `budget` bytes.

    Args:
        image: what to compress.
        codec: 'jpeg' or 'webp'.
        budget: bytes of this picture.
        count: what the budget counts: 'payload' (kind to the codec: its headers are free, as the grid of ours is) or 'file'.

    Raises:
        InputError: no such codec or way to count.
    """
    check_name(codec, QUALITIES, "image codec")
    check_name(count, ("payload", "file"), "bytes to count")
    size = lambda data: payload_bytes(data, codec) if count == "payload" else len(data)
    best, smallest = None, None
    for scale in SCALES:
        low, high = QUALITIES[codec]
        while low <= high:  # the highest quality that fits; sizes grow with quality but for a few bytes
            quality = (low + high) // 2
            data, decoded = encode(image, codec, quality, scale)
            found = Coded(decoded, len(data), payload_bytes(data, codec), quality, scale, size(data) <= budget)
            if found.fits:
                low = quality + 1
                error = psnr_db(decoded, image)
                best = (error, found) if best is None or error > best[0] else best
            else:
                high = quality - 1
            if smallest is None or size(data) < smallest[0]:
                smallest = size(data), found
    return best[1] if best else smallest[1]
