"""What a frozen representation keeps of the pixels, trained or random, with the controls that the paper lacks (§3.7).

Run card
    python -m tools.sweep --config=experiments/sweeps/recovery.py --workdir=runs/recovery
    python -m tools.sweep --config=experiments/sweeps/recovery.py:smoke --workdir=DIR       two cells of a few steps
One pixel decoder of one size is trained on each source (tools/sweep/recovery.py): a trained and a random encoder, the random one
without skips, a random linear map of the pixels and their first principal components, and features of other cells. Every
source has the same width and is read as it is and as codes of the same bits. Encoders have the seed of their cell.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dina.config import check_name
from experiments import digits
from experiments.digits import stage
from tools.sweep import measure, plan, recovery

SEEDS = ("seed", (17, 18, 19))
STEPS, SOURCE, READ = "stages.V0.steps", "stages.R.options.source", "stages.R.options.read"
WIDTH = "vision.bridge.out_dim"
TRAINED = 500


def base(arg: str = "") -> ConfigDict:
    """digits.py with stage R, the decoder on a source; `arg` are its variants."""
    c = digits.get_config(arg)
    c.stages.R = stage(recovery.TASK, 300, 8, 2e-3, ("pixel_decoder",), {"l1": 1.0, "l2": 1.0}, init_from={"vision_encoder": "V0"},
                       ema_decay=0.98, options={"source": "encoder", "read": "features", "canvas_power": -0.7})  # fmt: skip
    c.stages.R.optimizer.muon = c.stages.V2.optimizer.muon
    c.order = (*c.order, "R")
    return c


def get_config(arg: str = "") -> ConfigDict:
    """The sweep; `arg` is a comma list of variant names. With the variant `base` it is the experiment that it sweeps over."""
    names = [name for name in arg.split(",") if name]
    if "base" in names:
        return base(",".join(name for name in names if name != "base"))
    c = plan.default_config()
    c.name, c.title = "recovery", "What a frozen representation keeps of the pixels"
    c.base = "experiments/sweeps/recovery.py:base"
    c.stages, c.shared_paths = ("V0", "R"), ("seed", STEPS, WIDTH)
    c.measure = measure.default_options()
    c.measure.codec = "tools.sweep.recovery_codec:RecoveryCodec"
    c.measure.update({"depths": (1, 2, 4, 8), "timed": (8,)})
    c.labels = ((STEPS, "V0 steps", "V0 steps"), (SOURCE, "source", ""), (READ, "read as", ""), (WIDTH, "width", "width"))
    c.lead = ("One pixel decoder of one size, trained on frozen features of several sources. V0 steps 0 is a random encoder.",)
    c.fixed = (("vision.quantizer.sizes", (1024,) * 8),)
    read = (READ, ("features", "codes"))
    c.products = (
        ((STEPS, (TRAINED, 0)), (SOURCE, ("encoder",)), read, SEEDS),
        ((STEPS, (0,)), (SOURCE, ("no_skips", "linear", "principal")), read, SEEDS),
        ((STEPS, (TRAINED,)), (SOURCE, ("shuffled",)), (READ, ("features",)), SEEDS),
        # The bottleneck: a random network that is as wide as its input may simply be invertible.
        ((STEPS, (0,)), (SOURCE, ("encoder", "linear", "principal")), (READ, ("features",)), (WIDTH, (32,)), SEEDS),
    )
    for name in names:
        check_name(name, VARIANTS, "--config: variant")
        VARIANTS[name](c)
    return c


def smoke(c: ConfigDict) -> None:
    """Two cells of a few steps."""
    c.base = "experiments/sweeps/recovery.py:base,smoke"
    c.fixed = (("vision.quantizer.sizes", (16,) * 4), ("stages.R.options", {"sample": 64}), ("stages.R.steps", 3))
    c.products = (((STEPS, (0,)), (SOURCE, ("no_skips", "principal")), (READ, ("codes",)), ("seed", (17,))),)
    c.measure.update({"images": 8, "window": 16, "timed": (1, 4), "repeats": 2, "depths": (1, 4)})
    c.measure.language.update({"images": 16, "steps": 3, "rows": 2, "positions": 128, "width": 16, "head_width": 16})


VARIANTS = {"smoke": smoke}
