"""A user's tfds builder is read under our names."""

import io

import ml_collections
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from dina.config import InputError
from dina.data import rasters, sources, tfds_sets


class Pets(tfds.core.GeneratorBasedBuilder):
    """Two classes, grey and colour pictures."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}

    def _info(self):
        features = {"picture": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "words": tfds.features.Text(), "said": tfds.features.Sequence({"raw": tfds.features.Text()}), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"picture": _png(i, "RGB"), "mask": _png(i, "L"), "words": f" words {i} ",
                      "said": [{"raw": "one"}, {"raw": "two"}], "label": i % 2}


def _png(i, mode):
    out = io.BytesIO()
    PIL.Image.new(mode, (30 + i, 20), i).save(out, "PNG")
    out.seek(0)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tfds.disable_progress_bar()
    builder = Pets(file_format="array_record", data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return builder.data_path


def _config(folder, **options):
    config = ml_collections.ConfigDict({"data": tfds_sets.default_config()})
    config.data.update({"path": str(folder), "image": "picture", "native_pixels": 28 * 28} | options)
    return config


@pytest.mark.parametrize("image, caption, said", [("picture", "label", "dog"), ("picture", "words", "words 1"), ("mask", "", "")])
def test_features_under_our_names(folder, image, caption, said):
    config = _config(folder, image=image, caption=caption)
    assert str(sources.prepare(config)) == str(folder)
    columns = sources.load_all(config, "images", "train")
    assert [picture.shape for picture in columns["image"]] == [(20, 30 + i, 3) for i in range(4)]
    assert columns["caption"][1] == said and columns["source"][1] == "train/1" and columns["split"] == ["train"] * 4
    assert columns["native"].dtype == np.int32 and len(sources.open_source(config, "images", "validation")) == 2


def test_bytes_if_asked(folder):
    record = sources.Source(_config(folder), "images", "train", skip=["image"])[2]
    assert record["image"] == _png(2, "RGB").getvalue()


@pytest.mark.parametrize("options, message", [
    ({"path": "nowhere"}, "data.path: 'nowhere'"), ({"image": "pictures"}, "did you mean 'picture'"),
    ({"caption": "tags"}, "data.caption"), ({"caption": "said"}, "data.caption: feature 'said' is Sequence"), ({}, "'test' of images: must be one of train, validation"),
])
def test_what_is_not_there_is_named(folder, options, message):
    with pytest.raises(InputError, match=message):
        sources.open_source(_config(folder, **options), "images", "test" if not options else "train")


def test_the_key_follows_the_files(folder, tmp_path):
    one = sources.cache_path(_config(folder), tmp_path)
    assert one == sources.cache_path(_config(folder), tmp_path)
    assert one != sources.cache_path(_config(folder, caption="label"), tmp_path)


def test_valid_is_what_others_call_validation(folder):
    columns = sources.load_all(_config(folder), "images", "valid")
    assert columns["split"] == ["valid"] * 2 and columns["source"] == ["valid/0", "valid/1"]


def test_a_damaged_record_of_a_user_is_not_to_be_deleted(folder, monkeypatch):
    source = sources.open_source(_config(folder), "images", "train")
    monkeypatch.setattr(rasters, "on_white", lambda picture: PIL.Image.open(io.BytesIO(b"")))
    with pytest.raises(InputError, match="record 1 of images/train") as caught:
        source[1]
    assert str(folder) in str(caught.value) and "delete" not in str(caught.value)
