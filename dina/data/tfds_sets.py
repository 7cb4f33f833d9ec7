"""Any captioned image data set that tfds has prepared as ArrayRecord: config `data.name='tfds'` and its folder."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from dina.config import InputError, check_name
from dina.data import cache, prepared, rasters

KINDS = ("images",)


def default_config() -> ml_collections.ConfigDict:
    """The experiment's `data` section; the split 'valid' is the builder's 'validation' if it has no 'valid'.

    `path`: the folder with dataset_info.json. `image` and `caption`: names of features; a class label becomes the name of
    its class, and without a caption it is ''. `native_pixels` as for stamps.
    """
    return ml_collections.ConfigDict({"name": "tfds", "path": "", "image": "image", "caption": "", "native_pixels": 224 * 224})


def cache_path(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """A folder of this name is never made: nothing is prepared. The name tells the content of the data set.

    Raises:
        InputError: `data.path` has no tfds data set.
    """
    folder = prepare(config)
    files = cache.content(folder.resolve(), pathlib.Path.iterdir)
    options = {k: v for k, v in config.data.to_dict().items() if k != "path"}
    return pathlib.Path(data_dir or cache.directory(config)) / f"tfds-{cache.key({'data': options, 'files': files})}"


def prepare(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """The user's folder; raises InputError if there is no tfds data set."""
    del data_dir
    folder = pathlib.Path(config.data.path)
    if not config.data.path or not (folder / "dataset_info.json").is_file():
        raise InputError(f"config key data.path: {config.data.path!r} has no dataset_info.json; name the version's folder"
                         " of a data set that tfds has prepared with file_format='array_record'")
    return folder


class Captioned:
    """Records of a tfds split under our names: image, caption, source ('split/number'), native, split.

    Raises:
        InputError: there is no such split or feature, or the caption is not one text, number or class.
    """

    def __init__(self, records: prepared.Records, options: ml_collections.ConfigDict, split: str,
                 skip: Sequence[str] = ()) -> None:
        self._records, self._options, self._split, self._skip = records, options, split, skip
        for key in ("image", "caption"):
            if options[key]:
                check_name(options[key], list(records.features), f"config key data.{key}: feature")
        if options.caption and records.features[options.caption].shape != ():
            raise InputError(f"config key data.caption: feature {options.caption!r} is {records.features[options.caption]},"
                             " not one text, number or class a record; name another, or '' for none")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, options = self._records[index], self._options
        image = record[options.image]
        native = 1 if "image" in self._skip else rasters.is_native(*image.shape[:2], options.native_pixels)
        return {"image": image, "caption": self._caption(record), "source": f"{self._split}/{index}", "native": native,
                "split": self._split}

    def _caption(self, record: dict[str, Any]) -> str:
        name = self._options.caption
        if not name:
            return ""
        feature = self._records.features[name]
        return feature.int2str(record[name]) if hasattr(feature, "int2str") else str(record[name]).strip()


def open_records(config: ml_collections.ConfigDict, kind: str, split: str, data_dir: pathlib.Path | str | None = None,
                 skip: Sequence[str] = ()) -> Captioned:
    """The records of a split; raises InputError as `prepare`, and if there is no such split or feature."""
    del data_dir
    skipped = [config.data.image] if "image" in skip else []
    advice = f"get or prepare the data set in {config.data.path!r} again, with the tools that made it"
    records = prepared.Records(prepare(config), split, f"{kind}/{split}", (config.data.image,), skipped, advice)
    return Captioned(records, config.data, split, skip)
