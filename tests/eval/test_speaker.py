"""The voice encoder with random weights: its LSTM against the formula, lengths, loudness, and damaged weights."""

import numpy as np
import pytest

from dina.config import InputError
from dina.data import packages
from dina.eval import speaker


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32) for name, shape in speaker.shapes().items()}


def voice(seconds, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    return (0.1 * np.sin(2 * np.pi * (120 + 60 * seed) * t + 3 * np.sin(5 * t)) + 0.01 * rng.normal(size=len(t))).astype(np.float32)


def test_the_network_is_the_written_formula(weights):
    mel = speaker.windows(voice(2.5))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for window, found in zip(mel, np.asarray(speaker.encode(weights, mel)), strict=True):
        inputs = window.astype(np.float64)
        for layer in range(3):
            w = {key: weights[f"lstm.{key}_l{layer}"].astype(np.float64) for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            h, c, out = np.zeros(256), np.zeros(256), []
            for x in inputs:
                i, f, g, o = np.split(w["weight_ih"] @ x + w["bias_ih"] + w["weight_hh"] @ h + w["bias_hh"], 4)  # PyTorch's order
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                out.append(h)
            inputs = np.array(out)
        raw = np.maximum(weights["linear.weight"] @ inputs[-1] + weights["linear.bias"], 0)
        np.testing.assert_allclose(found, raw / np.linalg.norm(raw), atol=2e-4)


def test_windows_cover_a_clip_of_any_length():
    for seconds, count in ((0.05, 1), (1.6, 1), (2.3, 2), (4.0, 4), (4.7, 5)):
        mel = speaker.windows(voice(seconds))
        assert mel.shape == (count, 160, 40) and np.isfinite(mel).all()
    whole = speaker.windows(voice(4.0))
    np.testing.assert_allclose(whole[0, 80:158], whole[1, :78], rtol=1e-3, atol=1e-6)  # half of it is shared


def test_vectors_are_of_unit_length_and_do_not_hear_loudness(weights):
    one = speaker.embed(weights, voice(3.0))
    assert one.shape == (256,) and abs(np.linalg.norm(one) - 1) < 1e-5
    np.testing.assert_allclose(speaker.embed(weights, 0.01 * voice(3.0)), speaker.embed(weights, 0.02 * voice(3.0)), atol=1e-3)
    assert abs(speaker.similarity(weights, voice(3.0), voice(3.0)) - 1) < 1e-5
    assert speaker.similarity(weights, voice(3.0), voice(3.0, 3)) < 0.9999


def test_weights_of_another_network_are_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "fetch", lambda package, data_dir: tmp_path)
    monkeypatch.setattr(speaker.torch_weights, "read", lambda path: {"model_state": weights})
    assert set(speaker.load(tmp_path)) == set(weights)
    for saved in ({}, {"model_state": {}}, {"model_state": weights | {"linear.bias": np.zeros(3)}}, [1]):
        monkeypatch.setattr(speaker.torch_weights, "read", lambda path: saved)
        with pytest.raises(InputError, match="not the expected voice encoder"):
            speaker.load(tmp_path)
