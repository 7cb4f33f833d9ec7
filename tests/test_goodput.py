"""Seconds by kind, over processes of which some were killed."""

import json
import time

from dina import goodput


def test_kinds_add_up_over_processes_and_torn_lines_do_not_count(tmp_path):
    for _ in range(2):
        times = goodput.Goodput(tmp_path)
        begun = time.monotonic()
        with times.spent("compiling"):
            time.sleep(0.02)
        times.write(1)
        with times.spent("saving"):
            time.sleep(0.01)
        times.write(2)
        took = time.monotonic() - begun
        own = json.loads(times.path.read_text().splitlines()[-1])
        assert own["step"] == 2 and own["compiling"] >= 0.02 and own["saving"] >= 0.01 and own["lost"] == 0
        assert sum(own[kind] for kind in goodput.KINDS) <= took + 0.01  # nothing twice
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"process": "x", "comp')
    total = goodput.total(tmp_path)
    assert 0.04 <= total["compiling"] < 2 * (took + 0.04) and total.keys() == set(goodput.KINDS)


def test_what_is_done_again_is_lost(tmp_path):
    lines = [{"step": 1, "wall": 100.0}, {"step": 2, "wall": 103.0}, {"step": 3, "wall": 107.0}, {"step": 4, "wall": 112.5}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "wa')
    for first, lost in ((2, 9.5), (4, 0.0), (0, 12.5)):
        times = goodput.Goodput(tmp_path)
        times.lose(path, first)
        assert times.seconds["lost"] == lost
    goodput.Goodput(tmp_path).lose(tmp_path / "none", 0)
