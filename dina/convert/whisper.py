"""A Whisper checkpoint of transformers as our part `audio_encoder`.

Its encoder is the released one's own shape (tokenizers.md B.2), so the same table reads it. The bridge behind it, which makes
codes' vectors of frames, is ours alone and is started fresh. Positions must be the sinusoids that our encoder computes; they
are carried along. The decoder is not read. Both spellings of the names are read, with and without 'model.'.

Whisper's own features leave a clip's padding at the logarithm's floor; ours mask it, so only whole chunks are equal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dina.audio.config import default_config
from dina.audio.encoder import Bridge, make_encoder, sinusoid
from dina.config import InputError
from dina.convert import audio, hf_audio
from dina.convert.hf import number, refuse
from dina.convert.plan import Leaf, account
from dina.convert.released import Released
from dina.convert.rules import by_path, least_shape, pieces
from dina.optim import flatten

STARTS = ("model.encoder", "encoder")
PROCESSOR = "preprocessor_config.json"
FEATURES = ("rate", "n_fft", "hop", "mels", "max_frames")  # what the weights ask for; the rest stays the experiment's
ROUNDED = 4e-3  # of the sinusoids, stored in bfloat16


def make(checkpoint: Released) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """(our arrays by path, settings as of hf_audio.py) of the encoder in a checkpoint.

    Raises:
        InputError: no Whisper, a setting that our encoder cannot express, or tensors that are missing, unknown or of
            another shape or dtype.
    """
    c = checkpoint.config()
    if c.get("model_type") != "whisper":
        raise InputError(f"{checkpoint.folder}/config.json: model_type is {c.get('model_type')!r}, not 'whisper'")
    start = next((s for s in STARTS if any(name.startswith(f"{s}.") for name in checkpoint.tensors)), None)
    if start is None:
        raise InputError(f"{checkpoint.folder} holds no tensor whose name begins with {' or '.join(f'{s}.' for s in STARTS)}")
    places = number(c, "max_source_positions", "config.json")
    found = hf_audio.whisper(c, "config.json", "encoder_", 2 * places)
    found |= {"features": {name: found["features"][name] for name in FEATURES}, "bridge": {"pool": default_config().bridge.pool}}
    if (checkpoint.folder / PROCESSOR).exists():
        wanted = {"sampling_rate": found["features"]["rate"], "n_fft": found["features"]["n_fft"], "hop_length": found["features"]["hop"]}
        refuse(checkpoint.read_json(PROCESSOR), wanted, PROCESSOR)
    table = f"{start}.embed_positions.weight"
    sizes = audio.encoder_sizes(make_encoder(hf_audio.as_config(found)), found["features"]["mels"], places)
    groups = by_path(pieces([*audio.whisper(start), *audio.positions("audio_encoder", table, "d")], *sizes))
    leaves = {path: Leaf(path, least_shape(group), tuple(group)) for path, group in groups.items()}
    account(checkpoint, leaves, [name for name in checkpoint.tensors if name.startswith(f"{start}.")])
    miss = np.abs(checkpoint.read(table).astype(np.float32) - sinusoid(places, found["encoder"]["width"])).max()
    if miss > ROUNDED:
        raise InputError(f"{checkpoint.folder}: {table} is {miss:.2g} off the sinusoids that this encoder adds; were positions trained?")
    return leaves, found | {"positions": {"audio_encoder": places}}


def bridge(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """The bridge's arrays by path, started as a stage would."""
    module = Bridge(found["bridge"]["pool"], parent=None)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, found["bridge"]["pool"], found["encoder"]["width"])))["params"]
    return {f"{audio.ENCODER}/bridge/{path}": np.asarray(leaf) for path, leaf in flatten(params).items()}
