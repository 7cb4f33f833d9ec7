"""The page, report.json and the README's table, from a synthetic run."""

import html.parser
import json
import re

import pytest

from dina.config import InputError
from tests.tools import fake_run
from tools.report import __main__ as command
from tools.report import figures, inputs, page, readme, samples, table


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("run"), count=12)


@pytest.fixture(scope="module")
def run(workdir):
    return inputs.read_run(workdir)


@pytest.fixture(scope="module")
def text(run):
    return page.build(run)


class Balance(html.parser.HTMLParser):
    """Raises where a tag is closed that is not open; `open` must be empty at the end."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()


def test_page_is_well_formed_and_refers_to_nothing_outside(text):
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    addresses = re.findall(r'(?:src|href)="([^"]{0,12})', text)
    assert addresses and all(a.startswith(("data:", "#")) for a in addresses)
    assert "url(" not in text and "@import" not in text and "<script" not in text


def test_page_shows_every_section_every_stage_and_every_score(text, run):
    for anchor, heading, _ in page.SECTIONS:
        assert (f'id="{anchor}"' in text) == (anchor != "environment" or bool(run.environment)), anchor
    for name in fake_run.STAGES:
        assert f"learning curves of stage {name}" in text
    for row in (*table.MAIN, *table.OTHER):
        assert row.title in text, row.key


def test_prompts_are_escaped(run):
    hostile = {**run.answers["text_to_image"][0], "prompt": "<script>alert(1)</script>"}
    shown = samples.painted(inputs.dataclasses.replace(run, answers={"text_to_image": [hostile]}))
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_box_is_outlined_where_the_record_says(run):
    record = run.answers["text_to_image"][0]
    shown = samples.picture(run, record["file"], [14, 28, 56], zoom=2)
    assert "top:28px;left:56px;width:112px;height:112px" in shown


def test_score_bar_places_value_and_bar_on_one_scale():
    svg = figures.interval_bar(0.75, 0.7, 0.8, 0.9, None, start=0.5)
    value, bar = float(re.search(r'cx="([\d.]+)"', svg)[1]), float(re.search(r'x1="([\d.]+)" y1="2"', svg)[1])
    assert value == pytest.approx(4 + 232 * 0.5) and bar == pytest.approx(4 + 232 * 0.8, abs=0.06)
    assert figures.BAD in svg and figures.GOOD in figures.interval_bar(0.95, 0.9, 1.0, 0.9, None)


def test_missing_parts_are_left_out_not_fatal(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"codebook_usage": 0.95}))
    built = page.build(inputs.read_run(tmp_path))
    assert "0.950" in built and "It paints" not in built


def test_damaged_and_absent_inputs_are_named(tmp_path):
    with pytest.raises(InputError, match="run `python -m dina.evaluate"):
        inputs.read_run(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.json").write_text("{")
    with pytest.raises(InputError, match="scores.json is damaged"):
        inputs.read_run(tmp_path)


def test_command_writes_both_files_with_equal_numbers_and_the_readme(workdir, tmp_path):
    target = tmp_path / "README.md"
    target.write_text(f"# x\n\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    for _ in range(2):  # twice gives the same
        assert command.main([f"--workdir={workdir}", "--config=", f"--readme={target}"]) == 0
    found = json.loads((workdir / "report.json").read_text())
    assert all(isinstance(s, (int, float)) or set(s) == {"value", "low", "high", "n"} for s in found.values())
    assert found["demo_minutes"] == pytest.approx(812 / 60, abs=0.01) and found["seconds_V0"] == 60.0
    text = target.read_text()
    assert "old" not in text and text.endswith("after\n") and text.count(readme.BEGIN) == 1
    shown = re.search(r"`text_to_image_accuracy` \| ([\d.]+)", text)
    assert float(shown[1]) == pytest.approx(found["text_to_image_accuracy"]["value"], abs=5e-4)


def test_readme_without_markers_is_refused(tmp_path):
    target = tmp_path / "README.md"
    target.write_text("# x\n")
    with pytest.raises(InputError, match="results: begin"):
        readme.rewrite(target, {})
    assert target.read_text() == "# x\n"


def test_bars_are_reached_in_the_right_direction():
    minutes = next(row for row in table.OTHER if row.key == "demo_minutes")
    assert table.reached(minutes, 14.9) and not table.reached(minutes, 15.1)
    assert table.reached(table.MAIN[0], {"value": 0.94}) and not table.reached(table.MAIN[0], {"value": 0.93})
    assert table.reached(table.SECOND[0], {"value": 0.5}) is None


def test_the_readme_can_be_checked_against_the_scores(workdir, run, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"a\n{readme.BEGIN}\n{readme.END}\nb\n")
    with pytest.raises(InputError, match="should be"):
        readme.check(path, run.scores)
    readme.rewrite(path, run.scores)
    readme.check(path, run.scores)
    assert command.main([f"--workdir={workdir}", f"--check-readme={path}"]) == 0
    path.write_text(path.read_text().replace(readme.END, f"| more |\n{readme.END}"))
    with pytest.raises(InputError, match="more"):
        readme.check(path, run.scores)
    with pytest.raises(InputError, match="report.json"):
        command.main([f"--workdir={tmp_path}", f"--check-readme={path}"])
