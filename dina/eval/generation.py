"""The one place where the evaluation touches the model: loading, asking, tokenizing, detokenizing.

Sampling settings are `config.eval.sampling`; `config.eval.refine` says whether painted pictures pass the refiner.

Letters: B clips; U cells or frames; L levels; N samples; T mel frames; M mel bands.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from dina import model as models, stages
from dina.audio import detokenizer, features, tokenizer as audio_tokenizer
from dina.audio.vocoder import make_vocoder
from dina.data import packing
from dina.decode import batching, media, prompts
from dina.eval import metrics
from dina.eval.prompts import Question
from dina.eval.speech_judge import Clip
from dina.grammar import Speech
from dina.vision import detokenize, preprocess
from dina.vision.tokenize import tokenize_images

_CLIPS, _PACKS = 16, 16  # rows of one compiled call


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model gave back: always its text (the transcript of speech), and a picture or a wave at `rate` Hz."""

    text: str
    image: np.ndarray | None = None
    wave: np.ndarray | None = None
    rate: int = 0


class Generator:
    """A trained model, all parts in memory.

    Args:
        config: the experiment.
        workdir: its folder.

    Raises:
        InputError: a part is not trained yet, or the workdir belongs to another config.
    """

    def __init__(self, config, workdir: pathlib.Path):
        self.config = config
        params, stats = stages.load_parts(config, workdir, [*media.parts(config), *models.PARTS])
        self.variables = {"params": params, "stats": stats}
        self.vocabulary, self.text = packing.open_vocabulary(config)
        names = {"params": models.PARTS, "stats": ("backbone",)}
        language = [{part: self.variables[kind][part] for part in parts} for kind, parts in names.items()]
        batches = dict(rows=config.eval.rows, prompt_step=config.eval.step, reply_step=config.eval.step)
        self._generate = batching.Generator(models.build(config.model, self.vocabulary), *language, **batches)
        self.rate = config.audio.target.rate
        self._tokenize = audio_tokenizer.make_tokenize(config.audio)
        self._detokenize = detokenizer.make_detokenize(config.audio)
        self._vocode = jax.jit(make_vocoder(config.audio, params))
        self._mel = {name: jax.jit(functools.partial(features.ln_mel, target=config.audio[name])) for name in ("target", "recon")}

    # ---------------------------------------------------------------------------------------------------- answers
    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        """The first sample of every question, in order."""
        images = iter(self.image_codes([q.image for q in questions if q.image is not None]))
        clips = iter(self.speech_codes([q.wave for q in questions if q.wave is not None]))
        requests = []
        for number, question in enumerate(questions):
            media = []
            if question.image is not None:
                cells = tuple(side // preprocess.CELL for side in question.image.shape[:2])
                media.append(prompts.shown(next(images), cells))
            if question.wave is not None:
                media.append(Speech(next(clips)))
            prompt = prompts.build(self.vocabulary, self.text.encode_prompt(question.prompt), media, question.reply, question.canvas)
            requests.append(self._request(prompt, seed, number))
        replies = self._generate(requests)
        painted = iter(self._paint(replies, seed))
        waves = iter(self._sound(replies, seed))
        answers = []
        for question, reply in zip(questions, replies, strict=True):
            text = self.text.decode(reply.text())
            if question.reply == "image":
                answers.append(Answer(text, image=next(painted) if reply.images() else self._blank(question)))
            elif question.reply == "speech":
                said = self.text.decode(reply.speech()[0].transcript or ()) if reply.speech() else ""
                answers.append(Answer(said, wave=next(waves) if reply.speech() else np.zeros(self.rate // 10, np.float32), rate=self.rate))
            else:
                answers.append(Answer(text))
        return answers

    def _request(self, prompt: prompts.Prompt, seed: int, number: int) -> batching.Request:
        how = self.config.eval.sampling
        heads = {head: how[head].to_dict() for head in batching.HEADS}
        audio = self.config.audio
        return batching.Request(
            prompt, seed, number, **heads, image_guidance=how.image_guidance if prompt.reply == "image" else 1.0,
            speech_guidance=how.speech_guidance if prompt.reply == "speech" else 1.0,
            max_frames=audio.features.max_frames // (2 * audio.bridge.pool), stop="eos" if prompt.reply == "text" else "span",
        )  # fmt: skip

    def _paint(self, replies: Sequence[batching.Reply], seed: int) -> list[np.ndarray]:
        """The first picture of every reply that has one."""
        found = [reply.images()[0] for reply in replies if reply.images()]
        return self.decode_images([i.codes for i in found], [(i.h, i.w) for i in found], self.config.eval.refine == "flow", seed)

    def _sound(self, replies: Sequence[batching.Reply], seed: int) -> list[np.ndarray]:
        """The first speech of every reply that has some."""
        return [s.wave for s in self.decode_speech([r.speech()[0].codes for r in replies if r.speech()], seed)]

    @staticmethod
    def _blank(question: Question) -> np.ndarray:
        """What a reply without a picture is judged as: an empty canvas."""
        return np.zeros((question.canvas[0] * preprocess.CELL, question.canvas[1] * preprocess.CELL, 3), np.uint8)

    # ------------------------------------------------------------------------------------------------- tokenizers
    def image_codes(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes [U, L] of pictures whose sides are multiples of 28, in order."""
        return tokenize_images(self.config.vision, self.variables, images, _PACKS)

    def decode_images(self, codes: Sequence[np.ndarray], grids: Sequence[tuple[int, int]], refined: bool, seed: int) -> list[np.ndarray]:
        """Pictures of codes by the pixel decoder alone, or refined by flow matching."""
        return detokenize.detokenize(self.config.vision, self.variables, codes, grids, seed=seed,
                                     refine="flow" if refined else "none")

    def speech_codes(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes [U, L] of float waves at 16 kHz."""
        return audio_tokenizer.tokenize_waves(self._tokenize, self.config.audio, *self._parts(), waves)

    def decode_speech(self, codes: Sequence[np.ndarray], seed: int) -> list[detokenizer.Sound]:
        """One Sound per code array: true-length wave, flow mel and mel-decoder mel."""
        audio = self.config.audio
        longest = audio.features.max_frames // (2 * audio.bridge.pool)
        sounds = []
        for start in range(0, len(codes), _CLIPS):
            part = codes[start:start + _CLIPS]
            codes_BUL = np.full((_CLIPS, longest, len(audio.quantizer.sizes)), -1, np.int32)
            length_B = np.zeros(_CLIPS, np.int32)
            for row, clip in enumerate(part):
                codes_BUL[row, :len(clip)], length_B[row] = clip, len(clip)
            example_B = np.arange(start, start + _CLIPS, dtype=np.int32)
            out = jax.device_get(self._detokenize(*self._parts(), codes_BUL, length_B, jax.random.key(seed), example_B))
            for row in range(len(part)):
                samples = int(out.samples[row])
                frames, seconds = samples // audio.target.hop, samples / audio.target.rate
                refined = out.refined[row][:round(seconds * audio.recon.rate / audio.recon.hop)]
                sounds.append(detokenizer.Sound(out.wave[row, :samples], samples, out.mel[row, :frames],
                                                out.mean[row, :frames], refined))
        return sounds

    def mel_distances(self, sound: detokenizer.Sound, original: np.ndarray) -> dict[bool, float]:
        """Mel L1 in nepers to a 24 kHz original: False = the mel decoder's (16 kHz), True = after flow matching."""
        at_16 = features.resample(original[None], self.rate, self.config.audio.recon.rate)[0]
        return {False: metrics.mel_l1(sound.refined, self._ln_mel(at_16, "recon")),
                True: metrics.mel_l1(sound.mel, self._ln_mel(original, "target"))}

    def _ln_mel(self, wave: np.ndarray, name: str) -> np.ndarray:
        """ln mel [T, M] of a wave; padded to one static length, so that it compiles once per kind."""
        target = self.config.audio[name]
        audio = self.config.audio.features
        longest = -(-audio.max_frames * audio.hop * target.rate // audio.rate // target.hop) * target.hop
        wave = wave[:longest]
        mel = self._mel[name](np.pad(wave, (0, longest - len(wave)))[None])
        return np.asarray(mel)[0, :-(-len(wave) // target.hop)]

    def resynthesize(self, clip: Clip) -> Clip:
        """A real clip through mel analysis and the vocoder: what the way back to sound costs, without any model."""
        wave = features.resample(np.asarray(clip[0], np.float32)[None], clip[1], self.rate)[0]
        mel = self._ln_mel(wave, "target")
        longest = self.config.audio.features.max_frames * self.config.audio.features.hop * self.rate
        frames = longest // self.config.audio.features.rate // self.config.audio.target.hop
        padded = np.full((frames, mel.shape[1]), detokenizer.SILENT, np.float32)
        padded[:len(mel)] = mel[:frames]
        return np.asarray(self._vocode(padded.T[None]))[0, :len(mel) * self.config.audio.target.hop], self.rate

    def _parts(self) -> tuple[dict, dict]:
        names = ("audio_encoder", *detokenizer.parts(self.config.audio))
        return {name: self.variables["params"][name] for name in names}, {
            "audio_quantizer": self.variables["stats"]["audio_quantizer"]}
