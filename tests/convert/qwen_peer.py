"""Run by the interpreter that has torch: `python qwen_peer.py FOLDER` writes a small Qwen2.5-VL checkpoint and what its tower computes.

FOLDER/checkpoint is as transformers saves it, FOLDER/out.safetensors holds patches, grids, features before the merger (in
the order of windows) and merged cells.
"""

import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers

# Two images of a window's multiple and of odd sides, and two frames of a video, in one pack.
GRIDS = [[1, 8, 8], [1, 6, 10], [2, 2, 14], [1, 2, 2]]
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}  # fmt: skip
VISION = {"depth": 4, "hidden_size": 48, "intermediate_size": 28, "num_heads": 3, "window_size": 84, "fullatt_block_indexes": [1, 3], "out_hidden_size": 16}


def main(folder: pathlib.Path) -> None:
    """Draws all weights anew, for fresh ones have biases of zero and norms of one."""
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, image_token_id=3, video_token_id=4, vision_start_token_id=5,
                                           vision_end_token_id=6)  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()
    tower = model.model.visual if hasattr(model.model, "visual") else model.visual
    for name, weight in tower.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name or "ln_q" in name else 0.0, 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5)
    model.save_pretrained(folder / "checkpoint")
    patches = torch.randn(sum(t * h * w for t, h, w in GRIDS), 1176)
    with torch.no_grad():
        seen = []
        tower.merger.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        out = tower(patches, grid_thw=torch.tensor(GRIDS))
    merged = getattr(out, "pooler_output", out)
    arrays = {"patches": patches, "grids": torch.tensor(GRIDS), "features": seen[0], "merged": merged.contiguous()}
    safetensors.torch.save_file(arrays, folder / "out.safetensors")
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
