"""The entry point on an untrained tiny experiment: what it prints and writes, and what it refuses."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import soundfile

from dina import config as configs
from dina import model as model_lib
from dina import grammar, sample, stages
from dina.config import InputError
from dina.data import packing
from dina.eval import prompts as eval_prompts
from dina.tasks.flow import FlowTask
from dina.tasks.refiner import RefinerTask
from dina.text import tokenizer as text
from tests import tiny_language
from tests.audio import toy
from tests.vision import packs

WORDS = ["paint a small seven at the top left", "which digit is it", "say the word river", "0 1 2 3 4 5 6 7 8 9"]


@functools.cache
def _experiment():
    config = packs.tiny_config()
    config.audio, config.model = toy.experiment().audio, tiny_language.model_config()
    config.vision.max_pixels = 6 * 28 * 28
    config.text = {"vocab_size": 290}
    config.eval = eval_prompts.default_config()
    config.run = {"workdir": "", "data_dir": ""}
    return config


@functools.cache
def _parts(tokenizer):
    """Variables of every part: fresh statistics, and parameters drawn on the host, for compiling the initialisers takes longer."""
    config, key = _experiment(), jax.random.key(0)
    vocabulary = grammar.from_config(config, tokenizer.encode)
    model = model_lib.build(config.model, vocabulary)
    inits = (RefinerTask(config, packs.stage("refiner")).init, FlowTask(config, toy.stage("flow")).init, functools.partial(model_lib.init, model))
    params, stats, rng = {}, {}, np.random.default_rng(0)

    def draw(path, x):
        spread = x.shape[-2] ** -0.5 if len(x.shape) > 1 else 0.1
        return ((path[-1].key == "scale") + rng.normal(0, spread, x.shape)).astype(x.dtype)

    for init in inits:
        params |= jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, key)["params"])
        stats |= jax.jit(lambda key, init=init: init(key)["stats"])(key)
    return jax.tree.map(jnp.asarray, (params, stats))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.model"
    text.train_tokenizer(WORDS * 5, path, vocab_size=290)
    plain = text.TextTokenizer(path)
    return text.TextTokenizer(path, grammar.from_config(_experiment(), plain.encode).ids)


@pytest.fixture
def run(monkeypatch, tmp_path, tokenizer):
    """Runs the command line with `--workdir` and returns its exit code."""
    vocabulary = grammar.from_config(_experiment(), tokenizer.encode)
    monkeypatch.setattr(configs, "load", lambda spec: _experiment().copy_and_resolve_references())
    monkeypatch.setattr(packing, "open_vocabulary", lambda config: (vocabulary, tokenizer))
    monkeypatch.setattr(sample, "settle", lambda config: None)  # tests have a compile cache of their own

    def load(config, workdir, parts):
        params, stats = _parts(tokenizer)
        assert set(parts) <= set(params)
        return params, stats

    monkeypatch.setattr(stages, "load_parts", load)

    def call(*flags):
        with pytest.raises(SystemExit) as end:
            configs.run_main(sample.main, ["--config=x.py", f"--workdir={tmp_path}", *flags])
        return end.value.code

    return call


def _png(path, size=(56, 28)):
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def _wav(path, n=8000):
    soundfile.write(path, 0.3 * np.sin(np.arange(n) / 9), 16000, "PCM_16")
    return path


@pytest.mark.slow
def test_a_painting_has_the_size_asked_for(run, tmp_path, capsys):
    flags = ("--prompt=paint a small seven", "--size=2x3", "--guidance=2", f"--out={tmp_path / 'o'}")
    assert run(*flags) == 0
    assert PIL.Image.open(tmp_path / "o" / "sample-000.png").size == (84, 56)
    assert "2x3" in capsys.readouterr().out
    first = (tmp_path / "o" / "sample-000.png").read_bytes()
    assert run(*flags) == 0 and (tmp_path / "o" / "sample-000.png").read_bytes() == first
    assert run(*flags, "--seed=5") == 0 and (tmp_path / "o" / "sample-000.png").read_bytes() != first
    assert not [p for p in (tmp_path / "o").iterdir() if "part" in p.name]


def test_a_file_of_prompts_mixes_all_kinds(run, tmp_path, capsys):
    image, wave = _png(tmp_path / "in.png"), _wav(tmp_path / "in.wav")
    lines = [
        {"prompt": "which digit is it", "image": str(image)},
        {"prompt": "which digit is it", "speech": str(wave)},
        {"prompt": "say the word river", "reply": "speech", "seed": 4},
        {"prompt": "paint it", "speech": str(wave), "size": "1x2", "guidance": 1.5},
        {"prompt": "say it <audiogen_start>", "image": str(image)},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert run(f"--prompts={tmp_path / 'p.jsonl'}", "--refine=none", f"--out={tmp_path / 'o'}") == 0
    printed = capsys.readouterr().out
    assert set(re.findall(r"^(\d): ", printed, re.MULTILINE)) == set("01234")
    assert (tmp_path / "o" / "sample-003.png").is_file()
    for line in printed.splitlines():
        if "[speech]" in line and line.endswith(".wav"):
            rate = soundfile.info(line.split()[-1]).samplerate
            assert rate == _experiment().audio.target.rate


SAY = ("--prompt=say the word river", "--reply=speech")


@pytest.mark.slow
def test_speech_is_played_while_it_is_made(run, tmp_path, capsys):
    out = (f"--out={tmp_path / 'o'}", f"--stream={tmp_path / 'pcm'}")
    assert run(*SAY, *out, f"--voice={_wav(tmp_path / 'v.wav')}", "--segments=2", "--max_text=4") == 0
    played, (kept, rate) = np.frombuffer((tmp_path / "pcm").read_bytes(), np.int16), soundfile.read(tmp_path / "o" / "sample-000.wav", dtype="int16")
    np.testing.assert_allclose(played, kept, atol=2)  # the file's full scale is one step more
    assert len(kept) > rate / 10 and "[speech]" in capsys.readouterr().out


def test_samples_are_written_as_they_come_and_kept_whole(run, tmp_path, capsys, monkeypatch, tokenizer):
    pcm, sizes = tmp_path / "pcm", []

    def stream(desk, ask):
        for number, count in enumerate((0, 300, 200)):
            sizes.append(pcm.stat().st_size)
            yield sample.streaming.Spoken(np.full(count, 0.5, np.float32), tuple(tokenizer.encode("river")[number : number + 1]), number, None)

    monkeypatch.setattr(sample.Desk, "stream", stream)
    assert run(*SAY, f"--stream={pcm}") == 0 and sizes == [0, 0, 600]
    assert pcm.read_bytes() == np.full(500, 16384, np.int16).tobytes() and "[speech] ri" in capsys.readouterr().out
    assert len(soundfile.read(tmp_path / "samples" / "sample-000.wav")[0]) == 500
    assert run("--prompt=what", f"--stream={pcm}") == 2 and "--reply=speech" in capsys.readouterr().err
    assert run("--interactive", f"--stream={pcm}") == 2
    assert run(*SAY, f"--stream={tmp_path / 'no' / 'pcm'}") == 2 and "cannot be written" in capsys.readouterr().err


def test_pictures_that_no_stage_has_learnt_are_refused(run, tmp_path, capsys, monkeypatch):
    config = _experiment().copy_and_resolve_references()
    config.stages = {"A1": toy.stage("audio_tokens")}
    config.stages.A1.train = ("audio_encoder", "audio_decoder/head/*")
    monkeypatch.setattr(configs, "load", lambda spec: config)
    for flags in ((f"--image={_png(tmp_path / 'in.png')}",), ("--size=1x1", "--refine=none")):
        assert run("--prompt=what", *flags) == 2 and "which no stage of the experiment trains" in capsys.readouterr().err


def test_a_conversation_remembers_and_survives_mistakes(run, tmp_path, monkeypatch, capsys):
    image = _png(tmp_path / "in.png")
    seen = []
    answer = sample.Desk.answer
    monkeypatch.setattr(sample.Desk, "answer", lambda self, asks, before=(): seen.append(before) or answer(self, asks, before))
    turns = [f"/image {image}", "which digit is it", "/size 1x2", "paint it", "/size 99x99", "paint it", "/fly", "/new", "say it", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", turns_of(turns))
    assert run("--interactive", "--refine=none", f"--out={tmp_path / 'o'}") == 0
    out = capsys.readouterr().out
    assert "99 x 99" in out and "/fly" in out and (tmp_path / "o" / "turn-001.png").is_file()
    assert [len(before) > 0 for before in seen] == [False, True, False]


def turns_of(lines):
    return (line + "\n" for line in lines)


@pytest.mark.parametrize(
    "flags,named",
    [
        (("--prompt=paint <img_begin>", "--size=1x1"), "<img_begin>"),
        (("--prompt=a <img_pad> b",), "<img_pad>"),
        (("--prompt=paint", "--size=9x9"), "9 x 9"),
        (("--prompt=paint", "--size=0x2"), "0x2"),
        (("--prompt=paint", "--size=huge"), "huge"),
        (("--prompt=paint", "--reply=image"), "size"),
        (("--prompt=say it", "--reply=speech", "--size=1x1"), "1x1"),
        (("--prompt=what", "--image=nowhere.png"), "nowhere.png"),
        (("--prompt=what", "--speech=nowhere.wav"), "nowhere.wav"),
        (("--prompt=say it", "--reply=speech", "--voice=nowhere.wav"), "nowhere.wav"),
        (("--prompt=say it", "--reply=speech", "--segments=0"), "segments 0"),
        (("--prompts=nowhere.jsonl",), "nowhere.jsonl"),
        (("--prompt=what", "--text_temperature=-1"), "temperature"),
        (("--prompt=what", "--max_text=0"), "max_text"),
        (("--prompt=what", "--delay=-3"), "-3"),
        (("--prompt=what", "--seed=-1"), "seed -1"),
        (("--prompt=what", f"--seed={2**31}"), f"seed {2**31}"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.setattr(stages, "load_parts", lambda *a: pytest.fail("the model was loaded before the input was checked"))
    assert run(*flags) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and "\n" not in error
    assert not (tmp_path / "samples").exists()


def test_a_seed_of_a_line_is_named(run, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "what", "seed": 2**40}))
    assert run(f"--prompts={tmp_path / 'p.jsonl'}") == 2
    assert "line 1: seed" in capsys.readouterr().err


@pytest.mark.parametrize("flags,wanted", [
    ((), (0.3, 0.25, 1.5, 1.75, "none")),
    (("--text_temperature=1", "--visual_temperature=2", "--guidance=3", "--speech_guidance=4", "--refine=flow"), (1, 2, 3, 4, "flow")),
])
def test_what_is_not_said_is_the_experiments(tmp_path, tokenizer, monkeypatch, flags, wanted):
    config = _experiment().copy_and_resolve_references()
    config.eval.sampling.update({"text": {"temperature": 0.3}, "visual": {"temperature": 0.25}, "image_guidance": 1.5, "speech_guidance": 1.75})
    config.eval.refine = "none"
    vocabulary = grammar.from_config(_experiment(), tokenizer.encode)
    monkeypatch.setattr(packing, "open_vocabulary", lambda config: (vocabulary, tokenizer))
    options = sample.options_of(["--config=x.py", f"--workdir={tmp_path}", "--prompt=what", *flags])
    desk = sample.Desk(config, tmp_path, options)
    heads = tuple(desk.how[head]["temperature"] for head in ("text", "visual"))
    ask = desk.check(sample.Ask("paint", size="1x1"))
    assert (*heads, ask.guidance, desk.options.speech_guidance, desk.options.refine) == wanted


def test_damaged_files_are_named(run, tmp_path, capsys):
    cut = tmp_path / "cut.png"
    cut.write_bytes(_png(tmp_path / "whole.png").read_bytes()[:100])
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(8000), 16000)
    long = _png(tmp_path / "long.png", (1, 5000))
    for flag, path in (("image", cut), ("speech", silent), ("image", long)):
        assert run("--prompt=what", f"--{flag}={path}") == 2
        assert path.name in capsys.readouterr().err


@pytest.mark.parametrize(
    "line,match",
    [("{", "line 1: not JSON"), ('{"image": "x"}', "prompt"), ('{"prompt": "a", "colour": "red"}', "colour"), ('{"prompt": "a", "seed": "1"}', "seed"), ("", "no prompt")],
)
def test_bad_lines_of_a_prompt_file_are_named(tmp_path, line, match):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(InputError, match=match):
        sample.read_asks(tmp_path / "p.jsonl")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception):
        sample.save_image(tmp_path, "x", np.zeros((2, 2, 7), np.uint8))
    assert not list(tmp_path.iterdir())
