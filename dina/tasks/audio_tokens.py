"""Stage A1: the speech tokenizer, trained as one: encoder, bridge, codebooks, mel decoder (tokenizers.md C, I).

The encoder hears clips with noise and rooms, the decoder's two mels are compared with the clean clip, and a throw-away
reader names the word from the quantised vectors, which is what makes the codes semantic (it stands for the frozen
small language model of the release). The first `options.continuous_steps` steps bypass the codebooks, whose moving
averages follow the encoder from the first step on; whole clips are cut at a random level (quantizer dropout), so the
levels are ordered from coarse to fine for the mels and the word alike.

Letters: B clips, U codes, Z vector of a code, T mel frames, M mel bands, L levels, W words.
"""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from dina.audio import features
from dina.audio.encoder import MASKED, length_mask, make_encoder
from dina.audio.mel_decoder import make_decoder
from dina.audio.tokenizer import CodeProjection, code_lengths, quantizer_config
from dina.losses import nll
from dina.quantize import rvq
from dina.tasks import audio_semantic
from dina.tasks.audio_batches import WORDS, AudioBatches, hide, open_table
from dina.tasks.base import LossOut, Task, Variables, merge_options

START_CLIPS = 512  # for the k-means start: about 4,000 vectors, eight per code of the largest book
POOLS = ((2, 1), (4, 1), (8, 1), (2, 2), (4, 4))  # (time, band) windows of the multi-scale mel loss


def default_options() -> ConfigDict:
    """`stage.options` of this task.

    continuous_steps: so many first steps bypass the codebooks. distill: the feature that the first level is to predict, of
    `audio_semantic.FEATURES`; it brings the part `audio_semantic` and the loss term `semantic`.
    """
    return ConfigDict({"continuous_steps": 0, "distill": "none"})


class Reader(nn.Module):
    """The part `audio_reader`: names the word by attention pooling over code vectors."""

    width: int
    words: int
    heads: int = 4

    @nn.compact
    def __call__(self, q_BUZ: Float[Array, "B U Z"], valid_BU: Bool[Array, "B U"]) -> Float[Array, "B W"]:
        h_BUD = nn.gelu(nn.Dense(self.width, name="in")(q_BUZ))
        score_BUH = jnp.where(valid_BU[..., None], nn.Dense(self.heads, name="score")(h_BUD), MASKED)
        pooled_BHD = jnp.einsum("buh,bud->bhd", jax.nn.softmax(score_BUH, axis=1), h_BUD)
        return nn.Dense(self.words, name="word")(pooled_BHD.reshape(h_BUD.shape[0], -1))


class AudioTokens(Task):
    """Trains `audio_encoder`, `audio_quantizer`, `audio_decoder` and `audio_reader`.

    Loss terms: `coarse`, `refined` (L1 + L2 of the normalised mel), `multiscale`, `commit`, `word`, and with a feature to
    distil `semantic`.
    """

    def __init__(self, config, stage):
        super().__init__(config, stage)
        self.audio, self.options = config.audio, merge_options(default_options(), stage)
        self.quantizer = quantizer_config(self.audio)
        self.encoder, self.decoder = make_encoder(self.audio), make_decoder(self.audio)
        self.projection = CodeProjection(self.audio.decoder.width)
        self.reader = Reader(self.audio.reader.width, len(WORDS))
        wide = audio_semantic.width(self.options.distill)
        self.semantic = audio_semantic.SemanticHead(wide) if wide else None

    def batches(self) -> AudioBatches:
        table = open_table(self.config, "train")
        return AudioBatches(self.config, self.stage, table, ("clean16",), continuous_steps=self.options.continuous_steps)

    def init(self, key: jax.Array) -> Variables:
        keys = jax.random.split(key, 5)
        one = jnp.ones((1,), jnp.int32)
        mel = jnp.zeros((1, 8, self.audio.features.mels))
        q_BUZ = jnp.zeros((1, 1, self.quantizer.dim))
        x_BUD = jnp.zeros((1, 1, self.audio.decoder.width))
        params = {
            "audio_encoder": self.encoder.init(keys[0], mel, 8 * one)["params"],
            "audio_quantizer": self.projection.init(keys[1], q_BUZ)["params"],
            "audio_decoder": self.decoder.init(keys[2], x_BUD, one)["params"],
            "audio_reader": self.reader.init(keys[3], q_BUZ, jnp.ones((1, 1), bool))["params"],
        }
        if self.semantic:
            params[audio_semantic.PART] = self.semantic.init(jax.random.fold_in(key, 5), q_BUZ)["params"]
        return {"params": params, "stats": {"audio_quantizer": rvq.init_stats(self.quantizer, keys[4])}}

    def encode(self, encoder_params, batch) -> tuple[Array, Array]:
        """(vectors [B, U, Z], codes of each clip [B]) of what SpecAugment leaves of a batch."""
        samples_B = batch["samples"]
        mel_BTM = hide(features.log_mel(batch["wave16"], samples_B, self.audio.features), batch)
        frames_B = features.valid_frames(samples_B, self.audio.features)
        z_BUZ = self.encoder.apply({"params": encoder_params}, mel_BTM, frames_B)
        return z_BUZ, code_lengths(samples_B, self.audio)

    def start(self, variables: Variables, batches: Iterator[dict[str, np.ndarray]], key: jax.Array) -> Variables:
        """Codebooks by k-means on the untrained encoder's vectors, which already tell sounds apart."""
        encode = jax.jit(self.encode)
        vectors, masks = [], []
        for batch in batches:  # of a very short stage, all there are
            z_BUZ, codes_B = encode(variables["params"]["audio_encoder"], batch)
            vectors.append(np.asarray(z_BUZ))
            masks.append(np.asarray(length_mask(codes_B, z_BUZ.shape[1])))
            if sum(len(mask) for mask in masks) >= START_CLIPS:
                break
        mask_N = np.concatenate(masks).reshape(-1)
        vectors_NZ = np.concatenate(vectors).reshape(len(mask_N), -1)
        per_update = float(mask_N.sum() / len(masks))
        stats = rvq.kmeans_init(self.quantizer, vectors_NZ, mask_N.astype(np.float32), key, per_update)
        return variables | {"stats": variables["stats"] | {"audio_quantizer": stats}}

    def loss(self, params, stats, batch, key: jax.Array, axes: tuple[str, ...]) -> LossOut:
        z_BUZ, codes_B = self.encode(params["audio_encoder"], batch)
        b, u, _ = z_BUZ.shape
        valid_BU = length_mask(codes_B, u)
        mask_N = valid_BU.reshape(-1).astype(jnp.float32)
        z_NZ = z_BUZ.reshape(b * u, -1)
        clip_keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(batch["example"])
        dropout = self.audio.quantizer.dropout
        out = rvq.quantize(self.quantizer, stats["audio_quantizer"], z_NZ, mask_N, jnp.repeat(clip_keys, u, 0), dropout)
        token_keys = rvq.token_keys(jax.random.fold_in(key, 1), batch["example"], u)
        updates = rvq.statistics(
            self.quantizer, stats["audio_quantizer"], z_NZ, out.codes_NL, mask_N, token_keys, axes
        )
        quantized_B11 = batch["quantized"][:, None, None]
        q_BUZ = quantized_B11 * out.q_ND.reshape(z_BUZ.shape) + (1 - quantized_B11) * z_BUZ

        x_BUD = self.projection.apply({"params": params["audio_quantizer"]}, q_BUZ)
        _, coarse, refined = self.decoder.apply({"params": params["audio_decoder"]}, x_BUD, codes_B)
        terms, metrics = self.mel_terms(coarse, refined, batch["clean16"], codes_B)
        logits_BW = self.reader.apply({"params": params["audio_reader"]}, q_BUZ, valid_BU)
        loss_B, right_B = nll(logits_BW, batch["word"])
        known_B = (batch["word"] >= 0).astype(jnp.float32)
        terms |= {"word": (jnp.sum(loss_B * known_B), jnp.sum(known_B)), "commit": out.commit}
        if self.semantic:
            terms["semantic"] = self.distilled(params[audio_semantic.PART], stats["audio_quantizer"], batch, z_BUZ, out.codes_NL, valid_BU)
        metrics |= {"word_accuracy": (jnp.sum(right_B * known_B), jnp.sum(known_B))}
        for level in sorted({0, self.quantizer.levels // 2, self.quantizer.levels - 1}):
            metrics[f"energy_left/{level}"] = (out.energy_L[0][level], out.energy_L[1][level])
        return LossOut(terms, metrics, {"audio_quantizer": updates})

    def distilled(self, params, stats, batch, z_BUZ: Array, codes_NL: Array, valid_BU: Array) -> tuple[Array, Array]:
        """The term `semantic`: straight through the first level's code, whatever dropout leaves of the others."""
        first_BUZ = stats["codebook"][self.quantizer.book(0)][codes_NL[:, 0]].reshape(z_BUZ.shape)
        first_BUZ = z_BUZ + jax.lax.stop_gradient(first_BUZ - z_BUZ)
        mel_BTM = features.log_mel(batch["wave16"], batch["samples"], self.audio.features)
        found_BUF = self.semantic.apply({"params": params}, first_BUZ)
        return audio_semantic.distance(found_BUF, jax.lax.stop_gradient(audio_semantic.cepstra(mel_BTM, valid_BU)), valid_BU)

    def mel_terms(self, coarse: Array, refined: Array, clean_BN: Array, codes_B: Array) -> tuple[dict, dict]:
        """Loss terms and metrics of the two mels against the clean clip's."""
        recon = self.audio.recon
        frames = coarse.shape[1]
        target = features.normalise(features.ln_mel(clean_BN, recon), recon)[:, :frames]
        target = jnp.pad(target, ((0, 0), (0, frames - target.shape[1]), (0, 0)))
        length_B, _ = self.decoder.head.lengths(codes_B, self.audio.features.max_frames)
        keep = length_mask(length_B, frames)[..., None].astype(jnp.float32)
        count = jnp.sum(keep) * recon.mels
        terms = {}
        for name, mel in (("coarse", coarse), ("refined", refined)):
            error = (mel - target) * keep
            terms[name] = (jnp.sum(jnp.abs(error) + error**2), count)
        error = (refined - target) * keep
        terms["multiscale"] = (sum(pooled_l1(error, time, band) for time, band in POOLS) / len(POOLS), count)
        metrics = {"mel_l1": (jnp.sum(jnp.abs(error)) * recon.scale, count)}
        return terms, metrics

    def update_stats(self, stats, updates, key: jax.Array, step: jax.Array):
        del step
        moved = rvq.apply(self.quantizer, stats["audio_quantizer"], updates["audio_quantizer"], key)
        return stats | {"audio_quantizer": moved}


def pooled_l1(error_BTM: Float[Array, "B T M"], time: int, band: int) -> Float[Array, ""]:
    """L1 of the error averaged over windows of `time` frames and `band` bands, scaled back to a sum over all values."""
    b, t, m = error_BTM.shape
    error = jnp.pad(error_BTM, ((0, 0), (0, -t % time), (0, -m % band)))
    windows = error.reshape(b, -(-t // time), time, -(-m // band), band)
    return jnp.sum(jnp.abs(windows.sum((2, 4))))
