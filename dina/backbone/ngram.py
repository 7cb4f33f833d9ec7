"""N-gram embedding: each text position adds rows of hashed tables for the last 2, 3, ... ids to its word row.

Table i (order g = 2 + i // splits) has int(ratio * V + 2i + 1) usable rows; row = (sum_d c_{t-d} V^d) mod rows.
The exact sum needs 64 bits; devices have 32. Ids are cut into digits so small that digit * (constant < rows) fits,
the constants V^d * 2^shift mod rows are computed here in Python integers, and everything left is int32.

What the caller passes: the ids that are hashed. Word ids and special ids as they are; -1 where there is no text
(padding, codes without transcript): its output row is exactly zero, whatever its word row is.

Variants (they differ only in corner cases; golden/README.md §2, backbone.md §2):
  'hf'      history ends at EOS, specials, absent text and id 0; a table is silent where its row is 0; specials keep
            their word row undivided, id 0 is divided like a word. Training uses this one.
  'oe'      history ends at EOS only, absent text and specials count as id 0 in it; a table is silent where all its ids
            are 0; specials and id 0 are undivided.
  'serving' history ends at specials and absent text only; no table is ever silent; id 0 is a word.

Legend: B rows, S positions, D width, T tables, O order, H = O-1 earlier ids, C digits, R stored rows, W row width.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dina.backbone.config import NgramConfig
from dina.backbone.norm import fan_in
from dina.tables import READ

ID_BITS = 21  # ids up to 2,097,151; the released joint vocabulary has 282,624 rows
ABSENT = -1


class NgramEmbedding(nn.Module):
    """Word rows plus hashed n-gram rows, averaged.

    Attributes:
        cfg: sizes and variant.
        vocab: V, the text vocabulary that hashes count in.
        specials: ids that are no text; hashed as 0.
    """

    cfg: NgramConfig
    vocab: int
    specials: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        ids_BS: Int[Array, "B S"],
        segment_BS: Int[Array, "B S"],
        word_BSD: Float[Array, "B S D"],
        history_BH: Int[Array, "B H"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Embeds text positions.

        Args:
            ids_BS: ids to hash, see the module's docstring for 0 and -1.
            segment_BS: document numbers; history never crosses from one to another.
            word_BSD: rows of the joint table for the ids (any value where the id is -1).
            history_BH: the H ids before the first position, oldest first, -1 = none (`next_history`).

        Returns:
            (word + sum of table rows) / (T + 1); specials: the word row; id -1: zero.
        """
        cfg, width = self.cfg, word_BSD.shape[-1]
        stored = stored_rows(cfg, self.vocab)
        row_BST, live_BST, divided_BS = rows(cfg, self.vocab, self.specials, ids_BS, segment_BS, history_BH)
        if self.has_variable("params", READ):  # the train step has read them
            found_BSTW = self.get_variable("params", READ)
        else:
            # A table's part starts with the spread of a word row drawn with the same `init_std`.
            table_TRW = self.param("table", nn.initializers.normal(cfg.init_std), (cfg.tables, stored, width // cfg.tables))
            flat_BST = row_BST + jnp.arange(cfg.tables, dtype=jnp.int32) * stored
            found_BSTW = jnp.take(table_TRW.reshape(-1, width // cfg.tables), flat_BST, axis=0)
        proj_TWD = self.param("proj", fan_in(1, 2, batch=(0,)), (cfg.tables, width // cfg.tables, width))
        found_BSTW = jnp.where(live_BST[..., None], found_BSTW, 0).astype(word_BSD.dtype)
        sum_BSD = jnp.einsum("bstw,twd->bsd", found_BSTW, proj_TWD.astype(word_BSD.dtype))
        out_BSD = jnp.where(divided_BS[..., None], (word_BSD + sum_BSD) / (cfg.tables + 1), word_BSD)
        return jnp.where((ids_BS == ABSENT)[..., None], 0, out_BSD)


def table_sizes(cfg: NgramConfig, vocab: int) -> tuple[int, ...]:
    """Usable rows of every table: the moduli of the hashes."""
    return tuple(int(cfg.ratio * vocab + 2 * i + 1) for i in range(cfg.tables))


def stored_rows(cfg: NgramConfig, vocab: int) -> int:
    """Rows that every table is stored with, the largest one's rounded up."""
    return -(-max(table_sizes(cfg, vocab)) // cfg.row_multiple) * cfg.row_multiple


def init_history(cfg: NgramConfig, batch: int) -> Int[Array, "B H"]:
    """The decode state before any id."""
    return jnp.full((batch, cfg.order - 1), ABSENT, jnp.int32)


def next_history(history_BH: Int[Array, "B H"], ids_BS: Int[Array, "B S"], segment_BS: Int[Array, "B S"]) -> Int[Array, "B H"]:
    """The decode state after `ids_BS` (as passed to the embedding); a row of padding alone keeps its state."""
    return follow(history_BH, ids_BS.astype(jnp.int32), left_padding(segment_BS))[:, ids_BS.shape[1] :]


def left_padding(segment_BS: Int[Array, "B S"]) -> Int[Array, " B"]:
    """How many positions stand before a row's first document."""
    return jnp.sum(jnp.cumsum(segment_BS > 0, 1) == 0, 1, dtype=jnp.int32)


def follow(history_BH: Int[Array, "B H"], ids_BS: Int[Array, "B S"], pads_B: Int[Array, " B"]) -> Int[Array, "B HS"]:
    """History and ids in one row each, the history right before the first id that is no left padding."""
    before, length = history_BH.shape[1], ids_BS.shape[1]
    place = jnp.arange(before + length)[None] - pads_B[:, None]
    own = jnp.take_along_axis(history_BH, jnp.clip(place, 0, before - 1), 1)
    ids = jnp.concatenate([jnp.full_like(history_BH, ABSENT), ids_BS], 1)
    return jnp.where(place < 0, ABSENT, jnp.where(place < before, own, ids))


def is_special(ids: Int[Array, "..."], specials: tuple[int, ...]) -> Bool[Array, "..."]:
    """Membership in a static set of ids, as one comparison pair per run of consecutive ids."""
    found = jnp.zeros(ids.shape, bool)
    ordered = np.unique(np.asarray(specials, np.int64))
    for run in np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1):
        if len(run):
            found |= (ids >= int(run[0])) & (ids <= int(run[-1]))
    return found


def contexts(cfg: NgramConfig, specials: tuple[int, ...], ids_BS, segment_BS, history_BH=None):
    """What is hashed at every position.

    Returns:
        context_BSO int32: the id itself and the O - 1 ids before it, 0 where the history ended; special_BS.
    """
    length, ids_BS = ids_BS.shape[1], ids_BS.astype(jnp.int32)
    history_BH = init_history(cfg, len(ids_BS)) if history_BH is None else history_BH
    pads_B = left_padding(segment_BS)
    all_ids = follow(history_BH, ids_BS, pads_B)
    # History belongs to the first position's document; where that is not so it must be -1.
    first_B1 = jnp.take_along_axis(segment_BS, jnp.minimum(pads_B, length - 1)[:, None], 1)
    all_segments = follow(jnp.broadcast_to(first_B1, history_BH.shape), segment_BS, pads_B)
    special = is_special(all_ids, specials)
    clean = jnp.where(special | (all_ids < 0), 0, all_ids)
    ends = {"hf": (clean == 0) | (clean == cfg.eos), "oe": clean == cfg.eos, "serving": special | (all_ids < 0)}[cfg.variant]
    silent = special if cfg.variant == "serving" else clean == 0

    def at(array, d):  # the value d positions earlier
        start = history_BH.shape[1] - d
        return array[:, start : start + length]

    context, seen_BS = [at(clean, 0)], ~at(silent, 0)
    for d in range(1, cfg.order):
        seen_BS &= ~at(ends, d) & (at(all_segments, d) == segment_BS)
        context.append(jnp.where(seen_BS, at(clean, d), 0))
    return jnp.stack(context, -1), at(special, 0)


def rows(cfg: NgramConfig, vocab: int, specials: tuple[int, ...], ids_BS, segment_BS, history_BH=None):
    """Table rows and rules of every position.

    Returns:
        row_BST int32 in [0, size of table), live_BST (False: the table adds nothing), divided_BS (False: the output
        is the word row alone).
    """
    context_BSO, special_BS = contexts(cfg, specials, ids_BS, segment_BS, history_BH)
    row_BST, nonzero_BST = hashes(cfg, vocab, context_BSO)
    live_BST = {"hf": row_BST > 0, "oe": nonzero_BST, "serving": jnp.ones_like(nonzero_BST)}[cfg.variant]
    live_BST &= ~(special_BS | (ids_BS < 0))[..., None]
    divided_BS = ~special_BS & ((context_BSO[..., 0] != 0) | (cfg.variant != "oe"))
    return row_BST, live_BST, divided_BS


def hashes(cfg: NgramConfig, vocab: int, context_BSO: Int[Array, "B S O"]):
    """Exact sum_d c_d V^d mod size for every table, in int32, and whether the sum before the modulus is not 0."""
    sizes = table_sizes(cfg, vocab)
    bits = 31 - max(sizes).bit_length()
    if bits < 1:
        raise ValueError(f"n-gram: tables of {max(sizes)} rows exceed what 32-bit hashing can address (2^30)")
    digits = -(-ID_BITS // bits)
    order_T = [2 + i // cfg.splits for i in range(cfg.tables)]
    constant_OCT = np.array(
        [[[pow(vocab, d, m) * 2 ** (bits * c) % m if d < g else 0 for g, m in zip(order_T, sizes, strict=True)]
          for c in range(digits)] for d in range(cfg.order)], np.int32)  # fmt: skip
    size_T = np.array(sizes, np.int32)
    total_BST = jnp.zeros((*context_BSO.shape[:2], cfg.tables), jnp.int32)
    nonzero_BST = jnp.zeros(total_BST.shape, bool)
    for d in range(cfg.order):
        id_BS1 = context_BSO[..., d, None]
        nonzero_BST |= (id_BS1 > 0) & (constant_OCT[d, 0] > 0)
        for c in range(digits):
            digit_BS1 = (id_BS1 >> (bits * c)) & (2**bits - 1)
            total_BST = (total_BST + digit_BS1 * constant_OCT[d, c] % size_T) % size_T
    return total_BST, nonzero_BST
