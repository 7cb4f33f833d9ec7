"""Depth transformer: the L codes of one position, each predicted from the trunk's hidden state and the codes before.

Row 0 is the hidden state, row l the running sum of the raw joint-table rows of codes 0..l-1; attention over rows is
causal and there is no positional code, because every level owns its slice of the feed-forward.

Tensors are level-major, [L, M, ...]: the sliced feed-forward is then a plain batched product. Weights are level-major
too, one to one with the released matrices: ffn_in[l, :, t] = linear1.weight[t*L + l, :] and
ffn_out[l, t, :] = linear2.weight[:, l*F + t], with F = ffn_scale * W / L hidden values per level. The released
feed-forward biases exist but are unused, so there are none here.

Legend: M positions, L levels, D trunk width, W head width, H attention heads, X = W/H, F hidden per level,
V classes (codes of a level plus one end class). Source: reference/backbone.md §4.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dina.backbone.config import DepthConfig
from dina.backbone.linear import Turned, product, turn, turns, weight
from dina.backbone.norm import RMSNorm, fan_in
from dina.heads.linear_loss import PADDED_LOGIT, linear_cross_entropy

EPS = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthCache:
    """Keys and values of the rows already run, per layer (first axis)."""

    key_NLMHX: Float[Array, "N L M H X"]
    value_NLMHX: Float[Array, "N L M H X"]


class LevelLoss(NamedTuple):
    """Weighted sums per level: cross-entropy in nats, correct argmax choices, and the weights."""

    loss_L: Float[Array, " L"]
    correct_L: Float[Array, " L"]
    weight_L: Float[Array, " L"]


class DepthLayer(nn.Module):
    """Pre-norm attention over levels and the level-sliced feed-forward."""

    cfg: DepthConfig
    levels: int

    @nn.compact
    def __call__(self, x_LMW, level=None, cache=None):
        """All levels at once, or one row (L = 1 in x) at `level` with `cache` = (keys, values) of all levels."""
        cfg, dtype, width = self.cfg, jnp.dtype(self.cfg.dtype), self.cfg.width
        size, gain = width // cfg.heads, 1.0 / (2 * cfg.layers)
        u = RMSNorm(EPS, name="norm_1")(x_LMW).astype(dtype)

        def project(name, bias):
            w_WHX = weight(self, name, fan_in(0, (1, 2)), (width, cfg.heads, size))
            y = product(u, w_WHX, cfg.dtype)
            return y + self.param(f"{name}_bias", nn.initializers.zeros, (cfg.heads, size)).astype(dtype) if bias else y

        q, k, v = project("q", True), project("k", False), project("v", True)
        if cache is None:
            row = jnp.arange(self.levels)
        else:
            k, v = (jax.lax.dynamic_update_slice_in_dim(c, new.astype(c.dtype), level, 0) for c, new in zip(cache, (k, v), strict=True))
            row = jnp.asarray(level)[None]
        y = attend(q, k, v, row[:, None] >= jnp.arange(self.levels))
        out_HXW = weight(self, "out", fan_in((0, 1), 2, gain=gain), (cfg.heads, size, width))
        out_XW = out_HXW if isinstance(out_HXW, Turned) else out_HXW.reshape(width, width)
        out_bias = self.param("out_bias", nn.initializers.zeros, (width,)).astype(x_LMW.dtype)
        y_LMW = product(y.reshape(x_LMW.shape), out_XW, cfg.dtype).astype(x_LMW.dtype) + out_bias
        self.sow("intermediates", "attention", y_LMW)  # kept only where a caller captures intermediates
        x_LMW = x_LMW + y_LMW
        hidden = cfg.ffn_scale * width // self.levels
        in_LWF = self.param("ffn_in", fan_in(1, 2, batch=(0,)), (self.levels, width, hidden)).astype(dtype)
        out_LFW = self.param("ffn_out", fan_in(1, 2, batch=(0,), gain=gain), (self.levels, hidden, width)).astype(dtype)
        if cache is not None:
            in_LWF, out_LFW = (jax.lax.dynamic_slice_in_dim(w, level, 1) for w in (in_LWF, out_LFW))
        u = RMSNorm(EPS, name="norm_2")(x_LMW).astype(dtype)
        hidden_LMF = jax.nn.gelu(jnp.einsum("lmw,lwf->lmf", u, in_LWF), approximate=False)
        return x_LMW + jnp.einsum("lmf,lfw->lmw", hidden_LMF, out_LFW).astype(x_LMW.dtype), (k, v)


def attend(q_LMHX, k_KMHX, v_KMHX, mask_LK) -> Float[Array, "L M H X"]:
    """Attention among the rows of each position; softmax in float32."""
    scores_MHLK = jnp.einsum("lmhx,kmhx->mhlk", q_LMHX * q_LMHX.shape[-1] ** -0.5, k_KMHX).astype(jnp.float32)
    p_MHLK = jax.nn.softmax(jnp.where(mask_LK, scores_MHLK, PADDED_LOGIT), -1)
    return jnp.einsum("mhlk,kmhx->lmhx", p_MHLK.astype(v_KMHX.dtype), v_KMHX)


class DepthHead(nn.Module):
    """The transformer and the parameters of its per-level classifiers.

    Attributes:
        cfg: widths and layers.
        sizes: codes of each level; classifier l has sizes[l] + 1 classes, the last one is the end class.
    """

    cfg: DepthConfig
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(
        self, rows_LMD: Float[Array, "L M D"], level: Int[Array, ""] | int | None = None, cache: DepthCache | None = None
    ) -> tuple[Float[Array, "L M W"], tuple[tuple[Array, Array], ...], DepthCache | None]:
        """Hidden states after the head's norm.

        Args:
            rows_LMD: `input_rows` of all levels, or one row (L = 1) when `level` and `cache` are given.
            level: level of that row.
            cache: from `init_cache`.

        Returns:
            Hidden states, the classifiers ((kernel [W, V], bias [V]) per level), and the cache with the row written.
        """
        cfg, levels = self.cfg, len(self.sizes)
        if cfg.width % cfg.heads or cfg.ffn_scale * cfg.width % levels:
            raise ValueError(f"depth head: width {cfg.width} must divide by {cfg.heads} heads, times {cfg.ffn_scale} by {levels} levels")
        x = RMSNorm(EPS, name="hidden_norm")(rows_LMD).astype(jnp.dtype(cfg.dtype))
        x = product(x, weight(self, "hidden_proj", fan_in(), (rows_LMD.shape[-1], cfg.width)), cfg.dtype)
        written = []
        for i in range(cfg.layers):
            own = None if cache is None else (cache.key_NLMHX[i], cache.value_NLMHX[i])
            x, own = DepthLayer(cfg, levels, name=f"layer_{i}")(x, level, own)
            written.append(own)
        x = RMSNorm(EPS, name="head_norm")(x)
        heads = []
        for i, size in enumerate(self.sizes):
            classes = -(-(size + 1) // cfg.class_multiple) * cfg.class_multiple
            kernel_WV = weight(self, f"head_{i}", _zero_padded(size + 1), (cfg.width, classes))
            heads.append((kernel_WV, self.param(f"head_{i}_bias", nn.initializers.zeros, (classes,))))
        cache = None if cache is None else DepthCache(*(jnp.stack(parts) for parts in zip(*written, strict=True)))
        return x, tuple(heads), cache


def _zero_padded(classes: int):
    def init(key, shape, dtype=jnp.float32):
        return jnp.where(jnp.arange(shape[1]) < classes, fan_in()(key, shape, dtype), 0.0)

    return init


def input_rows(h_MD: Float[Array, "M D"], embedded_MLD: Float[Array, "M L D"]) -> Float[Array, "L M D"]:
    """[h, e_0, e_0 + e_1, ...]: the last level's embedding is not used.

    Args:
        h_MD: trunk hidden states after the final norm.
        embedded_MLD: raw joint-table rows of the true codes, zero where a level is absent (end positions are all zero).
    """
    rows = [h_MD]
    for level in range(embedded_MLD.shape[1] - 1):
        rows.append(embedded_MLD[:, level] if level == 0 else rows[-1] + embedded_MLD[:, level])
    return jnp.stack([row.astype(h_MD.dtype) for row in rows])


def teacher_forced(module: DepthHead, params: Any, rows_LMD: Float[Array, "L M D"]) -> list[Float[Array, "M V"]]:
    """Logits of every level given the true codes, float32, [M, sizes[l] + 1] each. Small inputs only: see `losses`."""
    hidden_LMW, heads, _ = module.apply({"params": params}, rows_LMD)
    return [classify(hidden_LMW[i], *heads[i])[:, : size + 1] for i, size in enumerate(module.sizes)]


def classify(hidden_MW, kernel_WV, bias_V) -> Float[Array, "M V"]:
    """Logits of one level in float32."""
    return product(hidden_MW, kernel_WV, hidden_MW.dtype, jnp.float32) + bias_V


def losses(
    module: DepthHead, params: Any, rows_LMD: Float[Array, "L M D"], label_ML: Int[Array, "M L"], weight_M: Float[Array, " M"]
) -> LevelLoss:
    """Weighted sums of the teacher-forced cross-entropies, level by level; no level's logits are kept.

    Args:
        module: the head.
        params: its parameters.
        rows_LMD: from `input_rows`.
        label_ML: codes, or sizes[l] for the end class; -1 leaves a level out.
        weight_M: weight of each position; unused places of the buffer have 0.
    """
    hidden_LMW, heads, _ = module.apply({"params": params}, rows_LMD)
    sums, weights = [], []
    for i, size in enumerate(module.sizes):
        weights.append(jnp.where(label_ML[:, i] >= 0, weight_M, 0.0))
        sums.append(linear_cross_entropy(hidden_LMW[i], *heads[i], label_ML[:, i], weights[-1], size + 1, module.cfg.loss_chunk))
    loss_L, correct_L = (jnp.stack(parts) for parts in zip(*sums, strict=True))
    return LevelLoss(loss_L, correct_L, jnp.stack([jnp.sum(w) for w in weights]))


def serve(params: dict, rows: int) -> dict:
    """The head's parameters with matrices as `rows` rows on a CPU want them; `step` computes the same."""
    if not turns(rows):
        return params
    turned = {}
    for name, tree in params.items():
        if name.startswith("layer_"):
            out_HXW = tree["out"]
            turned[name] = tree | {key: turn(tree[key]) for key in ("q", "k", "v")} | {"out": turn(out_HXW.reshape(-1, out_HXW.shape[-1]))}
        elif name == "hidden_proj" or (name.startswith("head_") and not name.endswith(("bias", "norm"))):
            turned[name] = turn(tree)
    return params | turned


def init_cache(module: DepthHead, batch: int) -> DepthCache:
    """Room for all levels of `batch` positions."""
    cfg = module.cfg
    shape = (cfg.layers, len(module.sizes), batch, cfg.heads, cfg.width // cfg.heads)
    return DepthCache(jnp.zeros(shape, jnp.dtype(cfg.dtype)), jnp.zeros(shape, jnp.dtype(cfg.dtype)))


def step(
    module: DepthHead, params: Any, level: Int[Array, ""] | int, row_MD: Float[Array, "M D"], cache: DepthCache
) -> tuple[Float[Array, "M V"], DepthCache]:
    """Logits of one level from its input row, levels in order from 0.

    Args:
        module: the head.
        params: its parameters.
        level: a Python number gives [M, sizes[level] + 1]; a traced one gives [M, max(sizes) + 1] with -1e30 on the
            classes that the level lacks, so that one compiled loop can run all levels.
        row_MD: the hidden state at level 0, then the running sum of the embeddings of the codes chosen so far.
        cache: from `init_cache`, then from the level before.
    """
    hidden_1MW, heads, cache = module.apply({"params": params}, row_MD[None], level, cache)
    if isinstance(level, int):
        return classify(hidden_1MW[0], *heads[level])[:, : module.sizes[level] + 1], cache
    most = max(module.sizes) + 1

    def one(size, kernel_WV, bias_V):
        def logits(hidden_MW):
            own_MV = classify(hidden_MW, kernel_WV, bias_V)[:, : size + 1]
            return jnp.pad(own_MV, ((0, 0), (0, most - size - 1)), constant_values=PADDED_LOGIT)

        return logits

    # A branch a level, so that only that level's classifier is read.
    return jax.lax.switch(level, [one(n, *head) for n, head in zip(module.sizes, heads, strict=True)], hidden_1MW[0]), cache
