"""Command line: `python -m tools.sweep --config=experiments/sweeps/rvq.py[:variant,key=value,...] --workdir=DIR [--executor=local|ray]`.

Trains and measures what is missing, then writes DIR/page.html and DIR/table.csv of all that is there. Run it again and it
goes on; with --page-only nothing is trained. Exit codes: 0 done, 75 interrupted and saved (run it again), 2 bad input, 1 bug.
"""

from __future__ import annotations

import argparse
import pathlib

from dina import train
from dina.config import EXIT_BUG, EXIT_DONE, EXIT_INPUT, EXIT_RESTART, InputError, run_main
from tools.sweep import execute, page, plan as plans, table


def write_page(plan: plans.Plan, workdir: pathlib.Path) -> None:
    """Writes page and table of the finished cells. Raises InputError where there are none."""
    found = [execute.load_result(execute.result_path(plan.sweep, workdir, cell.key)) for cell in plan.cells]
    # What was measured belongs to the training; how the cell is called is the sweep file's, which may have changed since.
    records = [record | {"group": cell.group, "axes": cell.axes} for record, cell in zip(found, plan.cells, strict=True) if record]
    if not records:
        raise InputError(f"{workdir} has no finished cell of this sweep; run it without --page-only")
    made = page.study(plan.sweep, records, len(plan.cells) - len(records))
    execute.write_whole(workdir / "table.csv", table.table(made.points, made.drawn))
    execute.write_whole(workdir / "page.html", page.build(made))
    print(f"dina: sweep: wrote {workdir / 'page.html'} and table.csv of {len(records)} of {len(plan.cells)} cells", flush=True)


def main(argv: list[str]) -> int:
    """Runs a sweep."""
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=__doc__)
    parser.add_argument("--config", required=True, help="experiments/sweeps/X.py[:variant,key=value,...]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--executor", choices=("local", "ray"), help="instead of the config's")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is there")
    args = parser.parse_args(argv)
    spec = args.config
    if args.executor:
        spec += f"{',' if ':' in spec else ':'}executor.name={args.executor}"
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.page_only:
        write_page(plans.load(spec), args.workdir)
        return EXIT_DONE
    try:
        plan, failed = execute.run(spec, args.workdir, train.Stopper())
    except train.Interrupted:
        return EXIT_RESTART
    done = [cell for cell in plan.cells if execute.result_path(plan.sweep, args.workdir, cell.key).is_file()]
    if done:
        write_page(plan, args.workdir)
    if not failed:
        return EXIT_DONE
    return EXIT_INPUT if all(isinstance(outcome.error, InputError) for outcome in failed) else EXIT_BUG


if __name__ == "__main__":
    run_main(main)
