"""Random numbers as a function of (seed, n), for any n, at the price of setting a counter.

`np.random.default_rng([seed, n])` is the same thing for 25 microseconds (it hashes its seed anew); a document takes as long.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

_TURN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


class Draws:
    """Generators of one stream: Philox with the seed as key and n in its counter.

    Args:
        seed: any integers >= 0.
    """

    def __init__(self, seed: Sequence[int]):
        self._key = np.random.SeedSequence([int(s) for s in seed]).generate_state(2, np.uint64)
        self._start = int(self._key[0])
        self._local = threading.local()

    def at(self, n: int) -> np.random.Generator:
        """The generator of number `n` >= 0; good until this thread asks for the next one."""
        if not hasattr(self._local, "generator"):
            self._local.generator = np.random.Generator(np.random.Philox(key=self._key))
            self._local.state = self._local.generator.bit_generator.state
        # The two low words count blocks of a generator: 2^128 of them a number.
        self._local.state["state"]["counter"][2] = n
        self._local.generator.bit_generator.state = self._local.state
        return self._local.generator

    def even(self, n: int) -> float:
        """Number `n` of a sequence that fills [0, 1) evenly: of any first N numbers, an interval of length p has p N within a few."""
        return ((n * _TURN + self._start) % 2**64) / 2**64
