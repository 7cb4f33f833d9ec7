"""Will it compile, fit and be fast? `python -m tools.aot --config=experiments/longcat_next.py:stage=pretrain --topology=v5p:4x4x8`.

Compiles the train step that dina.train would run, for TPUs that are not there, and prints memory, FLOPs, collectives and a
predicted step time. Needs libtpu (`pip install 'dina[tpu]'`), no TPU, and minutes. Exit 0 fits, 1 does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from dina import config as configs
from dina.config import InputError
from tools.aot import measure, plan as plans, report, sweep


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=__doc__)
    parser.add_argument("--config", required=True, help="experiments/X.py[:variant,stage=NAME,key=value,...]")
    parser.add_argument("--topology", required=True, help="v5p-128, v5p:4x4x4, v6e-256, v5e:16x16*2, ...")
    parser.add_argument("--mesh", default="", help="data=32,expert=8; default the config's own")
    parser.add_argument("--rows", type=int, default=0, help="rows of a device and micro-batch; default the config's own")
    parser.add_argument("--sweep", nargs="?", const="auto", help="meshes to compare, separated by ';'; without a value, data against expert")
    parser.add_argument("--json", type=pathlib.Path, help="writes the record there")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the program's text and the compiler's messages")
    parser.add_argument("--stop", choices=("state", "compile"), default="compile", help="state: only what is held between steps, in seconds")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a compile")
    args = parser.parse_args(argv)
    if args.rows < 0:
        raise InputError(f"--rows={args.rows}: a device takes at least one row")
    try:
        if args.sweep:
            records = sweep.run(args.config, args.topology, args.sweep, args.rows, args.timeout)
            print(report.comparison(records))
            out, fits = records, any(record.get("fits") for record in records)
        else:
            plan = plans.make(args.config, args.topology, args.mesh, args.rows)
            out = measure.measure(plan, args.timeout, args.keep, args.stop)
            print(report.page(out))
            fits = out["fits"]
    except RuntimeError as error:
        print(f"dina: {error}", file=sys.stderr)
        return configs.EXIT_BUG
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    return configs.EXIT_DONE if fits else 1


if __name__ == "__main__":
    configs.run_main(main)
