"""A language model small enough for seconds, and hand-packed batches, shared by the tests of the language side."""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from dina import model as model_lib, stages
from dina.grammar import Image, Speech, Text, Vocabulary, cost, empty, write

VOCABULARY = Vocabulary(40, visual=(6, 5, 4), audio=(5, 4)).with_sizes(
    lambda text: [10 + int(c) if c != " " else 30 for c in text], [(h, w) for h in (1, 2, 3) for w in (1, 2, 3)]
)


def experiment(**losses):
    """(config, stage) as tasks/language.py reads them; `losses` are the stage's weights."""
    config = ConfigDict({
        "text": {"vocab_size": VOCABULARY.text},
        "vision": {"quantizer": {"sizes": VOCABULARY.visual}, "patch": 14, "merge": 2, "max_pixels": 9 * 28**2},
        "audio": {"quantizer": {"sizes": VOCABULARY.audio}},
    })
    config.model = model_config()
    stage = stages.default_stage()
    stage.loss_weights = ConfigDict(losses or {"text": 1.0, "visual": 1.0, "audio": 1.0, "router_z": 1e-3})
    stage.train = model_lib.PARTS
    return config, stage


def model_config():
    """A config.model of width 24 with every kind of block in it."""
    config = model_lib.default_config()
    config.update({"width": 24, "layers": 2, "ffn": 32, "unroll": 2})
    config.attention.update({"heads": 2, "q_rank": 12, "kv_rank": 8, "nope": 8, "rope": 4, "v": 8})
    config.experts.update({"real": 4, "zero": 2, "top_k": 2, "hidden": 16, "target_top_k": 1.5})
    for head in (config.visual_head, config.audio_head):
        head.update({"width": 12, "layers": 1, "heads": 2})
    config.pre_buffer.hidden = 20
    return config


@functools.cache
def model():
    """The modules of `model_config` over `VOCABULARY`."""
    return model_lib.build(model_config(), VOCABULARY)


@functools.cache
def variables():
    """Fresh variables, with a router bias that is not zero."""
    init = functools.partial(model_lib.init, model())
    # The many small random fills compile five times faster unoptimised.
    out = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    bias = out["stats"]["backbone"]["router_bias"]
    out["stats"]["backbone"]["router_bias"] = 0.05 * jax.random.normal(jax.random.key(1), bias.shape)
    return out


def documents(seed=0):
    """One document of each kind that matters: painted and shown images, heard and spoken speech, text."""
    rng = np.random.default_rng(seed)
    v = VOCABULARY
    text = lambda n, loss=False: Text(tuple(int(i) for i in rng.integers(4, 40, n)), loss)
    codes = lambda n, sizes: np.stack([rng.integers(0, s, n) for s in sizes], -1)
    user, answer = Text((v.user,)), Text((v.assistant,))
    end = Text((v.eos,), True)
    said = [int(i) for i in rng.integers(4, 40, 3)]
    return [
        (user, text(4), answer, Image(codes(6, v.visual), 2, 3, True), end),
        (user, Image(codes(4, v.visual), 2, 2), text(2), answer, text(5, True), end),
        (user, Speech(codes(5, v.audio)), answer, text(3, True), end),
        (user, text(3), answer, Speech(codes(5, v.audio), said, True, 1), end),
        (user, text(3), answer, Speech(codes(4, v.audio), said, True, 3), end),
        (user, text(3), answer, Speech(codes(4, v.audio), None, True), end),
    ]


def pack(rows, length=96, visual=16, audio=24, cells=24):
    """Packs lists of documents, one list per row, into a batch; budgets as given."""
    v = VOCABULARY
    batch = empty((len(rows), length), v)
    batch["segment"] = np.zeros((len(rows), length), np.int32)
    batch["kind"] = np.zeros((len(rows), length), np.int32)
    batch["visual_index"] = np.full((len(rows), visual), -1, np.int32)
    batch["audio_index"] = np.full((len(rows), audio), -1, np.int32)
    batch["cell_index"] = np.full((len(rows), cells), -1, np.int32)
    for row, docs in enumerate(rows):
        at, view = 0, {name: array[row] for name, array in batch.items()}
        for number, document in enumerate(docs):
            end = write(document, v, view, at)
            view["segment"][at:end] = number + 1
            view["kind"][at:end] = number % 3
            assert end - at == cost(document, v).positions
            at = end
        weighted = np.flatnonzero(view["code_weight"] > 0)
        painted = weighted[view["tokens"][weighted] == v.img_pad]
        spoken = weighted[view["tokens"][weighted] != v.img_pad]
        shown = np.flatnonzero(view["tokens"] == v.img_pad)
        for name, where in (("visual_index", painted - 1), ("audio_index", spoken - 1), ("cell_index", shown)):
            view[name][: len(where)] = where
    return batch | {"example": np.arange(len(rows), dtype=np.int32)}
