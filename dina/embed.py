"""Input embedding of every position: text rows with n-grams, image cells and audio frames by their codes.

One joint table holds text pieces, specials, audio codes and visual codes (reference/backbone.md §3). A text position
is its word row averaged with hashed n-gram rows; specials are their raw row. An image cell is the sum of its level
rows through a residual LayerNorm + SwiGLU block (the pre-buffer) and replaces the position; an audio frame is the
plain sum of its level rows, added to the transcript word that the position carries.

Transcript words of guided speech are hashed as text, in transcript order. A position without any text (a placeholder,
a blank transcript entry, padding) has a zero text part. The released code lets a blank entry before the codes embed
id 0, which is E[0]/13 (backbone.md §3.4): `ngram.blank` = 'row0', which the import of its weights sets.

Shapes: B rows, S positions, L levels (the larger depth of the two modalities, -1 = no code), D width, M places for
image cells, H ids of n-gram history.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from dina.backbone.config import NgramConfig
from dina.backbone.linear import weight
from dina.backbone.ngram import ABSENT, NgramEmbedding
from dina.backbone.norm import fan_in
from dina.grammar.vocabulary import Vocabulary
from dina.sharding import Shard, columns


class PreBuffer(nn.Module):
    """g + down(silu(gate(LN g)) * up(LN g)), no linear biases (backbone.md §3.2)."""

    hidden: int
    eps: float = 1e-5

    @nn.compact
    def __call__(self, g_BMD: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
        """The embedding of image cells from the sums of their level rows."""
        width = g_BMD.shape[-1]
        u_BMD = nn.LayerNorm(epsilon=self.eps, name="norm")(g_BMD)
        gate_DF = self.param("gate", fan_in(), (width, self.hidden)).astype(g_BMD.dtype)
        up_DF = self.param("up", fan_in(), (width, self.hidden)).astype(g_BMD.dtype)
        down_FD = self.param("down", fan_in(), (self.hidden, width)).astype(g_BMD.dtype)
        return g_BMD + (jax.nn.silu(u_BMD @ gate_DF) * (u_BMD @ up_DF)) @ down_FD


class Embed(nn.Module):
    """The joint table, the n-gram tables and the pre-buffer.

    Attributes:
        vocabulary: row layout and special ids.
        width: D.
        ngram: sizes and variant of the hashed tables.
        pre_buffer: F.
    """

    vocabulary: Vocabulary
    width: int
    ngram: NgramConfig
    pre_buffer: int

    @nn.compact
    def __call__(
        self,
        tokens_BS: Int[Array, "B S"],
        transcript_BS: Int[Array, "B S"],
        codes_BSL: Int[Array, "B S L"],
        segment_BS: Int[Array, "B S"],
        history_BH: Int[Array, "B H"] | None = None,
        cell_index_BM: Int[Array, "B M"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Embeds packed rows, or the next positions of rows being decoded.

        Args:
            tokens_BS: outer stream.
            transcript_BS: guiding text of speech, -1 or audiotext_pad where there is none.
            codes_BSL: codes of image cells and audio frames; other positions' entries are not read.
            segment_BS: document numbers, 0 = padding.
            history_BH: text ids before the first position (`text_ids`), for decoding.
            cell_index_BM: positions of all image cells, -1 = unused, so that the pre-buffer runs on them only; None
                runs it on every position, as decoding does.

        Returns:
            Input embeddings; padding is zero.
        """
        voc = self.vocabulary
        table_RD = weight(self, "table", _table_init(voc), (voc.padded_rows, self.width))
        text = NgramEmbedding(self.ngram, voc.text, voc.special_ids, name="ngram")
        if self.ngram.variant == "oe":
            x_BSD = _two_texts(voc, text, table_RD, tokens_BS, transcript_BS, segment_BS)
        else:
            ids_BS = text_ids(voc, tokens_BS, transcript_BS, segment_BS, self.ngram.blank)
            x_BSD = text(ids_BS, segment_BS, _words(table_RD, ids_BS), history_BH)
            begins_BS = (tokens_BS == voc.audiotext_start) & (segment_BS > 0)
            x_BSD = x_BSD + jnp.where(begins_BS[..., None], _words(table_RD, jnp.full(1, voc.audiotext_start)), 0)
        image_BS, audio_BS = holds_codes(voc, tokens_BS, segment_BS)
        sum_BSD = level_sum(table_RD, code_rows(voc, codes_BSL, image_BS, audio_BS))
        x_BSD = x_BSD + jnp.where(audio_BS[..., None], sum_BSD, 0)
        block = PreBuffer(self.pre_buffer, name="pre_buffer")
        if cell_index_BM is None:
            return jnp.where(image_BS[..., None], block(sum_BSD), x_BSD)
        rows_B1, length = jnp.arange(len(x_BSD))[:, None], x_BSD.shape[1]
        place_BM = jnp.where(cell_index_BM < 0, length, cell_index_BM)  # past the end: reads zero, writes nothing
        v_BMD = block(sum_BSD.at[rows_B1, place_BM].get(mode="fill", fill_value=0))
        return x_BSD.at[rows_B1, place_BM].set(v_BMD.astype(x_BSD.dtype), mode="drop")


def _words(table_RD, ids_BS):
    return columns(lambda table_RC, ids: jnp.take(table_RC, jnp.maximum(ids, 0), axis=0), table_RD, ids_BS)


def _two_texts(voc: Vocabulary, text: NgramEmbedding, table_RD, tokens_BS, transcript_BS, segment_BS):
    """The 'oe' class embeds outer stream and transcript apart: each is hashed as one sequence, whatever stands between.

    For whole sequences: a step of decoding would need both histories (that class cannot decode incrementally at all).
    """
    spoken_BS, inside_BS = in_speech(voc, tokens_BS), segment_BS > 0
    holes_BS = (tokens_BS == voc.img_pad) | (tokens_BS == voc.audio_pad)
    outer_BS = jnp.where(inside_BS, jnp.where(holes_BS, 0, tokens_BS), ABSENT)
    outer_BSD = text(outer_BS, segment_BS, _words(table_RD, outer_BS))
    outer_BSD = jnp.where((holes_BS | (tokens_BS == voc.audiotext_pad))[..., None], 0, outer_BSD)
    word_BS = jnp.where(transcript_BS == voc.audiotext_pad, ABSENT, transcript_BS)
    order_BS = jnp.argsort(~(spoken_BS & inside_BS), axis=1, stable=True)  # the words of all spans one after another
    take = lambda x: jnp.take_along_axis(x, order_BS, 1)
    words_BS = jnp.where(take(spoken_BS), take(word_BS), ABSENT)
    words_BSD = text(words_BS, take(segment_BS), _words(table_RD, words_BS))
    back_BSD = jnp.take_along_axis(words_BSD, jnp.argsort(order_BS, axis=1)[..., None], 1)
    return outer_BSD + back_BSD


def _table_init(voc: Vocabulary):
    """Variance 1 for text rows, as the n-gram rows averaged in (NgramConfig.init_std), and for sums of code rows."""

    def init(key, shape, dtype=jnp.float32):
        std_R = jnp.ones(shape[0]).at[voc.classes :].set(voc.levels**-0.5).at[voc.rows :].set(0)
        return jax.random.normal(key, shape, dtype) * std_R[:, None].astype(dtype)

    return init


def rows_from_codebooks(
    key: Key[Array, ""], books: Sequence[Float[Array, "K Z"]], counts: Sequence[Float[Array, "K"]], width: int
) -> Float[Array, "R D"]:
    """Rows of one modality's codes that know the tokenizer's geometry from the start, level after level.

    Half of a row's variance is a random projection of its code vector, the same for all levels, so that the sum over
    levels shows the quantised feature; the other half is the row's own noise, equal on all levels, so that no level's
    identity drowns in that of the first.

    Args:
        key: of the projection and the noise.
        books: code vectors of each level.
        counts: how often each code is used, any unit; what all codes have in common is left out.
        width: D.
    """
    into_ZD = jax.random.normal(jax.random.fold_in(key, 0), (books[0].shape[1], width))
    centred, variance = [], 0.0
    for book_KZ, count_K in zip(books, counts, strict=True):
        share_K1 = (count_K / jnp.sum(count_K))[:, None]
        centred.append((book_KZ - jnp.sum(share_K1 * book_KZ, 0)) @ into_ZD)
        variance += jnp.mean(jnp.sum(share_K1 * centred[-1] ** 2, 0))
    known_RD = jnp.concatenate(centred) * jnp.sqrt(0.5 / variance)
    return known_RD + jax.random.normal(jax.random.fold_in(key, 1), known_RD.shape) * (0.5 / len(books)) ** 0.5


def text_ids(
    voc: Vocabulary, tokens_BS: Int[Array, "B S"], transcript_BS: Int[Array, "B S"], segment_BS: Int[Array, "B S"],
    blank: str = "zero",
) -> Int[Array, "B S"]:  # fmt: skip
    """The id that is hashed and looked up as text at every position, -1 where there is none.

    Inside guided speech that is the transcript's word; elsewhere the outer token, unless it stands for codes. With
    `blank` = 'row0' a blank entry before the codes is id 0.
    """
    spoken = in_speech(voc, tokens_BS)
    empty_BS = jnp.where((blank == "row0") & (tokens_BS != voc.audio_pad), 0, ABSENT)
    word_BS = jnp.where((transcript_BS >= 0) & (transcript_BS != voc.audiotext_pad), transcript_BS, empty_BS)
    ids_BS = jnp.where(spoken, word_BS, jnp.where(tokens_BS == voc.img_pad, ABSENT, tokens_BS))
    return jnp.where(segment_BS > 0, ids_BS, ABSENT).astype(jnp.int32)


def in_speech(voc: Vocabulary, tokens_BS: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Positions whose text, if any, is a transcript word."""
    return (tokens_BS == voc.audiotext_pad) | (tokens_BS == voc.audiotext_start) | (tokens_BS == voc.audio_pad)


def holds_codes(voc: Vocabulary, tokens_BS: Int[Array, "B S"], segment_BS: Int[Array, "B S"]):
    """Masks of image cells and of audio frames."""
    return (tokens_BS == voc.img_pad) & (segment_BS > 0), (tokens_BS == voc.audio_pad) & (segment_BS > 0)


def code_rows(
    voc: Vocabulary, codes_BSL: Int[Array, "B S L"], image_BS: Bool[Array, "B S"], audio_BS: Bool[Array, "B S"]
) -> Int[Array, "B S L"]:
    """Joint-table rows of every level, -1 where there is no code."""
    levels = codes_BSL.shape[-1]
    base = lambda bases: jnp.asarray((*bases, *[0] * levels)[:levels], jnp.int32)
    rows_BSL = codes_BSL + jnp.where(image_BS[..., None], base(voc.visual_base), base(voc.audio_base))
    return jnp.where((codes_BSL >= 0) & (image_BS | audio_BS)[..., None], rows_BSL, -1)


def level_sum(table_RD: Float[Array, "R D"] | Shard, rows_BSL: Int[Array, "B S L"]) -> Float[Array, "B S D"]:
    """Sum over levels of the table's rows, absent levels adding nothing."""
    return columns(lambda table_RC, rows: jnp.sum(_present(table_RC, rows), axis=-2), table_RD, rows_BSL)


def level_rows(table_RD: Float[Array, "R D"] | Shard, rows: Int[Array, "... L"]) -> Float[Array, "... L D"]:
    """Each level's row, zero where absent."""
    return columns(_present, table_RD, rows)


def _present(table_RC, rows):
    return jnp.where((rows >= 0)[..., None], jnp.take(table_RC, jnp.maximum(rows, 0), axis=0), 0)
