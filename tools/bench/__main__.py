"""Benchmarks: `python -m tools.bench NAME [--json FILE] [--rounds N]`.

NAME: lm_forward (time, lower is better), lm_decode, ngram, depth_head, import (rates, higher is better). Ours and the peer run
in turn in one process tree; medians and their ratio are printed with the samples' spread and the machine's own floor.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable

from dina.config import check_name, run_main
from tools.bench import harness, importing, lm, small

# name -> (workloads, unit, what `ratio` divides, rounds)
BENCHES: dict[str, tuple[list[Callable[[], harness.Workload]], str, str, int]] = {
    "lm_forward": ([lm.forward], "s", "time", 7),
    "lm_decode": ([lambda: lm.decode(1), lambda: lm.decode(8)], "tokens/s", "rate", 5),
    "ngram": ([small.ngram], "tokens/s", "rate", 15),
    "depth_head": ([small.depth_head], "positions/s", "rate", 9),
}


def run(name: str, rounds: int | None = None) -> dict:
    """All cases of one benchmark as the JSON that DESIGN §6 describes; numbers are one per case where there are several."""
    if name == "import":
        return importing.run(rounds)
    workloads, unit, kind, default = BENCHES[name]
    found = [harness.compare(make(), rounds or default) for make in workloads]
    value = lambda row, key: row[key] if kind == "time" else row["amount"] / row[key]
    column = lambda key: [value(row, key) for row in found]
    single = lambda values: values[0] if len(values) == 1 else {row["case"]: v for row, v in zip(found, values, strict=True)}
    ours, peer = column("ours"), column("peer")
    return {
        "name": name, "ours": single(ours), "peer": single(peer), "ratio": single([a / b for a, b in zip(ours, peer, strict=True)]),
        "floor": single(column("floor")), "peer_version": found[0]["peer_version"], "unit": unit,
        "samples": {row["case"]: row["samples"] | {"peer_threads": row["peer_threads"]} for row in found}, "machine": harness.machine_name(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark and prints it."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args(argv)
    check_name(args.name, (*BENCHES, "import"), "benchmark")
    harness.exactly()
    result = run(args.name, args.rounds)
    for key, value in result.items():
        if key != "samples":
            print(f"{key:>18}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)
