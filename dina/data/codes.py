"""Code shards: what offline tokenisation leaves, and what the language stages read.

A shard is an ArrayRecord file of `tf.train.Example` records in the layout of tfds features, with tfds metadata beside
it, so `open_codes` gives the ordinary index-addressable tfds source. Beside every finished shard stands a small JSON
note: which tokenizer made it, its hash, how many records and which ones were bad. A shard counts only with its note.
Records are read and written through the protocol buffer itself: through tfds features a record takes ten times longer.
Legend: N cells or frames of a record, L levels, F cells or frames of all records, R records.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int

from dina.config import InputError

# Fields that a record may have beside `codes`, numbers or text: those of its data set, and of all records the same.
# `record` is the number of the raw record in its split.
FIELDS: dict[str, tuple[str, ...]] = {
    "images": ("h", "w", "digit", "source", "size", "top", "left", "aligned", "caption", "record"),
    "speech": ("word", "voice", "digit", "text", "language", "speaker", "picture", "noisy", "record"),
}
VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class CodeTable:
    """All codes of a kind and split in memory.

    Attributes:
        kind: 'images' or 'speech'.
        flat: codes of all records, one after the other.
        start: [R + 1] first row of each record in `flat`.
        fields: name -> int32 array [R], or list of str.
    """

    kind: str
    flat: Int[np.ndarray, "F L"]
    start: Int[np.ndarray, " R+1"]
    fields: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.start) - 1

    def codes(self, record: int) -> Int[np.ndarray, "N L"]:
        """Codes of one record (a view)."""
        return self.flat[self.start[record] : self.start[record + 1]]


def table(kind: str, records: Iterable[Mapping[str, Any]]) -> CodeTable:
    """A table of records: `codes` [N, L] and those of the kind's fields that the first one has.

    Raises:
        InputError: no records, or one with other fields.
    """
    records = list(records)
    if not records:
        raise InputError(f"{kind} codes: no records")
    names = _names(kind, records)
    start = np.cumsum([0] + [len(record["codes"]) for record in records])
    flat = np.concatenate([record["codes"] for record in records]).astype(np.int32)
    fields = {}
    for name in names:
        column = [record[name] for record in records]
        fields[name] = column if isinstance(column[0], str) else np.array(column, np.int32)
    for array in (flat, start, *(f for f in fields.values() if isinstance(f, np.ndarray))):
        array.setflags(write=False)
    return CodeTable(kind, flat, start, fields)


def _names(kind: str, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Those of the kind's fields that records have. Raises InputError if not all have the same."""
    names = tuple(name for name in FIELDS[kind] if records and name in records[0])
    for record in records:
        other = [name for name in FIELDS[kind] if (name in record) != (name in names)]
        if other:
            raise InputError(f"{kind} record {record.get('record', '?')}: field {other[0]!r} is not in all records; they must be of one data set")
    return names


def folder(workdir: pathlib.Path | str, kind: str) -> pathlib.Path:
    """Where the shards of a kind are."""
    if kind not in FIELDS:
        raise InputError(f"codes of kind {kind!r}: must be one of {', '.join(FIELDS)}")
    return pathlib.Path(workdir) / "codes" / kind / VERSION


def shard_path(workdir: pathlib.Path | str, kind: str, split: str, shard: int, shards: int) -> pathlib.Path:
    """The file of one shard, named as tfds names it."""
    return folder(workdir, kind) / f"{kind}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.note.json")


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _message():
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def _to_bytes(kind: str, record: Mapping[str, Any]) -> bytes:
    example = _message()()
    feature = example.features.feature
    codes = record["codes"]
    if codes.ndim != 2 or codes.min(initial=0) < 0 or codes.max(initial=0) >= 2**16:
        raise InputError(f"{kind} record {record['record']}: codes of shape {codes.shape} do not fit 16 bits")
    feature["codes"].bytes_list.value.append(codes.astype("<u2").tobytes())
    for name in FIELDS[kind]:
        if isinstance(record.get(name), str):
            feature[name].bytes_list.value.append(record[name].encode())
        elif name in record:
            feature[name].int64_list.value.append(int(record[name]))
    return example.SerializeToString(deterministic=True)


def _from_bytes(kind: str, data: bytes, levels: int) -> dict[str, Any]:
    feature = _message().FromString(data).features.feature
    record: dict[str, Any] = {"codes": np.frombuffer(feature["codes"].bytes_list.value[0], "<u2").reshape(-1, levels)}
    for name in FIELDS[kind]:
        if name in feature:
            value = feature[name]
            record[name] = value.int64_list.value[0] if value.int64_list.value else value.bytes_list.value[0].decode()
    return record


def _first(files: Sequence[pathlib.Path], kind: str, levels: int) -> dict[str, Any]:
    """The first record of some shards; one with nothing but a number if all are empty."""
    for file in files:
        reader = array_record_module.ArrayRecordReader(str(file))
        data = reader.read([0]) if reader.num_records() else []
        reader.close()
        if data:
            return _from_bytes(kind, data[0], levels)
    return {"record": 0}


def write_shard(
    path: pathlib.Path, kind: str, records: Sequence[Mapping[str, Any]], identity: str, errors: Sequence[str] = ()
) -> None:
    """Writes one shard and its note; the file appears whole, or not at all.

    Args:
        path: of `shard_path`.
        records: `codes` [N, L] of 0..65535 and some of the kind's fields, all the same ones.
        identity: of the tokenizer and the raw data; a shard of another identity is made again.
        errors: one line per raw record that was left out.
    """
    _names(kind, records)
    path.parent.mkdir(parents=True, exist_ok=True)
    _note(path).unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    data = [_to_bytes(kind, record) for record in records]
    for item in data:
        writer.write(item)
    writer.close()
    note = {"identity": identity, "sha256": _sha256(temporary), "records": len(records), "bytes": sum(map(len, data)),
            "errors": list(errors)}
    temporary.rename(path)
    unfinished = _note(path).with_suffix(".part")
    unfinished.write_text(json.dumps(note, indent=1))
    unfinished.rename(_note(path))


def verify_shard(path: pathlib.Path, identity: str) -> dict[str, Any] | None:
    """The note of a finished shard; None if it is missing, of another identity, or the file is not what was written."""
    try:
        note = json.loads(_note(path).read_text())
    except (OSError, ValueError):
        return None
    whole = note["identity"] == identity and path.is_file() and _sha256(path) == note["sha256"]
    return note if whole else None


def finish(workdir: pathlib.Path | str, kind: str, levels: int, splits: Mapping[str, int]) -> dict[str, Any]:
    """Writes the tfds metadata over finished shards, after which `load_codes` and `open_codes` see them.

    Args:
        levels: L of the kind.
        splits: split -> number of shards.

    Returns:
        {'counts': {split: records}, 'errors': [line, ...]}.
    """
    import tensorflow_datasets as tfds

    path, infos, report, made = folder(workdir, kind), [], {"counts": {}, "errors": []}, []
    for split, shards in splits.items():
        files = [shard_path(workdir, kind, split, shard, shards) for shard in range(shards)]
        for old in set(path.glob(f"{kind}-{split}.array_record-*")) - {*files, *map(_note, files)}:
            old.unlink()
        notes, made = [json.loads(_note(file).read_text()) for file in files], [*made, *files]
        template = tfds.core.ShardedFileTemplate(data_dir=path, dataset_name=kind, split=split,
                                                 filetype_suffix="array_record")
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[n["records"] for n in notes],
                                         num_bytes=sum(n["bytes"] for n in notes), filename_template=template))
        report["counts"][split] = sum(n["records"] for n in notes)
        report["errors"] += [line for n in notes for line in n["errors"]]
    first = _first(made, kind, levels)
    features = {name: tfds.features.Text() if isinstance(first[name], str) else tfds.features.Scalar(np.int32)
                for name in FIELDS[kind] if name in first}
    features["codes"] = tfds.features.Tensor(shape=(None, levels), dtype=np.uint16, encoding=tfds.features.Encoding.BYTES)
    tfds.folder_dataset.write_metadata(
        data_dir=str(path), features=tfds.features.FeaturesDict(features), split_infos=infos,
        filename_template=None, check_data=False,  # the check needs TensorFlow
    )
    _load.cache_clear()
    return report


def _require(workdir: pathlib.Path | str, kind: str, split: str) -> list[pathlib.Path]:
    """Files of a finished split."""
    path = folder(workdir, kind)
    if not (path / "dataset_info.json").is_file():
        raise InputError(f"no {kind} codes in {str(workdir)!r}: `python -m dina.tokenize` makes them from raw data")
    files = sorted(path.glob(f"{kind}-{split}.array_record-?????-of-?????"))
    if not files:
        found = {file.name.split(".")[0].removeprefix(f"{kind}-") for file in path.glob(f"{kind}-*.array_record-*-of-*")}
        raise InputError(f"{kind} codes have no split {split!r} in {str(workdir)!r}; there are {', '.join(sorted(found))}")
    return files


def open_codes(workdir: pathlib.Path | str, kind: str, split: str):
    """The records of a kind and split as a tfds data source (random access, read on demand). Raises as `load_codes`."""
    import tensorflow_datasets as tfds

    _require(workdir, kind, split)
    return tfds.builder_from_directory(folder(workdir, kind)).as_data_source(split)


def load_codes(workdir: pathlib.Path | str, kind: str, split: str) -> CodeTable:
    """Everything of a kind and split in memory, read once per process.

    Raises:
        InputError: no such kind, split or finished codes, or a file is damaged; the message names it.
    """
    files = _require(workdir, kind, split)
    stamp = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _load(str(workdir), kind, split, stamp)


@functools.lru_cache(maxsize=16)
def _load(workdir: str, kind: str, split: str, stamp) -> CodeTable:
    records = []
    shape = json.loads((folder(workdir, kind) / "features.json").read_text())
    levels = int(shape["featuresDict"]["features"]["codes"]["tensor"]["shape"]["dimensions"][1])
    for file, _, _ in stamp:
        path = pathlib.Path(file)
        try:
            note = json.loads(_note(path).read_text())
            reader = array_record_module.ArrayRecordReader(file)
            data = reader.read_all() if reader.num_records() else []
            reader.close()
            records += [_from_bytes(kind, item, levels) for item in data]
        except Exception as error:  # the reader and the protocol buffer have error types of their own
            raise InputError(f"code shard {file!r} cannot be read ({error}); delete it and tokenise again") from None
        if len(data) != note["records"]:
            raise InputError(f"code shard {file!r} has {len(data)} of {note['records']} records;"
                             " delete it and tokenise again")
    return table(kind, records)
