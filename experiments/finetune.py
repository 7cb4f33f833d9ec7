"""Fine-tune: the digits tasks on an imported language model, in its own vocabulary.

The import decides model, vocabulary, text tokenizer and codebook sizes. Tokenizers of images and sound are trained here, so
the import's code rows meet other codes and are trained to them; `settings.apply_vision` takes a release's own for images.

Run card
    python -m tools.convert import --checkpoint RELEASE --workdir=DIR
    python -m dina.train --config=experiments/finetune.py:DIR --workdir=DIR
    python -m tools.convert export --workdir=DIR --stage=sft --out=OUT
Hardware: as much as the imported model needs (68.5B: a pod). Seen so far: small synthetic releases (tests/tools/test_convert.py).
"""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from dina.config import InputError, load
from dina.convert import settings
from dina.stages import DATA_JOBS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is the workdir that holds the import, then variants of digits.py."""
    workdir, *variants = arg.split(",")
    if not workdir:
        raise InputError("--config=experiments/finetune.py:DIR needs the workdir of the import")
    c = load(f"{pathlib.Path(__file__).with_name('digits.py')}:{','.join(variants)}")
    c.unlock()
    c.name = "finetune"
    settings.apply(c, pathlib.Path(workdir) / "released")
    c.model.ngram.lookup = "exchange"
    with c.ignore_type():  # the released weights of losses, whatever the number of levels
        c.model.losses.update({"visual_level": 0.25, "audio_level": 0.25})
    for name in ("prealign", "pretrain", "midtrain"):
        del c.stages[name]
    parts = c.stages.sft.init_from
    c.stages.sft.init_from = ConfigDict({part: "released" for part in parts})
    c.order = tuple(name for name in c.order if name in c.stages)
    c.jobs = tuple(job for job in c.jobs if job in (*c.stages, *DATA_JOBS))
    return c
