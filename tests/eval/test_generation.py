"""The adapter's routing: which question's media go where, and which reply belongs to whom; no model is run."""

import dataclasses
import types

import ml_collections
import numpy as np
import pytest

from dina.decode.batching import Reply
from dina.eval import prompts
from dina.eval.generation import Generator
from dina.eval.prompts import Question
from dina.grammar import Image, Speech, Text, Vocabulary

IDS = {word: 10 + i for i, word in enumerate(("a", "b", "c", "seven"))}


class Words:
    """A tokenizer whose pieces are words."""

    def encode_prompt(self, text):
        return [IDS[word] for word in text.split()]

    def decode(self, ids):
        names = {number: word for word, number in IDS.items()}
        return " ".join(names[int(i)] for i in ids)


@pytest.fixture()
def generator():
    made = object.__new__(Generator)
    made.config = ml_collections.ConfigDict({"eval": prompts.default_config()})
    made.config.audio = ml_collections.ConfigDict({"features": {"max_frames": 128}, "bridge": {"pool": 4}})
    made.vocabulary = Vocabulary(64, audio=(9, 9), visual=(9, 9)).with_sizes(lambda s: [20 + int(x) for x in s.split()], [(1, 1), (2, 1)])
    made.text, made.rate, made.asked = Words(), 24000, []
    made.image_codes = lambda images: [np.full((i.shape[0] * i.shape[1] // 784, 2), i[0, 0, 0]) for i in images]
    made.speech_codes = lambda waves: [np.full((3, 2), int(w[0])) for w in waves]
    made.decode_images = lambda codes, grids, refined, seed: [np.full((28 * h, 28 * w, 3), c[0, 0], np.uint8) for c, (h, w) in zip(codes, grids, strict=True)]
    made.decode_speech = lambda codes, seed: [types.SimpleNamespace(wave=np.full(5, c[0, 0], np.float32)) for c in codes]
    return made


def reply(*spans):
    return Reply(tuple(spans), np.zeros(0), np.zeros(0), np.zeros((0, 2)), True)


def ask(**fields):
    return Question(task="t", group="main", truth=7, word="seven", **{"prompt": "a b", "reply": "text"} | fields)


def test_media_reach_their_own_prompt_and_replies_their_own_question(generator):
    codes = lambda n, value: np.full((n, 2), value)
    questions = [ask(image=np.full((56, 28, 3), 4, np.uint8)), ask(reply="image", canvas=(2, 1), box=(0, 0, 28)),
                 ask(wave=np.full(9, 5.0), reply="speech"), ask(wave=np.full(9, 6.0), reply="image", canvas=(1, 1), box=(0, 0, 28))]
    replies = [reply(Text((IDS["seven"],))), reply(Image(codes(2, 1), 2, 1, True)), reply(Speech(codes(4, 2), (IDS["seven"],), True)),
               reply(Image(codes(1, 3), 1, 1, True))]

    def generate(requests):
        generator.asked = requests
        return replies

    generator._generate = generate
    answers = generator.answer(questions, seed=3)
    assert answers[0].text == "seven" and answers[0].image is None
    assert answers[1].image.shape == (56, 28, 3) and answers[1].image[0, 0, 0] == 1
    assert answers[2].text == "seven" and answers[2].wave[0] == 2 and answers[2].rate == 24000
    assert answers[3].image.shape == (28, 28, 3) and answers[3].image[0, 0, 0] == 3
    shown = [[s.codes[0, 0] for s in r.prompt.document if not isinstance(s, Text)] for r in generator.asked]
    assert shown == [[4], [], [5], [6]]
    assert [(r.seed, r.number, r.stop, r.image_guidance > 1) for r in generator.asked] == [
        (3, 0, "eos", False), (3, 1, "span", True), (3, 2, "span", False), (3, 3, "span", True)]


def test_a_mute_reply_is_an_empty_canvas_or_silence(generator):
    generator._generate = lambda requests: [reply(), reply(), reply()]
    answers = generator.answer([ask(reply="image", canvas=(1, 1), box=(0, 0, 28)), ask(reply="speech"), ask()], seed=0)
    assert answers[0].image.shape == (28, 28, 3) and not answers[0].image.any()
    assert answers[1].text == "" and not answers[1].wave.any() and len(answers[1].wave)
    assert dataclasses.asdict(answers[2])["text"] == ""
