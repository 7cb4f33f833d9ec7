"""Which checkpoints are kept."""

import pytest
from hypothesis import given, strategies as st

from dina import retention
from dina.config import InputError

STEPS = st.dictionaries(st.integers(0, 200), st.fixed_dictionaries({}, optional={"loss": st.floats(-5, 5)}), min_size=1)


@given(STEPS, st.integers(0, 5), st.integers(0, 9), st.sampled_from(["", "min:loss", "max:loss", "min:other"]))
def test_what_a_policy_promises_is_kept_and_nothing_else(steps, last, every, best):
    kept = retention.kept(steps, last, every, best)
    assert kept <= set(steps) and max(steps) in kept
    newest = set(sorted(steps)[-max(1, last):])
    multiples = {step for step in steps if every and step % every == 0}
    scored = {step: values["loss"] for step, values in steps.items() if "loss" in values} if "loss" in best else {}
    assert newest | multiples <= kept and len(kept - newest - multiples) <= 1
    if scored:
        wanted = (min if best.startswith("min") else max)(scored.values())
        assert any(scored.get(step) == wanted for step in kept)
    else:
        assert kept == newest | multiples


def test_a_policy_that_is_none_is_named():
    with pytest.raises(InputError, match="keep_best: 'loss'"):
        retention.parse_best("loss")
