"""Code vectors to pixels (case 07a): every layer, and both ways in which the reference attends.

Its fall-back on a CPU scales scores once and lets packed images see each other; its flash branch scales twice and keeps
images apart.
"""

from __future__ import annotations

import re

import jax
import numpy as np

from dina.convert import visual
from dina.vision import pixel_decoder, preprocess
from tools.parity import load
from tools.parity.case import Case


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "quant_features" in case and "positions_2d" in case


def module(c, scale: str, positions: str) -> pixel_decoder.PixelDecoder:
    """The decoder of a case's config."""
    return pixel_decoder.PixelDecoder(
        c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"], preprocess.PATCH_DIM, c["layer_norm_eps"],
        positions=positions, attn_scale=scale, norms="sub" if c["subln"] else "pre", ffn="swiglu" if c["swiglu"] else c["hidden_act"],
        qkv_bias="".join(name for name in "qkv" if c.get(f"{name}_bias", True)),
    )  # fmt: skip


class Decoder:
    """Our decoder with the weights and images of a case."""

    def __init__(self, case: Case):
        self.c, self.q_BND = case.config, case.input("quant_features")[None]
        self.grids = [(h // 2, w // 2) for t, h, w in case.input("grid_thw").tolist() for _ in range(t)]
        layout = preprocess.pack_layout(self.grids, self.q_BND.shape[1], len(self.grids), 1)
        self.pack = {name: layout[name][None] for name in ("segment", "row", "col", "grid")}
        self.row, self.col = pixel_decoder.positions(self.pack, "raster")
        single = module(self.c, "single", "raster")
        table = (visual.pixel_decoder(single), *visual.pixel_decoder_sizes(single, self.q_BND.shape[-1]))
        self.params = load.variables(case, table)["params"]["pixel_decoder"]

    def run(self, scale: str, sight: str = "image"):
        """Patches [P, V] and intermediates; `sight`: an image sees itself ('image') or all of them ('all')."""
        model, pack = module(self.c, scale, "raster"), self.pack
        if sight == "all":  # one segment, so that positions must come from outside
            model = module(self.c, scale, "block")
            pack = {"segment": np.ones_like(self.row), "row": self.row, "col": self.col}
        apply = lambda params, q_BND, pack: model.apply({"params": params}, q_BND, pack, capture_intermediates=True)
        out_BPV, state = jax.jit(apply)(self.params, self.q_BND, pack)
        return np.asarray(out_BPV[0]), state["intermediates"]

    def images(self, patches_PV):
        """(number, CLIP-normalised pixels [3, H, W], uint8 [H, W, 3]) of each image."""
        at = 0
        for number, (h, w) in enumerate(self.grids):
            own = patches_PV[at : at + 4 * h * w]
            yield number, preprocess.patches_to_pixels(own, (h, w)).transpose(2, 0, 1), preprocess.patches_to_image(own, (h, w))
            at += 4 * h * w


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    decoder = Decoder(case)
    case.compare_ids("positions_2d", np.stack([decoder.row[0], decoder.col[0]], axis=-1))
    patches_PV, seen = decoder.run("single", "all")
    case.compare("unmerged", seen["unmerge2"]["__call__"][0].reshape(len(patches_PV), -1))
    case.compare("norm_in_out", seen["norm_in"]["__call__"][0])
    for i, x_BPW in enumerate(seen["layers"]["__call__"][0][0]):
        case.compare(f"cpu_layer{i}_out", x_BPW)
    for name in case.arrays:
        if match := re.fullmatch(r"cpu_pixel_features(?:_first(\d+))?", name):
            case.compare(name, patches_PV[: int(match[1])] if match[1] else patches_PV)
    for number, pixels, _ in decoder.images(decoder.run("single")[0]):
        case.compare(f"image{number}_pixels_single_scale", pixels)
    for number, pixels, rounded in decoder.images(decoder.run("double")[0]):
        _finished(case, f"gpu_image{number}", number, pixels, rounded)


def _finished(case: Case, name: str, number: int, pixels, rounded) -> None:
    error = case.compare(f"{name}_double_scale", pixels)
    levels = lambda x: x * preprocess.CLIP_STD[:, None, None] + preprocess.CLIP_MEAN[:, None, None]
    if f"{name}_uint8" in case and f"{name}_double_scale" in case:
        # A level is decided where the golden value lies half-way between two.
        exact = np.moveaxis(levels(case.golden(f"{name}_double_scale")), 0, -1) * 255
        case.compare_ids(f"{name}_uint8", rounded, np.abs(exact - np.floor(exact) - 0.5), error * 255 * preprocess.CLIP_STD.max())
    if number == 0:
        for array in case.arrays:
            if match := re.fullmatch(r"refiner_input_norm(?:_rows(\d+))?", array):
                signed = 2 * np.clip(levels(pixels), 0, 1) - 1
                case.compare(array, signed[None, :, : int(match[1])] if match[1] else signed[None])
