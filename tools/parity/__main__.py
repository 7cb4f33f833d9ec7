"""Runs golden cases: `python -m tools.parity CASE_DIR… [--json FILE]`.

One line per tensor: case, tensor, max abs error, relative error, tolerance, PASS or FAIL. Exit code 1 if any fails, or
unless every array is an input, compared, or listed with a reason, and every weight used or listed; 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import traceback

from dina.config import InputError, run_main
from tools.parity import audio_decoder, audio_flow, audio_mel, audio_tokenizer, bridge_rvq, depth_head, multimodal, ngram, pixel_decoder
from tools.parity import refiner, refiner_pipeline, sampling, trunk, visual_encoder, vocoder
from tools.parity.case import Case, Line

COMPONENTS = (
    multimodal, trunk, ngram, depth_head, sampling, visual_encoder, bridge_rvq, pixel_decoder, refiner, refiner_pipeline,
    audio_mel, audio_tokenizer, audio_decoder, audio_flow, vocoder,
)  # fmt: skip


def run(folder: pathlib.Path) -> Case:
    """Runs one case. Raises InputError if its arrays are those of no component."""
    case = Case(folder)
    for component in COMPONENTS:
        if component.is_case(case):
            try:
                component.run(case)
            except InputError:
                raise
            except Exception as error:  # one case that we cannot run must not hide the others
                traceback.print_exc()
                case.crash(error)
            case.finish()
            return case
    raise InputError(f"golden case {folder}: its arrays ({', '.join(case.arrays[:6])}, ...) belong to no known component")


def show(line: Line) -> str:
    """One printed line."""
    verdict = "PASS" if line.passed else "FAIL"
    return (f"{line.case:<26} {line.tensor:<44} {line.max_abs_error:9.2e} {line.relative_error:9.2e} {line.tolerance:8.0e}"
            f" {verdict}{'  ' + line.note if line.note else ''}")


def main(argv: list[str] | None = None) -> int:
    """Prints every comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.parity", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", type=pathlib.Path, metavar="CASE_DIR")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all lines as a list")
    args = parser.parse_args(argv)
    lines: list[Line] = []
    print(f"{'case':<26} {'tensor':<44} {'max abs':>9} {'relative':>9} {'allowed':>8}")
    for folder in args.cases:
        case = run(folder)
        lines += case.lines
        for line in case.lines:
            print(show(line))
        for name, reason in {**case.not_compared, **case.unused}.items():
            print(f"{case.name:<26} {name:<44} left out: {reason}")
    failed = [line for line in lines if not line.passed]
    print(f"{len(lines) - len(failed)} of {len(lines)} pass")
    if args.json:
        finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
        rows = [{key: finite(value) for key, value in dataclasses.asdict(line).items()} for line in lines]
        args.json.write_text(json.dumps(rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
