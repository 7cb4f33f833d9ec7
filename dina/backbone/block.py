"""The trunk: logical layers of two attentions, two dense blocks and one sparse block on a shortcut, then a norm.

Parameters of all logical layers are stacked along a leading dimension and looped over by `nn.scan`.

Legend: B rows, S positions, T cache slots, D width, L logical layers, E experts (real, then identity), C latent
rank, R rotated values, G groups of tokens. Source: reference/backbone.md §1.2.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dina import sharding
from dina.backbone import experts, rope
from dina.backbone.attention import MLA, absorb
from dina.backbone.config import EXCHANGES, BackboneConfig
from dina.backbone.experts import SparseFFN
from dina.backbone.linear import FEW_ROWS, beside, product, products, turn, turns, weight
from dina.backbone.norm import RMSNorm, fan_in
from dina.backbone.rows import ROUTED


ATTENDED = "attended"  # name of an attention's output, for `policy`
MOST_APART = 512  # experts of all layers up to which each gets a branch of its own: compiling takes 15 ms each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Latents and rotated keys of every attention and slot (two attentions per logical layer), and which document a slot holds.

    Where parameters are `serve`d, `latents` and `keys` are tuples (of layers) of pairs of [B, T, C] and [B, T, R].
    """

    latents: Float[Array, "L 2 B T C"] | tuple
    keys: Float[Array, "L 2 B T R"] | tuple
    segment_BT: Int[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackboneOut:
    """What the trunk returns; sums are local to the caller's shard.

    Attributes:
        h_BSD: hidden states after the final norm.
        stream_BSD: the residual stream before it, in its compute type (hidden z-loss, backbone.md §7.2).
        cache: updated cache, or None.
        counts_LGE: int32 selections of every expert, by group of tokens.
        router_z: (sum over layers and valid tokens of logsumexp(z)^2, number of valid tokens); their ratio is the
            sum over layers of each layer's mean.
        overflow: int32 (token, expert) pairs over buffer capacity, summed over layers; they took the exact slow path.
    """

    h_BSD: Float[Array, "B S D"]
    stream_BSD: Float[Array, "B S D"]
    cache: Cache | None
    counts_LGE: Int[Array, "L G E"]
    router_z: tuple[Float[Array, ""], Float[Array, ""]]
    overflow: Int[Array, ""]


def init_cache(cfg: BackboneConfig, batch: int, length: int, params: dict | None = None) -> Cache:
    """An empty cache of `length` slots for `batch` rows, in the compute type and in the form that `params` want if `serve`d."""
    a, dtype = cfg.attention, jnp.dtype(cfg.dtype)
    if params is None or "layers" in params:
        make = lambda size: jnp.zeros((cfg.layers, 2, batch, length, size), dtype)
    else:
        make = lambda size: tuple(tuple(jnp.zeros((batch, length, size), dtype) for _ in (0, 1)) for _ in range(cfg.layers))
    return Cache(make(a.kv_rank), make(a.rope), jnp.zeros((batch, length), jnp.int32))


def serve(cfg: BackboneConfig, params: dict, rows: int) -> dict:
    """Parameters for `rows` rows together on a CPU (of positions, where whole sequences are read; no gradient): one subtree a
    layer (a loop over stacked ones copies each layer's weights first); for few rows experts apart unless they are many, and
    from two rows on other matrices turned; for many rows experts in turn."""
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    few = rows <= FEW_ROWS
    layers = {f"layers_{i}": jax.tree.map(lambda x: x[i], params["layers"]) for i in range(cfg.layers)}
    for layer in layers.values():
        for i in (0, 1):
            attention, ffn = layer[f"attention_{i}"], layer[f"ffn_{i}"]
            attention, ffn = beside(attention, ("q_a", "kv_a"), rows), beside(ffn, ("gate", "up"), rows)
            if few and cfg.attention.decode == "absorbed":
                attention = attention | {"kv_b": absorb(attention["kv_b"], cfg.attention.nope)}
            if turns(rows):
                o_HVD = attention["o"]
                attention = attention | {"q_b": turn(attention["q_b"]), "o": turn(o_HVD.reshape(-1, o_HVD.shape[-1]))}
                ffn = ffn | {"down": turn(ffn["down"])}
            layer[f"attention_{i}"], layer[f"ffn_{i}"] = attention, ffn
        if cfg.experts.dispatch in ("gather", *EXCHANGES) and (not few or cfg.layers * cfg.experts.real <= MOST_APART):
            layer["experts"] = experts.serve(layer["experts"], cfg.dtype, few)
    return rest | layers


class DenseFFN(nn.Module):
    """SwiGLU without biases."""

    hidden: int
    dtype: str = "float32"
    gain: float = 1.0

    @nn.compact
    def __call__(self, u_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """down(silu(gate(u)) * up(u))."""
        width = u_BSD.shape[-1]
        into = [weight(self, name, fan_in(), (width, self.hidden)) for name in ("gate", "up")]
        gate_BSF, up_BSF = products(u_BSD, into, self.dtype)
        down_FD = weight(self, "down", fan_in(gain=self.gain), (self.hidden, width))
        return product(jax.nn.silu(gate_BSF.astype(jnp.float32)) * up_BSF, down_FD, self.dtype)


class LogicalLayer(nn.Module):
    """Two attention and dense sub-layers; the sparse block reads the first and is added after the second."""

    cfg: BackboneConfig
    axes: tuple[str, ...] = ()
    groups: int = 1

    @nn.compact
    def __call__(self, x_BSD, bias_E, cache, rotary, segment_BS, group_BS, cached_segment_BT, slot):
        """One logical layer in the shape `nn.scan` wants: (x, (new cache, RoutingStats)).

        Args:
            x_BSD: residual stream.
            bias_E: this layer's selection bias.
            cache: ([2, B, T, C], [2, B, T, R]), or two pairs where parameters are served, or None.
            rotary: cosines and sines of the positions.
            segment_BS: document numbers, 0 = padding.
            group_BS: 0 for tokens that are not routed.
            cached_segment_BT: document numbers of all slots, or None.
            slot: first slot of the new positions, or None.
        """
        cfg = self.cfg
        gain = 1.0 / (4 * cfg.layers)  # five additions to the stream per layer; keeps its variance near 1 at the start
        caches, shortcut = [], None
        for i in (0, 1):
            own = None if cache is None else (cache[0][i], cache[1][i])
            u_BSD = RMSNorm(cfg.norm_eps, name=f"input_norm_{i}")(x_BSD)
            mla = MLA(cfg.attention, cfg.dtype, gain, name=f"attention_{i}")
            y_BSD, own = mla(u_BSD, rotary, segment_BS, own, cached_segment_BT, slot)
            y_BSD = checkpoint_name(y_BSD, ATTENDED)
            caches.append(own)
            x_BSD = x_BSD + y_BSD.astype(x_BSD.dtype)
            u_BSD = RMSNorm(cfg.norm_eps, name=f"post_norm_{i}")(x_BSD)
            if i == 0:
                shortcut, stats = SparseFFN(cfg.experts, cfg.dtype, gain, self.axes, self.groups, name="experts")(u_BSD, bias_E, group_BS)
            x_BSD = x_BSD + DenseFFN(cfg.ffn, cfg.dtype, gain, name=f"ffn_{i}")(u_BSD).astype(x_BSD.dtype)
        if cache is not None:
            pairs = tuple(zip(*caches, strict=True))
            cache = pairs if isinstance(cache[0], tuple) else tuple(jnp.stack(pair) for pair in pairs)
        return x_BSD + shortcut.astype(x_BSD.dtype), (cache, stats)


def policy(remat: str):
    """What a rematerialised layer keeps: nothing; or the outputs of attentions, [N, D] each; or what experts' buffers hold, so
    that tokens do not travel again (in the first round of 'gather' and 'all_to_all')."""
    kept = {"full": (), "attention": (ATTENDED,), "experts": (ROUTED,), "attention+experts": (ATTENDED, ROUTED)}[remat]
    return jax.checkpoint_policies.save_only_these_names(*kept) if kept else None


def gathered(cfg: BackboneConfig, variables: dict) -> dict:
    """One layer's parameters made whole, in the layer's body; experts stay with their devices if tokens travel."""
    layer = dict(variables["params"])
    experts = dict(layer.pop("experts"))
    router, keep = sharding.whole(experts.pop("router")), -3 if cfg.experts.dispatch in EXCHANGES else 0
    experts = sharding.whole(experts, cfg.dtype, keep)
    return {"params": sharding.whole(layer, cfg.dtype) | {"experts": experts | {"router": router}}}


class Backbone(nn.Module):
    """All logical layers and the final norm.

    Attributes:
        axes: mesh axes that must agree on the experts' slow path.
        groups: how many groups of tokens the experts' selections are counted by.
    """

    cfg: BackboneConfig
    axes: tuple[str, ...] = ()
    groups: int = 1

    @nn.compact
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        position_BS: Int[Array, "B S"],
        segment_BS: Int[Array, "B S"],
        router_bias_LE: Float[Array, "L E"],
        group_BS: Int[Array, "B S"] | None = None,
        cache: Cache | None = None,
        slot: Int[Array, ""] | int | None = None,
    ) -> BackboneOut:
        """Runs the trunk over packed rows, or over new positions of cached rows.

        Args:
            x_BSD: input embeddings.
            position_BS: position of each token in its document.
            segment_BS: document number; 0 is padding. Attention is causal and stays within a document.
            router_bias_LE: selection biases (non-gradient state, see balance.py).
            group_BS: 0 for tokens that are not routed, else 1 + the group that they count in; default segment_BS > 0.
            cache: trains without; with it, queries see the slots before them that hold their document.
            slot: with a cache, the slot of the first new position, the same in all rows (prompts are left-padded).

        Returns:
            BackboneOut.
        """
        cfg = self.cfg
        group_BS = (segment_BS > 0).astype(jnp.int32) if group_BS is None else group_BS
        rotary = rope.table(position_BS, cfg.attention.rope, cfg.attention.theta)
        layers, cached_segment_BT = None, None
        if cache is not None:
            cached_segment_BT = jax.lax.dynamic_update_slice_in_dim(cache.segment_BT, segment_BS.astype(jnp.int32), slot, 1)
            layers = (cache.latents, cache.keys)
        layer = LogicalLayer
        if self.has_variable("params", "layers") and sharding.split(self.get_variable("params", "layers")):
            layer = nn.map_variables(layer, "params", functools.partial(gathered, cfg))
        if cfg.remat != "none":
            layer = nn.remat(layer, prevent_cse=False, policy=policy(cfg.remat))
        shared = (rotary, segment_BS, group_BS, cached_segment_BT, slot)
        if self.has_variable("params", "layers_0"):
            x_BSD, (layers, stats) = self._one_by_one(x_BSD, router_bias_LE, layers, shared)
            return self._out(x_BSD, layers, cached_segment_BT, stats, group_BS)
        stack = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, *[nn.broadcast] * 5),
            length=cfg.layers,
            unroll=min(cfg.unroll, cfg.layers),
        )
        x_BSD, (layers, stats) = stack(cfg, self.axes, self.groups, name="layers")(x_BSD, router_bias_LE, layers, *shared)
        return self._out(x_BSD, layers, cached_segment_BT, stats, group_BS)

    def _one_by_one(self, x_BSD, bias_LE, layers, shared):
        """The layers of `serve`d parameters."""
        if layers is not None and not isinstance(layers[0], tuple):
            raise ValueError("the cache was not made for these parameters: init_cache wants served ones too")
        kept, stats = [], []
        for i in range(self.cfg.layers):
            own = None if layers is None else tuple(c[i] for c in layers)
            x_BSD, (own, stat) = LogicalLayer(self.cfg, self.axes, self.groups, name=f"layers_{i}")(x_BSD, bias_LE[i], own, *shared)
            kept.append(own)
            stats.append(stat)
        layers = None if layers is None else tuple(zip(*kept, strict=True))
        return x_BSD, (layers, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats))

    def _out(self, x_BSD, layers, cached_segment_BT, stats, group_BS) -> BackboneOut:
        h_BSD = RMSNorm(self.cfg.norm_eps, name="final_norm")(x_BSD)
        cache = None if layers is None else Cache(*layers, cached_segment_BT)
        router_z = (jnp.sum(stats.z_sum), jnp.sum(group_BS > 0, dtype=jnp.float32))
        return BackboneOut(h_BSD, x_BSD, cache, stats.count_GR, router_z, jnp.sum(stats.overflow))
