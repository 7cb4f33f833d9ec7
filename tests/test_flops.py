"""The formula against what XLA counts for the model's own modules, and against itself."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from dina import config as configs
from dina import flops, stages
from dina.backbone import config as trunk_config
from dina.data import packing
from dina.heads import depth
from tools.aot import count
from tools.aot.hlo import Program

FILE = pathlib.Path(__file__).parent.parent / "experiments" / "longcat_next.py"
SMALL = ("0.3b,pretrain,model.width=48,model.layers=3,model.ffn=96,model.remat=none,model.attention.heads=2,model.attention.q_rank=24,"
         "model.attention.kv_rank=16,model.attention.nope=16,model.attention.rope=8,model.attention.v=16,model.attention.block=0,model.experts.real=4,"
         "model.experts.zero=2,model.experts.top_k=3,model.experts.target_top_k=2.0,model.experts.hidden=32,model.experts.dispatch=dense,"
         "model.dtype=float32,model.visual_head.width=32,model.visual_head.heads=2,model.visual_head.dtype=float32,model.visual_head.class_multiple=1,"
         "text.vocab_size=64,model.visual_head.layers=2")


def load(extra=""):
    config = configs.load(f"{FILE}:{SMALL}{extra}")
    with config.unlocked():
        config.vision.quantizer.sizes = config.audio.quantizer.sizes = (7, 7)
    stage = config.stages.pretrain
    return config, stage, packing.stage_options(stage).pack


def products(fn, *args):
    """FLOPs of the compiled program's matrix products, loops multiplied."""
    found = count.count(Program(jax.jit(fn).lower(*args).compile().as_text()), {"data": 1})
    return sum(found.flops.values()) + found.remat


def test_a_trunks_forward_pass():
    """Dense dispatch multiplies every expert with every token, and one block every pair of positions: both are known factors."""
    config, stage, _ = load()
    model = stages.make_task(config, "pretrain").model
    rows, length, width = 2, 16, model.trunk.width
    ones = jnp.ones((rows, length), jnp.int32)
    bias = jnp.zeros((model.trunk.layers, model.trunk.experts.total))
    x = jnp.zeros((rows, length, width))
    variables = jax.eval_shape(model.backbone.init, jax.random.key(0), x, ones, ones, bias)
    compiled = products(lambda v: model.backbone.apply(v, x, ones, ones, bias).h_BSD, variables)
    e, a, tokens = model.trunk.experts, model.trunk.attention, rows * length
    found = flops.language(config, stage, flops.Work(rows, length, 0, 0, 0, 0)).by_group
    pairs = model.trunk.layers * 2 * 2 * a.heads * (a.nope + a.rope + a.v) * rows * length**2 / 2
    all_experts = model.trunk.layers * 2 * tokens * 3 * width * e.hidden * (e.real - e.target_top_k)
    forward = (found["attention"] + found["dense"] + found["experts"]) / 3
    assert compiled == pytest.approx(forward + pairs + all_experts, rel=1e-6)


def test_a_depth_heads_forward_pass():
    config, stage, _ = load()
    cfg, sizes, places = trunk_config.parse(trunk_config.DepthConfig, config.model.visual_head), (7, 7), 16
    head = depth.DepthHead(cfg, sizes)
    rows = jnp.zeros((2, places, config.model.width))
    variables = jax.eval_shape(head.init, jax.random.key(0), rows)

    def logits(variables):
        return depth.teacher_forced(head, variables["params"], rows)

    # Attention among levels is causal; the program multiplies all pairs.
    others = cfg.layers * places * 2 * (2 * 2 - 3) * 2 * cfg.width
    found = flops.language(config, stage, flops.Work(1, 16, 0, places, 0, 0)).by_group["depth_heads"] / 3
    assert products(logits, variables) == pytest.approx(found + others, rel=1e-6)


def test_text_head_and_bridge():
    config, stage, _ = load()
    found = flops.language(config, stage, flops.Work(2, 16, 5, 0, 0, 3)).by_group
    assert found["text_head"] == 3 * 2 * 2 * 5 * 48 * (64 + 53)
    assert found["embed"] == 3 * 2 * 2 * 3 * 3 * 48 * config.model.pre_buffer.hidden


def test_what_is_frozen_needs_no_gradient_of_its_own():
    config, stage, pack = load()
    whole = flops.language(config, stage, flops.full(stage, pack)).by_group
    frozen = flops.language(config, config.stages.prealign, flops.full(config.stages.prealign, pack)).by_group
    assert frozen["dense"] == pytest.approx(whole["dense"] * 2 / 3) and frozen["depth_heads"] == whole["depth_heads"]
    pairs = whole["attention"] - frozen["attention"]
    assert 0 < pairs < whole["attention"] / 3  # scores have two factors and no weight


def test_remat_adds_the_forward_pass_of_what_it_repeats():
    config, stage, pack = load()
    work = flops.full(stage, pack)
    none, full = (flops.language(load(f",model.remat={remat},model.losses.remat={losses}")[0], stage, work)
                  for remat, losses in (("none", "none"), ("full", "full")))
    assert none.remat == 0 and none.by_group == full.by_group
    repeated = [value for name, value in full.by_group.items() if name not in ("ngram", "embed")]
    assert full.remat == pytest.approx(sum(repeated) / 3, rel=0.01)


def test_buffers_bound_what_is_expected():
    _, stage, pack = load()
    full, expected = flops.full(stage, pack), flops.expected(stage, pack)
    assert all(a >= b for a, b in zip(full, expected, strict=True)) and expected.text == pack.positions - pack.visual - pack.audio
