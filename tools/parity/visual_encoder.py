"""Pixels to cell features (case 04): resizing, patches, windows, every layer, the bridge, pixels rounded to bfloat16 or not.

The reference permutes patches so that windows are contiguous; ours are put into that order before they are compared, unless
the encoder has sorted them itself.
"""

from __future__ import annotations

import jax
import numpy as np

from dina.convert import visual
from dina.vision import encoder, preprocess
from dina.vision.bridge import MERGED, Bridge, VisionEncoder
from tools.parity import load
from tools.parity.case import Case


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "pixel_values" in case and "window_index" in case


def module(c, pixels: str) -> VisionEncoder:
    """Encoder and bridge of a case's config."""
    vit = encoder.VisionTransformer(
        c["hidden_size"], c["depth"], c["num_heads"], c["intermediate_size"], tuple(c["fullatt_block_indexes"]), (c["window_size"] // c["patch_size"]) ** 2,
        pixels=pixels, parent=None,
    )
    return VisionEncoder(vit, Bridge(c["out_hidden_size"], parent=None))


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    _images(case)
    pack = _pack(case)
    cells_N = pack["window"][0, ::MERGED]
    order_N, cells = np.argsort(cells_N, kind="stable"), len(cells_N)
    case.compare_ids("window_index", order_N)
    edges = lambda areas: MERGED * np.cumsum([0, *areas])
    case.compare_ids("cu_window_seqlens", edges(np.unique(cells_N, return_counts=True)[1]))
    case.compare_ids("cu_seqlens", edges(pack["grid"][0].prod(-1)))
    head_dim = case.config["hidden_size"] // case.config["num_heads"]
    case.compare("rotary_freqs_unwindowed", encoder.rotary_angles(pack["row"], pack["col"], head_dim)[0])
    params = load.variables(case, (visual.encoder(""), *visual.encoder_sizes(module(case.config, "float32"))))["params"]["vision_encoder"]
    windowed = lambda x_PD: np.asarray(x_PD).reshape(cells, MERGED, -1)[order_N].reshape(cells * MERGED, -1)
    for pixels, features, bridge in (("bfloat16", "official_features", "bridge_out"), ("float32", "fp32_features", "fp32_bridge_out")):
        model = module(case.config, pixels)
        out, state = jax.jit(lambda params, pack, model=model: model.apply({"params": params}, pack, capture_intermediates=True))(params, pack)
        seen = state["intermediates"]["vit"]
        layers_LPD, features_PD = seen["blocks"]["__call__"][0][0], seen["__call__"][0][0]
        sorted_ = layers_LPD.shape[-2] >= encoder.SORTED * model.vit.window_patches
        if pixels == "bfloat16":
            case.compare("official_patch_embed", seen["patch_embed"]["__call__"][0])
            for i, x_PD in enumerate(layers_LPD):
                case.compare(f"official_block{i}_out_windowed", x_PD if sorted_ else windowed(x_PD))
        case.compare(features, features_PD)
        case.compare(f"{features}_windowed", windowed(features_PD))
        case.compare(bridge, out[0])


def _images(case: Case) -> None:
    """Preprocessing, image by image."""
    c, patches = case.config, []
    for i in range(len(c["images"])):
        image = preprocess.resize_image(case.input(f"image{i}_uint8").astype(np.uint8), preprocess.CELL, c["min_pixels"], c["max_pixels"])
        case.compare_ids(f"image{i}_resized_uint8", image)
        case.compare_ids(f"image{i}_grid_thw", _grid(image))
        patches.append((preprocess.image_to_patches(image), _grid(image)))
    case.compare("pixel_values", np.concatenate([values for values, _ in patches]))
    case.compare_ids("grid_thw", [grid for _, grid in patches])


def _grid(image: np.ndarray) -> list[int]:
    return [1, image.shape[0] // preprocess.PATCH, image.shape[1] // preprocess.PATCH]


def _pack(case: Case) -> dict[str, np.ndarray]:
    """One row with all images, of the case's own pixels, so that an error in preprocessing shows where it is."""
    c = case.config
    window = c["window_size"] // c["patch_size"] // c["spatial_merge_size"]
    grids = [(h // preprocess.MERGE, w // preprocess.MERGE) for t, h, w in case.golden("grid_thw").tolist() for _ in range(t)]
    pack = preprocess.pack_layout(grids, sum(h * w for h, w in grids), len(grids), window)
    return {name: array[None] for name, array in {**pack, "patches": case.golden("pixel_values")}.items()}
