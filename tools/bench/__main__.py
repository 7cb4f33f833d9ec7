"""Benchmarks: `python -m tools.bench NAME [--json FILE] [--rounds N] [--case I]`.

NAME: lm_forward, rvq_encode, rvq_train_step, audio_encode, audio_decode, flow, vocoder (times, lower is better; of speech also
`real_time_factor`, seconds of work a second of sound), lm_decode, ngram, depth_head, import, packed_loader (rates, higher is better). Ours and
the peer run in turn in one process tree (first_audio, seconds until a spoken reply is heard, has no peer, nor has saving, of checkpoints); medians and their ratio are printed with the samples' spread and the machine's own floor. Times come with `memory`: peaks of both in bytes over what they hold between runs, and their ratio.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable

from dina.config import check_name, run_main
from tools.bench import audio_chain, first_audio, harness, importing, lm, loading, rvq, saving, small, vocoder

# name -> (workloads, unit, what `ratio` divides, rounds)
BENCHES: dict[str, tuple[list[Callable[[], harness.Workload]], str, str, int]] = {
    "lm_forward": ([lm.forward], "s", "time", 7),
    "lm_decode": ([lambda: lm.decode(1), lambda: lm.decode(8)], "tokens/s", "rate", 5),
    "ngram": ([small.ngram], "tokens/s", "rate", 15),
    "depth_head": ([small.depth_head], "positions/s", "rate", 9),
    "audio_encode": ([audio_chain.encode], "s", "time", 5),
    "audio_decode": ([audio_chain.decode], "s", "time", 5),
    "flow": ([audio_chain.flow], "s", "time", 5),
    "vocoder": ([vocoder.vocoder], "s", "time", 7),
    "rvq_encode": ([functools.partial(rvq.encode, dim, peer) for dim in rvq.DIMS for peer in rvq.PEERS], "s", "time", 5),
    "rvq_train_step": ([functools.partial(rvq.train_step, dim, peer) for dim in rvq.DIMS for peer in rvq.PEERS], "s", "time", 5),
}
# Those that have their own way of measuring.
OWN: dict[str, Callable[[int | None], dict]] = {"import": importing.run, "packed_loader": loading.packed_loader, "first_audio": first_audio.run, "saving": saving.run}
SPEECH = ("audio_encode", "audio_decode", "flow", "vocoder")  # their amount is seconds of sound


def run(name: str, rounds: int | None = None, case: int | None = None) -> dict:
    """All cases of one benchmark, or one of them, as the JSON that DESIGN §6 describes; numbers are one per case where there are several."""
    if name in OWN:
        return OWN[name](rounds)
    workloads, unit, kind, default = BENCHES[name]
    found = [harness.compare(make(), rounds or default) for make in (workloads if case is None else [workloads[case]])]
    value = lambda row, key: row[key] if kind == "time" else row["amount"] / row[key]
    column = lambda key: [value(row, key) for row in found]
    single = lambda values: values[0] if len(values) == 1 else {row["case"]: v for row, v in zip(found, values, strict=True)}
    ours, peer = column("ours"), column("peer")
    factor = {"real_time_factor": {who: single([row[who] / row["amount"] for row in found]) for who in ("ours", "peer")}} if name in SPEECH else {}
    memory = single([dict(zip(("ours", "peer", "ratio"), (*row["peak"], row["peak"][0] / row["peak"][1]))) if row["peak"] else None for row in found])
    return {
        "name": name, "ours": single(ours), "peer": single(peer), "ratio": single([a / b for a, b in zip(ours, peer, strict=True)]),
        "floor": single(column("floor")), "peer_version": found[0]["peer_version"], "unit": unit,
        "samples": {row["case"]: row["samples"] | {"peer_threads": row["peer_threads"]} for row in found}, "machine": harness.machine_name(),
    } | ({"memory": memory} if kind == "time" else {}) | factor  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark and prints it."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--case", type=int, metavar="I", help="only the I-th case, from 0")
    args = parser.parse_args(argv)
    check_name(args.name, (*BENCHES, *OWN), "benchmark")
    harness.exactly()
    result = run(args.name, args.rounds, args.case)
    for key, value in result.items():
        if key != "samples":
            print(f"{key:>18}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)
