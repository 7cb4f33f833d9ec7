"""Settings survive the trip through a config file, and a wrong option is named."""

import pytest

from dina.backbone import config
from dina.config import InputError


def test_defaults_survive_the_nested_form():
    node = config.default_config()
    assert config.parse(config.BackboneConfig, node) == config.BackboneConfig()
    assert config.parse(config.NgramConfig, node.ngram) == config.NgramConfig()


def test_unknown_option_and_missing_key_are_named():
    node = config.default_config()
    node.experts.dispatch = "magic"
    with pytest.raises(InputError, match="dispatch is 'magic'; known: dense, gather, ragged"):
        config.parse(config.BackboneConfig, node)
    del node.attention.heads
    with pytest.raises(InputError, match="'heads' is missing"):
        config.parse(config.BackboneConfig, node)
