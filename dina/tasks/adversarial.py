"""Stage V3: the pixel decoder against a discriminator, an option after V2 (reference/tokenizers.md I, V3).

Terms beside those of V2: adversarial (the decoder's; its weight is a statistic, see below), discriminator (hinge) and
regularise (r1 or lecam). Both sides move in one step: the decoder's term holds the heads still and the heads' terms
see features without gradient, so neither loss reaches the other's parameters.

The adversarial weight by VQGAN's rule is |d reconstruction / d last layer| / |d adversarial / d last layer|, at most
`weight` (Esser et al. 2021, eq. 7). Gradients of the last layer add up over examples, so they are summed over devices and
micro-batches like any statistic and the weight of one step is used in the next: the same on every mesh, and no
reduction waits in the middle of the loss.

Letters: B rows, P patches, V values of a patch, M windows of the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dina.config import check_name
from dina.sharding import psum
from dina.tasks import pixels
from dina.tasks.base import LossOut
from dina.vision import discriminator, perceptual, pixel_decoder
from dina.vision.discriminator import PART

LAST = "head2"  # the pixel decoder's last layer
_SUMS = ("real", "made")  # mean logits
_DECAY = 0.99  # of their running means (Tseng et al. 2021)


def default_options() -> ConfigDict:
    """`stage.options` of this task: those of `pixels`, and

    heads: width of the discriminator's heads. weighting: 'adaptive' or 'fixed'; weight: the adversarial weight, at most or
    exactly. regularise: 'r1', 'lecam' or 'none'. head_start: steps in which the discriminator learns alone.
    """
    options = pixels.default_options()
    options.update({"heads": 64, "weighting": "adaptive", "weight": 0.1, "regularise": "r1", "head_start": 100})
    return options


class Adversarial(pixels.Pixels):
    """Trains `pixel_decoder` and `discriminator`."""

    defaults = staticmethod(default_options)

    def __init__(self, config, stage):
        super().__init__(config, stage)
        check_name(self.options.weighting, ("adaptive", "fixed"), "stage option weighting")
        check_name(self.options.regularise, ("r1", "lecam", "none"), "stage option regularise")
        self.heads = discriminator.Heads(self.options.heads, parent=None)

    def wants_network(self) -> bool:
        return True

    def init(self, key):
        variables = super().init(key)
        heads = discriminator.init_heads(self.heads, self.network, jax.random.fold_in(key, 1))
        stats = {name: jnp.zeros(()) for name in ("weight", *_SUMS)}
        return {"params": variables["params"] | {PART: heads}, "stats": variables["stats"] | {PART: stats}}

    def loss(self, params, stats, batch, key, axes):
        z_BNZ, q_BND, depth_BN = self.conditions(params, stats, batch, key)
        decoder = params[pixel_decoder.PART]
        decode = lambda last: self.decoder.apply({"params": decoder | {LAST: last}}, q_BND, batch)
        made_BPV, to_last = jax.vjp(decode, decoder[LAST])
        terms, metrics = self.pixel_terms(params, batch, made_BPV, z_BNZ, depth_BN)
        windows, weights, used_M = self.draw_windows(batch, key)
        real = jax.lax.stop_gradient(self.feature_maps(params, batch["patches"], windows))
        still_BPV = jax.lax.stop_gradient(made_BPV)
        made, to_patches = jax.vjp(lambda x: self.feature_maps(params, x, windows), still_BPV)
        total = lambda value_M: jnp.sum(value_M * used_M)
        far, far_grad = jax.value_and_grad(lambda maps: total(perceptual.map_distance(maps, real, weights)))(made)
        fool, fool_grad = jax.value_and_grad(lambda maps: -total(self._judge(params[PART], maps, weights)))(made)
        grads = {"perceptual": to_patches(far_grad)[0], "adversarial": to_patches(fool_grad)[0]}
        count, strength = jnp.sum(used_M), stats[PART]["weight"]
        if self.stage.loss_weights.get("perceptual", 0.0) > 0:
            terms["perceptual"] = through(far, grads["perceptual"], made_BPV), count
        terms["adversarial"] = strength * through(fool, grads["adversarial"], made_BPV), count
        found, sums = self._discriminator(params[PART], stats[PART], real, made, weights, used_M)
        metrics |= {f"logit_{name}": (value, count) for name, value in sums.items()}
        metrics |= {"adversarial_weight": (strength * count, count), "perceptual_distance": (far, count)}
        updates = sums | {"count": count, "last": self._last_gradients(to_last, grads, batch, made_BPV)}
        updates["patches"] = terms["l1"][1]
        return LossOut(terms | found, metrics, {PART: psum(jax.lax.stop_gradient(updates), axes)})

    def _judge(self, heads, maps, weights):
        """Mean logit of each window; gradient by the maps only."""
        frozen = jax.lax.stop_gradient(heads)
        return discriminator.window_means(self.heads.apply({"params": frozen}, discriminator.inputs(maps)), weights)

    def _discriminator(self, heads, means, real, made, weights, used_M):
        """(terms of the heads, sums of mean logits): the maps come and go without gradient."""
        real, made = (jax.lax.stop_gradient(discriminator.inputs(maps)) for maps in (real, made))
        judged = [self.heads.apply({"params": heads}, maps) for maps in (real, made)]
        total = lambda value_M: (jnp.sum(value_M * used_M), jnp.sum(used_M))
        logit_M = [discriminator.window_means(logits, weights) for logits in judged]
        terms = {"discriminator": total(discriminator.hinge(*judged, weights))}
        if self.options.regularise == "r1":
            terms["regularise"] = total(discriminator.r1(self.heads, heads, real, weights))
        elif self.options.regularise == "lecam":
            terms["regularise"] = total(discriminator.lecam(*logit_M, means["real"], means["made"]))
        return terms, {name: total(value_M)[0] for name, value_M in zip(_SUMS, logit_M)}

    def _last_gradients(self, to_last, grads, batch, made_BPV) -> dict[str, jax.Array]:
        """Sums' gradients by the last layer's kernel: pixel (l1 and l2 with their weights), perceptual, adversarial."""
        if self.options.weighting == "fixed":
            return {}
        coefficients = self.stage.loss_weights
        error_BPV = jax.lax.stop_gradient(made_BPV) - batch["patches"]
        slope = coefficients.get("l1", 0.0) * jnp.sign(error_BPV) + coefficients.get("l2", 0.0) * 2 * error_BPV
        pixel_BPV = slope * (batch["segment"] > 0)[..., None] / error_BPV.shape[-1]
        return {name: to_last(grad)[0]["kernel"] for name, grad in ({"pixel": pixel_BPV} | grads).items()}

    def update_stats(self, stats, updates, key, step):
        del key
        new, own, count = dict(stats[PART]), updates[PART], jnp.maximum(updates[PART]["count"], 1e-9)
        for name in _SUMS:
            mean = own[name] / count
            new[name] = jnp.where(step == 0, mean, _DECAY * new[name] + (1 - _DECAY) * mean)
        weight = jnp.float32(self.options.weight)
        if self.options.weighting == "adaptive":
            last = own["last"]
            near = last["pixel"] / jnp.maximum(own["patches"], 1e-9)
            near += self.stage.loss_weights.get("perceptual", 0.0) * last["perceptual"] / count
            ratio = jnp.linalg.norm(near) / (jnp.linalg.norm(last["adversarial"] / count) + 1e-4)
            weight = jnp.minimum(ratio, weight)
        new["weight"] = jnp.where(step + 1 < self.options.head_start, 0.0, weight)
        return stats | {PART: new}


def through(value, grad_BPV, made_BPV):
    """`value` with the known gradient `grad_BPV` by `made_BPV`: what was computed once is not differentiated again."""
    moved = made_BPV - jax.lax.stop_gradient(made_BPV)
    return jax.lax.stop_gradient(value) + jnp.sum(jax.lax.stop_gradient(grad_BPV) * moved)
