"""The HiFT vocoder against the same formulas in plain PyTorch, at the released size; one second, so times are real-time factors."""

from __future__ import annotations

import math
import re

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dina.audio import hift
from dina.audio.config import default_config, hift_vocoder
from dina.audio.hift_source import draw
from dina.convert import hift as released
from dina.optim import flatten
from tools.bench.harness import Workload

RELEASED = {"channels": 512, "f0_channels": 512}


def vocoder(frames: int = 50, **sizes) -> Workload:
    """Samples of one clip of `frames` mel frames; `sizes` over the released ones."""
    audio = default_config()
    audio.vocoder = hift_vocoder()
    with audio.ignore_type():
        audio.vocoder.update(RELEASED | sizes)
    audio.target.update({"mean": 0.0, "scale": 1.0})
    module, random = hift.make_hift(audio), np.random.default_rng(0)
    hop, sines = audio.target.hop, module.source.sines
    one = jnp.ones(1, jnp.int32)
    empty = jnp.zeros((1, 1, audio.target.mels)), one, jnp.zeros((1, sines)), jnp.zeros((1, hop, sines))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *empty)
    params = jax.tree_util.tree_map_with_path(lambda path, x: _weight(path[-1].key, x.shape, random), shapes["params"])
    mel = random.normal(-5, 1.5, (1, frames, audio.target.mels)).astype(np.float32)
    phase, noise = map(np.array, draw(jax.random.key(0), one, frames, hop, sines))
    phase[:, 0] = 0
    own = module.filter
    rules = released.table(len(own.rates), len(own.kernels), len(own.dilations))
    ours = flatten(params)
    tensors = {}
    for rule in rules:
        left, right = rule.axes.split("->")
        tensors[rule.theirs] = einops.rearrange(ours[rule.ours], f"{right} -> {left}")
    tensors |= {"mel": mel.swapaxes(1, 2), "phase": phase[..., None], "noise": noise.swapaxes(1, 2)}
    run = jax.jit(lambda params, *given: module.apply({"params": params}, *given)[0])
    params, given = jax.tree.map(jnp.asarray, params), (jnp.asarray(mel), one * frames, jnp.asarray(phase), jnp.asarray(noise))
    seconds = frames * hop / audio.target.rate
    config = {name: list(audio.vocoder[name]) for name in ("rates", "kernels", "dilations")}
    config |= {"n_fft": own.n_fft, "hop": own.hop, "harmonics": sines - 1, "rate": audio.target.rate}
    return Workload(
        name=f"{seconds:g} s of speech", ours=lambda: run(params, *given), peer="vocoder", config=config, tensors=tensors, amount=seconds,
        check=_close, flops=flops(params, frames, own), bytes=float(sum(x.nbytes for x in jax.tree.leaves(params))),
    )  # fmt: skip


def _weight(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if name == "alpha":
        return np.ones(shape, np.float32)
    spread = 0.01 if name == "bias" else 0.7 * math.prod(shape[:-1]) ** -0.5
    return random.normal(0, spread, shape).astype(np.float32)


def flops(params: dict, frames: int, own: hift.Filter) -> float:
    """Of all layers: two a weight and frame (of a transposed convolution: of its input)."""
    total = 0.0
    for path, kernel in flatten(params).items():
        if path.endswith("kernel"):
            total += 2.0 * kernel.size * frames * _rate(*path.split("/")[:2], own)
    return total


def _rate(part: str, layer: str, own: hift.Filter) -> int:
    """How often a layer works in a mel frame."""
    whole = math.prod(own.rates)
    fixed = {"f0": 1, "source": whole * own.hop, "pre": 1, "post": whole}
    if (where := part if part != "filter" else layer) in fixed:
        return fixed[where]
    stage = int(re.search(r"\d+", layer)[0])
    return math.prod(own.rates[: stage + (not layer.startswith("up"))])


def _close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())
