"""The DiNA model: packing, padding, targets, embeddings, and the losses' positions."""

import jax
import numpy as np
import pytest

from dina import losses
from dina import model as model_lib
from dina.backbone.block import init_cache
from dina.backbone import ngram
from dina.config import InputError
from dina.decode.generate import _forward
from dina.embed import text_ids
from dina.heads import depth
from tests import tiny_language as tiny

V = tiny.VOCABULARY


def _hidden(batch, variables=None):
    variables = variables or tiny.variables()
    return _run(variables["params"], variables["stats"], {k: batch[k] for k in ("tokens", "transcript", "codes", "segment", "position", "cell_index")})


@jax.jit
def _run(params, stats, batch):
    return model_lib.run(tiny.model(), params, stats, batch).h_BSD


@jax.jit
def _all_sums(params, stats, batch):
    model = tiny.model()
    h_BSD = model_lib.run(model, params, stats, batch).h_BSD
    code = lambda name: model_lib.code_sums(model, params, f"{name}_head", h_BSD, batch[f"{name}_index"], batch)
    return {"text": model_lib.text_sums(model, params, h_BSD, batch, 3), "visual": code("visual"), "audio": code("audio")}


def _pack(*rows):
    """Always the same shape, so that everything compiles once."""
    return tiny.pack([*rows, *[[]] * (6 - len(rows))])


def _sums(batch):
    variables = tiny.variables()
    return _all_sums(variables["params"], variables["stats"], batch)


def test_documents_of_a_pack_do_not_see_each_other():
    documents = tiny.documents()
    packed = _pack(documents)
    separate = _pack(*([document] for document in documents))
    h_packed, h_separate = _hidden(packed)[0], _hidden(separate)
    at = 0
    for row in range(len(documents)):
        length = int((separate["segment"][row] > 0).sum())
        np.testing.assert_allclose(h_packed[at : at + length], h_separate[row, :length], atol=2e-5)
        at += length
    a, b = _sums(packed), _sums(separate)
    for name in ("visual", "audio"):
        np.testing.assert_allclose(a[name].loss_L, b[name].loss_L, rtol=1e-5)
    np.testing.assert_allclose(a["text"]["nll"].sum(), b["text"]["nll"].sum(), rtol=1e-5)


def test_text_loss_counts_its_positions_and_no_padding():
    batch = _pack(tiny.documents())
    out = _sums(batch)["text"]
    assert float(out["weight"].sum()) == batch["text_weight"].sum() > 0
    changed = {k: v.copy() for k, v in batch.items()}
    padding = batch["segment"] == 0
    changed["tokens"][padding] = 7
    changed["text_weight"][padding] = 0
    np.testing.assert_allclose(_sums(changed)["text"]["nll"], out["nll"], rtol=1e-6)


def test_text_loss_equals_the_plain_cross_entropy():
    batch = _pack(tiny.documents()[:3], tiny.documents()[3:])
    h = _hidden(batch)
    logits = tiny.model().lm_head.apply({"params": tiny.variables()["params"]["lm_head"]}, h)
    log_p = np.asarray(jax.nn.log_softmax(logits[..., : V.classes]))
    expected = np.zeros(3)
    for row, position in np.argwhere(batch["text_weight"] > 0):
        target = batch["transcript"][row, position] if batch["transcript"][row, position] >= 0 else batch["tokens"][row, position]
        expected[batch["kind"][row, position]] -= log_p[row, position - 1, target]
    np.testing.assert_allclose(_sums(batch)["text"]["nll"], expected, rtol=1e-5)


@pytest.mark.parametrize("name,head", [("visual", "visual_head"), ("audio", "audio_head")])
def test_code_loss_equals_the_head_at_each_position(name, head):
    batch = _pack(tiny.documents()[:3], tiny.documents()[3:])
    params, h = tiny.variables()["params"], _hidden(batch)
    module = getattr(tiny.model(), head)
    bases, table = getattr(V, f"{name}_base"), np.asarray(params["embed"]["table"])
    expected = np.zeros(len(bases))
    logits_of = jax.jit(lambda h, e: depth.teacher_forced(module, params[head], depth.input_rows(h[None], e[None])))
    for row, at in np.argwhere(batch["code_weight"] > 0):
        if (batch["tokens"][row, at] == V.img_pad) != (name == "visual"):
            continue
        codes = batch["codes"][row, at, : len(bases)]
        ends = batch["tokens"][row, at] == V.audiogen_end
        embedded = np.stack([table[b + c] * (not ends and c >= 0) for b, c in zip(bases, codes)])
        logits = logits_of(h[row, at - 1], embedded)
        for level, code in enumerate(codes):
            if code >= 0:
                expected[level] += losses.nll(logits[level][0], code)[0]
    np.testing.assert_allclose(getattr(_sums(batch)[name], "loss_L"), expected, rtol=1e-4)


def test_end_of_speech_is_a_label_of_the_first_level_only():
    batch = _pack([tiny.documents()[5]])
    out = _sums(batch)["audio"]
    assert np.asarray(out.weight_L).tolist() == [5.0, 4.0]


def test_losses_do_not_depend_on_chunks():
    batch = _pack(tiny.documents()[:3], tiny.documents()[3:])
    whole = _sums(batch)
    config = tiny.model_config()
    config.losses.text_chunk, config.losses.code_chunk, config.losses.remat = 7, 5, "none"
    model, variables = model_lib.build(config, V), tiny.variables()
    h = _hidden(batch)
    text = model_lib.text_sums(model, variables["params"], h, batch, 3)
    np.testing.assert_allclose(text["nll"], whole["text"]["nll"], rtol=1e-5)
    visual = model_lib.code_sums(model, variables["params"], "visual_head", h, batch["visual_index"], batch)
    np.testing.assert_allclose(visual.loss_L, whole["visual"].loss_L, rtol=1e-5)


def test_pre_buffer_on_gathered_cells_equals_it_everywhere():
    batch = _pack(tiny.documents())
    params, embed = tiny.variables()["params"]["embed"], tiny.model().embed
    arrays = [batch[name] for name in ("tokens", "transcript", "codes", "segment")]
    gathered = embed.apply({"params": params}, *arrays, cell_index_BM=batch["cell_index"])
    np.testing.assert_allclose(gathered, embed.apply({"params": params}, *arrays), atol=1e-6)


def test_embedding_of_each_kind_of_position():
    params, embed = tiny.variables()["params"]["embed"], tiny.model().embed
    table = np.asarray(params["table"])
    batch = tiny.pack([[tiny.documents()[3]], [tiny.documents()[2]], [tiny.documents()[1]]])
    x = np.asarray(embed.apply({"params": params}, *(batch[n] for n in ("tokens", "transcript", "codes", "segment"))))
    tokens = batch["tokens"]
    assert not x[batch["segment"] == 0].any()
    for token in (V.user, V.assistant, V.audiogen_start, V.img_start, V.img_end, V.audio_start):
        for row, at in np.argwhere(tokens == token):
            np.testing.assert_allclose(x[row, at], table[token], atol=1e-6)  # specials are not divided
    frames = lambda row, at: sum(table[b + c] for b, c in zip(V.audio_base, batch["codes"][row, at]))
    row, at = np.argwhere(tokens == V.audio_pad)[-1]  # heard: no words, so the text part is zero
    np.testing.assert_allclose(x[row, at], frames(row, at), atol=1e-5)
    ids = np.asarray(text_ids(V, tokens, batch["transcript"], batch["segment"]))
    row, at = np.argwhere((tokens == V.audio_pad) & (ids >= 0))[0]  # spoken beside a word of the transcript
    word = x[row, at] - frames(row, at)
    assert np.abs(word).max() > 0.05 and ids[row, at] == batch["transcript"][row, at]
    begin = np.argwhere(tokens == V.audiotext_start)[0]
    assert ids[tuple(begin)] == batch["transcript"][tuple(begin)] >= 0
    assert np.abs(x[tuple(begin)] - table[V.audiotext_start]).max() > 0.05
    blank = (tokens == V.audio_pad) & (batch["transcript"] == V.audiotext_pad)
    assert blank.any() and (ids[blank] == -1).all()


def test_cached_positions_equal_teacher_forcing():
    model, variables = tiny.model(), tiny.variables()
    documents = tiny.documents()
    batch = {n: x[:, :48] if x.ndim > 1 and x.shape[1] == 96 else x for n, x in _pack(*([d] for d in documents)).items()}
    lengths = (batch["segment"] > 0).sum(1)
    full = np.asarray(_hidden(_pack(*([d] for d in documents))))
    # The same documents padded on the left, read in one piece of 20 and then one position at a time.
    left = {name: np.stack([np.roll(batch[name][r], 48 - n, 0) for r, n in enumerate(lengths)])
            for name in ("tokens", "transcript", "codes", "segment", "position")}  # fmt: skip
    cache, history = init_cache(model.trunk, len(documents), 48), ngram.init_history(model.ngram, len(documents))
    forward = jax.jit(lambda *a: _forward(model, variables["params"], variables["stats"], *a))
    at = 0
    for size in [36] + [1] * 12:
        piece = {name: array[:, at : at + size] for name, array in left.items()}
        h, cache, history = forward(piece, piece["position"], history, cache, at)
        at += size
        for row, n in enumerate(lengths):
            own = n - (48 - at) - 1  # position in the document of the last one read
            if own >= 0:
                np.testing.assert_allclose(h[row], full[row, own], atol=1e-5)
    assert at == 48


def test_unknown_normalisation_is_named():
    config = tiny.model_config()
    config.losses.normalise = "mean"
    with pytest.raises(Exception, match="mean"):
        model_lib.build(config, V)


def test_an_unknown_start_of_the_code_rows_is_named():
    config = tiny.model_config()
    config.code_start = "zeros"
    with pytest.raises(InputError, match="model.code_start.*zeros.*codebooks"):
        model_lib.build(config, V)
