"""From recordings to a spoken reply: data, text tokenizer, codes, language stages and guided speech of experiments/speech.py."""

import pathlib

import jax
import ml_collections
import pytest
import soundfile

from dina import checkpoint, config as configs, sample, sharding, stages, train
from dina.data import codes, packing
from tests.data import test_recordings as fake
from tests.data.test_recordings import tree  # noqa: F401, a fixture

ROOT = pathlib.Path(__file__).parent.parent


def experiment(tmp_path):
    config = configs.load(f"{ROOT}/experiments/speech.py:streaming,language,smoke,run.data_dir={tmp_path / 'data'}")
    with config.unlocked():
        config.data = fake.options(packages=("tuxpaint",)).data
        config.data.pictures, config.text.vocab_size = ml_collections.ConfigDict(), 324
        for stage in config.stages.values():
            stage.steps = 2
    return config


def test_the_variant_trains_the_speech_tokenizer_and_hears_before_it_reads():
    plain, config = (configs.load(f"{ROOT}/experiments/speech.py{variant}") for variant in ("", ":language"))
    for name in ("A1", "A2"):
        assert config.stages[name] == plain.stages[name] and config.audio == plain.audio and config.data == plain.data
    for name, stage in config.stages.items():
        for before in (*stage.init_from.values(), *stage.after):
            assert config.jobs.index(before) < config.jobs.index(name)
    assert config.jobs.index("A1") < config.jobs.index("codes:speech") < config.jobs.index("prealign") > config.jobs.index("codes:images")
    stages.make_task(config, "pretrain")
    assert packing.stage_options(config.stages.pretrain).voice_share > 0


@pytest.mark.slow
def test_recordings_become_a_model_that_answers_aloud(tree, tmp_path, monkeypatch, capsys):  # noqa: F811
    config, workdir = experiment(tmp_path), tmp_path / "work"
    fake.use(tree, monkeypatch)
    monkeypatch.setattr(train, "setup", lambda config, *_: sharding.make_mesh({"data": 1}, jax.devices()[:1]))
    monkeypatch.setattr(sample, "settle", lambda config: None)  # tests have a compile cache of their own
    assert train.run(config, workdir) == 0
    for name in config.order:
        assert checkpoint.finished(workdir / name, stages.stage_identity(config, name))["steps"] == 2
    assert "text" in codes.load_codes(workdir, "speech", "train").fields
    monkeypatch.setattr(configs, "load", lambda spec: config)
    voice = tmp_path / "voice.ogg"
    voice.write_bytes(fake.sound(3))
    argv = ["--config=x", f"--workdir={workdir}", "--prompt=say in en: A beast.", "--reply=speech", f"--voice={voice}", "--delay=2"]
    assert sample.main([*argv, f"--out={tmp_path / 'whole'}"]) == 0
    assert sample.main([*argv, f"--out={tmp_path / 'heard'}", f"--stream={tmp_path / 'pcm'}"]) == 0
    whole, heard = (soundfile.info(tmp_path / name / "sample-000.wav") for name in ("whole", "heard"))
    assert whole.samplerate == config.audio.target.rate and heard.frames == whole.frames == (tmp_path / "pcm").stat().st_size // 2
    assert capsys.readouterr().out.count("[speech]") == 2
