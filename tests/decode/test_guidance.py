"""Guided logits and the three silent prompts."""

import numpy as np
import pytest

from dina.decode import guidance


def _pair(scale):
    logits = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    cond, uncond = np.array([0, 1, 0]), np.array([2, 1, 2])
    return logits, np.asarray(guidance.combine(logits, guidance.Pairs(cond, uncond, np.full(3, scale, np.float32))))


def test_rows_of_a_pair_get_one_answer_and_single_rows_keep_theirs():
    logits, out = _pair(2.0)
    np.testing.assert_array_equal(out[1], logits[1])
    np.testing.assert_array_equal(out[0], out[2])
    np.testing.assert_allclose(out[0], logits[2] + 2 * (logits[0] - logits[2]), rtol=1e-6)


def test_scale_one_is_the_conditional_row():
    logits, out = _pair(1.0)
    np.testing.assert_allclose(out[0], logits[0], rtol=1e-5)


def _prompt():
    codes = np.full((6, 2), -1, np.int32)
    codes[1] = 4
    return {"tokens": np.array([7, 8, 9, 60, 61, 62]), "transcript": np.full(6, -1), "codes": codes}


@pytest.mark.parametrize(
    "variant,tokens", [("suffix", [60, 61, 62]), ("zeroed", [0, 0, 0, 60, 61, 62]), ("literal", [0, 0, 0, 0, 0, 0])]
)
def test_silent_prompts(variant, tokens):
    out = guidance.unconditional(_prompt(), 3, variant)
    assert out["tokens"].tolist() == tokens
    assert (out["codes"] == -1).all()
    assert len(out["codes"]) == len(out["transcript"]) == len(tokens)


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="blank"):
        guidance.unconditional(_prompt(), 3, "blank")
    with pytest.raises(ValueError, match="7"):
        guidance.unconditional(_prompt(), 7)
