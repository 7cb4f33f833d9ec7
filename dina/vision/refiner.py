"""The refiner: a flow-matching diffusion transformer that sharpens the pixel decoder's image (tokenizers.md A.7).

It denoises the tokens of an autoencoder (dina/vision/autoencoder.py) under two conditions: the pixel decoder's image,
laid beside the noise as reference tokens, and the projected code vectors, one token per cell. Each kind passes its
own small refiner, then all of an image's tokens attend to each other. Several images share a row; segments keep them
apart. t = 0 is noise, t = 1 is data, the velocity is data minus noise. The part `refiner`.

Letters: B rows, N cells, T latent tokens, C values of a latent token, D width of a code vector, I images of a row,
W width, E width of the time embedding, H heads, G key-value heads, K head width, R tokens of the references (most often
T), S = N + R + T joint tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dina.vision.autoencoder import make_autoencoder
from dina.vision.attention import attend
from dina.vision.encoder import RMSNorm
from dina.vision.pixel_decoder import rotate_pairs, segment_index

PART = "refiner"
ROPE_THETA = 1e4
EPS = 1e-5  # of norms; those of queries and keys have it whatever `eps` says
TIME_FREQUENCIES, TIME_SCALE = 128, 1000.0
PREDICTIONS = ("velocity", "clean", "correction")
NEAREST_END = 0.05  # a clean prediction becomes a velocity by / (1 - t), not by less than this


def default_refiner_config() -> ConfigDict:
    """`config.vision.refiner`: released 32 layers of width 2,520 with 21 heads, 7 key-value heads; small here."""
    return ConfigDict(
        {
            "width": 96,
            "depth": 3,
            "refiner_layers": 1,
            "heads": 4,
            "kv_heads": 2,
            "ff": 256,
            "cond_dim": 96,
            "references": 1,
            # 'velocity' is the released form. 588 pixel values a token are more than the width: a network that names
            # the clean token ('clean') need not carry the noise through it, and one that names what the reference lacks
            # ('correction') starts as good as the reference. After 80 steps, one run each, squared error of what
            # it takes for the data: 0.12 and 0.039 (some images have no reference), of the reference itself 0.037.
            "prediction": "correction",
            "remat": "none",
            "autoencoder": {"name": "patch", "side": 14},
            # Released: 28 steps, both scales 1.5 (three passes a step).
            "sampler": {"steps": 8, "cond_scale": 1.0, "ref_scale": 1.0},
        }
    )


default_config = default_refiner_config  # the name that dina/vision/config.py looks for


def rotary_tables(id_BT3: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """cos, sin [B, T, 1, K] of three-axis positions: `axes` of the head's values per axis, adjacent pairs share an angle."""
    frequencies = [ROPE_THETA ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width) for width in axes]
    angles = [id_BT3[..., i : i + 1].astype(jnp.float32) * frequency for i, frequency in enumerate(frequencies)]
    angles = jnp.repeat(jnp.concatenate(angles, axis=-1), 2, axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def token_positions(
    pack: Mapping[str, Array], layout: Mapping[str, Array], has_ref_BI: Array, ref_layout: Mapping[str, Array] | None = None
) -> tuple[Array, Array, Array]:
    """Three-axis ids of condition [B, N, 3], reference [B, R, 3] and noise tokens [B, T, 3] (A.7).

    Condition token l of an image of L cells sits at (l, l, l), a reference token at (L, row, col), a noise token at
    (L + the reference's longer side, row, col), the shift only where a reference is there.
    """
    ref_layout = layout if ref_layout is None else ref_layout
    length_BI = jnp.prod(pack["grid"], axis=-1)
    here = ref_layout["segment"][:, None] == jnp.arange(1, length_BI.shape[1] + 1)[None, :, None]
    reach_BR = jnp.maximum(ref_layout["row"], ref_layout["col"]) + 1
    side_BI = jnp.max(jnp.where(here, reach_BR[:, None], 0), axis=-1)

    def place(first_BI, tokens):
        first_BT = jnp.take_along_axis(first_BI, image_index(tokens["segment"]), axis=1)
        return jnp.stack([first_BT, tokens["row"], tokens["col"]], axis=-1)

    index_BN = segment_index(pack["cell_segment"])
    noise = place(length_BI + side_BI * has_ref_BI.astype(jnp.int32), layout)
    return jnp.repeat(index_BN[..., None], 3, axis=-1), place(length_BI, ref_layout), noise


def image_index(segment: Array) -> Array:
    """Which image of its row a token belongs to, 0-based; padding reads image 0."""
    return jnp.maximum(segment - 1, 0)


def spread(x_BIX: Array, image_BT: Array) -> Array:
    """Per-image vectors laid out over tokens: [B, T, X]."""
    return jnp.take_along_axis(x_BIX, image_BT[..., None], axis=1)


class Attention(nn.Module):
    """Grouped-query attention without biases, learned RMS norms on queries and keys, rotary after the norms."""

    heads: int
    kv_heads: int

    @nn.compact
    def __call__(self, x_BSW, segment_BS, rotary):
        b, s, w = x_BSW.shape
        k = w // self.heads
        dense = lambda heads, name: nn.Dense(heads * k, use_bias=False, name=name)(x_BSW).reshape(b, s, heads, k)
        q = rotate_pairs(RMSNorm(EPS, name="norm_q")(dense(self.heads, "to_q")), *rotary) * k**-0.5
        key = rotate_pairs(RMSNorm(EPS, name="norm_k")(dense(self.kv_heads, "to_k")), *rotary)
        value = dense(self.kv_heads, "to_v")
        return nn.Dense(w, use_bias=False, name="to_out")(attend(q, key, value, (segment_BS,)))


class Block(nn.Module):
    """Attention and SwiGLU with norms before and after each; `modulation` is 'time' or 'none'."""

    heads: int
    kv_heads: int
    ff: int
    modulation: str
    eps: float = EPS

    @nn.compact
    def __call__(self, x_BSW, temb_BIE, image_BS, segment_BS, rotary):
        w = x_BSW.shape[-1]
        norm = lambda name, x: RMSNorm(self.eps, name=name)(x)
        if self.modulation == "time":
            parts = spread(nn.Dense(4 * w, name="modulate")(nn.silu(temb_BIE)), image_BS)
            scale_a, gate_a, scale_m, gate_m = jnp.split(parts, 4, axis=-1)
            gate_a, gate_m = jnp.tanh(gate_a), jnp.tanh(gate_m)
        else:
            scale_a = scale_m = 0.0
            gate_a = gate_m = 1.0
        h_BSW = norm("norm1", x_BSW) * (1 + scale_a)
        h_BSW = Attention(self.heads, self.kv_heads, name="attn")(h_BSW, segment_BS, rotary)
        x_BSW = x_BSW + gate_a * norm("norm2", h_BSW)
        h_BSW = norm("ffn_norm1", x_BSW) * (1 + scale_m)
        dense = lambda width, name, x: nn.Dense(width, use_bias=False, name=name)(x)
        h_BSF = nn.silu(dense(self.ff, "linear_1", h_BSW)) * dense(self.ff, "linear_3", h_BSW)
        return x_BSW + gate_m * norm("ffn_norm2", dense(w, "linear_2", h_BSF)), None


class Refiner(nn.Module):
    """Velocity of packed latent tokens.

    Attributes:
        width, depth, refiner_layers, heads, kv_heads, ff: W, joint layers, layers of each of the three refiners, H,
            G, feed-forward width.
        cond_dim: width to which code vectors are projected first; 0: they are used as they are.
        references: most reference images of one image (one is used here).
        token_dim: C.
        prediction: what the network's output is: 'velocity', 'clean' (the data) or 'correction' (the data less the
            reference, zero at the start).
        remat: 'none' or 'block'.
        eps: of the norms.
        time_scale: by which times are multiplied before their sinusoids.
        axes: values of a head that turn by each of the three positions; (): a third each.
    """

    width: int
    depth: int
    refiner_layers: int
    heads: int
    kv_heads: int
    ff: int
    cond_dim: int
    references: int
    token_dim: int
    prediction: str = "velocity"
    remat: str = "none"
    eps: float = EPS
    time_scale: float = TIME_SCALE
    axes: tuple[int, ...] = ()

    @property
    def time_width(self) -> int:
        """E."""
        return min(self.width, 1024)

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """`axes` as they are used. Raises ValueError if they do not make up a head in pairs."""
        head = self.width // self.heads
        axes = self.axes or (head // 3,) * 3
        if sum(axes) != head or any(width % 2 for width in axes):
            raise ValueError(f"refiner head width {head} must be made of three axes of pairs, not {axes}")
        return axes

    @nn.compact
    def __call__(
        self,
        x_BTC: Float[Array, "B T C"],
        t_BI: Float[Array, "B I"],
        cond_BND: Float[Array, "B N D"],
        ref_BTC: Float[Array, "B T C"],
        pack: Mapping[str, Array],
        layout: Mapping[str, Array],
        keep: Mapping[str, Float[Array, "B I"]],
        ref_layout: Mapping[str, Array] | None = None,
    ) -> Float[Array, "B T C"]:
        """Velocity at x and t.

        Args:
            x_BTC: noisy tokens.
            t_BI: time of each image, 0 = noise.
            cond_BND: sums of code vectors.
            ref_BTC: tokens of the pixel decoder's image.
            pack: cell_segment [B, N], grid [B, I, 2].
            layout: segment, row, col [B, T] of the latent tokens.
            keep: 'cond' and 'ref', 1 where the image has that condition. A dropped code condition is zero after its
                projection (Q13), a dropped reference is absent.
            ref_layout: of the reference's tokens where they are not laid out as the noise's.
        """
        ref_layout = layout if ref_layout is None else ref_layout
        image_BN, image_BT = image_index(pack["cell_segment"]), image_index(layout["segment"])
        image_BR = image_index(ref_layout["segment"])
        seg_cond, seg_x = pack["cell_segment"], layout["segment"]
        has_ref_BR = spread(keep["ref"][..., None], image_BR)[..., 0] > 0
        seg_ref = jnp.where(has_ref_BR, ref_layout["segment"], -1)  # seen by nobody but their like
        rotary = [rotary_tables(ids, self.rotary_axes) for ids in token_positions(pack, layout, keep["ref"], ref_layout)]
        temb_BIE = self.time_embedding(t_BI)
        cond = nn.Dense(self.cond_dim, name="cond_proj")(cond_BND) if self.cond_dim else cond_BND
        cond = cond * spread(keep["cond"][..., None], image_BN)
        # A dropped condition is this bias alone: at zero, every norm of the stack would multiply its gradient by 300.
        null = nn.initializers.normal(0.5)
        cond = nn.Dense(self.width, bias_init=null, name="caption_embedder")(RMSNorm(self.eps, name="caption_norm")(cond))
        ref = nn.Dense(self.width, name="ref_embedder")(ref_BTC)
        ref = ref + self.param("image_index_embedding", nn.initializers.normal(0.02), (self.references, self.width))[0]
        x = nn.Dense(self.width, name="x_embedder")(x_BTC)
        few = self.refiner_layers
        cond = self.stack("context_refiner", few, "none", cond, temb_BIE, (image_BN,), (seg_cond,), rotary[:1])
        ref = self.stack("ref_refiner", few, "time", ref, temb_BIE, (image_BR,), (seg_ref,), rotary[1:2])
        x = self.stack("noise_refiner", few, "time", x, temb_BIE, (image_BT,), (seg_x,), rotary[2:])
        joint = jnp.concatenate([cond, ref, x], axis=1)
        images, segments = (image_BN, image_BR, image_BT), (seg_cond, seg_ref, seg_x)
        joint = self.stack("layers", self.depth, "time", joint, temb_BIE, images, segments, rotary)
        out = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, name="norm_out")(joint[:, -x.shape[1] :])
        out = out * (1 + spread(nn.Dense(self.width, name="modulate_out")(nn.silu(temb_BIE)), image_BT))
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"refiner.prediction={self.prediction!r}: choose one of {', '.join(PREDICTIONS)}")
        start = nn.initializers.zeros if self.prediction == "correction" else nn.initializers.lecun_normal()
        out_BTC = nn.Dense(self.token_dim, kernel_init=start, name="out")(out)
        if self.prediction == "velocity":
            return out_BTC
        if self.prediction == "correction":
            out_BTC = out_BTC + jnp.where(has_ref_BR[..., None], ref_BTC, 0)
        left_BT1 = 1 - spread(t_BI[..., None], image_BT)
        return (out_BTC - x_BTC) / jnp.maximum(left_BT1, NEAREST_END)

    @nn.nowrap
    def time_embedding(self, t_BI: Array) -> Array:
        """Sinusoids of the scaled time, cosines first, through two layers; float32."""
        rate = 1e4 ** (-jnp.arange(TIME_FREQUENCIES, dtype=jnp.float32) / TIME_FREQUENCIES)
        angle = self.time_scale * t_BI[..., None].astype(jnp.float32) * rate
        wave = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        e = self.time_width
        return nn.Dense(e, name="time2")(nn.silu(nn.Dense(e, name="time1")(wave)))

    @nn.nowrap
    def stack(self, name, depth, modulation, x, temb_BIE, images, segments, rotary):
        """`depth` blocks over tokens whose images, segments and rotary tables are given in pieces along S."""
        join = lambda parts: jnp.concatenate(parts, axis=1)
        tables = join([cos for cos, _ in rotary]), join([sin for _, sin in rotary])
        block = {"none": Block, "block": nn.remat(Block, prevent_cse=False)}[self.remat]
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 4,
            length=depth,
        )(self.heads, self.kv_heads, self.ff, modulation, self.eps, name=name)
        return layers(x, temb_BIE, join(images), join(segments), tables)[0]


def make_refiner(config_vision: ConfigDict) -> Refiner:
    """The refiner of a config's `vision` section."""
    fields = config_vision.refiner.to_dict()
    fields.pop("sampler")
    fields.pop("autoencoder")
    return Refiner(token_dim=make_autoencoder(config_vision.refiner.autoencoder).token_dim, parent=None, **fields)


def init_refiner(config_vision: ConfigDict, key: jax.Array) -> Mapping:
    """Parameters of the part `refiner`: the transformer's and, where it has any, the autoencoder's."""
    auto = make_autoencoder(config_vision.refiner.autoencoder)
    first, second = jax.random.split(key)
    pack = {name: jnp.ones((1, 4), jnp.int32) for name in ("segment", "row", "col")}
    pack |= {"cell_segment": jnp.ones((1, 1), jnp.int32), "grid": jnp.ones((1, 1, 2), jnp.int32)}
    x = jnp.zeros((1, auto.tokens(1), auto.token_dim))
    one, cond = jnp.ones((1, 1)), jnp.zeros((1, 1, config_vision.quantizer.dim))
    keep = {"cond": one, "ref": one}
    params = make_refiner(config_vision).init(first, x, one, cond, x, pack, auto.layout(pack), keep)["params"]
    latent = auto.init(second)
    return {"dit": params} | ({"autoencoder": latent} if latent else {})


def times(steps: int, shift_tokens: int = 0) -> np.ndarray:
    """Times of Euler's method from noise, 0, to data, 1: `steps` + 1 values, float32.

    `shift_tokens`: of the reference's dynamic shift, values of one channel of the latent (rows times columns); its pipeline
    configures the shift but never applies it (Q8), so 0, equal steps.
    """
    t = np.linspace(0, 1, steps + 1, dtype=np.float32)
    if shift_tokens:
        m = np.sqrt(shift_tokens) / 40
        t = t / (m - m * t + t)
    return t.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Two guidance scales: v = U + ref (R - U) + cond (T - R) with T = both conditions, R = reference only, U = none (A.7)."""

    cond: float = 1.5
    ref: float = 1.5

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """(condition, reference) kept in each pass; with both scales 1 the first alone tells all."""
        return ((1, 1),) if self.cond == self.ref == 1 else ((1, 1), (0, 1), (0, 0))

    def combine(self, velocities: Sequence[Array]) -> Array:
        """The guided velocity of those of `passes`."""
        if len(velocities) == 1:
            return velocities[0]
        both, reference, nothing = velocities
        return nothing + self.ref * (reference - nothing) + self.cond * (both - reference)


def velocities(guidance: Guidance, refiner: Refiner, params, x_BTC, t, cond_BND, ref_BTC, pack, layout, ref_layout=None) -> list[Array]:
    """Velocities [B, T, C] of the passes that `guidance` combines, at time `t` (of all images, or [B, I]); others as in `Refiner`."""
    images = pack["grid"].shape[:2]
    t_BI, kept = jnp.full(images, t), {0: jnp.zeros(images), 1: jnp.ones(images)}
    one = lambda keep: refiner.apply({"params": params}, x_BTC, t_BI, cond_BND, ref_BTC, pack, layout, keep, ref_layout)
    keeps = [{"cond": kept[cond], "ref": kept[ref]} for cond, ref in guidance.passes]
    if len(keeps) == 1:
        return [one(keeps[0])]
    return list(jax.lax.map(one, jax.tree.map(lambda *leaves: jnp.stack(leaves), *keeps)))  # one program, not three


def sample(
    refiner: Refiner, params, noise_BTC, cond_BND, ref_BTC, pack, layout, steps: int, cond_scale: float, ref_scale: float
) -> Float[Array, "B T C"]:
    """Euler's method from noise to data with two guidance scales.

    Args:
        refiner, params: the transformer and its parameters ('dit').
        noise_BTC: start, standard normal.
        cond_BND, ref_BTC, pack, layout: as in `Refiner`.
        steps: Euler steps of equal length.
        cond_scale, ref_scale: Python numbers, of `Guidance`.

    Returns:
        Data tokens [B, T, C].
    """
    guidance, t_S = Guidance(cond_scale, ref_scale), jnp.asarray(times(steps))

    def step(i, x):
        v = guidance.combine(velocities(guidance, refiner, params, x, t_S[i], cond_BND, ref_BTC, pack, layout))
        return x + (t_S[i + 1] - t_S[i]) * v

    return jax.lax.fori_loop(0, steps, step, noise_BTC)
