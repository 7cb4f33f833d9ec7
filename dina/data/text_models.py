"""The text tokenizer that goes with a data set: trained on what its training records say, or a released one's file.

Digits make theirs with their records; for recordings (any data set of clips.py) it stands in a folder of its own,
`text-<key>`, made when it is first asked for, so that a speech tokenizer alone needs none.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from dina.config import InputError
from dina.data import cache, utterances
from dina.text import released, tokenizer

Tokenizer = tokenizer.TextTokenizer | released.ReleasedTokenizer
PACKAGES = ("sentencepiece",)
_FORMAT = 1  # of the tokenizer; raise it when the code makes another one from the same transcripts


def settings(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """What the tokenizer depends on beside its texts: size and algorithm, or the hash of a released one."""
    if _released(config):
        return ml_collections.ConfigDict({"algorithm": config.text.algorithm, "sha256": config.text.sha256})
    result = tokenizer.default_config()
    result.update({name: value for name, value in config.get("text", {}).items() if name in result})
    return result


def _released(config: ml_collections.ConfigDict) -> bool:
    return config.get("text", {}).get("algorithm") == released.ALGORITHM


def make(config: ml_collections.ConfigDict, texts: Callable[[], Iterable[str]], folder: pathlib.Path) -> pathlib.Path:
    """Trains the tokenizer into `folder`, or copies the released one there; returns its file.

    Args:
        config: the experiment; `text` counts.
        texts: gives the sentences to train on.
        folder: where `open_model` looks for it.

    Raises:
        InputError: the texts do not allow the vocabulary, or the released file is not the config's.
    """
    if not _released(config):
        path = folder / "tokenizer.model"
        tokenizer.train_tokenizer(texts(), path, **settings(config).to_dict())
        return path
    source, path = pathlib.Path(config.text.path), folder / "tokenizer.json"
    if not source.is_file():
        raise InputError(f"config key text.path: no file {str(source)!r}; the released checkpoint has one")
    if cache.sha256(source) != config.text.sha256:
        raise InputError(f"config key text.path: {str(source)!r} is not the file that text.sha256 is of;"
                         " make the config anew from it")
    return pathlib.Path(shutil.copyfile(source, path))


def open_model(config: ml_collections.ConfigDict, folder: pathlib.Path, specials: Mapping[str, int] | Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `make` has left in `folder`; `specials` as for `TextTokenizer`, a released one has its own."""
    if _released(config):
        return released.ReleasedTokenizer(folder / "tokenizer.json")
    return tokenizer.TextTokenizer(folder / "tokenizer.model", specials)


def of_transcripts(config: ml_collections.ConfigDict, records: pathlib.Path, notes: Sequence[Mapping[str, Any]],
                   specials: Mapping[str, int] | Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a data set of clips, made unless it is there.

    Args:
        config: the experiment; `text` counts.
        records: the folder of the clips, whose name tells their content.
        notes: of the training clips, see `clips.Clips`.
        specials: as for `open_model`.

    Raises:
        InputError: as `make`, or no clip has a transcript.
    """
    said = [note["text"] for note in notes if note["text"]]
    if not said:
        raise InputError(f"data in {str(records)!r}: no training clip has a transcript, so there are no words to learn")
    identity = {"format": _FORMAT, "text": settings(config).to_dict(), "records": records.name, "versions": cache.versions(PACKAGES, "transcripts")}

    def build(work: pathlib.Path) -> None:
        languages = sorted({note["language"] for note in notes} - {""})
        path = make(config, lambda: utterances.sentences(said, languages), work)
        (work / cache.MANIFEST).write_text(json.dumps(identity | {"sentences": len(said), "sha256": cache.sha256(path)}, indent=1))

    return open_model(config, cache.build_once(records.parent / f"text-{cache.key(identity)}", build), specials)
