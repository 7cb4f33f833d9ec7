"""Speech: the speech tokenizer on recordings of people, from waveform to waveform at 12.5 codes a second.

Run card
    make speech                                  packages, training, scores and page: runs/speech/report.html
    python -m dina.train --config=experiments/speech.py --workdir=DIR            the stages alone
    python -m dina.train --config=experiments/speech.py:smoke --workdir=DIR      each in a few steps
    python -m dina.train --config=experiments/speech.py:vocoder --workdir=DIR    with A3, the HiFT vocoder against judges
    python -m dina.train --config=experiments/speech.py:language --workdir=DIR   then pictures' codes, and the language model over all
    python -m dina.sample --config=experiments/speech.py:language --workdir=DIR --prompt='say in en: Goodbye.' --reply=speech
    python -m dina.eval.speech_codec --config=experiments/speech.py --workdir=DIR       scores of held-out clips
Data: 13,000 recordings of 14 languages from Debian packages (dina/data/recordings.py), split by text, sound and picture; the
pictures are those of experiments/stamps.py, in the same splits. Hardware: 2 CPU cores, about an hour of processor time; the
variant `language` has not been trained at length yet. Variants: streaming, vocoder, language, smoke, in this order.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dina import model, tokenize
from dina.audio import config as audio
from dina.config import check_name
from dina.data import recordings, utterances
from dina.eval import prompts
from dina.tasks import audio_batches
from dina.text import tokenizer as text
from experiments import stamps
from experiments.digits import PARTS, running, stage

ORDER = ("A1", "A2")
CODED = ("audio_encoder", "audio_quantizer", "audio_decoder")
VISION, LANGUAGE = ("V0", "V1", "V2"), ("prealign", "pretrain")
# Hearing and speaking are what the recordings are for. Half of them say what is in a picture, 2,000 pictures in up to 14 languages.
MIXTURE = {"image_to_text": 1.0, "text_to_image": 0.5, "speech_to_text": 2.0, "text_to_speech": 3.0,
           "image_to_speech": 1.0, "speech_to_image": 0.5, "plain_text": 0.5, "conversation": 1.0}
# The longest are two segments after a voice, each with its transcript: 6 s are 75 frames and at most some 60 text ids.
PACK = {"positions": 384, "visual": 72, "audio": 160, "cells": 108, "window": 256}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is a comma list of variant names."""
    c = ConfigDict()
    c.name, c.seed = "speech", 17
    c.order = ORDER
    c.jobs = ("data", *ORDER)
    running(c)
    c.data, c.text, c.tokenize = recordings.default_config(), text.default_config(), tokenize.default_config()
    c.data.pictures = stamps.get_config().data
    c.audio = audio.default_config()
    # Windows of 6 s: 0.96 of the recordings are shorter, and 12 s would double the attention's share of a step.
    c.audio.features.max_frames = 600
    # Mean and deviation of two minutes of these recordings.
    c.audio.recon.update({"mean": -5.2, "scale": 2.7})
    c.audio.target.update({"mean": -4.4, "scale": 2.7})
    c.audio.batches = audio_batches.default_config()
    c.audio.batches.pack = "window"  # waves stay in memory, 2 GB of them; read = "disk" takes none
    c.audio.encoder.update({"width": 160, "layers": 3, "heads": 4, "ff": 480})
    c.audio.decoder.update({"width": 160, "layers": 3, "heads": 4, "ff": 480})
    # 74 bits a position of all levels, 0.93 kbit/s. A step has some 1,000 vectors, about one a code of the first level.
    c.audio.quantizer.sizes = (1024, 768) + (512,) * 6
    # The voices differ enough; noise and rooms are for the encoder's sake, and cost the reconstruction.
    c.audio.augment.update({"speed_share": 0.5, "noise_share": 0.15, "reverb_share": 0.1})
    c.stages = ConfigDict(audio_stages())
    for name in filter(None, arg.split(",")):
        check_name(name, VARIANTS, "--config: variant")
        VARIANTS[name](c)
    return c


def audio_stages() -> dict[str, ConfigDict]:
    """A1 tokenizer with its mel decoder, A2 flow matching."""
    # A step's loss and gradient take 2.8 processor seconds in both (two cores, both busy with other work): 42 and 14 minutes.
    # The reader names words of a small vocabulary, which these recordings are not made of.
    losses = {"coarse": 1.0, "refined": 1.0, "multiscale": 0.5, "commit": 0.25, "word": 0.0}
    made = {
        "A1": stage("audio_tokens", 900, 16, 2e-3, (*CODED, "audio_reader"), losses, options={"continuous_steps": 100}),
        "A2": stage("flow", 300, 16, 2e-3, ("flow",), {"flow": 1.0, "prenet": 0.5}, init_from={part: "A1" for part in CODED},
                    freeze_stats=("audio_quantizer",), ema_decay=0.98),
    }
    made["A1"].optimizer.muon = (
        "audio_encoder/*/kernel", "audio_quantizer/*/kernel", "audio_decoder/frames/*/kernel", "audio_decoder/head/dconv2/kernel",
        "audio_decoder/head/post_net/conv*/kernel")
    made["A2"].optimizer.muon = ("flow/prenet/*/kernel", "flow/estimator/*/kernel")
    return made


def language(c: ConfigDict) -> None:
    """Codes of recordings and of their pictures, then one language model over text, speech and picture-caption-speech triples."""
    # Of 14 languages 512 pieces, which digits have, are hardly more than their 300 letters: 2,048 are 13 ids a recording of 27 frames.
    c.text.vocab_size = 2048
    # Pictures of 25 to 36 cells: beside 27 frames of speech, those of stamps.py would be nearly all of a row.
    c.vision = stamps.get_config().vision
    c.vision.update({"min_pixels": 140 * 140, "max_pixels": 168 * 168, "pack": {"cells": 72, "images": 4}})
    c.vision.encoder.depth, c.vision.encoder.full_layers, c.vision.pixel_decoder.depth = 4, (3,), 4
    c.model, c.eval = model.default_config(), prompts.default_config()
    c.model.update({"width": 128, "layers": 2, "unroll": 2, "ffn": 256, "code_start": "codebooks"})
    c.model.ngram.init_std = 0.2
    with c.ignore_type():  # one number for all levels, or one each: the first says what is said, as for digits
        c.model.losses.update({"visual_level": (1.0,) + (0.25,) * 7, "audio_level": (1.0,) + (0.25,) * 7, "code_chunk": 128})
    c.eval.refine = "none"
    seen = stamps.vision_stages()
    for name, steps in zip(VISION, (400, 100, 400), strict=True):
        seen[name].steps, seen[name].batch = steps, 8
        for option in stamps.PARTS:  # pictures as small as these are read whole
            del seen[name].options[option]
    c.stages.update({name: seen[name] for name in VISION} | language_stages())
    c.order = (*c.order, *VISION, *LANGUAGE)
    c.jobs = (*c.jobs, "codes:speech", "V0", "V1", "codes:images", "V2", *LANGUAGE)


def language_stages() -> dict[str, ConfigDict]:
    """Pre-align (trunk frozen), then all of it; delays of speech are drawn for every document."""
    losses = {"text": 1.0, "visual": 1.0, "audio": 1.0, "router_z": 1e-4}
    options = {"mixture": MIXTURE, "noisy_share": 0.15, "voice_share": 0.3, "segments_share": 0.1, "pack": ConfigDict(PACK)}
    heads = tuple(part for part in PARTS if part != "backbone")
    made = {
        "prealign": stage("language", 30, 8, 3e-3, heads, losses, freeze_stats=("backbone",), after=("V1", "A1"), options=options),
        "pretrain": stage("language", 600, 8, 3e-3, PARTS, losses, init_from=dict.fromkeys(PARTS, "prealign"), after=("V1", "A1"), options=options),
    }
    made["pretrain"].optimizer.muon = tuple(f"backbone/layers/{name}" for name in (
        "ffn_*/*", "experts/down", "experts/gate", "experts/up", "attention_*/kv_a", "attention_*/q_a"))
    for one in made.values():
        one.optimizer.multipliers = (("embed/table", 5.0), ("embed/ngram/*", 5.0))
    return made


def streaming(c: ConfigDict) -> None:
    """Sound while codes still come: no statistics over a whole clip, and blocks of 0.64 s; A1 and A2 are other stages then."""
    c.audio.decoder.statistics = "frame"
    c.audio.flow.estimator.chunk = 32


def vocoder(c: ConfigDict) -> None:
    """A small HiFT in the place of Griffin-Lim, trained by A3 on the recordings' own mels; before `smoke` if both are wanted."""
    c.audio.vocoder = audio.hift_vocoder()
    # Weights as released; crops of half a second and narrow judges, which cost as much as the vocoder.
    losses = {"mel": 45.0, "f0": 1.0, "adversarial": 1.0, "features": 2.0, "discriminator": 1.0}
    options = {"seconds": 0.5, "mel_windows": (512, 1024, 2048), "periods": (2, 5, 11), "resolutions": (1024,), "width": 8}
    c.stages.A3 = stage("vocoder", 600, 8, 5e-4, ("vocoder", "wave_discriminator"), losses, options=options)
    c.order, c.jobs = (*c.order, "A3"), (*c.jobs, "A3")


def smoke(c: ConfigDict) -> None:
    """A few steps of everything on few records."""
    c.data = recordings.smoke_config()
    c.checkpoint.every, c.log.every = 2, 1
    for s in c.stages.values():
        s.steps, s.batch = 4, 2
    c.stages.A1.options.continuous_steps = 2
    c.audio.features.max_frames = 200
    c.audio.quantizer.sizes = (32, 16, 16)
    # Nearly all of its time is compilation, which follows the number of layers: one of each kind.
    c.audio.encoder.layers, c.audio.decoder.layers, c.audio.flow.prenet.layers, c.audio.flow.estimator.middle = 1, 1, 1, 1
    if "pretrain" in c.stages:
        _smoke_language(c)
    if "A3" in c.stages:
        c.audio.vocoder.update({"channels": 16, "f0_channels": 8, "kernels": (3,), "source_kernels": (3, 3, 3), "dilations": (1,)})
        c.stages.A3.options.update({"mel_windows": (512,), "periods": (2,), "resolutions": (512,), "width": 2})


def _smoke_language(c: ConfigDict) -> None:
    """Without pictures, which the few records have none of."""
    c.text.vocab_size = 360
    c.model.update({"layers": 1, "unroll": 1, "code_start": "random"})
    c.model.visual_head.layers, c.model.audio_head.layers = 1, 1
    with c.ignore_type():
        c.model.losses.audio_level = 0.25
    c.audio.encoder.update({"width": 32, "heads": 2, "ff": 64})
    c.audio.quantizer.sizes = (32, 16, 16, 16)  # a depth head's width is cut by heads and levels
    for name in VISION:
        del c.stages[name]
    c.order, c.jobs = (tuple(name for name in names if name not in (*VISION, "codes:images")) for names in (c.order, c.jobs))
    for name in LANGUAGE:
        c.stages[name].after = ("A1",)
        c.stages[name].options.mixture.update(dict.fromkeys(utterances.PICTURED, 0.0))


VARIANTS = {"streaming": streaming, "vocoder": vocoder, "language": language, "smoke": smoke}
