"""A Qwen2.5-VL vision tower of transformers as our part `vision_encoder`.

Its transformer is the released encoder's own shape (tokenizers.md A.2), so the same table reads it, with the convolution of
the patch embedding flattened. Its merger is our bridge, layer for layer, and `out_hidden_size` its width: nothing is dropped.
Both spellings of the names are read, 'visual.' of the published checkpoints and 'model.visual.'; the language model is not.
"""

from __future__ import annotations

from typing import Any

from dina.config import InputError
from dina.convert import hf_visual, visual
from dina.convert.plan import Leaf, account
from dina.convert.released import Released
from dina.convert.rules import by_path, least_shape, pieces
from dina.vision.bridge import make_encoder

STARTS = ("visual", "model.visual")
KINDS = ("qwen2_5_vl", "qwen2_5_vl_vision")  # of a vision_config; that of Qwen2-VL or Qwen3-VL is another network


def make(checkpoint: Released) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """(our arrays by path, settings as of hf_visual.py) of the tower in a checkpoint.

    Raises:
        InputError: no such tower, a setting that our encoder cannot express, or tensors that are missing, unknown or of
            another shape or dtype.
    """
    config = checkpoint.config()
    if not isinstance(config.get("vision_config"), dict):
        raise InputError(f"{checkpoint.folder}/config.json has no section 'vision_config': no checkpoint of Qwen2.5-VL")
    c = config["vision_config"]
    if c.get("model_type", KINDS[0]) not in KINDS:
        raise InputError(f"vision_config.model_type is {c['model_type']!r}; this code computes {' or '.join(map(repr, KINDS))}")
    start = next((s for s in STARTS if any(name.startswith(f"{s}.") for name in checkpoint.tensors)), None)
    if start is None:
        raise InputError(f"{checkpoint.folder} holds no tensor whose name begins with {' or '.join(f'{s}.' for s in STARTS)}")
    found = hf_visual.pixels(checkpoint) | hf_visual.tower(c, "vision_config")
    found["encoder"]["pixels"] = "float32"
    sizes = visual.encoder_sizes(make_encoder(hf_visual.as_config(found)))
    groups = by_path(pieces([*visual.tower(start), *visual.bridge(f"{start}.merger")], *sizes))
    leaves = {path: Leaf(path, least_shape(group), tuple(group)) for path, group in groups.items()}
    account(checkpoint, leaves, [name for name in checkpoint.tensors if name.startswith(f"{start}.")])
    return leaves, found
