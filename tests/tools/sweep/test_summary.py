"""Intervals, fronts, differences and the table, from made-up cells whose answers are known."""

import csv
import html.parser
import io
import re

import numpy as np
import pytest

from dina.config import InputError
from tools.sweep import compare, measure, page, plan, summary, table

PICTURES = 40
BASE = np.random.default_rng(0).normal(25, 4, PICTURES)  # what pictures have in common: much more than cells differ by


def _cell(sizes, books, seed, gain=0.0, language=True, noise=0.05):
    """A cell whose PSNR grows by 1 dB a level and with the logarithm of its size, plus `gain` and little noise."""
    rng = np.random.default_rng([len(sizes), sizes[0], seed, len(books)])
    depths = range(1, len(sizes) + 1)
    psnr = {str(d): (BASE + d + np.log2(sizes[0]) + gain + rng.normal(0, noise, PICTURES)).tolist() for d in depths}
    cells = [1 + i % 3 for i in range(PICTURES)]
    bits = [[0.8 * n * np.log2(size) for size in sizes] for n in cells]
    return {
        "key": f"{sizes}{books}{seed}", "group": f"{plan.describe(sizes)} {books}", "seed": seed, "levels": len(sizes), "sizes": list(sizes),
        "axes": {"vision.quantizer.sizes": list(sizes), "vision.quantizer.codebook": books, "seed": seed}, "depths": list(depths),
        "pictures": {"split": "test", "count": PICTURES, "identity": "same", "cells": cells}, "bits": [float(np.log2(s)) for s in sizes],
        "psnr_db": psnr, "ssim": {d: [v / 50 for v in values] for d, values in psnr.items()}, "head_flops": [1e6 * d for d in depths],
        "language": {"bits": bits, "curve": [3.0]} if language else {}, "seconds": {"V1": 1.0, "measure": 2.0},
        "codebooks": {"usage": [1.0] * len(sizes), "perplexity": [3.0] * len(sizes), "dead": [0] * len(sizes), "window": 99,
                      "energy": [0.5**d for d in depths]},
        "latency": {"encoder": {"us_cell": [1.0, 2.0, 3.0], "mib": 1.0}, "search": {"1": {"us_cell": [1.0, 2.0, 3.0], "mib": 2.0}}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def records():
    grid = [_cell((size,) * 4, books, seed, 0.3 if books == "shared" else 0.0)
            for size in (8, 64) for books in ("separate", "shared") for seed in (1, 2, 3)]  # fmt: skip
    return [*grid, *(_cell((64,) * 2, "separate", seed, 0.2) for seed in (1, 2))]


@pytest.fixture(scope="module")
def study(records):
    sweep = plan.default_config()
    sweep.measure = measure.default_options()
    with sweep.ignore_type():
        sweep.title, sweep.notes = "A title", ("A <note>.",)
    return page.study(sweep, records, 0)


def test_front_is_what_no_point_beats():
    rng = np.random.default_rng(1)
    for count in (1, 2, 30):
        cost, gain = rng.integers(0, 9, count).astype(float), rng.integers(0, 9, count).astype(float)
        beaten = [any(cost[j] <= cost[i] and gain[j] >= gain[i] and (cost[j] < cost[i] or gain[j] > gain[i]) for j in range(count)) for i in range(count)]
        np.testing.assert_array_equal(summary.pareto(cost, gain), ~np.array(beaten))


def test_an_interval_covers_pictures_and_seeds():
    """Of 300 made studies, with 3 seeds and 30 pictures: pictures' share of the variance is what the bootstrap must see."""
    rng = np.random.default_rng(2)
    hits = 0
    drawn = summary.Draws(rng.multinomial(30, np.full(30, 1 / 30), 300) / 30, rng.random((300, 3)))
    for _ in range(300):
        value_SR = rng.normal(0, 1, 30) + rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.1, (3, 30))
        found = drawn.interval(value_SR)
        hits += found["low"] <= 0 <= found["high"]
    assert 0.89 < hits / 300 < 0.985
    flat = drawn.interval(np.full((3, 30), 7.0))
    assert list(flat.values()) == pytest.approx([7.0, 7.0, 7.0])


def test_pairs_see_what_pictures_would_hide(study):
    separate, shared = (next(g for g in study.groups if g.name == f"4 x 64 {books}") for books in ("separate", "shared"))
    alone = study.drawn.interval(separate.values("psnr_db", 4))
    (pair,) = [d for d in compare.differences(study.groups, study.drawn, (4,), ("psnr_db",)) if (d.first, d.second) == (separate, shared)]
    assert alone["high"] - alone["low"] > 1.5 and pair.interval["high"] - pair.interval["low"] < 0.2
    assert pair.is_clear and pair.axis == "vision.quantizer.codebook" and abs(pair.interval["value"] - 0.3) < 0.05


def test_a_training_of_few_levels_is_compared_with_the_read_off_at_its_depth(study):
    found = [d for d in compare.differences(study.groups, study.drawn, (1, 2, 4), ("psnr_db",)) if d.axis == compare.NESTING]
    assert [(d.first.name, d.second.name, d.depth) for d in found] == [("4 x 64 separate", "2 x 64 separate", 2)]
    assert abs(found[0].interval["value"] - 0.2) < 0.05  # the seeds that both have
    axes = {(d.axis, d.first.name, d.second.name) for d in compare.differences(study.groups, study.drawn, (1,), ("psnr_db",))}
    assert ("vision.quantizer.sizes", "4 x 8 shared", "4 x 64 shared") in axes and not any("2 x 64" in second for _, _, second in axes if _ != "4 x 64 separate")


def test_cells_measured_on_other_pictures_are_refused(records):
    other = records[0] | {"pictures": records[0]["pictures"] | {"identity": "other"}, "key": "odd"}
    with pytest.raises(InputError, match="odd.*different pictures|different pictures.*odd"):
        summary.groups([*records, other])


def test_checks_name_what_is_not_monotone(records, study):
    assert all(check.holds == check.total for check in compare.checks(study.points, study.drawn))
    broken = {"1": records[0]["psnr_db"]["4"], "2": records[0]["psnr_db"]["1"]}
    cells = [records[0] | {"psnr_db": records[0]["psnr_db"] | broken, "language": {"bits": [[-1.0, 99.0, 0.0, 0.0]] * PICTURES, "curve": []}}]
    found = summary.groups(cells)
    drawn = summary.draws(found)
    checks = {check.claim: check for check in compare.checks(summary.points(found, drawn), drawn)}
    assert checks["psnr_db does not fall with depth"].exceptions[0].startswith("4 x 8 separate: depth 1 to 2: -3")
    assert checks["the language model needs fewer bits than the codes have"].holds < 4


def test_table_has_every_cell_and_every_configuration_at_every_depth(study, records):
    lines = list(csv.DictReader(io.StringIO(table.table(study.points, study.drawn))))
    assert len(lines) == sum(r["levels"] for r in records) + sum(g.levels for g in study.groups)
    one = next(line for line in lines if line["seed"] == "2" and line["group"] == "4 x 64 shared" and line["depth"] == "3")
    cell = next(r for r in records if r["group"] == "4 x 64 shared" and r["seed"] == 2)
    assert abs(float(one["psnr_db"]) - np.mean(cell["psnr_db"]["3"])) < 1e-4 and float(one["bits_cell"]) == 18.0
    assert abs(float(one["language_bits_image"]) - 0.8 * float(one["bits_image"])) < 1e-2 and one["encode_us"] == ""
    assert float(one["psnr_db_low"]) < float(one["psnr_db"]) < float(one["psnr_db_high"]) and one["vision.quantizer.sizes"] == "64/64/64/64"


class _Balance(html.parser.HTMLParser):
    """Raises where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "img", "br", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_page_is_whole_and_refers_to_nothing_outside(study):
    text = page.build(study)
    parser = _Balance()
    parser.feed(text)
    assert parser.open == []
    addresses = re.findall(r'(?:src|href)="([^"]{0,12})', text)
    assert addresses and all(a.startswith(("data:", "#")) for a in addresses) and "<script" not in text
    for anchor, heading, _ in page.SECTIONS:
        assert f'id="{anchor}">{heading}' in text
    assert "A &lt;note&gt;." in text and "Trained with few levels" in text


def test_page_of_cells_without_codes_has_what_there_is(records):
    bare = [r | {"levels": 0, "sizes": [], "depths": [0], "bits": [], "head_flops": [], "language": {}, "codebooks": {}, "psnr_db": {"0": r["psnr_db"]["1"]},
                 "ssim": {"0": r["ssim"]["1"]}, "latency": {"encoder": {"us_cell": [1.0, 2.0, 3.0], "mib": 1.0}, "search": {}}} for r in records[:6]]  # fmt: skip
    sweep = plan.default_config()
    sweep.measure = measure.default_options()
    made = page.study(sweep, bare, 2)
    text = page.build(made)
    assert 'id="fronts"' not in text and 'id="fidelity"' in text and "2 cells are not finished" in text
    assert not any(point.front for point in made.points)
