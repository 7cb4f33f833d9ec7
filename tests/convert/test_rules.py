"""Conversion tables: released → ours → released gives the same bits; shapes and names are checked."""

import numpy as np
import pytest

from dina.backbone.config import AttentionConfig, BackboneConfig, DepthConfig, ExpertsConfig, NgramConfig
from dina.config import InputError
from dina.convert import language, rules

TRUNK = BackboneConfig(12, 3, 20, attention=AttentionConfig(2, 6, 5, 3, 4, 7), experts=ExpertsConfig(4, 2, 2, 9))
NGRAM = NgramConfig(order=3, splits=2, ratio=2.0)
DEPTH = DepthConfig(width=8, layers=2, heads=2, ffn_scale=3)
TABLES = {
    "trunk": (language.trunk(), *language.trunk_sizes(TRUNK)),
    "ngram": (language.ngram(), *language.ngram_sizes(NGRAM, 30, 12)),
    "depth": (language.depth_head("audio_head"), *language.depth_sizes(DEPTH, 12, (9, 7, 5))),
    "rest": ([*language.text_head(), *language.joint_table(), *language.pre_buffer()], {}, {"V": 11, "R": 40, "d": 12, "b": 10}),
}


@pytest.mark.parametrize("name", TABLES)
def test_export_of_an_import_is_equal(name):
    random = np.random.default_rng(0)
    groups = rules.by_path(rules.pieces(*TABLES[name]))
    released = {p.name: random.normal(size=p.shape).astype(np.float32) for group in groups.values() for p in group}
    for path, group in groups.items():
        least = rules.least_shape(group)
        # Padded where the model pads, but for the axes that pieces are stacked on.
        shape = (*least[: len(group[0].index)], *(n + 3 for n in least[len(group[0].index) :]))
        ours = rules.assemble(group, released.__getitem__, shape, np.float32)
        for piece in group:
            np.testing.assert_array_equal(piece.to_theirs(ours[piece.slices]), released[piece.name])
        assert np.count_nonzero(ours) == sum(released[p.name].size for p in group), path  # the rest is padding


def test_one_tensor_lies_where_the_formula_says():
    groups = rules.by_path(rules.pieces(*TABLES["depth"]))
    group = groups["params/audio_head/layer_1/ffn_in"]
    released = np.arange(24 * 8, dtype=np.float32).reshape(24, 8)  # hidden value t of level l is row t * 3 + l
    ours = rules.assemble(group, {group[0].name: released}.__getitem__, (3, 8, 8), np.float32)
    assert group[0].name == "audio_head.transformer_layers.1.linear1.weight"
    np.testing.assert_array_equal(ours[2, :, 5], released[5 * 3 + 2])


def test_stacks_follow_the_order_of_the_names():
    groups = rules.by_path(rules.pieces(*TABLES["trunk"]))
    names = {piece.index: piece.name for piece in groups["params/backbone/layers/experts/up"]}
    assert names[2, 3] == "model.layers.2.mlp.experts.3.up_proj.weight" and len(names) == 12
    assert groups["params/backbone/layers/attention_1/q_b"][2].name == "model.layers.2.self_attn.1.q_b_proj.weight"


def test_tensors_below_each_other_and_their_starts():
    rule = rules.Rule("params/t", "x.{level}", "K d -> K d", by="level", start=(0, 4))
    group = rules.by_path(rules.pieces([rule], {"level": 2}, {"K": (3, 2), "d": 2}))["params/t"]
    ours = rules.assemble(group, {"x.0": np.full((3, 2), 1.0), "x.1": np.full((2, 2), 2.0)}.__getitem__, (7, 2), np.float32)
    np.testing.assert_array_equal(ours[:, 0], [1, 1, 1, 0, 2, 2, 0])


def test_wrong_shapes_and_double_claims_are_named():
    groups = rules.by_path(rules.pieces(*TABLES["rest"]))
    group = groups["params/lm_head/kernel"]
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[11, 13\], this config needs \[11, 12\]"):
        rules.assemble(group, lambda name: np.zeros((11, 13)), (12, 11), np.float32)
    with pytest.raises(InputError, match=r"params/lm_head/kernel has shape \[12, 10\]"):
        rules.assemble(group, lambda name: np.zeros((11, 12)), (12, 10), np.float32)
    with pytest.raises(InputError, match="lm_head.weight is claimed twice"):
        rules.by_path(rules.pieces(language.text_head() * 2, {}, {"V": 11, "d": 12}))
