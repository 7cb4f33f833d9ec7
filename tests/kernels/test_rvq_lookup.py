"""The fused search: ids of a float64 search, ties, padding, uneven blocks and books, and no race between its copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.rvq_lookup import rvq_lookup
from kernels.rvq_lookup.pallas_tpu import _plan

# name -> (vectors, dimensions, sizes of the books, levels, block_n, block_k)
CASES = {
    "even": (256, 128, (128, 128, 128), 3, 128, 64),
    "uneven vectors, dimensions and codes": (200, 72, (100, 100), 2, 128, 32),
    "books of different sizes": (130, 80, (300, 65, 8, 1), 4, 128, 64),
    "shared book": (128, 64, (90,), 5, 128, 32),
    "one vector, blocks chosen": (1, 24, (700, 40), 2, None, None),
    "one block a level": (150, 130, (48, 48), 2, 256, 48),
}


def _draw(n, dim, sizes, seed=0):
    """Vectors, and books whose scale falls as a trained quantizer's does."""
    random = np.random.default_rng(seed)
    books = [random.normal(0, 0.6**i, (size, dim)).astype(np.float32) for i, size in enumerate(sizes)]
    return random.normal(size=(n, dim)).astype(np.float32), books


def _check(x_ND, books, levels, codes_NL):
    """Every code is the float64 nearest of its own residual, unless the two distances differ by less than float32 can tell."""
    residual, close = x_ND.astype(np.float64), 0
    assert codes_NL.shape == (len(x_ND), levels) and codes_NL.dtype == jnp.int32
    for level in range(levels):
        book = np.asarray(books[level % len(books)], np.float64)
        score = (book**2).sum(-1) - 2 * residual @ book.T
        best, code = score.argmin(-1), np.asarray(codes_NL[:, level])
        assert code.min() >= 0 and code.max() < len(book)
        rows = np.arange(len(code))
        gap = score[rows, code] - score[rows, best]
        allowed = 1e-6 * ((book**2).sum(-1).max() + (residual**2).sum(-1))
        assert (gap <= np.where(code == best, 0, allowed)).all(), f"level {level}"
        close += (code != best).sum()
        residual = residual - book[code]
    assert close <= 0.01 * codes_NL.size


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_tpu_by_level", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_codes_are_the_nearest(case, implementation):
    n, dim, sizes, levels, block_n, block_k = CASES[case]
    x, books = _draw(n, dim, sizes)
    options = {"block_n": block_n, "block_k": block_k, "interpret": True} if implementation != "reference" else {}
    _check(x, books, levels, rvq_lookup(x, books, levels, implementation, **options))


@pytest.mark.parametrize("implementation", ["pallas_tpu", "reference"])
def test_the_first_of_equal_codes_wins_within_and_across_blocks(implementation):
    x, books = _draw(128, 16, (100, 100))
    for book in books:
        book[[5, 29, 40, 99]] = book[3]  # block 0 twice, block 1, and the last with its padding
        book[50] = book[35]
    x[:40], x[40:80] = books[0][3], books[0][35]
    options = {"block_n": 128, "block_k": 32, "interpret": True} if implementation == "pallas_tpu" else {}
    codes = np.asarray(rvq_lookup(x, books, implementation=implementation, **options))
    assert (codes[:40, 0] == 3).all() and (codes[40:80, 0] == 35).all()
    assert not np.isin(codes, [5, 29, 40, 99, 50]).any()


def test_rows_of_padding_never_win():
    x, books = np.zeros((3, 8), np.float32), [np.full((5, 8), 100, np.float32) + np.arange(5, 0, -1, dtype=np.float32)[:, None]]
    codes = rvq_lookup(x, books, levels=2, block_n=128, block_k=32, interpret=True)  # zeros would be nearest to padding
    np.testing.assert_array_equal(codes, np.full((3, 2), 4))


def test_codes_of_a_vector_do_not_depend_on_the_others():
    x, books = _draw(200, 40, (64, 64))
    run = lambda x: np.asarray(rvq_lookup(x, books, block_n=128, block_k=64, interpret=True))
    np.testing.assert_array_equal(run(x)[150:], run(x[150:]))


def test_half_precision_and_no_vectors():
    x, books = _draw(20, 16, (30, 30))
    half = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(rvq_lookup(half, books, interpret=True), rvq_lookup(half.astype(jnp.float32), books, interpret=True))
    assert rvq_lookup(x[:0], books).shape == (0, 2)


def test_copies_do_not_race():
    x, books = _draw(200, 24, (40, 12, 12))
    codes = rvq_lookup(x, books, block_n=128, block_k=16, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    np.testing.assert_array_equal(codes, rvq_lookup(x, books, implementation="reference"))


def test_scores_of_a_whole_book_are_never_held():
    x, book = jnp.zeros((256, 128)), jnp.zeros((4096, 128))
    text = str(jax.make_jaxpr(lambda x, b: rvq_lookup(x, [b], 2, block_n=128, block_k=512))(x, book))
    assert "f32[512,128]" in text and "4096,256]" not in text and "4096,128]" in text and "256,4096]" not in text


def test_a_shared_book_is_stored_once():
    level, start, offset, size = _plan([70], 3, 32)
    np.testing.assert_array_equal(level, np.repeat([0, 1, 2], 3))
    np.testing.assert_array_equal(start, np.zeros(9))
    np.testing.assert_array_equal(offset, np.tile([0, 32, 64], 3))
    start = _plan([70, 8], 2, 32)[1]
    np.testing.assert_array_equal(start, [0, 0, 0, 96])


@pytest.mark.parametrize("message, change", [
    ("choose one of pallas_tpu, pallas_tpu_by_level, reference", {"implementation": "cuda"}),
    ("3 books for 2 levels", {"books_KD": [jnp.zeros((4, 6))] * 3, "levels": 2}),
    ("0 books for 0 levels", {"books_KD": []}),
    (r"book 1 has shape \(4, 5\), wanted \[K >= 1, 6\]", {"books_KD": [jnp.zeros((4, 6)), jnp.zeros((4, 5))]}),
    ("book 0 has shape", {"books_KD": [jnp.zeros((0, 6))]}),
    ("x has shape", {"x_ND": jnp.zeros((2, 3, 6))}),
    ("wanted multiples of 128 and 8", {"block_n": 100}),
    ("wanted multiples of 128 and 8", {"block_k": 12}),
])  # fmt: skip
def test_wrong_arguments_are_named(message, change):
    with pytest.raises(ValueError, match=message):
        rvq_lookup(**{"x_ND": jnp.zeros((2, 6)), "books_KD": [jnp.zeros((4, 6))], **change})
