"""The golden case of the visual encoder in our parameter layout (tests only)."""

import numpy as np

from tests.golden_io import GOLDEN

CASE = GOLDEN / "04_visual_encoder"


def encoder_params(weights, depth):
    """Parameters of `VisionEncoder` from the released names: kernels transposed, layers stacked."""

    def dense(names, keys=("kernel", "bias")):
        parts = {"kernel": [weights[f"{n}.weight"].T for n in names]}
        parts["bias"] = [weights[f"{n}.bias"] for n in names]
        return {key: np.stack(parts[key]) for key in keys}

    blocks = [f"visual_model.blocks.{i}" for i in range(depth)]
    names = {"qkv": "attn.qkv", "proj": "attn.proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    stacked = {ours: dense([f"{block}.{theirs}" for block in blocks]) for ours, theirs in names.items()}
    for norm in ("norm1", "norm2"):
        stacked[norm] = {"scale": np.stack([weights[f"{block}.{norm}.weight"] for block in blocks])}
    patch = weights["visual_model.patch_embed.proj.weight"]
    bridge = "visual_bridge_model.bridge"
    one = lambda name: {key: value[0] for key, value in dense([name]).items()}
    return {
        "vit": {"patch_embed": {"kernel": patch.reshape(len(patch), -1).T}, "blocks": stacked},
        "bridge": {
            "ln_q": {"scale": weights[f"{bridge}.ln_q.weight"]},
            "fc1": one(f"{bridge}.mlp.0"),
            "fc2": one(f"{bridge}.mlp.2"),
        },
    }
