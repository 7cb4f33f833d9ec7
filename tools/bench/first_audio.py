"""How soon a spoken reply is heard, by its delay: from the request to the first samples, prompt, generation and detokenizer included.

The model and the speech tokenizer of experiments/speech.py (variants streaming, vocoder, language) with random weights that end neither
transcript nor speech, so that every reply has `LENGTH` ids and frames. Delays are taken in turn; one thread of Python, the
device's own threads as they are. There is no peer: no other implementation streams this model.
"""

from __future__ import annotations

import functools
import statistics
import time

import jax
import numpy as np

from dina import config as configs
from dina import grammar
from dina import model as model_lib
from dina.audio import hift
from dina.audio.mel_decoder import make_decoder
from dina.audio.flow import make_flow
from dina.audio.sound_stream import SoundStream
from dina.audio.tokenizer import CodeProjection, quantizer_config
from dina.decode import batching, prompts, streaming
from dina.grammar import rules
from tools.bench import audio_chain, harness

LENGTH = 32  # transcript ids, and frames: 2.56 s, at the 13 ids a second that pieces of 14 languages come to
DELAYS = {"parallel": 0, "4": 4, "8": 8, "16": 16, "serial": rules.SERIAL}
ROUNDS = 7
_PROMPT = 16


def setting(config, length: int = LENGTH) -> tuple[streaming.Generator, SoundStream]:
    """Language model and detokenizer of an experiment, with random weights."""
    random, audio = np.random.default_rng(0), config.audio
    vocabulary = grammar.from_config(config)
    model = model_lib.build(config.model, vocabulary)
    variables = jax.jit(functools.partial(model_lib.init, model), compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    params = variables["params"]
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, vocabulary.audiotext_pad].set(0.0)  # never the likeliest
    step = -(-(2 * length + 2) // 32) * 32
    generator = streaming.Generator(model, params, variables["stats"], rows=2, reply_step=step)
    sizes = audio.decoder.width, quantizer_config(audio).dim
    one, two = np.ones(1, np.int32), np.full(1, 2, np.int32)
    mel = np.zeros((1, 2, audio.target.mels), np.float32)
    modules = {
        "audio_quantizer": (CodeProjection(sizes[0]), np.zeros((1, 1, sizes[1]), np.float32)),
        "audio_decoder": (make_decoder(audio), np.zeros((1, 1, sizes[0]), np.float32), one),
        "flow": (make_flow(audio), np.zeros((1, 2, sizes[0]), np.float32), two, mel, np.zeros(1, np.float32)),
        hift.PART: (hift.make_hift(audio), mel, two, np.zeros((1, audio.vocoder.harmonics + 1), np.float32),
                    np.zeros((1, 2 * audio.target.hop, audio.vocoder.harmonics + 1), np.float32)),
    }  # fmt: skip
    shapes = {part: jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"] for part, (module, *inputs) in modules.items()}
    stats, _ = audio_chain.codebooks(audio, random)
    return generator, SoundStream(audio, audio_chain.weights(shapes, random), {"audio_quantizer": stats})


def measure(generator: streaming.Generator, sound: SoundStream, delay: int, length: int = LENGTH) -> dict[str, float]:
    """One reply: `first` and `whole` in seconds, `positions` and `codes` made before the first samples, `sound` in seconds.

    Raises:
        AssertionError: the weights ended the reply too soon.
    """
    greedy = {head: {"temperature": 0.0} for head in batching.HEADS}
    prompt = prompts.build(generator.model.vocabulary, tuple(range(4, 4 + _PROMPT)), reply="speech")
    request = batching.Request(prompt, **greedy, delay=delay, max_frames=length, stop="span")
    begun, found, samples = time.perf_counter(), {}, 0
    for part in streaming.speak(generator, request, sound):
        samples += len(part.wave_N)
        if samples and not found:
            found = {"first": time.perf_counter() - begun, "codes": part.codes}
    found |= {"whole": time.perf_counter() - begun, "sound": samples / sound.audio.target.rate}
    spoken = part.reply.speech()
    assert len(spoken) == 1 and len(spoken[0].codes) == len(spoken[0].transcript) == length, part.reply
    return found | {"positions": min(delay, length) + 1 + found["codes"]}


def run(rounds: int | None = None, config=None, length: int = LENGTH) -> dict:
    """Medians by delay; prints them as a table."""
    config = config or configs.load("experiments/speech.py:streaming,vocoder,language")
    made, samples = setting(config, length), {name: [] for name in DELAYS}
    for turn in range((rounds or ROUNDS) + 1):
        for name, delay in DELAYS.items():
            found = measure(*made, delay, length)
            samples[name] += [found] if turn else []  # the first turn compiles
    middle = {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in samples.items()}
    print(f"{'delay':>10}{'first sound, s':>16}{'least to most':>18}{'positions':>11}{'whole, s':>10}{'sound, s':>10}")
    for name, row in middle.items():
        spread = sorted(one["first"] for one in samples[name])
        print(f"{name:>10}{row['first']:16.3f}{f'{spread[0]:.3f} to {spread[-1]:.3f}':>18}{row['positions']:11.0f}{row['whole']:10.2f}{row['sound']:10.2f}")
    return {"name": "first_audio", "ours": {name: row["first"] for name, row in middle.items()}, "whole": {name: row["whole"] for name, row in middle.items()},
            "unit": "s", "samples": {name: [one["first"] for one in rows] for name, rows in samples.items()}, "machine": harness.machine_name()}  # fmt: skip
