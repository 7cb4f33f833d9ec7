"""A small prepared data set shared by the tests of this folder."""

import ml_collections
import pytest

from dina.data import digits


@pytest.fixture(scope="session")
def config():
    data = digits.smoke_config()
    data.mnist.update({"train": 40, "valid": 10, "test": 20})
    return ml_collections.ConfigDict({"data": data})


@pytest.fixture(scope="session")
def data_dir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    digits.prepare(config, path)
    return path
