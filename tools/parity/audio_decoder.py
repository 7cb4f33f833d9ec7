"""Code vectors to hidden frames and two mels (case 08c): a padded batch as the reference computes it, and one clip alone.

The reference's group norms count padding, so a clip depends on the longest one beside it ('padded'). Without padding
both of our forms must agree with it.
"""

from __future__ import annotations

import jax
import numpy as np

from dina.audio import mel_decoder
from dina.audio.encoder import length_mask
from dina.convert import audio as tables
from tools.parity import load
from tools.parity.audio_tokenizer import packed
from tools.parity.case import Case

FIRST = "audio_decoder.dconv1.conv.weight"


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "audio_embed_packed" in case and "refined_mel" in case


def module(c, statistics: str) -> mel_decoder.MelDecoder:
    """The decoder of a case's config."""
    a, v = c["audio"], c["vocoder"]
    sizes = a["d_model"], a["decoder_layers"], a["decoder_attention_heads"], a["decoder_ffn_dim"]
    pool, kernel, frame = a["avg_pooler"], a["decoder_kernel_size"], (a["sampling_rate"], a["hop_length"])
    frames = mel_decoder.FrameDecoder(*sizes, statistics, pool, kernel, a["activation_function"], parent=None)
    mel = v["num_mel_bins"], v["sampling_rate"], v["hop_length"], tuple(v["channels"])
    head = mel_decoder.MelHead(*mel, statistics, pool, kernel, a["decoder_stride_size"], frame, parent=None)
    return mel_decoder.MelDecoder(frames, head)


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    model, length_B = module(case.config, "padded"), case.input("lengths")
    x_BUD = _rows(case.input("audio_embed_packed"), length_B)
    prefix = next(name for name in case.weight_names if name.endswith(FIRST)).removesuffix(FIRST)
    table = f"{prefix}audio_decoder.positional_embedding"
    if table in case.weight_names:
        case.drop_weight(table, "sinusoids, which our module computes")
    params = load.variables(case, (tables.decoder(model, prefix), *tables.decoder_sizes(model)))["params"]["audio_decoder"]

    def decode(model, x_BUD, length_B):
        apply = lambda params, x, length: model.apply({"params": params}, x, length, capture_intermediates=True)
        out, state = jax.jit(apply)(params, x_BUD, length_B)
        return (*out, state["intermediates"]["frames"]["dconv1"]["__call__"][0])

    hidden_BTD, coarse, refined, grown_BTD = decode(model, x_BUD, length_B)
    hidden_B = mel_decoder.hidden_length(length_B, model.frames.pool, model.frames.kernel)
    for name in ("length_before_dconv2", "dconv1_len"):
        case.compare_ids(name, hidden_B)
    case.compare("dconv1_out", np.where(length_mask(hidden_B, grown_BTD.shape[1])[..., None], grown_BTD, 0))
    case.compare("hidden_before_dconv2", packed(hidden_BTD, hidden_B))
    case.compare_ids("mel_length", model.head.lengths(length_B, x_BUD.shape[1])[0])
    case.compare("coarse_mel", coarse)
    case.compare("refined_mel", refined)
    alone = [decode(module(case.config, statistics), x_BUD[:1, : length_B[0]], length_B[:1]) for statistics in ("padded", "masked")]
    case.compare("single_hidden_before_dconv2", *(out[0][0] for out in alone))
    case.compare("single_coarse_mel", *(out[1] for out in alone))
    case.compare("single_refined_mel", *(out[2] for out in alone))


def _rows(packed_ND: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """The inverse of `packed`, zeros beyond each length."""
    rows_BUD = np.zeros((len(length_B), length_B.max(), packed_ND.shape[-1]), np.float32)
    rows_BUD[np.arange(length_B.max()) < length_B[:, None]] = packed_ND
    return rows_BUD
