"""The evaluation from questions to scores.json, with a stand-in model that is right, wrong or mute on purpose."""

import json
import types

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest

from dina import checkpoint, evaluate as evaluation, sharding, stages, train
from dina.config import InputError
from dina.data import canvases, digits, sources, spoken
from dina.eval import prompts
from dina.eval.generation import Answer
from tests import toy
from tests.eval.test_reconstruction import Stub


class Oracle(Stub):
    """Answers by giving real held-out material of the right digit; every fourth picture stands in the wrong place."""

    columns: dict = {}
    asked = 0

    def __init__(self, config, workdir):
        pass

    def resynthesize(self, clip):
        return clip

    def answer(self, questions, seed):
        Oracle.asked += len(questions)
        return [self._one(number, question) for number, question in enumerate(questions)]

    def _one(self, number, q):
        speech, images = self.columns["speech"], self.columns["images"]
        if q.reply == "text":
            return Answer(q.caption or q.word)
        if q.reply == "speech":
            index = speech["word"].index(q.word) if q.word in speech["word"] else 0
            return Answer(q.word, wave=np.asarray(speech["audio24"][index], np.float32) / 32768, rate=24000)
        index = next(i for i, d in enumerate(images["digit"]) if d == q.truth)
        top, left, size = (int(images[name][index]) for name in ("top", "left", "size"))
        digit = np.asarray(images["image"][index])[top:top + size, left:left + size, 0][:: size // 28, :: size // 28]
        box = q.box if number % 4 else (0, 0, 28)
        pixels = canvases.paste(digit, q.canvas, box[2], box[0], box[1])
        return Answer("", image=np.repeat(pixels[..., None], 3, -1))


def columns(records):
    rows = list(records)
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def config():
    c = ml_collections.ConfigDict({"eval": prompts.default_config(), "data": digits.smoke_config(), "name": "toy", "seed": 1, "order": ("sft",)})
    c.vision = ml_collections.ConfigDict({"quantizer": {"sizes": (4,) * 4}})
    c.audio = ml_collections.ConfigDict({"quantizer": {"sizes": (4, 3, 3)}})
    for task in ("image_to_text", "speech_to_text", "text_to_image", "text_to_speech", "image_to_speech", "speech_to_image"):
        for group in c.eval[task]:
            c.eval[task][group] = 20
    c.eval.reconstruct_images, c.eval.reconstruct_clips, c.eval.media = 4, 3, 2
    c.data.mnist.update({"train": 500, "test": 60})
    c.data.speech.judge.update({"voices": ("en-us", "en"), "variants": ("m7", "john"), "digits": 3})
    return c


@pytest.fixture(scope="module")
def data(config):
    """Columns as `load_all` gives them, without building a data set."""
    found = {("images", "test"): columns(canvases.records(config.data, "test"))}
    for split in ("judge", "test", "valid"):
        found["speech", split] = columns(spoken.records(config.data, split))
    images = found["images", "test"]
    images["image"] = [np.asarray(PIL.Image.open(image)) for image in images["image"]]
    return found


@pytest.fixture()
def run(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "load_all", lambda config, kind, split: data[kind, split])
    monkeypatch.setattr(evaluation, "Generator", Oracle)
    monkeypatch.setattr(evaluation, "settle", lambda config: None)
    Oracle.columns = {"images": data["images", "test"], "speech": data["speech", "test"]}
    return lambda: (evaluation.evaluate(config, tmp_path), tmp_path / "eval")


def test_scores_follow_what_the_model_did_media_are_kept_and_runs_repeat(run, monkeypatch):
    fit, fitted = evaluation.Judges, []
    monkeypatch.setattr(evaluation, "Judges", lambda *args: fitted[0] if fitted else fitted.append(fit(*args)) or fitted[0])
    scores, folder = run()
    assert scores["image_to_text_accuracy"]["value"] == scores["speech_to_text_accuracy"]["value"] == 1.0
    assert scores["image_to_text_caption_accuracy"]["value"] == scores["speech_to_text_words_accuracy"]["value"] == 1.0
    assert scores["digit_judge_accuracy"]["value"] > 0.85 and scores["speech_judge_accuracy"]["value"] > 0.7
    assert scores["text_to_speech_accuracy"]["value"] > 0.6
    assert scores["text_to_speech_transcript_accuracy"]["value"] == 1.0
    # Pictures in the wrong place are wrong, unless the words name that very place.
    records = [json.loads(line) for line in (folder / "text_to_image.jsonl").read_text().splitlines()]
    moved = [r for r in records if r["box"] != [0, 0, 28]]
    assert len(moved) > 10
    assert 0.5 < scores["text_to_image_accuracy"]["value"] < 1.0
    kept = [json.loads(line) for line in (folder / "image_to_speech.jsonl").read_text().splitlines()]
    kept = [r for r in kept if "file" in r]
    assert len(kept) == 4 and {r["group"] for r in kept} == {"main", "any_offset"}
    assert all((folder / r["file"]).is_file() and (folder / r["shown"]).is_file() for r in kept)
    # A second evaluation of the same model is read, and asks nothing.
    before, Oracle.asked = Oracle.asked, 0
    assert run()[0] == scores and Oracle.asked == 0
    # One that was killed before its end asks only what was not kept, replaces the first, and says the same.
    (folder / "stray.png").write_bytes(b"x")
    (folder / "stage.json").unlink()
    kept = sorted((folder.parent / "answers").iterdir())
    assert len(kept) == before > 100
    kept[0].unlink()
    kept[1].write_bytes(kept[1].read_bytes()[:-1])
    again, _ = run()
    assert again == scores and json.loads((folder / "scores.json").read_text()) == scores
    assert not (folder / "stray.png").exists() and 0 < Oracle.asked <= 2 * evaluation.ASKED_AT_ONCE
    assert sorted((folder.parent / "answers").iterdir()) == kept


def test_another_model_or_other_settings_are_another_evaluation(config, tmp_path):
    digests = {evaluation.model_digest(config, tmp_path)}
    for text in ("{}", '{"seal": "a"}'):
        (tmp_path / "sft").mkdir(exist_ok=True)
        (tmp_path / "sft" / "stage.json").write_text(text)
        digests.add(evaluation.model_digest(config, tmp_path))
    assert len(digests) == 3 and evaluation.model_digest(config, tmp_path) in digests
    (tmp_path / "stage.json").write_text(json.dumps({"about": "x"}))
    assert evaluation.finished(tmp_path, "x") is None  # no scores
    (tmp_path / "scores.json").write_text('{"a": 1}')
    assert evaluation.finished(tmp_path, "x") == {"a": 1} and evaluation.finished(tmp_path, "y") is None


def test_checkpoints_of_a_stage_are_scored_newest_first_once_each(tmp_path, monkeypatch, capsys):
    config, mesh = toy.config(), sharding.make_mesh({"data": 1}, jax.devices()[:1])
    config.checkpoint.keep = 9
    train.train_stage(config, "one", tmp_path, mesh, types.SimpleNamespace(asked=False))
    scored = []

    def weigh(config, workdir):
        params, _ = stages.load_parts(config, workdir, ["body", "head"])
        scored.append((workdir.name, float(np.abs(params["body"]["w"]).sum())))
        if len(scored) == 1:  # while it works, the older one is damaged
            path = next((tmp_path / "one" / "checkpoints").glob("00000004.*/_METADATA"))
            path.write_bytes(path.read_bytes()[:-1])
        return {"weight": scored[-1][1]}

    monkeypatch.setattr(evaluation, "evaluate", weigh)
    found = evaluation.score_stage(config, tmp_path, "one", watch=0.01)
    assert [name for name, _ in scored] == ["one-8"] and found["one-4"] == {}
    assert "one-4 is passed over" in capsys.readouterr().out
    assert scored[0][1] != float(np.abs(checkpoint.result(tmp_path / "one")["params"]["body"]["w"]).sum())
    with pytest.raises(InputError, match="no stage 'three'"):
        evaluation.score_stage(config, tmp_path, "three")


def test_a_missing_second_judge_is_named_not_fatal(run, monkeypatch):
    monkeypatch.setattr(evaluation, "PocketSphinx", _absent)
    scores, folder = run()
    assert "pocketsphinx" in json.loads((folder / "stage.json").read_text())["skipped"]
    assert not [key for key in scores if "pocketsphinx" in key]


def _absent(words):
    raise ImportError("No module named 'pocketsphinx'")


