"""Cell features to codes, code vectors and what the language model is given (case 05)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dina import embed
from dina.convert import language, visual
from dina.quantize import lookup, rvq
from dina.vision.tokenizer import QuantConv
from tools.parity import load
from tools.parity.case import Case

COMMITMENT = 0.25  # the reference's commit_loss_ratio


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "level0_distances" in case and "quant_cumulative" in case


def settings(c) -> rvq.RVQConfig:
    """The quantizer of a case's config."""
    sizes = c["codebook_size"]
    return rvq.RVQConfig(
        sizes=tuple(sizes) if isinstance(sizes, list) else (sizes,) * c["depth"],
        dim=c["codebook_dim"],
        codebook="shared" if c["shared_codebook"] else "separate",
    )


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    c, cfg = case.config, settings(case.config)
    rules = [*visual.codebooks(cfg, ""), *(visual.quant_conv("") if c["quant_conv"] else [])]
    if any(name.endswith(".embed_ema") for name in case.weight_names):
        rules += visual.averages(cfg, "")
    variables = load.variables(case, (rules, *visual.quantizer_sizes(cfg, c["in_channels"])))
    x_ND = jnp.asarray(case.input("features"))
    if c["quant_conv"]:
        x_ND = QuantConv(cfg.dim).apply({"params": variables["params"]["vision_quantizer"]["quant_conv"]}, x_ND)
    case.compare("quant_conv_out", x_ND)
    _codes(case, cfg, variables["stats"]["vision_quantizer"], x_ND)
    if "bridge_codes_in" in case:
        _embedding(case)


def _codes(case: Case, cfg: rvq.RVQConfig, stats, x_ND) -> None:
    distances_NK = lookup.scores(x_ND, stats["codebook"][cfg.book(0)])
    error = case.compare("level0_distances", distances_NK)
    out = jax.jit(lambda x_ND: rvq.quantize(cfg, stats, x_ND, jnp.ones(len(x_ND))))(x_ND)
    other_NL = case.compare_ids("codes", out.codes_NL, case.golden("argmin_margin"), error, along=1)
    lost_NL = np.maximum.accumulate(other_NL, axis=1)
    lost_N = lost_NL[:, -1]
    partial_LND = np.stack([rvq.decode(cfg, stats, out.codes_NL, level + 1) for level in range(cfg.levels)])
    before_LND = np.asarray(x_ND) - np.concatenate([np.zeros_like(partial_LND[:1]), partial_LND[:-1]])
    margins = [_margin(lookup.scores(jnp.asarray(r_ND), stats["codebook"][cfg.book(level)])) for level, r_ND in enumerate(before_LND)]
    # The difference of two distances: its error is theirs.
    case.compare("argmin_margin", np.stack(margins, -1), scale=float(np.max(distances_NK)), lost=lost_NL)
    case.compare("quant_cumulative", partial_LND, lost=lost_NL.T)
    case.compare("quants_NdhL", out.q_ND.T[None, :, None], lost=np.broadcast_to(lost_N, (1, cfg.dim, 1, len(lost_N))))
    case.compare("decoded_features", partial_LND[-1], lost=lost_N)
    case.compare("final_residual", x_ND - partial_LND[-1], lost=lost_N)
    if lost_N.any():
        case.leave_out("commit_loss", "a mean over all cells, and some have another code of two that are as near")
    else:
        case.compare("commit_loss", COMMITMENT * (out.commit[0] / out.commit[1])[None])


def _margin(distances_NK) -> np.ndarray:
    best = np.partition(np.asarray(distances_NK), 1, axis=-1)
    return best[:, 1] - best[:, 0]


def _embedding(case: Case) -> None:
    """Sums of the rows of every level's table, which have one more than there are codes, and the pre-buffer."""
    c, prefix = case.config, "visual_emb_bridge"
    codes_NL = case.input("bridge_codes_in")
    rows = [case.weight(f"{prefix}.embedding_layers.{level}.weight")[codes_NL[:, level]] for level in range(codes_NL.shape[1])]
    summed_ND = jnp.asarray(sum(rows[1:], start=rows[0]))
    case.compare("visual_emb_sum", summed_ND)
    table = (language.pre_buffer(f"{prefix}.transformer_block"), {}, {"d": c["hidden_size"], "b": c["intermediate_size"]})
    params = load.variables(case, table)["params"]["embed"]["pre_buffer"]
    block = embed.PreBuffer(c["intermediate_size"], c["rms_norm_eps"])
    case.compare("visual_emb_out", block.apply({"params": params}, summed_ND[None])[0])
