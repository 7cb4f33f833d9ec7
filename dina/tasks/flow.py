"""Stage A2: flow matching from the frozen tokenizer's hidden frames to the 24 kHz mel (tokenizers.md B.6, C.1, I).

Clean clips are tokenised by the frozen parts, decoded to hidden frames from all levels, and the prenet and the estimator
learn the clean clip's mel: L1 of the prenet's guess, and the velocity at a random time with the guess left out now
and then, which is what guidance needs.

Letters: B clips, U codes, T frames at 50 Hz, M mel bands.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dina.audio import features
from dina.audio.detokenizer import hidden_frames
from dina.audio.encoder import length_mask, make_encoder
from dina.audio.flow import SMALLEST_REST, flow_length, make_flow, noisy_pair
from dina.audio.mel_decoder import make_decoder
from dina.audio.tokenizer import CodeProjection, code_lengths, decoder_input, quantizer_config, search
from dina.quantize import rvq
from dina.tasks.audio_batches import AudioBatches, open_table
from dina.tasks.base import LossOut, Task, Variables, merge_options


class FlowTask(Task):
    """Trains `flow`; `audio_encoder`, `audio_quantizer` and `audio_decoder` come from stage A1 and stay as they are.

    Loss terms: `flow` (velocity, squared), `prenet` (L1), both on the normalised mel.
    """

    def __init__(self, config, stage):
        super().__init__(config, stage)
        merge_options(ConfigDict(), stage)  # there are none
        self.audio = config.audio
        self.encoder, self.decoder, self.flow = make_encoder(self.audio), make_decoder(self.audio), make_flow(self.audio)

    def batches(self) -> AudioBatches:
        return AudioBatches(self.config, self.stage, open_table(self.config, "train"), ("clean24",), augment="none")

    def init(self, key: jax.Array) -> Variables:
        keys = jax.random.split(key, 5)
        audio, one = self.audio, jnp.ones((1,), jnp.int32)
        quantizer = quantizer_config(audio)
        x_BUD = jnp.zeros((1, 1, audio.decoder.width))
        hidden = jnp.zeros((1, 3, audio.decoder.width))
        mel = jnp.zeros((1, flow_length(3, audio.flow.prenet.ratio), audio.target.mels))
        params = {
            "audio_encoder": self.encoder.init(keys[0], jnp.zeros((1, 8, audio.features.mels)), 8 * one)["params"],
            "audio_quantizer": CodeProjection(audio.decoder.width).init(keys[1], jnp.zeros((1, 1, quantizer.dim)))["params"],
            "audio_decoder": self.decoder.init(keys[2], x_BUD, one)["params"],
            "flow": self.flow.init(keys[3], hidden, 3 * one, mel, jnp.zeros((1,)))["params"],
        }
        return {"params": params, "stats": {"audio_quantizer": rvq.init_stats(quantizer, keys[4])}}

    def hidden(self, params, stats, batch) -> tuple[jax.Array, jax.Array]:
        """(hidden frames [B, T, D] of the frozen tokenizer, their number [B])."""
        samples_B = batch["samples"]
        mel_BTM = features.log_mel(batch["wave16"], samples_B, self.audio.features)
        frames_B = features.valid_frames(samples_B, self.audio.features)
        z_BUZ = self.encoder.apply({"params": params["audio_encoder"]}, mel_BTM, frames_B)
        codes_BUL = search(self.audio, stats["audio_quantizer"], z_BUZ)
        x_BUD = decoder_input(self.audio, params["audio_quantizer"], stats["audio_quantizer"], codes_BUL)
        codes_B = code_lengths(samples_B, self.audio)
        hidden = self.decoder.apply({"params": params["audio_decoder"]}, x_BUD, codes_B, method="hidden")
        return jax.lax.stop_gradient(hidden), hidden_frames(codes_B, self.audio)

    def loss(self, params, stats, batch, key: jax.Array, axes: tuple[str, ...]) -> LossOut:
        del axes
        options, target = self.audio.flow, self.audio.target
        hidden_BTD, frames_B = self.hidden(params, stats, batch)
        mel_BTM = features.normalise(features.ln_mel(batch["clean24"], target), target)
        variables = {"params": params["flow"]}
        mu_BTM = self.flow.apply(variables, hidden_BTD, frames_B, method="mean")
        frames = mu_BTM.shape[1]
        x1 = mel_BTM[:, :frames]
        valid_BT = length_mask(flow_length(frames_B, options.prenet.ratio), frames)
        keep = valid_BT[..., None].astype(jnp.float32)

        def draw(example):
            keys = jax.random.split(jax.random.fold_in(key, example), 3)
            dropped = jax.random.uniform(keys[2]) < options.drop_condition
            return jax.random.normal(keys[0], x1.shape[1:]), jax.random.uniform(keys[1]), dropped

        noise, u_B, dropped_B = jax.vmap(draw)(batch["example"])
        t_B, point, wanted = noisy_pair(x1, noise, u_B, options.sigma_min)
        condition = jnp.where(dropped_B[:, None, None], 0.0, mu_BTM)
        velocity = self.flow.apply(variables, point, condition, t_B, valid_BT, method="velocity")
        count = jnp.sum(keep) * target.mels
        miss = (velocity - wanted) * keep
        if options.prediction == "clean":  # the error of the mel itself: that of the velocity grows without bound
            miss *= jnp.maximum(1.0 - t_B, SMALLEST_REST)[:, None, None]
        error = jnp.abs((mu_BTM - x1) * keep)
        terms = {"flow": (jnp.sum(miss**2), count), "prenet": (jnp.sum(error), count)}
        return LossOut(terms, {"prenet_mel_l1": (jnp.sum(error) * target.scale, count)})
