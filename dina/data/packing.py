"""Packs are a plan: which documents share a row is a pure function of the data, so step n stays one integer.

Documents are taken window by window; those of a window are packed, largest first, under the budgets of a row (`pack`),
which are the static sizes of its buffers: S positions, M cells and frames to predict, image cells in all. Rows are
numbered through all windows; step n takes rows n*B to (n+1)*B-1. A document over budget is counted and left out.
Source: DESIGN §4.4. Legend: B rows, S positions, L levels, M slots of a buffer, D documents of a window.
"""

from __future__ import annotations

import bisect
import collections
import functools
import gc
import typing
import zlib
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np
from jaxtyping import Int

from dina import grammar
from dina.config import InputError, check_name
from dina.data import audio_sets, codes, documents, sources, utterances
from dina.data.documents import KINDS, Sample
from dina.grammar import Cost, Vocabulary

BUDGETS = Cost._fields  # positions, visual, audio, cells
_INDEX = {"visual": "visual_index", "audio": "audio_index", "cells": "cell_index"}


def default_pack() -> ml_collections.ConfigDict:
    """`options.pack` of a language stage: budgets of a row and documents packed together.

    They fit the even mixture of the eight kinds over the digits data: 98 % of positions, 62, 77 and 81 % of the buffers
    are in use, measured over 1,200 rows.
    """
    return ml_collections.ConfigDict({"positions": 256, "visual": 24, "audio": 28, "cells": 40, "window": 512})


def default_options() -> ml_collections.ConfigDict:
    """All of a language stage's `options` that concern its data: those of `documents.default_options`, and `pack`."""
    options = documents.default_options()
    options.pack = default_pack()
    return options


class Window(typing.NamedTuple):
    """One window's documents, how they are packed, and how many were over budget, by kind."""

    samples: list[Sample]
    rows: list[list[int]]
    errors: dict[str, int]


def pack(costs_D4: Int[np.ndarray, "D 4"], budget: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Vector bin packing: as many rows as the scarcest budget needs, and each document, largest first, goes to the row whose
    free room is most like its need (largest dot product, both as shares of the budget); to a new row if it fits none.

    Of 4,096 documents of pre-training's shapes it fills 99.5 % of the positions, at the least number of rows that the budgets
    allow; going to the fullest row that can take it fills 86 %, because pictures come together in few rows.

    Args:
        costs_D4: what each document needs.
        budget: what a row has.

    Returns:
        (documents of each row, documents that fit no row).
    """
    budget_4 = np.asarray(budget, np.int64)
    misfit_D = (costs_D4 > budget_4).any(1)
    share_D4 = costs_D4 / np.maximum(budget_4, 1)
    order = np.argsort(-share_D4.max(1), kind="stable")
    first = max(1, int(np.ceil(share_D4[~misfit_D].sum(0).max())))
    free_R4 = np.tile(budget_4, (first, 1))
    rows: list[list[int]] = [[] for _ in range(first)]
    for document in order[~misfit_D[order]].tolist():
        need_4 = costs_D4[document]
        alike_R = np.where((free_R4 >= need_4).all(1), free_R4 @ (share_D4[document] / np.maximum(budget_4, 1)), -1.0)
        row = int(alike_R.argmax())
        if alike_R[row] < 0:
            row = len(rows)
            rows.append([])
            free_R4 = np.concatenate([free_R4, budget_4[None]])
        rows[row].append(document)
        free_R4[row] -= need_4
    return [row for row in rows if row], np.flatnonzero(misfit_D).tolist()


class PackedDocuments:
    """Training batches of packed documents.

    `batch(step)` has a leading dimension B: the arrays of grammar/spans.py, and
      segment [S]       number of the document in its row from 1, 0 = padding
      kind [S]          index into documents.KINDS, -1 = padding
      visual_index, audio_index [M]   positions whose next position has a visual or audio code loss, -1 = unused
      cell_index [M]    positions of all image cells, shown or painted, -1 = unused
      example           int32, the number of the row

    Args:
        documents: number -> Sample.
        vocabulary: of the documents.
        budget: `options.pack`.
        rows: B, the global batch.
        seed: orders the rows of a window.

    Attributes:
        errors: kind -> documents left out so far because they exceed a budget.
    """

    def __init__(self, documents: Callable[[int], Sample], vocabulary: Vocabulary, budget: ml_collections.ConfigDict,
                 rows: int, seed: Sequence[int]):
        for name in (*BUDGETS, "window"):
            if int(budget[name]) < 1:
                raise InputError(f"options.pack.{name} is {budget[name]}: must be at least 1")
        self.documents, self.vocabulary, self.rows = documents, vocabulary, rows
        self.budget, self.size = {name: int(budget[name]) for name in BUDGETS}, int(budget.window)
        self.seed = [int(s) for s in seed]
        self.errors: collections.Counter[str] = collections.Counter()
        self._ends = [0]  # of the rows of each window, as far as known
        self.window = functools.lru_cache(maxsize=4)(self._window)

    def _window(self, number: int) -> Window:
        """Documents number*size to (number+1)*size-1, packed."""
        samples = [self.documents(n) for n in range(number * self.size, (number + 1) * self.size)]
        costs = np.array([grammar.cost(sample.document, self.vocabulary) for sample in samples])
        rows, misfits = pack(costs, tuple(self.budget.values()))
        if not rows:
            raise InputError(f"options.pack {self.budget}: none of {len(samples)} documents fits; the smallest needs"
                             f" {costs[costs[:, 0].argmin()].tolist()}")
        # Packed as they are, the last rows of a window would hold its small documents only.
        order = np.random.default_rng([*self.seed, number]).permutation(len(rows))
        errors = collections.Counter(KINDS[samples[d].kind] for d in misfits)
        return Window(samples, [rows[row] for row in order], dict(errors))

    def _reach(self, row: int) -> None:
        """Plans windows until `row` lies in one."""
        while self._ends[-1] <= row:
            window = self.window(len(self._ends) - 1)
            self._ends.append(self._ends[-1] + len(window.rows))
            self.errors.update(window.errors)

    def samples(self, row: int) -> list[tuple[int, Sample]]:
        """(document number, document) of row `row` of the endless list of rows, in order."""
        self._reach(row)
        number = bisect.bisect_right(self._ends, row) - 1
        window = self.window(number)
        return [(number * self.size + d, window.samples[d]) for d in window.rows[row - self._ends[number]]]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The global batch of `step`."""
        first = step * self.rows
        groups = [[sample for _, sample in self.samples(row)] for row in range(first, first + self.rows)]
        out = assemble(groups, self.vocabulary, self.budget)
        return out | {"example": (np.arange(first, first + self.rows) % 2**31).astype(np.int32)}


def assemble(groups: Sequence[Sequence[Sample]], vocabulary: Vocabulary, budget: dict[str, int]) -> dict[str, np.ndarray]:
    """Writes rows of documents into arrays; see `PackedDocuments`. The documents of a row must be within budget."""
    shape = (len(groups), budget["positions"])
    out = grammar.empty(shape, vocabulary)
    out["segment"], out["kind"] = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for b, group in enumerate(groups):
        row = {name: array[b] for name, array in out.items()}
        start = 0
        for number, sample in enumerate(group):
            end = grammar.write(sample.document, vocabulary, row, start)
            row["segment"][start:end], row["kind"][start:end] = number + 1, sample.kind
            start = end
    cell = out["tokens"] == vocabulary.img_pad
    learnt = out["code_weight"] > 0
    for name, mask, shift in (("visual", learnt & cell, 1), ("audio", learnt & ~cell, 1), ("cells", cell, 0)):
        out[_INDEX[name]] = _positions(mask, budget[name], shift)
    return out


def blank_batch(config: ml_collections.ConfigDict, stage: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """A batch of a language stage with nothing in it, of the shapes that all of its batches have; needs no data."""
    budget = stage_options(stage).pack
    out = assemble([[]] * stage.batch, grammar.from_config(config), {name: int(budget[name]) for name in BUDGETS})
    return out | {"example": np.arange(stage.batch, dtype=np.int32)}


def _positions(mask_BS: np.ndarray, slots: int, shift: int) -> Int[np.ndarray, "B M"]:
    """Positions `shift` before those of the mask, row by row, -1 behind them."""
    index = np.full((len(mask_BS), slots), -1, np.int32)
    rows, positions = np.nonzero(mask_BS)
    slot = np.arange(len(rows)) - np.searchsorted(rows, rows)  # rows are sorted: number within the row
    index[rows, slot] = positions - shift
    return index


def open_vocabulary(config: ml_collections.ConfigDict):
    """(vocabulary with size tags, text tokenizer that knows its specials) of an experiment with prepared data."""
    plain = grammar.from_config(config)
    tokenizer = sources.open_tokenizer(config, plain.ids)
    return grammar.from_config(config, tokenizer.encode), tokenizer


def stage_options(stage: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`default_options` with what the stage's `options` say. Raises InputError for an option that there is not."""
    options = default_options()
    for name, value in stage.options.items():
        check_name(name, options, f"option of a stage of task {stage.task!r}")
        # A mixture names all its kinds; of a pack only what differs need be said.
        options[name] = value if name != "pack" else ml_collections.ConfigDict(options.pack.to_dict() | value.to_dict())
    return options


def open_batches(config: ml_collections.ConfigDict, stage: ml_collections.ConfigDict, workdir) -> PackedDocuments:
    """Training batches of a language stage.

    Args:
        config: the experiment.
        stage: one of config.stages; its name is the random stream, its `options` override `default_options`.
        workdir: where the code shards are.

    Raises:
        InputError: prepared data or code shards are missing, an option is wrong, or no documents are made of such a data set.
    """
    options = stage_options(stage)
    name = next((name for name, other in config.stages.items() if other is stage), stage.task)
    seed = (config.seed, zlib.crc32(name.encode()))
    data_set = config.data.get("name", "digits")
    check_name(data_set, MIXTURES, "documents of data set")
    vocabulary, tokenizer = open_vocabulary(config)
    made = MIXTURES[data_set](config, options, (*seed, 0), vocabulary, tokenizer.encode, workdir)
    # What is there by now stays: the collector of garbage would look at all of it again with every window of documents.
    gc.freeze()
    return PackedDocuments(made, vocabulary, options.pack, stage.batch, (*seed, 1))


def _of_digits(config, options, seed, vocabulary, encode, workdir) -> documents.Documents:
    texts = sources.load_all(config, "text", "train")["text"]
    images, speech = (codes.load_codes(workdir, kind, "train") for kind in ("images", "speech"))
    return documents.Documents(options, seed, vocabulary, encode, images, speech, texts)


def _of_recordings(config, options, seed, vocabulary, encode, workdir) -> utterances.Utterances:
    pictured = config.data.get("pictures") and any(options.mixture.get(kind, 0) > 0 for kind in utterances.PICTURED)
    images = codes.load_codes(workdir, "images", "train") if pictured else None
    return utterances.Utterances(options, seed, vocabulary, encode, codes.load_codes(workdir, "speech", "train"), images)


# Data set -> what makes its documents: (config, options, seed, vocabulary, encode, workdir) -> number -> Sample.
MIXTURES = {"digits": _of_digits, **dict.fromkeys(("recordings", *audio_sets.SETS), _of_recordings)}
