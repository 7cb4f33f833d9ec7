"""Kept answers: what comes back, and that each thing that decides an answer decides its name."""

import dataclasses

import numpy as np

from dina.eval.answers import Answers
from dina.eval.generation import Answer
from dina.eval.prompts import Question

QUESTION = Question(task="image_to_text", group="main", prompt="which digit", truth=3, word="three", reply="text",
                    image=np.arange(12, dtype=np.uint8).reshape(2, 2, 3))  # fmt: skip


def test_answers_come_back_bit_for_bit_and_damaged_ones_do_not(tmp_path):
    answers, rng = Answers(tmp_path, "a"), np.random.default_rng(0)
    given = [Answer("drei, ünd"), Answer("", image=rng.integers(0, 255, (28, 56, 3)).astype(np.uint8)),
             Answer("word", wave=rng.normal(size=999).astype(np.float32), rate=24000)]  # fmt: skip
    for number, answer in enumerate(given):
        assert answers.get(str(number)) is None
        answers.put(str(number), answer)
        found = answers.get(str(number))
        assert (found.text, found.rate) == (answer.text, answer.rate)
        for field in ("image", "wave"):
            one, two = getattr(found, field), getattr(answer, field)
            assert (one is None) == (two is None) and (one is None or (one.dtype == two.dtype and np.array_equal(one, two)))
    whole = (tmp_path / "1").read_bytes()
    for at in range(0, len(whole), 97):
        (tmp_path / "1").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert answers.get("1") is None
    (tmp_path / "1").write_bytes(whole[:20])
    assert answers.get("1") is None


def test_everything_that_decides_an_answer_is_in_its_name(tmp_path):
    image = QUESTION.image.copy()
    image[1, 1, 1] ^= 1
    others = [dataclasses.replace(QUESTION, **change) for change in (
        {"prompt": "which number"}, {"image": image}, {"image": QUESTION.image.reshape(1, 4, 3)}, {"image": None},
        {"reply": "speech"}, {"canvas": (1, 1)}, {"wave": np.zeros(3, np.float32)}, {"truth": 4})]  # fmt: skip
    names = [Answers(tmp_path, "a").name(question, 0, 1) for question in (QUESTION, *others)]
    names += [Answers(tmp_path, "b").name(QUESTION, 0, 1), Answers(tmp_path, "a").name(QUESTION, 1, 1), Answers(tmp_path, "a").name(QUESTION, 0, 2)]
    assert len(set(names)) == len(names)
    assert Answers(tmp_path, "a").name(dataclasses.replace(QUESTION, image=QUESTION.image.copy()), 0, 1) == names[0]
