"""Run by the interpreter that has torch: `python whisper_peer.py FOLDER` writes a small Whisper checkpoint and what its encoder computes.

FOLDER/checkpoint is as transformers saves it, FOLDER/out.safetensors holds features [B, bands, T], the output of the first
layer and that of the encoder [B, T / 2, D].
"""

import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers

CONFIG = {"vocab_size": 64, "num_mel_bins": 12, "d_model": 48, "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 70,
          "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 20, "max_source_positions": 31, "max_target_positions": 8,
          "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "suppress_tokens": None,
          "begin_suppress_tokens": None}  # fmt: skip


def main(folder: pathlib.Path) -> None:
    """Draws all weights anew but the positions, for fresh ones have biases of zero and norms of one."""
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**CONFIG)).float().eval()
    encoder = model.model.encoder
    for name, weight in encoder.named_parameters():
        if "embed_positions" not in name:
            torch.nn.init.normal_(weight, 1.0 if "norm.weight" in name else 0.0, 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5)
    model.save_pretrained(folder / "checkpoint")
    features = torch.randn(3, CONFIG["num_mel_bins"], 2 * CONFIG["max_source_positions"])
    seen = []
    encoder.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        out = encoder(features).last_hidden_state
    safetensors.torch.save_file({"features": features, "layer0": seen[0].contiguous(), "out": out.contiguous()}, folder / "out.safetensors")
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
