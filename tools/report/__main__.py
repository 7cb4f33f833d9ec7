"""Command line: `python -m tools.report --workdir=runs/demo [--config=experiments/digits.py] [--readme[=FILE]]`.

With --check-readme[=FILE] nothing is written: exit code 0 if the file's results table is that of report.json, else 2.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from dina import config as configs
from dina.config import InputError
from tools.report import inputs, page, readme


def main(argv: list[str]) -> int:
    """Writes report.json and report.html, and with --readme the README's table."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("--config", default="experiments/digits.py", help="the experiment: name, seed, hashes, stage order")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--readme", nargs="?", const="README.md", type=pathlib.Path, help="file with the marker comments")
    parser.add_argument("--check-readme", nargs="?", const="README.md", type=pathlib.Path, help="only compare its table")
    args = parser.parse_args(argv)
    if args.check_readme:
        if not (args.workdir / "report.json").is_file():
            raise InputError(f"{args.workdir / 'report.json'}: no such file; write it with `python -m tools.report --workdir={args.workdir}`")
        readme.check(args.check_readme, json.loads((args.workdir / "report.json").read_text()))
        print(f"dina: the table in {args.check_readme} is that of {args.workdir / 'report.json'}")
        return 0
    config = configs.load(args.config) if args.config else None
    run = inputs.read_run(args.workdir, config)
    for name, text in (("report.json", json.dumps(run.scores, indent=1)), ("report.html", page.build(run))):
        part = args.workdir / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(args.workdir / name)
    if args.readme:
        readme.rewrite(pathlib.Path(args.readme), run.scores)
    print(f"dina: wrote {args.workdir / 'report.html'} and report.json ({len(run.scores)} scores)")
    return 0


if __name__ == "__main__":
    configs.run_main(main)
