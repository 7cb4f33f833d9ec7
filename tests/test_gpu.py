"""On a GPU: golden parity, a training loss with its gradients, generation and codes as on the CPU of the same machine.

Run with `JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/test_gpu.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina import model as model_lib
from dina.decode import batching
from dina.quantize import rvq
from dina.tasks.language import Language
from tests import tiny_language as tiny
from tests.decode.test_generate import _hear, _paint, _speak, _write
from tests.golden_io import GOLDEN
from tests.tools.test_parity import CASES
from tools.parity import __main__ as parity

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")]


@pytest.fixture(autouse=True)
def float32():
    """Products in float32: JAX's default there is 10 bits of mantissa."""
    with jax.default_matmul_precision("highest"):
        yield


def on_both(f, *args):
    """Results of f, compiled for the GPU and for the CPU."""
    results = []
    for platform in ("gpu", "cpu"):
        device = jax.local_devices(backend=platform)[0]
        results.append(jax.device_get(jax.jit(f)(*jax.device_put(args, device))))
    return results


@pytest.mark.parametrize("name", CASES)
def test_golden_case_passes(name):
    lines = parity.run(GOLDEN / name).lines
    assert lines and [line for line in lines if not line.passed] == []


@pytest.mark.parametrize("dispatch", ["gather", "ragged"])
def test_loss_and_gradients_equal_the_cpus(dispatch):
    config, stage = tiny.experiment()
    config.model.experts.dispatch = dispatch
    task, variables = Language(config, stage), tiny.variables()
    batch = tiny.pack([tiny.documents(seed)[:3] for seed in (0, 1)] + [tiny.documents(seed)[3:] for seed in (0, 1)])

    def loss(params, stats, batch):
        terms = task.loss(params, stats, batch, jax.random.key(0), ()).terms
        return sum(total / weight for total, weight in terms.values())  # a term without weight would be NaN

    (value, gradient), (expected, expected_gradient) = on_both(jax.value_and_grad(loss), variables["params"], variables["stats"], batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((expected, expected_gradient)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1e-3)), gradient, expected_gradient)


def test_greedy_replies_equal_the_cpus():
    """The CPU's with plain parameters: the default backend decides whether they are rearranged."""
    requests = [_write(), _hear(1), _paint(2, visual={"temperature": 0}), _speak(3, audio={"temperature": 0}, text={"temperature": 0})]
    variables, replies = tiny.variables(), []
    for platform in ("gpu", "cpu"):
        with jax.default_device(jax.local_devices(backend=platform)[0]):
            params, stats = jax.device_put((variables["params"], variables["stats"]), jax.local_devices(backend=platform)[0])
            replies.append(batching.Generator(tiny.model(), params, stats, rows=8)(requests))
    for gpu, cpu in zip(*replies, strict=True):
        np.testing.assert_array_equal(gpu.codes_TL, cpu.codes_TL)
        np.testing.assert_array_equal(gpu.tokens_T, cpu.tokens_T)


def test_codes_equal_the_cpus():
    cfg = rvq.RVQConfig(sizes=(256, 128, 64), dim=32, codebook="separate")
    stats, x_ND = rvq.init_stats(cfg, jax.random.key(0)), jax.random.normal(jax.random.key(1), (2048, 32))
    gpu, cpu = on_both(lambda stats, x_ND: rvq.encode(cfg, stats, x_ND), stats, x_ND)
    assert np.mean(gpu != cpu) < 1e-3  # near ties


def test_bfloat16_hidden_states_are_near_float32():
    config = tiny.model_config()
    batch = tiny.pack([tiny.documents(0)[:3], tiny.documents(1)[3:]])
    variables, hidden = tiny.variables(), []
    for dtype in ("bfloat16", "float32"):
        config.dtype = dtype
        model = model_lib.build(config, tiny.VOCABULARY)
        run = jax.jit(lambda params, stats, batch, model=model: model_lib.run(model, params, stats, batch).h_BSD)
        hidden.append(np.asarray(run(variables["params"], variables["stats"], jax.tree.map(jnp.asarray, batch)), np.float32))
    live = batch["segment"] > 0
    # An expert chosen otherwise changes a token; most tokens keep theirs.
    assert np.median(np.abs(hidden[0] - hidden[1])[live].max(-1)) < 0.1
