"""What a quantizer keeps, and where: statistics that `apply` moves, and parameters that gradient moves.

Statistics always hold the codes as a reader needs them: 'codebook' {book: [K, E]} and, with projections, 'in' {book: [D, E]}
and 'out' {book: [E, D]}; `encode` and `decode` look at nothing else. 'count' [K] is hits per update, a moving average.

| choice          | further statistics         | parameters                                          |
|-----------------|----------------------------|-----------------------------------------------------|
| update='ema'    | sum [K, E]                 | none                                                |
| update='sgd'    | base [K, E]                | code_table [K, E]: codebook = base + code_table     |
| kind='simvq'    | base [K, E], never changed | map [E, E]: codebook = base map                     |
| kind='fsq'      | none                       | none                                                |
| projections     | none                       | in, out                                             |

`base` is where a code of 'sgd' started or restarted: parameters are the optimizer's alone, statistics are not, so a
restart moves the base and the code with it. What follows from parameters is in the statistics a second time, as the last
forward pass had it, so that later stages and tools need the statistics only.

Legend: D dimensions of a vector, E of a code, K codes of one book.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dina.quantize import fsq
from dina.quantize.coding import Stats
from dina.quantize.config import RVQConfig
from dina.quantize.lookup import HIGHEST

Params = Mapping[str, Mapping[str, Array]]


def init(cfg: RVQConfig, key: PRNGKeyArray) -> tuple[Params, Stats]:
    """Random books and projections with the statistics that belong to them.

    Args:
        cfg: the quantizer.
        key: a PRNG key.

    Returns:
        (parameters, statistics), float32; the table above says what they hold. No parameters are an empty dict.
    """
    fit = {"book": [random_book(cfg, book, jax.random.fold_in(key, i)) for i, book in enumerate(cfg.books)]}
    if cfg.kind == "simvq":
        fit["map"] = [jnp.eye(cfg.width(book)) for book in cfg.books]
    if cfg.projected:
        keys = [jax.random.fold_in(key, len(cfg.books) + i) for i in range(len(cfg.books))]
        normal = [jax.random.normal(k, (cfg.dim, cfg.width(book))) for k, book in zip(keys, cfg.books, strict=True)]
        fit["in"] = [jnp.linalg.qr(normal_DE)[0] for normal_DE in normal]
        fit["out"] = [in_DE.T for in_DE in fit["in"]]
    return assemble(cfg, fit, [jnp.ones(size, jnp.float32) for size in cfg.books.values()])


def random_book(cfg: RVQConfig, book: str, key: PRNGKeyArray) -> Array:
    """Normal codes [K, E] of about unit length; the grid of 'fsq'."""
    if cfg.kind == "fsq":
        return jnp.asarray(fsq.points(cfg.books[book]))
    width = cfg.width(book)
    return jax.random.normal(key, (cfg.books[book], width), jnp.float32) / width**0.5


def init_stats(cfg: RVQConfig, key: PRNGKeyArray) -> Stats:
    """The statistics of `init`."""
    return init(cfg, key)[1]


def from_codebooks(books_KD: list[Array], counts_K: list[Array] | None = None) -> Stats:
    """Statistics of 'ema' in which every code is exactly the mean of `count` vectors (default one); books in level order."""
    counts = [jnp.ones(book.shape[:1], jnp.float32) for book in books_KD] if counts_K is None else counts_K
    sums = [book * count[:, None] for book, count in zip(books_KD, counts, strict=True)]
    leaves = {"codebook": books_KD, "count": counts, "sum": sums}
    return {name: named(parts) for name, parts in leaves.items()}


def named(parts: list[Array]) -> dict[str, Array]:
    """Parts of the stored books under their names."""
    return {str(i): part for i, part in enumerate(parts)}


def assemble(cfg: RVQConfig, fit: Mapping[str, list[Array]], counts_K: list[Array]) -> tuple[Params, Stats]:
    """(parameters, statistics) of books ('book', of 'simvq' the base), and where there are any 'map', 'in' and 'out'."""
    if cfg.books_are_averaged:
        params, stats = {}, from_codebooks(fit["book"], counts_K)
    else:
        params, stats = {}, {"codebook": named(fit["book"]), "count": named(counts_K)}
    if cfg.books_are_trained:
        stats["base"] = stats.pop("codebook")
        own = {"map": fit["map"]} if cfg.kind == "simvq" else {"code_table": [jnp.zeros_like(b) for b in fit["book"]]}
        params |= {name: named(parts) for name, parts in own.items()}
    if cfg.projected:
        params |= {name: named(fit[name]) for name in ("in", "out")}
    # Arrays of their own: a training step gives its state away, and no buffer can be given twice.
    return params, jax.tree.map(jnp.copy, view(cfg, params, stats)) if params else stats


def view(cfg: RVQConfig, params: Params, stats: Stats) -> Stats:
    """Statistics whose codebooks and projections are made of the parameters now, with gradient to them."""
    made = dict(stats)
    if cfg.kind == "simvq":
        made["codebook"] = {b: jnp.matmul(stats["base"][b], params["map"][b], precision=HIGHEST) for b in cfg.books}
    elif cfg.books_are_trained:
        made["codebook"] = {b: stats["base"][b] + params["code_table"][b] for b in cfg.books}
    return made | {name: dict(params[name]) for name in published(cfg) if name != "codebook"}


def published(cfg: RVQConfig) -> tuple[str, ...]:
    """Statistics that follow from parameters."""
    return (("codebook",) if cfg.books_are_trained else ()) + (("in", "out") if cfg.projected else ())
