"""Answers that a model gave once: small immutable objects, so that a job that is killed asks nothing twice.

An answer is kept under a hash of all that decides it: the model's digest, the version of the tasks, the question with its
pictures and waves, its number, the seed and the sampling settings. Whoever finds it under that name need not ask.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pathlib
import zipfile

import numpy as np

from dina import files
from dina.eval.generation import Answer
from dina.eval.prompts import Question


class Answers:
    """Kept answers of one model.

    Args:
        place: a folder or an address of a bucket.
        about: what all of these answers depend on: digest of the model, version, settings.
    """

    def __init__(self, place: pathlib.Path | str, about: str):
        self.store, self.about = files.open_store(place), about

    def name(self, question: Question, number: int, seed: int) -> str:
        """Under which an answer is kept."""
        found = hashlib.sha256(f"{self.about}/{number}/{seed}".encode())
        for field in dataclasses.fields(question):
            value = getattr(question, field.name)
            if isinstance(value, np.ndarray):
                found.update(f"{field.name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
            else:
                found.update(f"{field.name} {value!r}".encode())
        return found.hexdigest()[:40]

    def get(self, name: str) -> Answer | None:
        """A kept answer; None if there is none, or it is damaged."""
        data = self.store.read(name)
        if data is None or hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        try:
            with np.load(io.BytesIO(data[32:]), allow_pickle=False) as found:
                arrays = {field: found[field] for field in ("image", "wave") if field in found}
                return Answer(str(found["text"]), rate=int(found["rate"]), **arrays)
        except (ValueError, KeyError, zipfile.BadZipFile):
            return None

    def put(self, name: str, answer: Answer) -> None:
        """Keeps an answer, durably."""
        arrays = {field: getattr(answer, field) for field in ("image", "wave") if getattr(answer, field) is not None}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, text=np.array(answer.text), rate=np.array(answer.rate), **arrays)
        data = buffer.getvalue()
        self.store.write(name, hashlib.sha256(data).digest() + data)
