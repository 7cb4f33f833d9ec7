"""The door to the operation: arguments are checked here, once, for both implementations.

Legend: N vectors, D dimensions, L levels, K codes of one book.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.rvq_lookup import pallas_tpu, reference


def rvq_lookup(
    x_ND: Float[Array, "N D"],
    books_KD: Sequence[Float[Array, "K D"]],
    levels: int | None = None,
    implementation: str = "pallas_tpu",
    **options,
) -> Int[Array, "N L"]:
    """Codes of a residual quantizer: at each level the nearest code of what the levels before left over.

    Nearest is the least squared distance in float32 with products of full precision (`Precision.HIGHEST`), the first
    index on ties. A level's error decides all levels after it, and with the 8 mantissa bits of one bfloat16 pass
    the nearest of thousands of codes is often another.

    Args:
        x_ND: vectors of any float dtype. Sharded over N, call it inside a `shard_map`.
        books_KD: one book per level, of any sizes; or one book that `levels` levels share.
        levels: number of levels L; needed with a single book of several levels, else the number of books.
        implementation: 'pallas_tpu' (all levels in one kernel; neither scores nor residuals leave the chip's vector
            memory), 'pallas_tpu_by_level' (a kernel a level, residuals by XLA) or 'reference' (plain JAX).
        **options: of the kernels: `block_n` and `block_k` (vectors and codes scored at once, multiples of 128 and 8)
            and `interpret` (True or `pltpu.InterpretParams(...)` runs it on a CPU).

    Returns:
        int32 [N, L], each in [0, size of the level's book).

    Raises:
        ValueError: an unknown implementation, shapes that do not fit, an empty book, or no vector dimension.
    """
    known = {"pallas_tpu": pallas_tpu.rvq_lookup, "pallas_tpu_by_level": pallas_tpu.rvq_lookup_by_level, "reference": reference.rvq_lookup}
    if implementation not in known:
        raise ValueError(f"rvq_lookup: implementation={implementation!r}: choose one of {', '.join(known)}")
    books_KD = list(books_KD)
    depth = len(books_KD) if levels is None else levels
    if depth < 1 or len(books_KD) not in (1, depth):
        raise ValueError(f"rvq_lookup: {len(books_KD)} books for {depth} levels: give one book per level, or one for all")
    if x_ND.ndim != 2 or not x_ND.shape[1]:
        raise ValueError(f"rvq_lookup: x has shape {x_ND.shape}, wanted [N, D] with D >= 1")
    for i, book_KD in enumerate(books_KD):
        if book_KD.ndim != 2 or not book_KD.shape[0] or book_KD.shape[1] != x_ND.shape[1]:
            raise ValueError(f"rvq_lookup: book {i} has shape {book_KD.shape}, wanted [K >= 1, {x_ND.shape[1]}]")
    if not x_ND.shape[0]:
        return jnp.zeros((0, depth), jnp.int32)
    books = [book_KD.astype(jnp.float32) for book_KD in books_KD]
    return known[implementation](x_ND.astype(jnp.float32), books, depth, **options)
