"""Tables of the audio tokenizer: both directions, all of our parameters, the release's own counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.audio.encoder import AudioEncoder, Bridge, WhisperEncoder
from dina.audio.flow import Estimator, Flow, Prenet
from dina.audio.mel_decoder import FrameDecoder, MelDecoder, MelHead
from dina.audio.tokenizer import CodeProjection
from dina.convert import audio, rules
from dina.optim import flatten
from dina.quantize import rvq


def encoder(width=8, layers=2, heads=2, ff=6, pool=2):
    return AudioEncoder(WhisperEncoder(width, layers, heads, ff, parent=None), Bridge(pool, parent=None))


def decoder(width=8, layers=2, heads=2, ff=6, mels=5, channels=(4, 6, 7)):
    head = MelHead(mels, 16000, 256, channels, "padded", parent=None)
    return MelDecoder(FrameDecoder(width, layers, heads, ff, "padded", parent=None), head)


def flow(width=6, layers=2, heads=3, ff=9, mels=5, channels=(8, 12), middle=2, blocks=1, act="gelu"):
    prenet = Prenet(width, layers, heads, ff, mels, parent=None)
    return Flow(prenet, Estimator(channels, middle, blocks, 2, 4, 100, act, parent=None))


BOOKS = rvq.RVQConfig((4, 3), 5)
TABLES = {
    "encoder": (audio.encoder(), *audio.encoder_sizes(encoder(), 7)),
    "quantizer": ([*audio.codebooks(), *audio.averages(), *audio.projection()], *audio.quantizer_sizes(BOOKS, 8)),
    "decoder": (audio.decoder(decoder()), *audio.decoder_sizes(decoder())),
    "flow": (audio.flow(flow()), *audio.flow_sizes(flow(), 8)),
    "one level, gated": (audio.flow(flow(channels=(8,), act="geglu")), *audio.flow_sizes(flow(channels=(8,), act="geglu"), 8)),
    "no post-net": (audio.decoder(decoder(channels=(4,))), *audio.decoder_sizes(decoder(channels=(4,)))),
}


def initial(name):
    """(our path, what makes the parameters there)."""
    key, one, hidden, mel = jax.random.key(0), jnp.ones(1, jnp.int32), jnp.zeros((1, 3, 8)), jnp.zeros((1, 3, 5))
    made = {
        "encoder": ("audio_encoder", encoder(), (jnp.zeros((1, 8, 7)), 8 * one)),
        "quantizer": ("audio_quantizer", CodeProjection(8), (jnp.zeros((1, 1, 5)),)),
        "decoder": ("audio_decoder", decoder(), (jnp.zeros((1, 1, 8)), one)),
        "no post-net": ("audio_decoder", decoder(channels=(4,)), (jnp.zeros((1, 1, 8)), one)),
        "flow": ("flow", flow(), (hidden, 3 * one, mel, jnp.zeros(1))),
        "one level, gated": ("flow", flow(channels=(8,), act="geglu"), (hidden, 3 * one, mel, jnp.zeros(1))),
    }
    part, module, args = made[name]
    return f"params/{part}", lambda: module.init(key, *args)


def released(name):
    """(our pieces by path, random tensors under the released names)."""
    groups, random = rules.by_path(rules.pieces(*TABLES[name])), np.random.default_rng(0)
    return groups, {piece.name: random.normal(size=piece.shape).astype(np.float32) for group in groups.values() for piece in group}


@pytest.mark.parametrize("name", TABLES)
def test_export_of_an_import_is_equal_and_the_table_fills_all_parameters(name):
    groups, tensors = released(name)
    ours = rules.assemble_all(groups, tensors.__getitem__)
    again = rules.disassemble(groups, ours)
    assert again.keys() == tensors.keys()
    for tensor in tensors:
        np.testing.assert_array_equal(again[tensor], tensors[tensor])
    path, init = initial(name)
    shapes = {f"{path}/{at}": leaf.shape for at, leaf in flatten(jax.eval_shape(init)["params"]).items()}
    assert {at: array.shape for at, array in ours.items() if at.startswith("params/")} == shapes


def test_statistics_have_the_quantizers_shapes():
    groups, tensors = released("quantizer")
    filled = {at: array.shape for at, array in rules.assemble_all(groups, tensors.__getitem__).items() if at.startswith("stats/")}
    assert filled == {f"stats/audio_quantizer/{at}": leaf.shape for at, leaf in flatten(rvq.init_stats(BOOKS, jax.random.key(0))).items()}


def test_one_tensor_of_each_layout_lies_where_the_formula_says():
    groups, tensors = released("encoder")
    gate = tensors["model.audio_tokenizer.audio_bridge_model.gate_proj.weight"]  # [16, 8, 2]: output, channel, frame of a code
    kernel = rules.assemble_all(groups, tensors.__getitem__)["params/audio_encoder/bridge/gate/kernel"]
    np.testing.assert_array_equal(kernel[1 * 8 + 3, 5], gate[5, 3, 1])
    groups, tensors = released("flow")
    ours, theirs = rules.assemble_all(groups, tensors.__getitem__), "model.audio_tokenizer.audio_flow_matching_decoder.conditional_decoder"
    np.testing.assert_array_equal(ours["params/flow/estimator/up1_conv/kernel"][2], tensors[f"{theirs}.up_blocks.0.2.conv.weight"][:, :, 2])
    np.testing.assert_array_equal(ours["params/flow/estimator/down0_conv/kernel"][2], tensors[f"{theirs}.down_blocks.0.2.conv.weight"][:, :, 2].T)
    np.testing.assert_array_equal(ours["params/flow/estimator/up0_conv/kernel"][2], tensors[f"{theirs}.up_blocks.1.2.weight"][:, :, 2].T)
    np.testing.assert_array_equal(ours["params/flow/estimator/up1_res/shortcut/kernel"], tensors[f"{theirs}.up_blocks.0.0.res_conv.weight"][..., 0].T)


def test_counts_are_those_of_the_release():
    """Tensors and values of the published file (tokenizers.md section 0, B): every shape and name of the big model is right."""
    big = encoder(1280, 32, 20, 5120, 4), decoder(1280, 8, 20, 5120, 80, (256,) * 5)
    books = rvq.RVQConfig((8192, 4096, 2048, *(1024,) * 5), 5120)
    mel = flow(512, 12, 8, 2048, 80, (256,), 12, 4)
    mel = Flow(mel.prenet, Estimator((256,), 12, 4, 8, 64, 100, parent=None))
    tables = {
        "encoder": (audio.encoder(), *audio.encoder_sizes(big[0], 128)),
        "quantizer": ([*audio.codebooks(), *audio.averages(), *audio.projection()], *audio.quantizer_sizes(books, 1280)),
        "decoder": (audio.decoder(big[1]), *audio.decoder_sizes(big[1])),
        "flow": (audio.flow(mel), *audio.flow_sizes(mel, 1280)),
    }
    found = {name: list(rules.pieces(*table)) for name, table in tables.items()}
    values = lambda pieces: sum(math.prod(piece.shape) for piece in pieces)
    within = lambda name, part: [piece for piece in found[name] if f".{part}." in piece.name]
    places = 1500 * 1280  # of the encoder's table, which is counted with it
    whisper, bridge = within("encoder", "audio_model"), within("encoder", "audio_bridge_model")
    assert (len(whisper) + 1, values(whisper) + places) == (487, 636_968_960)
    projection = [piece for piece in found["quantizer"] if "proj_decoder" in piece.name]
    assert (len(bridge) + len(found["quantizer"]), values(bridge) + values(projection)) == (31, 85_208_320)
    assert len(found["decoder"]) + 1 == 149
    prenet, estimator = within("flow", "prenet"), within("flow", "conditional_decoder")
    assert (len(prenet) + 1, len(estimator), values(estimator)) == (163, 910, 70_974_800)
