"""A speech tokenizer small enough for tests, and waves to feed it."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dina import stages
from dina.audio.config import default_config
from dina.convert import rules
from dina.optim import unflatten
from dina.quantize import rvq
from dina.tasks.audio_tokens import AudioTokens
from dina.tasks.flow import FlowTask


def experiment():
    """The config of a tiny experiment: 8 code frames of 3 levels."""
    config = ml_collections.ConfigDict({"seed": 0})
    audio = config.audio = default_config()
    audio.features.max_frames = 64
    audio.encoder.update({"width": 16, "layers": 1, "heads": 2, "ff": 24})
    audio.decoder.update({"width": 16, "layers": 1, "heads": 2, "ff": 24, "post_channels": (8, 8)})
    audio.quantizer.sizes = (16, 8, 8)
    audio.flow.prenet.update({"width": 16, "layers": 1, "heads": 2, "ff": 24})
    audio.flow.estimator.update({"channels": 16, "middle": 1, "heads": 2, "head_dim": 8})
    audio.flow.steps = 2
    audio.vocoder.iterations = 4
    audio.reader.width = 16
    return config


def from_released(weights, *table):
    """{'params': {part: tree}, ...} of released tensors by a conversion table: (rules, counts, sizes)."""
    return unflatten(rules.assemble_all(rules.by_path(rules.pieces(*table)), weights.__getitem__))


def stage(task, **options):
    """A stage of four clips."""
    s = stages.default_stage()
    s.task, s.batch = task, 4
    s.options.update(options)
    return s


def waves(count=6, seed=0):
    """Tones of 0.12 to 0.5 s, int16: (at 16 kHz, at 24 kHz). The longest ends well before its last code does."""
    rng = np.random.default_rng(seed)
    out = ([], [])
    for index in range(count):
        seconds, hz = rng.uniform(0.12, 0.47) if index else 0.4925, rng.uniform(150, 900)
        for wave, r in zip(out, (16000, 24000), strict=True):
            t = np.arange(int(seconds * r)) / r
            wave.append((8000 * np.sin(2 * np.pi * hz * t)).astype(np.int16))
    return out


def columns(count=6, seed=0):
    """Speech columns as `sources.load_all` gives them."""
    w16, w24 = waves(count, seed=seed)
    words = ["one", "two", "red", "one", "xylophone", "nine"]
    return {"audio16": w16, "audio24": w24, "word": [words[i % 6] for i in range(count)]}


def tasks(config):
    """(A1, A2) tasks."""
    return AudioTokens(config, stage("audio_tokens")), FlowTask(config, stage("flow"))


def variables(config, seed=0):
    """Variables of all parts, drawn on the host: compiling the real initialisers takes longer than any test."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        if path[-1].key == "scale":
            return np.ones(x.shape, np.float32)
        width = x.shape[-2] if len(x.shape) > 1 and path[-1].key == "kernel" else 4
        return rng.normal(0, width**-0.5, x.shape).astype(np.float32)

    shapes = [jax.eval_shape(task.init, jax.random.key(0)) for task in tasks(config)]
    params = jax.tree_util.tree_map_with_path(leaf, shapes[1]["params"] | shapes[0]["params"])
    books = [rng.normal(size=(size, 64)).astype(np.float32) for size in config.audio.quantizer.sizes]
    return jax.tree.map(jnp.asarray, {"params": params, "stats": {"audio_quantizer": rvq.from_codebooks(books)}})
