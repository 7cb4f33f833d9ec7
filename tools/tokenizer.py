"""One tokenizer on real data, from packages to a page: `python -m tools.tokenizer --config=experiments/stamps.py --workdir=DIR`.

Fetches and prepares the data, trains every stage, scores held-out pictures or clips beside common codecs, and writes report.html
and report.json into the workdir. Which of the two it is, the experiment's sections say: `vision`, or `audio`. Started again
after an interruption it goes on where it was; what is done is not repeated, but scores are made anew. Processor seconds of all
of it are printed, and kept in processor.json for the page.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys

from dina import config as configs
from tools.report import inputs, page, speech, tokenizer

SCORES = {"vision": ("dina.eval.codec", tokenizer), "audio": ("dina.eval.speech_codec", speech)}  # program, page


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="experiments/X.py[:variant,key=value,...]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    args = parser.parse_args(argv)
    config = configs.load(args.config)
    kinds = [kind for kind in SCORES if kind in config]
    if len(kinds) != 1:
        raise configs.InputError(f"--config={args.config}: has the sections {kinds}; name an experiment with one of {', '.join(SCORES)}")
    program, shown = SCORES[kinds[0]]
    args.workdir.mkdir(parents=True, exist_ok=True)
    clock = args.workdir / "processor.json"
    spent = json.loads(clock.read_text()) if clock.exists() else {}
    for name, module in (("train", "dina.train"), ("evaluate", program)):
        before = _processor_seconds()
        try:
            code = subprocess.run([sys.executable, "-m", module, f"--config={args.config}", f"--workdir={args.workdir}"]).returncode
        finally:
            spent[name] = (spent.get(name, 0.0) if name == "train" else 0.0) + _processor_seconds() - before
            clock.write_text(json.dumps(spent, indent=1))
        if code:
            return code
        print(f"dina: {config.name}: {name} took {spent[name] / 60:.1f} processor minutes", flush=True)
    run = inputs.read_run(args.workdir, config)
    (args.workdir / "report.json").write_text(json.dumps(run.scores, indent=1))
    (args.workdir / "report.html").write_text(page.build(run, shown.SECTIONS, shown.header, shown.tiles), encoding="utf-8")
    print(f"dina: wrote {args.workdir / 'report.html'} and report.json ({len(run.scores)} scores)")
    return 0


def _processor_seconds() -> float:
    """User and system seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    configs.run_main(main)
