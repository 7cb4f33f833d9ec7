"""Multi-head latent attention (MLA) over packed rows, and its cached form that stores only latents.

Training expands the latent to keys and values. Decoding keeps, per position, the normalised scaled latent and the
rotated shared key, and moves the expansion to the query and to the output ('absorbed'); both forms are equal.

Legend: B rows, S new positions, T cache slots or key positions, D width, H heads, Q query rank, C key-value rank,
N/R/V per-head sizes without rotation, with rotation, and of values; K = N + R. Source: reference/backbone.md §1.3.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dina.backbone import rope, splash
from dina.backbone.config import AttentionConfig
from dina.backbone.linear import Served, Turned, product, products, rearranges, weight
from dina.backbone.norm import RMSNorm, fan_in

LATENT_EPS = 1e-6  # both inner norms, whatever the trunk's epsilon is (backbone.md §1.3)
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Absorbed(Served):
    """kv_b as the absorbed form multiplies it: every head's matrix for itself, which a step would otherwise copy so."""

    key_HNC: Float[Array, "H N C"]
    value_HCV: Float[Array, "H C V"]


def absorb(kv_b_CHX: Float[Array, "C H X"], nope: int) -> Absorbed:
    """Splits and transposes."""
    return Absorbed(jnp.transpose(kv_b_CHX[..., :nope], (1, 2, 0)), jnp.transpose(kv_b_CHX[..., nope:], (1, 0, 2)))


class MLA(nn.Module):
    """One attention. `gain` scales the variance of the output projection at initialisation."""

    cfg: AttentionConfig
    dtype: str = "float32"
    gain: float = 1.0

    @nn.compact
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        rotary: tuple[Float[Array, "B S P"], Float[Array, "B S P"]],
        segment_BS: Int[Array, "B S"],
        cache: tuple[Float[Array, "B T C"], Float[Array, "B T R"]] | None = None,
        cached_segment_BT: Int[Array, "B T"] | None = None,
        slot: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B T C"], Float[Array, "B T R"]] | None]:
        """Causal attention within segments.

        Args:
            x_BSD: normalised input.
            rotary: cosines and sines of `rope.table` at the positions of x.
            segment_BS: document number of each position; 0 is padding, whose output is exactly zero.
            cache: latents and rotated keys of all slots; None trains.
            cached_segment_BT: document number of every slot, the new positions already written.
            slot: first slot of the new positions.

        Returns:
            The output, and the cache with the new positions written.
        """
        cfg, dtype, width = self.cfg, jnp.dtype(self.dtype), x_BSD.shape[-1]
        shapes = {"q_a": (width, cfg.q_rank), "q_b": (cfg.q_rank, cfg.heads, cfg.nope + cfg.rope),
                  "kv_a": (width, cfg.kv_rank + cfg.rope), "kv_b": (cfg.kv_rank, cfg.heads, cfg.nope + cfg.v)}
        w = {name: weight(self, name, fan_in(0, tuple(range(1, len(s)))), s) for name, s in shapes.items()}
        o_HVD = weight(self, "o", fan_in((0, 1), 2, gain=self.gain), (cfg.heads, cfg.v, width))
        # The query scale sqrt(D/Q) and the softmax scale act on rank Q instead of on S x T scores: the map is linear.
        q_scale = math.sqrt(width / cfg.q_rank) / math.sqrt(cfg.nope + cfg.rope)
        query, down = products(x_BSD, (w["q_a"], w["kv_a"]), self.dtype)
        q_BSQ = RMSNorm(LATENT_EPS, name="q_norm")(query) * q_scale
        q_BSHK = product(q_BSQ, w["q_b"], self.dtype)
        turned = rope.rotate(q_BSHK[..., cfg.nope :], *(t[:, :, None] for t in rotary))
        q_BSHK = jnp.concatenate([q_BSHK[..., : cfg.nope], turned], -1)
        latent_BSC = RMSNorm(LATENT_EPS, name="kv_norm")(down[..., : cfg.kv_rank]) * math.sqrt(width / cfg.kv_rank)
        key_BSR = rope.rotate(down[..., cfg.kv_rank :], *rotary)
        if cache is None:
            k_BTHK, v_BTHV = expand(cfg, latent_BSC.astype(dtype), key_BSR, w["kv_b"])
            in_blocks = lambda q, k, v, segment: attend(q, k, v, segment, segment, 0, cfg.block)
            y_BSHV = splash.attend(in_blocks, q_BSHK, k_BTHK, v_BTHV, segment_BS, cfg.block)
        else:
            cache = (write(cache[0], latent_BSC, slot), write(cache[1], key_BSR, slot))
            if jax.default_backend() == "cpu":  # which writes twice otherwise, once for each product that reads it, and copies the cache for that
                cache = jax.lax.optimization_barrier(cache)
            form = {"absorbed": attend_absorbed, "expanded": attend_expanded}[cfg.decode]
            kv_b = jax.tree.map(lambda x: x.astype(dtype), w["kv_b"])
            y_BSHV = form(cfg, q_BSHK, *(c.astype(dtype) for c in cache), kv_b, segment_BS, cached_segment_BT, slot)
        y_BSHV = jnp.where((segment_BS > 0)[:, :, None, None], y_BSHV, 0)
        y_BSX = y_BSHV.reshape(*x_BSD.shape[:2], cfg.heads * cfg.v)
        o_XD = o_HVD if isinstance(o_HVD, Turned) else o_HVD.reshape(-1, width)
        return product(y_BSX, o_XD, self.dtype), cache


def write(cache_BTX: Array, new_BSX: Array, slot: Int[Array, ""] | int) -> Array:
    """Writes new positions at `slot` in every row."""
    return jax.lax.dynamic_update_slice_in_dim(cache_BTX, new_BSX.astype(cache_BTX.dtype), slot, axis=1)


def expand(cfg: AttentionConfig, latent_BTC: Array, key_BTR: Array, kv_b_CHX: Array) -> tuple[Array, Array]:
    """Keys [B, T, H, N+R] and values [B, T, H, V] of latents; the rotated key is shared by all heads."""
    kv = product(latent_BTC, kv_b_CHX, latent_BTC.dtype)
    shared = jnp.broadcast_to(key_BTR[:, :, None].astype(kv.dtype), (*kv.shape[:3], cfg.rope))
    return jnp.concatenate([kv[..., : cfg.nope], shared], -1), kv[..., cfg.nope :]


def visible(segment_BS: Array, segment_BT: Array, offset: Int[Array, ""] | int) -> Array:
    """[B, 1, S, T]: key in the query's segment and not after it; query s sits at key position offset + s."""
    causal_ST = jnp.arange(segment_BT.shape[1]) <= offset + jnp.arange(segment_BS.shape[1])[:, None]
    return (causal_ST & (segment_BS[:, :, None] == segment_BT[:, None, :]))[:, None]


def probabilities(scores_BHST: Array, mask_B1ST: Array) -> Array:
    """Softmax in float32; a row without any visible key is uniform, hence finite."""
    return jax.nn.softmax(jnp.where(mask_B1ST, scores_BHST.astype(jnp.float32), MASKED), axis=-1)


def attend(q_BSHK: Array, k_BTHK: Array, v_BTHV: Array, segment_BS: Array, segment_BT: Array, offset, block: int) -> Array:
    """Attention of scaled queries over expanded keys; with `block`, a block of queries reads no later key.

    Blocks apply only where offset is the Python number 0, i.e. queries and keys are the same positions.
    """
    q_BHSK, k_BHTK, v_BHTV = (jnp.swapaxes(x, 1, 2) for x in (q_BSHK, k_BTHK, v_BTHV))
    length = q_BHSK.shape[2]
    block = block if block and isinstance(offset, int) else length
    parts = []
    for start in range(0, length, block):
        now, past = slice(start, start + block), slice(0, start + block if block < length else None)
        scores = jnp.einsum("bhsk,bhtk->bhst", q_BHSK[:, :, now], k_BHTK[:, :, past])
        mask = visible(segment_BS[:, now], segment_BT[:, past], start if block < length else offset)
        p = probabilities(scores, mask).astype(v_BHTV.dtype)
        parts.append(jnp.einsum("bhst,bhtv->bhsv", p, v_BHTV[:, :, past]))
    return jnp.swapaxes(jnp.concatenate(parts, 2), 1, 2)


def attend_expanded(cfg, q_BSHK, latent_BTC, key_BTR, kv_b_CHX, segment_BS, segment_BT, slot) -> Array:
    """Cached attention that rebuilds every key and value: the plain form that `attend_absorbed` must equal."""
    k_BTHK, v_BTHV = expand(cfg, latent_BTC, key_BTR, kv_b_CHX)
    return attend(q_BSHK, k_BTHK, v_BTHV, segment_BS, segment_BT, jnp.asarray(slot), 0)


def attend_absorbed(cfg, q_BSHK, latent_BTC, key_BTR, kv_b, segment_BS, segment_BT, slot) -> Array:
    """Cached attention on the latents: q' = W_k q meets c, and the mix of latents passes W_v once per query.

    P: heads and queries of a row together.
    """
    kv_b = kv_b if isinstance(kv_b, Absorbed) else absorb(kv_b, cfg.nope)
    rows, length, heads = q_BSHK.shape[:3]
    # Products of stacked matrices with the stack in front: XLA:CPU takes the same as einsum over [b, s, h, x] two to three
    # times as long (8 rows, 8 heads, 128 slots: 109 us against 287 for the mix, 65 and 62 against 123 and 105 around it).
    by_head = lambda x_BSHX: jnp.swapaxes(x_BSHX.reshape(rows * length, heads, -1), 0, 1)
    by_row = lambda x_HNX: jnp.moveaxis(x_HNX.reshape(heads, rows, length, -1), 0, 1).reshape(rows, heads * length, -1)
    q_BPC, turned_BPR = by_row(by_head(q_BSHK[..., : cfg.nope]) @ kv_b.key_HNC), by_row(by_head(q_BSHK[..., cfg.nope :]))
    # Of one query the slots come first: transposing all of them takes longer than the product (16 against 7 us; eight rows: 180, 280).
    against = slots_first if rows * length == 1 and rearranges() else lambda q_BPX, kept_BTX: q_BPX @ jnp.swapaxes(kept_BTX, 1, 2)
    scores = against(q_BPC, latent_BTC) + against(turned_BPR, key_BTR)
    p = probabilities(scores.reshape(rows, heads, length, -1), visible(segment_BS, segment_BT, slot)).astype(latent_BTC.dtype)
    mixed_BPC = p.reshape(rows, heads * length, -1) @ latent_BTC
    mixed_HNC = jnp.moveaxis(mixed_BPC.reshape(rows, heads, length, -1), 1, 0).reshape(heads, rows * length, -1)
    return jnp.swapaxes(mixed_HNC @ kv_b.value_HCV, 0, 1).reshape(rows, length, heads, -1)


def slots_first(q_BPX: Array, kept_BTX: Array) -> Array:
    """[B, P, T]: q times all slots; the barrier keeps XLA from turning the product round again."""
    return jnp.swapaxes(jax.lax.optimization_barrier(kept_BTX @ jnp.swapaxes(q_BPX, 1, 2)), 1, 2)
