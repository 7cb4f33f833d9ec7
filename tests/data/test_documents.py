import collections

import numpy as np
import pytest

from dina import grammar
from dina.config import InputError
from dina.data import documents, phrases
from dina.grammar import Image, Speech, Text

from tests.data import mixture


def make(**changes):
    options = documents.default_options()
    options.update(changes)
    return mixture.documents(options)


def words(made, span):
    """The text of a span, role tags and eos left out."""
    return " ".join(mixture.spell_back(made, span.ids))


def only(kind):
    return {"mixture": {name: float(name == kind) for name in documents.KINDS}}


def test_a_document_is_a_function_of_its_number():
    a, b = make(), make()
    for n in (0, 7, 100_000):
        one, two = a(n), b(n)
        assert one.kind == two.kind
        arrays = [grammar.encode(s.document, a.v) for s in (one, two)]
        assert all((arrays[0][k] == arrays[1][k]).all() for k in arrays[0])
    assert len({str(grammar.encode(a(n).document, a.v)["tokens"].tolist()) for n in range(40)}) > 30


def test_kinds_are_drawn_by_weight():
    made = make(mixture={**dict.fromkeys(documents.KINDS, 0.0), "text_to_image": 3.0, "plain_text": 1.0})
    count = collections.Counter(documents.KINDS[made(n).kind] for n in range(800))
    assert set(count) == {"text_to_image", "plain_text"} and 0.68 < count["text_to_image"] / 800 < 0.82


@pytest.mark.parametrize("kind", documents.KINDS)
def test_every_kind_is_a_document_that_comes_back(kind):
    made = make(**only(kind))
    for n in range(30):
        document = made(n).document
        back = grammar.decode(grammar.encode(document, made.v), made.v)
        assert grammar.encode(back, made.v)["tokens"].tolist() == grammar.encode(document, made.v)["tokens"].tolist()
        learnt = grammar.encode(document, made.v)
        assert learnt["text_weight"].sum() + learnt["code_weight"].sum() > 0


def test_pictures_are_what_the_prompt_asks_for_and_never_held_out():
    made = make(**only("text_to_image"), dropout=0.0)
    for n in range(200):
        ask, picture, _ = made(n).document
        record = mixture.find(made.images, picture.codes)
        f = {name: int(column[record]) for name, column in made.images.fields.items()}
        canvas = (f["h"], f["w"])
        assert f["aligned"] == 1 and not phrases.is_held_out(f["digit"], canvas) and picture.target
        captions = [phrases.caption(canvas, f["digit"], f["size"], f["top"], f["left"], k) for k in range(4)]
        assert any(words(made, ask).endswith(c) for c in captions)


def test_a_held_out_or_unaligned_picture_may_be_shown():
    made = make(**only("image_to_text"))
    shown = {mixture.find(made.images, made(n).document[1].codes) for n in range(600)}
    aligned = made.images.fields["aligned"]
    assert any(aligned[r] == 0 for r in shown)


def test_digits_agree_across_modalities():
    made = make(**only("image_to_speech"))
    for n in range(40):
        _, picture, _, voice, _ = made(n).document
        digit = made.images.fields["digit"][mixture.find(made.images, picture.codes)]
        record = mixture.find(made.speech, voice.codes)
        word = phrases.DIGIT_WORDS[digit]
        assert made.speech.fields["word"][record] == word == " ".join(mixture.spell_back(made, voice.transcript))
        assert made.speech.fields["noisy"][record] == 0
    made = make(**only("conversation"))
    for n in range(40):
        document = made(n).document
        pictures = [made.images.fields["digit"][mixture.find(made.images, s.codes)] for s in document if isinstance(s, Image)]
        said = {" ".join(mixture.spell_back(made, s.transcript)) for s in document if isinstance(s, Speech)}
        assert len(set(pictures)) == 1 and said <= {phrases.DIGIT_WORDS[pictures[0]]}
        assert sum(isinstance(s, Text) and made.v.user in s.ids for s in document) in (2, 3)


def test_heard_speech_is_noisy_as_often_as_asked():
    made = make(**only("speech_to_text"), noisy_share=0.25)
    noisy = [made.speech.fields["noisy"][mixture.find(made.speech, made(n).document[1].codes)] for n in range(400)]
    assert 0.17 < np.mean(noisy) < 0.33


def test_dropped_prompts_leave_what_guidance_uses():
    made = make(**only("text_to_image"), dropout=0.5)
    sizes = collections.Counter(len(made(n).document) for n in range(300))
    assert set(sizes) == {2, 3} and 0.4 < sizes[2] / 300 < 0.6
    tokens = grammar.encode(next(made(n) for n in range(99) if len(made(n).document) == 2).document, made.v)["tokens"]
    assert tokens[0] == made.v.size_open and tokens[-1] == made.v.eos


def test_plain_text_is_cut():
    made = make(**only("plain_text"), plain_tokens=5)
    lengths = {len(made(n).document[0].ids) for n in range(50)}
    assert max(lengths) == 5


@pytest.mark.parametrize("changes, message", [
    ({"mixture": {"text_to_video": 1.0}}, "text_to_video: must be one of"),
    ({"mixture": {"plain_text": 0.0}}, "not all zero"),
    ({"asks": {"digit": -1.0}}, ">= 0"),
])
def test_impossible_mixtures_are_refused(changes, message):
    options = documents.default_options()
    with options.unlocked():
        for key, value in changes.items():
            del options[key]
            options[key] = value
    with pytest.raises(InputError, match=message):
        mixture.documents(options)


def test_missing_data_is_named():
    v = mixture.vocabulary()
    options = documents.default_options()
    with pytest.raises(InputError, match="no image codes"):
        documents.Documents(options, (0,), v, mixture.Speller(), None, mixture.speech(), ["a"])
    with pytest.raises(InputError, match="no speech codes"):
        documents.Documents(options, (0,), v, mixture.Speller(), mixture.images(), None, ["a"])
    with pytest.raises(InputError, match="no texts"):
        documents.Documents(options, (0,), v, mixture.Speller(), mixture.images(), mixture.speech(), [])
    options.update(only("plain_text"))
    assert documents.Documents(options, (0,), v, mixture.Speller(), None, None, ["a b c"])(0).document


def test_kinds_have_exactly_the_shares_of_the_mixture():
    options = documents.default_options()
    shares = np.array([5, 1, 1, 0.5, 0, 2, 0.25, 0.25]) / 10
    options.mixture = dict(zip(documents.KINDS, shares.tolist(), strict=True))
    made = mixture.documents(options)
    counts = np.bincount([made(n).kind for n in range(2000)], minlength=len(documents.KINDS))
    assert np.abs(counts - 2000 * shares).max() < 6


def test_shares_may_be_of_positions():
    options = documents.default_options()
    options.mixture = {name: float(name in ("text_to_image", "plain_text")) for name in documents.KINDS}
    options.mixture_of = "positions"
    made, positions = mixture.documents(options), dict.fromkeys(documents.KINDS, 0)
    for n in range(1500):
        sample = made(n)
        positions[documents.KINDS[sample.kind]] += grammar.cost(sample.document, made.v).positions
    assert 0.47 < positions["text_to_image"] / sum(positions.values()) < 0.53
    options.mixture_of = "tokens"
    with pytest.raises(InputError, match="options.mixture_of.*documents, positions"):
        mixture.documents(options)
