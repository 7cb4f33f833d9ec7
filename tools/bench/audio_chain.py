"""The speech chain against the same formulas in plain PyTorch, at the released widths: waves to codes, codes to mel, flow.

Layers of the encoder are all alike, so a few of its 32 stand for them; everything else is as many as released. The peer gets
our tensors in PyTorch's layouts under our names.

Letters: B clips, N samples, U codes, L levels, T frames, M mel bands, D width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dina.audio import features, mel_decoder
from dina.audio.config import default_config
from dina.audio.detokenizer import hidden_frames
from dina.audio.encoder import length_mask, make_encoder
from dina.audio.flow import make_flow, solve, time_grid
from dina.audio.mel_decoder import make_decoder
from dina.audio.tokenizer import CodeProjection, decoder_input, make_tokenize, quantizer_config
from dina.optim import flatten
from dina.quantize import rvq
from tools.bench.harness import Workload

RELEASED = {
    "features": {"mels": 128, "max_frames": 3000},
    "encoder": {"width": 1280, "layers": 4, "heads": 20, "ff": 5120},
    "quantizer": {"sizes": (8192, 4096, 2048) + (1024,) * 5},
    "decoder": {"width": 1280, "layers": 8, "heads": 20, "ff": 5120, "post_channels": (256,) * 5},
    "flow": {"guidance": 0.7, "prediction": "velocity"},
    "prenet": {"width": 512, "layers": 12, "heads": 8, "ff": 2048},
    "estimator": {"channels": 256, "middle": 12, "blocks": 4, "heads": 8, "head_dim": 64},
}
TURNED = "dconv"  # transposed convolutions, which PyTorch stores the other way round


def settings(**changes: dict) -> ConfigDict:
    """`config.audio` of the released sizes; `changes` by section over them."""
    audio = default_config()
    places = {"prenet": audio.flow.prenet, "estimator": audio.flow.estimator}
    for name in RELEASED:
        (places[name] if name in places else audio[name]).update(RELEASED[name] | changes.get(name, {}))
    for name in ("target", "recon"):
        audio[name].update({"mean": 0.0, "scale": 1.0})
    return audio


def encode(seconds: float = 30.0, **changes: dict) -> Workload:
    """Codes of one clip that fills a chunk."""
    audio = settings(**changes)
    audio.features.max_frames = int(seconds * 100)
    random, encoder = np.random.default_rng(0), make_encoder(audio)
    empty = jnp.zeros((1, 8, audio.features.mels)), jnp.ones(1, jnp.int32)
    params = weights(jax.eval_shape(encoder.init, jax.random.key(0), *empty)["params"], random)
    stats, books = codebooks(audio, random)
    f = audio.features
    wave = (0.1 * random.standard_normal((1, f.max_frames * f.hop))).astype(np.float32)
    samples = np.full(1, wave.shape[1], np.int32)
    tokenize, held = make_tokenize(audio), (as_jax({"audio_encoder": params}), {"audio_quantizer": stats})
    filters = features.mel_filters(f.rate, f.n_fft, f.mels, 0.0, f.rate / 2)
    e, codes = audio.encoder, f.max_frames // (2 * audio.bridge.pool)
    config = {"layers": e.layers, "heads": e.heads, "levels": len(audio.quantizer.sizes), "n_fft": f.n_fft, "hop": f.hop}
    work = rate_of(params, lambda path: _encoder_rate(path, f.max_frames, audio))
    work += 4.0 * e.layers * (f.max_frames // 2) ** 2 * e.width + 2.0 * codes * sum(book.size for book in books)
    return Workload(
        name=f"{seconds:g} s of speech, {e.layers} of 32 layers", ours=lambda: tokenize(*held, wave, samples)[0][0], peer="audio_encode",
        config=config, tensors=theirs(params) | {f"book.{i}": book for i, book in enumerate(books)} | {"wave": wave, "filters": filters},
        amount=seconds, check=_same_codes, flops=work, bytes=size_of(params) + 4.0 * sum(book.size for book in books), threads="all",
    )  # fmt: skip


def decode(codes: int = 125, **changes: dict) -> Workload:
    """The refined mel of one clip of `codes` codes, 80 ms each."""
    audio = settings(**changes)
    random, decoder, width = np.random.default_rng(0), make_decoder(audio), audio.decoder.width
    one = jnp.ones(1, jnp.int32)
    params = weights(jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 1, width)), one)["params"], random)
    project = CodeProjection(width)
    projection = weights(jax.eval_shape(project.init, jax.random.key(0), jnp.zeros((1, 1, quantizer_config(audio).dim)))["params"], random)
    stats, books = codebooks(audio, random)
    given = np.stack([random.integers(0, size, codes) for size in audio.quantizer.sizes], -1)[None].astype(np.int32)
    held = as_jax({"decoder": params, "projection": projection, "stats": stats, "codes": given})

    @jax.jit
    def run(held):
        x_BUD = decoder_input(audio, held["projection"], held["stats"], held["codes"])
        return decoder.apply({"params": held["decoder"]}, x_BUD, one * codes)[2]

    d, frames = audio.decoder, int(hidden_frames(codes, audio))
    length = int(mel_decoder.mel_length(codes, audio.recon.rate, audio.recon.hop))
    config = {"layers": d.layers, "heads": d.heads, "levels": len(books), "stride": audio.bridge.pool, "half": mel_decoder.HALF,
              "frames": length, "post": len(d.post_channels) - 1}  # fmt: skip
    work = rate_of(params, lambda path: _decoder_rate(path, codes, frames, length)) + rate_of(projection, lambda path: codes)
    tensors = theirs(params) | theirs(projection) | {f"book.{i}": book for i, book in enumerate(books)} | {"codes": given.astype(np.int64)}
    return Workload(
        name=f"{codes * 0.08:g} s of speech", ours=lambda: run(held), peer="audio_decode", config=config, tensors=tensors, amount=codes * 0.08,
        check=_close, flops=work + 2.0 * d.layers * frames**2 * width, bytes=size_of(params) + size_of(projection), threads="all",
    )  # fmt: skip


def flow(codes: int = 50, **changes: dict) -> Workload:
    """The mel of the hidden frames of one clip of `codes` codes: prenet, all steps of the solver, both sides of guidance."""
    audio = settings(**changes)
    random, module, frames = np.random.default_rng(0), make_flow(audio), int(hidden_frames(codes, audio))
    mels, width = audio.target.mels, audio.decoder.width
    empty = jnp.zeros((1, 1, width)), jnp.ones(1, jnp.int32), jnp.zeros((1, 1, mels)), jnp.zeros(1)
    params = weights(jax.eval_shape(module.init, jax.random.key(0), *empty)["params"], random)
    hidden = random.standard_normal((1, frames, width)).astype(np.float32)
    noise = random.standard_normal((1, frames, mels)).astype(np.float32)
    length, grid_S = jnp.full(1, frames, jnp.int32), time_grid(audio.flow.steps)

    @jax.jit
    def run(params, hidden, noise):
        mu_BTM = module.apply({"params": params}, hidden, length, method="mean")
        velocity = lambda *point: module.apply({"params": params}, *point, method="velocity")
        return solve(velocity, mu_BTM, noise, length_mask(length, frames), grid_S, audio.flow.guidance)

    p, e, held = audio.flow.prenet, audio.flow.estimator, as_jax((params, hidden, noise))
    calls = audio.flow.steps * (1 if audio.flow.guidance == 0 else 2)
    config = {"layers": p.layers, "heads": p.heads, "middle": e.middle, "blocks": e.blocks, "inner": e.heads, "chunk": e.chunk,
              "guidance": audio.flow.guidance, "scale": 1000.0}  # fmt: skip
    work = rate_of(params["prenet"], lambda path: frames) + rate_of(params["estimator"], lambda path: 1 if "/time" in f"/{path}" else frames) * calls
    work += 2.0 * p.layers * frames**2 * p.width + 4.0 * calls * (e.middle + 2) * e.blocks * frames**2 * e.heads * e.head_dim
    return Workload(
        name=f"{codes * 0.08:g} s of speech", ours=lambda: run(*held), peer="flow", config=config,
        tensors=theirs(params) | {"frames": hidden, "noise": noise, "grid": np.asarray(grid_S)}, amount=codes * 0.08, check=_close,
        flops=work, bytes=size_of(params), threads="all",
    )  # fmt: skip


def weights(shapes, random: np.random.Generator):
    """Random weights of the given shapes that keep activations near one: norms near the identity, small biases."""

    def one(path, leaf):
        name = path[-1].key
        spread, middle = (0.02, 0.0) if name == "bias" else (0.02, 1.0) if name == "scale" else (math.prod(leaf.shape[:-1]) ** -0.5, 0.0)
        return random.normal(middle, spread, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def codebooks(audio: ConfigDict, random: np.random.Generator):
    """(statistics, books): random codes, finer from level to level."""
    q = quantizer_config(audio)
    books = [random.standard_normal((size, q.dim), np.float32) * 0.5 * 0.9**level for level, size in enumerate(q.sizes)]
    return rvq.from_codebooks([jnp.asarray(book) for book in books]), books


def as_jax(tree):
    """The same arrays on the device."""
    return jax.tree.map(jnp.asarray, tree)


def theirs(params) -> dict[str, np.ndarray]:
    """Our parameters in PyTorch's layouts: [out, in] of dense layers, [out, in, width] of convolutions."""
    turned = {}
    for path, x in flatten(params).items():
        axes = {2: (1, 0), 3: (1, 2, 0) if TURNED in path else (2, 1, 0)}
        turned[path.replace("/", ".")] = np.ascontiguousarray(x.transpose(axes[x.ndim])) if x.ndim in axes else x
    return turned


def size_of(params) -> float:
    """Bytes."""
    return float(sum(x.nbytes for x in jax.tree.leaves(params)))


def rate_of(params, rate) -> float:
    """FLOPs of all layers: two a weight, as often as `rate(path)` says that it works."""
    return sum(2.0 * kernel.size * rate(path) for path, kernel in flatten(params).items() if path.endswith("kernel"))


def _encoder_rate(path: str, frames: int, audio: ConfigDict) -> int:
    if "conv1" in path:
        return frames
    return frames // 2 if path.startswith("encoder") else frames // (2 * audio.bridge.pool)


def _decoder_rate(path: str, codes: int, frames: int, length: int) -> int:
    if "dconv1" in path:
        return codes
    return length if "post_net" in path else frames


def _same_codes(ours, theirs) -> None:
    """What one tie decides differently changes the levels after it."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert (ours == theirs).all(-1).mean() >= 0.98, (ours == theirs).mean(0)


def _close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())
