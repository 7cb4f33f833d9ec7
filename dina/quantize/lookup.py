"""Codebooks and their lookup: what a residual quantizer is, and the search for its codes.

Legend: N vectors, D dimensions, L levels, K codes of one book, T codes of one search tile.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

TILE = 1024  # codes scored at once: the score matrix never exceeds [N, TILE]
Stats = dict[str, dict[str, Array]]  # plain nested dicts: what checkpoints and parameter paths are made of


@dataclasses.dataclass(frozen=True)
class RVQConfig:
    """Shape and rules of one residual quantizer.

    Attributes:
        sizes: codes per level; one entry per level, all equal if the book is shared.
        dim: dimension of the quantised vectors.
        codebook: 'separate' (a book per level) or 'shared' (one book used by all levels, its statistics pooled).
        decay: of the moving averages, per update.
        eps: Laplace smoothing of the counts.
        restart_fraction: a code is dead when its average count is below this share of the mean count of its book.
            Relative, because the literal "less than one hit" of the paper never ends when N is below K (paper §1.4).
        restart_cap: at most this share of a book (rounded up) is restarted per update.
        commitment: 'cumulative' (each partial sum is compared with the whole vector, every level sends gradient) or
            'residual' (each level is compared with its own residual, which is passed on by the straight-through
            value, as in SoundStream and DAC: same number, gradient from the first level only).
        gradient: 'straight_through'.
    """

    sizes: tuple[int, ...]
    dim: int
    codebook: str = "separate"
    decay: float = 0.99
    eps: float = 1e-5
    restart_fraction: float = 0.1
    restart_cap: float = 0.03
    commitment: str = "cumulative"
    gradient: str = "straight_through"

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        choices = {
            "codebook": ("separate", "shared"),
            "commitment": ("cumulative", "residual"),
            "gradient": ("straight_through",),
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"RVQConfig.{field}={getattr(self, field)!r}: choose one of {', '.join(known)}")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"RVQConfig.sizes={self.sizes}: one positive size per level")
        if self.codebook == "shared" and len(set(self.sizes)) > 1:
            raise ValueError(f"RVQConfig.sizes={self.sizes}: a shared codebook needs equal sizes")

    @property
    def levels(self) -> int:
        """Number of levels L."""
        return len(self.sizes)

    @property
    def books(self) -> dict[str, int]:
        """Name and size of each stored book: one if shared, else one per level ("0", "1", ...)."""
        return {str(i): size for i, size in enumerate(self.sizes[:1] if self.codebook == "shared" else self.sizes)}

    def book(self, level: int) -> str:
        """Name of the stored book that `level` uses."""
        return "0" if self.codebook == "shared" else str(level)


def init_stats(cfg: RVQConfig, key: PRNGKeyArray) -> Stats:
    """Random books with the statistics that belong to them.

    Args:
        cfg: the quantizer.
        key: a PRNG key.

    Returns:
        {'codebook': {book: [K, D]}, 'count': {book: [K]}, 'sum': {book: [K, D]}}, books as in `cfg.books`, float32.
        Counts are hits per update (moving average), sums the vectors behind them.
    """
    books = [
        jax.random.normal(jax.random.fold_in(key, i), (size, cfg.dim), jnp.float32) / cfg.dim**0.5
        for i, size in enumerate(cfg.books.values())
    ]
    return from_codebooks(books)


def from_codebooks(books_KD: list[Array], counts_K: list[Array] | None = None) -> Stats:
    """Statistics in which every code is exactly the mean of `count` vectors (default one); books in level order."""
    counts = [jnp.ones(book.shape[:1], jnp.float32) for book in books_KD] if counts_K is None else counts_K
    sums = [book * count[:, None] for book, count in zip(books_KD, counts, strict=True)]
    leaves = {"codebook": books_KD, "count": counts, "sum": sums}
    return {name: {str(i): leaf for i, leaf in enumerate(parts)} for name, parts in leaves.items()}


def scores(x_ND: Array, book_TD: Array) -> Array:
    """Squared distances [N, T], in the order of operations of the reference (A.4), full float32."""
    dot_NT = jnp.einsum("nd,td->nt", x_ND, book_TD, precision=jax.lax.Precision.HIGHEST)
    return (jnp.sum(x_ND**2, -1)[:, None] + jnp.sum(book_TD**2, -1)) - 2 * dot_NT


def nearest(x_ND: Float[Array, "N D"], book_KD: Float[Array, "K D"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Nearest code of one book, first index on ties.

    Books larger than `TILE` are searched tile by tile with a running minimum, so that [N, K] never exists.

    Args:
        x_ND: vectors.
        book_KD: codes.

    Returns:
        (ids int32 [N], squared distances float32 [N]).
    """
    x_ND, book_KD = x_ND.astype(jnp.float32), book_KD.astype(jnp.float32)
    size = book_KD.shape[0]
    if size <= TILE:
        score_NK = scores(x_ND, book_KD)
        return jnp.argmin(score_NK, -1).astype(jnp.int32), jnp.min(score_NK, -1)
    tiles = -(-size // TILE)
    book_iTD = jnp.pad(book_KD, ((0, tiles * TILE - size), (0, 0))).reshape(tiles, TILE, -1)

    def step(best, tile):
        index, book_TD = tile
        score_NT = jnp.where(index * TILE + jnp.arange(TILE) < size, scores(x_ND, book_TD), jnp.inf)
        low_N = jnp.min(score_NT, -1)
        id_N = index * TILE + jnp.argmin(score_NT, -1).astype(jnp.int32)
        better = low_N < best[1]  # strict: an equal later code does not replace an earlier one
        return (jnp.where(better, id_N, best[0]), jnp.where(better, low_N, best[1])), None

    first = (jnp.zeros(x_ND.shape[0], jnp.int32), jnp.full(x_ND.shape[0], jnp.inf, jnp.float32))
    return jax.lax.scan(step, first, (jnp.arange(tiles), book_iTD))[0]


def encode(cfg: RVQConfig, stats: Stats, x_ND: Float[Array, "N D"]) -> Int[Array, "N L"]:
    """Codes of all levels by sequential residual search (A.4).

    Args:
        cfg: the quantizer.
        stats: its codebooks.
        x_ND: vectors, any float dtype; the search is float32.

    Returns:
        Codes int32 [N, L], each in [0, sizes[l]).
    """
    residual_ND, codes = x_ND.astype(jnp.float32), []
    for level in range(cfg.levels):
        book_KD = stats["codebook"][cfg.book(level)]
        code_N = nearest(residual_ND, book_KD)[0]
        residual_ND = residual_ND - row(book_KD, code_N)
        codes.append(code_N)
    return jnp.stack(codes, -1)


def row(book_KD: Array, code_N: Array) -> Array:
    """The code vectors [N, D] of one level; zero where the code is -1."""
    return jnp.where(code_N[:, None] >= 0, book_KD[jnp.maximum(code_N, 0)], 0.0)


def rows(cfg: RVQConfig, stats: Stats, codes_NL: Int[Array, "N L"]) -> list[Float[Array, "N D"]]:
    """The code vectors of each level; zero where the code is -1."""
    return [row(stats["codebook"][cfg.book(level)], codes_NL[:, level]) for level in range(cfg.levels)]


def decode(
    cfg: RVQConfig, stats: Stats, codes_NL: Int[Array, "N L"], levels: int | Int[Array, " N"] | None = None
) -> Float[Array, "N D"]:
    """Sum of the codes of the first `levels` levels, level 0 added first.

    Args:
        cfg: the quantizer.
        stats: its codebooks.
        codes_NL: codes; -1 means that the level is absent.
        levels: how many levels to add: a number, one number per vector, or None for all.

    Returns:
        float32 [N, D].
    """
    depth = cfg.levels if levels is None else levels
    total_ND = jnp.zeros((codes_NL.shape[0], cfg.dim), jnp.float32)
    for level, row_ND in enumerate(rows(cfg, stats, codes_NL)):
        keep = jnp.asarray(level < depth)
        total_ND = total_ND + jnp.where(keep[..., None] if keep.ndim else keep, row_ND, 0.0)
    return total_ND
