"""The search as one Pallas TPU kernel: all levels of a block of vectors while they stay in vector memory.

The grid is (blocks of vectors, blocks of codes of all levels one after another). The residual of a block of vectors
lies turned, [D, n], in vector memory for all levels; blocks of codes stream past it. So scores come out as [k, n]:
their minimum over codes needs no operation across lanes, and a code's norm is a column. |x|^2 is left out: it is the
same for every code, and without it less is rounded. At the end of a level the chosen rows come by one DMA each
(a one-hot product over every block would double the arithmetic), and the residual moves on.

Levels may have different books and sizes: scalars say for every block where its codes lie, where they start within
the level and how many the level has. Rows of padding have infinite norms and never win.

Legend: N vectors, D dimensions, L levels, K codes of one book, R stored rows of all books, C code blocks of all
levels, n and k vectors and codes of one block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES, SUBLANES = 128, 8
BLOCK_N, BLOCK_K = 512, 512
VMEM_LIMIT = 48 << 20  # bytes; v5p and tpu7x have 64 MiB, and XLA keeps some of it for its own arrays


def rvq_lookup(
    x_ND: Float[Array, "N D"],
    books_KD: list[Float[Array, "K D"]],
    levels: int,
    block_n: int | None = None,
    block_k: int | None = None,
    interpret: Any = False,
) -> Int[Array, "N L"]:
    """See `kernels.rvq_lookup.rvq_lookup`; arguments are checked there."""
    n = x_ND.shape[0]
    dim = _round_up(x_ND.shape[1], LANES)
    sizes = [book_KD.shape[0] for book_KD in books_KD]
    block_n = block_n or min(BLOCK_N, _round_up(n, LANES))
    block_k = block_k or min(BLOCK_K if dim <= 1024 else BLOCK_K // 2, _round_up(max(sizes), SUBLANES))
    if block_n % LANES or block_k % SUBLANES:
        raise ValueError(f"rvq_lookup: block_n={block_n}, block_k={block_k}: wanted multiples of {LANES} and {SUBLANES}")
    x_ND = _pad(x_ND, _round_up(n, block_n), dim)
    padded = [_pad(book_KD, _round_up(size, block_k), dim) for book_KD, size in zip(books_KD, sizes, strict=True)]
    books_RD = padded[0] if len(padded) == 1 else jnp.concatenate(padded)
    plan = _plan(sizes, levels, block_k)
    codes_LN = pl.pallas_call(
        functools.partial(_kernel, levels),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(x_ND.shape[0] // block_n, len(plan[0])),
            in_specs=[
                pl.BlockSpec((block_k, dim), lambda i, c, level, start, offset, size: ((start[c] + offset[c]) // block_k, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((levels, block_n), lambda i, c, *_: (0, i)),
            scratch_shapes=[
                pltpu.VMEM((dim, block_n), jnp.float32),
                pltpu.VMEM((block_n, dim), jnp.float32),
                pltpu.VMEM((1, block_n), jnp.float32),
                pltpu.VMEM((1, block_n), jnp.int32),
                pltpu.SMEM((1, block_n), jnp.int32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((levels, x_ND.shape[0]), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        interpret=interpret,
        name="rvq_lookup",
    )(*(jnp.asarray(column) for column in plan), books_RD, books_RD, x_ND)
    return codes_LN[:, :n].T


def rvq_lookup_by_level(x_ND: Float[Array, "N D"], books_KD: list[Float[Array, "K D"]], levels: int, **options) -> Int[Array, "N L"]:
    """The same with one kernel a level, for the search alone, and XLA's gather between two levels."""
    residual_ND, codes = x_ND, []
    for level in range(levels):
        book_KD = books_KD[level % len(books_KD)]
        codes.append(rvq_lookup(residual_ND, [book_KD], 1, **options)[:, 0])
        residual_ND = residual_ND - book_KD[codes[-1]]
    return jnp.stack(codes, -1)


def _plan(sizes: list[int], levels: int, block_k: int) -> list[np.ndarray]:
    """Four columns over all code blocks: level, first stored row of its book, first code of the block, codes of the level."""
    blocks = [-(-size // block_k) for size in sizes]
    starts = np.concatenate([[0], np.cumsum(blocks)]) * block_k
    books = [level % len(sizes) for level in range(levels)]
    rows = [(level, starts[b], i * block_k, sizes[b]) for level, b in enumerate(books) for i in range(blocks[b])]
    return list(np.array(rows, np.int32).T)


def _kernel(
    levels, level_C, start_C, offset_C, size_C, book_kD, books_RD, x_ND, codes_Ln,
    residual_Dn, rows_nD, best_1n, id_1n, id_smem_1n, semaphore,
):  # fmt: skip
    """One block of codes against one block of vectors."""
    i, c = pl.program_id(0), pl.program_id(1)
    level, offset, size = level_C[c], offset_C[c], size_C[c]
    n, k = residual_Dn.shape[1], book_kD.shape[0]

    @pl.when(c == 0)
    def _():
        copy = pltpu.make_async_copy(x_ND.at[pl.ds(i * n, n)], rows_nD, semaphore)
        copy.start()
        copy.wait()
        residual_Dn[...] = rows_nD[...].T

    @pl.when(offset == 0)
    def _():
        best_1n[...] = jnp.full_like(best_1n, jnp.inf)
        id_1n[...] = jnp.zeros_like(id_1n)

    book, row_k1 = book_kD[...], jax.lax.broadcasted_iota(jnp.int32, (k, 1), 0)
    norm_k1 = jnp.where(offset + row_k1 < size, 0.5 * jnp.sum(book * book, axis=1, keepdims=True), jnp.inf)
    dot_kn = jnp.dot(book, residual_Dn[...], precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    score_kn = norm_k1 - dot_kn  # half the squared distance, less |x|^2 / 2
    low_1n = jnp.min(score_kn, axis=0, keepdims=True)
    first_1n = jnp.min(jnp.where(score_kn == low_1n, row_k1, k), axis=0, keepdims=True)
    better_1n = low_1n < best_1n[...]  # strict: an equal later code does not replace an earlier one
    best_1n[...] = jnp.where(better_1n, low_1n, best_1n[...])
    id_1n[...] = jnp.where(better_1n, offset + first_1n, id_1n[...])

    @pl.when(offset + k >= size)
    def _():
        codes_Ln[pl.ds(level, 1), :] = id_1n[...]

    @pl.when((offset + k >= size) & (level + 1 < levels))
    def _():
        _subtract(start_C[c], books_RD, residual_Dn, rows_nD, id_1n, id_smem_1n, semaphore)


def _subtract(start, books_RD, residual_Dn, rows_nD, id_1n, id_smem_1n, semaphore):
    """Takes the chosen rows off the residual."""
    n = rows_nD.shape[0]
    ids = pltpu.make_async_copy(id_1n, id_smem_1n, semaphore)
    ids.start()
    ids.wait()

    def fetch(group, _):
        first = pl.multiple_of(group * SUBLANES, SUBLANES)
        for i in range(SUBLANES):
            row = start + id_smem_1n[0, first + i]
            pltpu.make_async_copy(books_RD.at[row], rows_nD.at[first + i], semaphore).start()

    jax.lax.fori_loop(0, n // SUBLANES, fetch, None)
    pltpu.make_async_copy(rows_nD, rows_nD, semaphore).wait()  # for the bytes of all rows
    residual_Dn[...] -= rows_nD[...].T


def _pad(x: Array, rows: int, columns: int) -> Array:
    """With rows and columns of zeros behind; without a copy where none are missing."""
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
