"""RVQ depth by codebook size by shared or separate books, with error bars: what the paper has no table of.

Run card
    python -m tools.sweep --config=experiments/sweeps/rvq.py --workdir=runs/rvq             the CPU grid, then page and table
    python -m tools.sweep --config=experiments/sweeps/rvq.py:full --workdir=DIR --executor=ray    the full grid, on accelerators
    python -m tools.sweep --config=experiments/sweeps/rvq.py:smoke --workdir=DIR            two cells of a few steps
Run again = resume. Every depth from 1 to 16 is read off one training by quantizer dropout (peers.md (ii) 8); depths 2 and 8
are also trained by themselves, so that what nesting costs is in the table. The encoder is trained once and frozen.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dina.config import check_name
from tools.sweep import measure, plan

SIZES, SEEDS = "vision.quantizer.sizes", (17, 18, 19)
BOOKS = ("vision.quantizer.codebook", ("separate", "shared"))
LEVELS = 16


def get_config(arg: str = "") -> ConfigDict:
    """The sweep; `arg` is a comma list of variant names."""
    c = plan.default_config()
    c.name, c.title = "rvq", "RVQ depth, size and sharing"
    c.measure = measure.default_options()
    with c.ignore_type():
        c.labels = ((SIZES, "levels x size", ""), (BOOKS[0], "books", ""))
        c.lead = (
            "One frozen encoder, one quantizer and one pixel decoder a cell; everything below is of held-out pictures. Depths are "
            "read off trainings in which images are cut at random levels.",
        )
        c.fixed = FIXED
        c.products = (
            (grid(LEVELS, 256, 1024, 4096), BOOKS, ("seed", SEEDS)),
            ((SIZES, ((1024,) * 2, (1024,) * 8)), (BOOKS[0], ("separate",)), ("seed", SEEDS)),
            # Once, and shared: of separate books, k-means would draw 262,144 centres one after another.
            (grid(LEVELS, 16384), (BOOKS[0], ("shared",)), ("seed", SEEDS[:1])),
        )
    for name in filter(None, arg.split(",")):
        check_name(name, VARIANTS, "--config: variant")
        with c.ignore_type():
            VARIANTS[name](c)
    return c


def grid(levels: int, *sizes: int) -> tuple[str, tuple]:
    """An axis of codebook sizes, all levels alike."""
    return SIZES, tuple((size,) * levels for size in sizes)


# Half of the images are cut at a random level while the quantizer learns, and most while the decoder does: every depth is to be
# read off, not only the last.
NESTED = (
    ("stages.V1.options", {"dropout": 0.5}),
    ("stages.V2.options", {"truncate": 0.75, "align_stride": 0}),
)
# The three cells of 16 x 256 took 5 to 6 minutes of processor each, on a busy machine; 25 cells are over an hour
# of two cores. A step has some 250 cells, a sixteenth of the largest books: their averages need a longer memory than the
# demo's 256 codes.
FIXED = (
    *NESTED, ("stages.V1.options", {"kmeans_vectors": 8192, "kmeans_iterations": 6}), ("vision.quantizer.decay", 0.99),
    ("stages.V1.steps", 100), ("stages.V2.steps", 200),
)  # fmt: skip


def full(c: ConfigDict) -> None:
    """Every size shared and separate, depths 1 to 8 also by themselves, five seeds, on the stamps; for accelerators."""
    c.base = "experiments/stamps.py"
    seeds = ("seed", (17, 18, 19, 20, 21))
    c.fixed = (*NESTED, ("vision.quantizer.decay", 0.99), ("stages.V1.steps", 2000), ("stages.V2.steps", 10000))
    c.products = (
        (grid(LEVELS, 256, 1024, 4096, 16384), BOOKS, seeds),
        ((SIZES, tuple((size,) * levels for size in (1024, 16384) for levels in (1, 2, 4, 8))), BOOKS, seeds),
    )
    c.measure.language.update({"steps": 3000, "rows": 16, "width": 256, "layers": 4, "head_width": 256, "head_layers": 2})
    c.executor.update({"name": "ray", "cpus": 8.0, "gpus": 1.0})


def smoke(c: ConfigDict) -> None:
    """Two cells of a few steps."""
    c.base = "experiments/digits.py:smoke"
    c.products = ((grid(4, 8, 16), (BOOKS[0], ("separate",)), ("seed", SEEDS[:1])),)
    c.fixed = (("stages.V1.options", {"dropout": 0.5, "kmeans_vectors": 64}), ("stages.V2.options", {"truncate": 0.75, "align_stride": 0}))
    c.measure.update({"images": 8, "window": 16, "timed": (1, 4), "repeats": 2})
    c.measure.language.update({"images": 16, "steps": 3, "rows": 2, "positions": 128, "width": 16, "head_width": 16})


VARIANTS = {"full": full, "smoke": smoke}
