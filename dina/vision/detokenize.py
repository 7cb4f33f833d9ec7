"""Codes of any images back to pixels: packing, pixel decoder, refiner, uint8.

Images of any grids are laid into rows of one static shape and decoded a few rows at a time, so few compiled programs
serve every request. Noise is keyed by (seed, image, token): an image does not change with its company.

Letters: B rows of a chunk, N cells of a row, P patches, L levels, I images of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from dina.vision import pixel_decoder, preprocess, refiner, tokenizer
from dina.vision.autoencoder import make_autoencoder


def detokenize(
    config_vision: ConfigDict,
    variables: Mapping,
    codes: Sequence[Int[np.ndarray, "_ L"]],
    grids: Sequence[tuple[int, int]],
    seed: int = 0,
    levels: int | None = None,
    refine: str = "flow",
    sampler: Mapping | None = None,
    rows: int = 8,
    frames: int = 1,
) -> list[UInt8[np.ndarray, "*T H W 3"]]:
    """Pixels of images given as codes.

    Args:
        config_vision: the `vision` section.
        variables: {'params', 'stats'} with vision_quantizer, pixel_decoder and, for 'flow', refiner.
        codes: per image [h*w, L], cells in raster order; -1 = level absent.
        grids: per image (h, w) in cells.
        seed: of the refiner's noise.
        levels: use the first so many levels only.
        refine: 'flow' (pixel decoder and refiner) or 'none' (pixel decoder alone).
        sampler: overrides of `config_vision.refiner.sampler` (steps, cond_scale, ref_scale).
        rows: most packs decoded at once; see `row_count`.
        frames: 1, or 2 where the codes are those of pairs of frames; the refiner knows one picture only.

    Returns:
        uint8 images of 28h x 28w pixels, in order; pairs [2, 28h, 28w, 3] with 2 frames.

    Raises:
        ValueError: an image whose number of codes is not h*w, an unknown `refine`, or `frames` that it does not make.
    """
    _check(codes, grids, refine, frames)
    if not codes:
        return []
    cells, images = row_cells(config_vision, max(h * w for h, w in grids)), config_vision.pack.images
    options = tuple(sorted((config_vision.refiner.sampler.to_dict() | dict(sampler or {})).items()))
    config = (config_vision, refine, options)
    plan = first_fit([h * w for h, w in grids], cells, images)
    rows = row_count(config_vision, cells, len(plan), rows)
    out: list = [None] * len(codes)
    for start in range(0, len(plan), rows):
        chunk = plan[start : start + rows] + [[]] * (start + rows - len(plan))
        batch = _rows(config_vision, codes, grids, chunk, cells, images)
        patches_BPV = np.asarray(_decode(config, variables, batch, levels, seed))
        for row, numbers in enumerate(chunk):
            at = 0
            for number in numbers:
                h, w = grids[number]
                made = [preprocess.patches_to_image(patches_BPV[row, at : at + 4 * h * w], (h, w), frame) for frame in range(frames)]
                out[number] = made[0] if frames == 1 else np.stack(made)
                at += 4 * h * w
    return out


def _check(codes, grids, refine: str, frames: int) -> None:
    if refine not in ("flow", "none"):
        raise ValueError(f"refine={refine!r}: choose flow or none")
    if frames not in (1, preprocess.TEMPORAL) or frames > 1 and refine != "none":
        raise ValueError(f"frames={frames} with refine={refine!r}: choose 1, or 2 with none")
    for number, (code, (h, w)) in enumerate(zip(codes, grids, strict=True)):
        if len(code) != h * w:
            raise ValueError(f"image {number}: {len(code)} cells of codes for a grid of {h}x{w}")


def row_cells(config_vision: ConfigDict, largest: int) -> int:
    """Cells of a row for images of at most `largest` cells: as configured, or the next power of two."""
    cells = config_vision.pack.cells
    return cells if largest <= cells else 1 << (largest - 1).bit_length()


def row_count(config_vision: ConfigDict, cells: int, planned: int, rows: int) -> int:
    """Rows of `cells` cells in one call: as many cells at most as in `rows` rows as configured, for memory grows with them.

    And no more than are `planned`, rounded up to a power of two, for each number of rows is compiled.
    """
    most = max(1, min(rows, rows * config_vision.pack.cells // cells))
    return min(most, 1 << (planned - 1).bit_length())


def first_fit(areas: Sequence[int], cells: int, images: int) -> list[list[int]]:
    """Image numbers per row of at most `cells` cells and `images` images, largest first."""
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(areas)), key=lambda i: -areas[i]):
        row = next((r for r in range(len(rows)) if free[r] >= areas[number] and len(rows[r]) < images), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(cells)
        rows[row].append(number)
        free[row] -= areas[number]
    return rows


def _rows(config_vision, codes, grids, chunk, cells, images) -> dict[str, np.ndarray]:
    """Layout and codes of a chunk of rows, with `image` [B, I]: the number of each image, for its noise."""
    window = config_vision.encoder.window_cells
    layouts = [preprocess.pack_layout([grids[n] for n in numbers], cells, images, window) for numbers in chunk]
    batch = {name: np.stack([layout[name] for layout in layouts]) for name in layouts[0]}
    batch["codes"] = np.full((len(chunk), cells, len(config_vision.quantizer.sizes)), -1, np.int32)
    batch["image"] = np.zeros((len(chunk), images), np.int32)
    for row, numbers in enumerate(chunk):
        if numbers:
            joined = np.concatenate([codes[n] for n in numbers])
            batch["codes"][row, : len(joined)] = joined
            batch["image"][row, : len(numbers)] = numbers
    return batch


def _decode(config, variables, batch, levels, seed) -> Array:
    config_vision, refine, options = config
    parts = [tokenizer.PART, pixel_decoder.PART] + ([refiner.PART] if refine == "flow" else [])
    params = {part: variables["params"][part] for part in parts}
    stats = {tokenizer.PART: variables["stats"][tokenizer.PART]}
    modules = (
        tokenizer.make_tokenizer(config_vision),
        pixel_decoder.make_pixel_decoder(config_vision),
        refiner.make_refiner(config_vision),
        make_autoencoder(config_vision.refiner.autoencoder),
    )
    return _compiled(modules, refine, options, levels, params, stats, batch, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compiled(modules, refine, options, levels, params, stats, batch, key) -> Float[Array, "B P V"]:
    tokens, decoder, flow, auto = modules
    q_BND = tokens.sums(stats, batch["codes"], levels)
    patches_BPV = decoder.apply({"params": params[pixel_decoder.PART]}, q_BND, batch)
    if refine == "none":
        return patches_BPV
    layout = auto.layout(batch)
    auto_params = params[refiner.PART].get("autoencoder", {})
    ref_BTC = auto.encode(auto_params, jnp.clip(patches_BPV, *pixel_range()), batch)
    noise_BTC = image_noise(key, batch["image"], layout["segment"], auto.token_dim)
    dit = params[refiner.PART]["dit"]
    x_BTC = refiner.sample(flow, dit, noise_BTC, q_BND, ref_BTC, batch, layout, **dict(options))
    return auto.decode(auto_params, x_BTC, batch)


def image_noise(key: Array, image_BI: Array, segment_BT: Array, width: int) -> Float[Array, "B T C"]:
    """Standard normal values that depend on the image's number and the token's place in it only."""
    image_BT = jnp.take_along_axis(image_BI, refiner.image_index(segment_BT), axis=1)
    index_BT = pixel_decoder.segment_index(segment_BT)
    one = lambda image, index: jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, image), index), (width,))
    return jax.vmap(jax.vmap(one))(image_BT, index_BT)


def pixel_range() -> tuple[Array, Array]:
    """Lowest and highest CLIP-normalised value of each of a patch's values [V]: black and white."""
    bounds = [(level - preprocess.CLIP_MEAN) / preprocess.CLIP_STD for level in (0.0, 1.0)]
    repeat = preprocess.PATCH_DIM // 3
    return tuple(jnp.asarray(np.repeat(bound, repeat), jnp.float32) for bound in bounds)
