"""Documents of recordings: what belongs together stays together, for every kind and every delay."""

import numpy as np
import pytest

from dina import grammar
from dina.config import InputError
from dina.data import codes, documents, utterances
from dina.grammar import Image, Speech
from tests.data import mixture

CLIPS = [("Ein Hund", "de", "dog"), ("A dog", "en", "dog"), ("A cat sits here", "en", "cat"), ("Goodbye", "en", ""), ("hors", "", ""),
         ("A lost picture", "en", "unknown"), ("", "en", "cat")]  # fmt: skip
NAMES = {"dog": 0, "cat": 1}


def tables():
    speech, numbers = [], iter(range(99))
    for record, (text, language, picture) in enumerate(CLIPS):
        for noisy in (0, 1):
            speech.append({"text": text, "language": language, "speaker": "s", "picture": picture, "noisy": noisy, "record": record,
                           "codes": mixture._numbered(next(numbers), 2 + record, mixture.LEVELS["audio"])})  # fmt: skip
    images = [{"h": 1 + i, "w": 2, "source": name, "caption": name, "record": i, "codes": mixture._numbered(i, 2 + 2 * i, mixture.LEVELS["visual"])}
              for name, i in NAMES.items()]  # fmt: skip
    return codes.table("speech", speech), codes.table("images", images)


def make(kind=None, pictures=True, **changes):
    options = documents.default_options()
    if kind:
        options.mixture = {name: float(name == kind) for name in documents.KINDS}
    options.update(changes)
    speller, (speech, images) = mixture.Speller(), tables()
    made = utterances.Utterances(options, (3, 0), mixture.vocabulary(speller), speller, speech, images if pictures else None)
    made.spell = lambda ids: " ".join(list(speller.words)[i - 4] for i in ids if 4 <= i < 4 + len(speller.words))
    return made


def said(made, span):
    """(text, language, picture, noisy) of a span of speech."""
    record = mixture.find(made.speech, span.codes)
    return tuple(made.speech.fields[name][record] for name in ("text", "language", "picture", "noisy"))


@pytest.mark.parametrize("kind", documents.KINDS)
def test_every_kind_comes_back_is_learnt_from_and_keeps_what_belongs_together(kind):
    made, other = make(kind), make(kind)
    for n in range(40):
        sample, again = made(n), other(n)
        assert documents.KINDS[sample.kind] == kind
        arrays = grammar.encode(sample.document, made.v)
        back = grammar.encode(grammar.decode(arrays, made.v), made.v)
        assert back["tokens"].tolist() == arrays["tokens"].tolist() == grammar.encode(again.document, made.v)["tokens"].tolist()
        assert arrays["text_weight"].sum() + arrays["code_weight"].sum() > 0
        spoken = [span for span in sample.document if isinstance(span, Speech)]
        pictures = [NAMES_OF[mixture.find(made.images, span.codes)] for span in sample.document if isinstance(span, Image)]
        assert all(said(made, span)[2] in pictures or not pictures for span in spoken)
        for span in spoken:
            if span.target:
                assert made.spell(span.transcript) == said(made, span)[0] and said(made, span)[3] == 0
        if kind == "conversation":
            assert made.spell(sample.document[3].ids) == said(made, spoken[0])[0]


NAMES_OF = {number: name for name, number in NAMES.items()}


def test_speech_is_heard_with_and_without_noise_and_written_as_it_was_said():
    made, noisy = make("speech_to_text"), set()
    for n in range(60):
        document = made(n).document
        text, *_, loud = said(made, document[1])
        noisy.add(int(loud))
        assert made.spell(document[-1].ids) == text != ""
    assert noisy == {0, 1}


def test_prompts_name_the_language_where_it_is_known_and_are_sometimes_left_out():
    made, asked = make("text_to_speech", dropout=0.3), []
    for n in range(80):
        document = made(n).document
        text, language, *_ = said(made, document[-2])
        if len(document) == 3:
            words = made.spell(document[0].ids)
            assert words.endswith(text) and (language in words.replace(":", "").split() if language else words.startswith("say: "))
        asked.append(len(document) == 3)
    assert 0.5 < np.mean(asked) < 0.9


def test_what_is_not_there_is_named():
    with pytest.raises(InputError, match="options.mixture asks for image_to_text, but there are no recordings of pictures"):
        make(pictures=False)
    assert make("plain_text", pictures=False)(0).document
    with pytest.raises(InputError, match="speech codes have no field 'language'"):
        utterances.Utterances(documents.default_options(), (1,), mixture.vocabulary(), mixture.Speller(), mixture.speech())


def test_sentences_for_a_tokenizer():
    found = utterances.sentences(["Hallo"], ["de", "en"])
    assert found[0] == "Hallo" and {"say it", "say in de:", "describe it in en"} < set(found) and len(found) == len(set(found))


def test_a_voice_is_another_clip_of_the_speaker_and_no_loss_is_on_what_is_heard():
    made, heard = make("text_to_speech", voice_share=0.5, dropout=0.2), []
    for n in range(80):
        document = made(n).document
        voices = [span for span in document if isinstance(span, Speech) and not span.target]
        heard.append(len(voices))
        if voices:
            assert made.spell(document[0].ids) == utterances.VOICE and document[0].ids[0] == made.v.system and document[1] is voices[0]
            assert said(made, voices[0])[0] != said(made, document[-2])[0]
    assert 0.1 < np.mean(heard) < 0.6 and max(heard) == 1
    for kind, share in (("speech_to_text", 0), ("speech_to_image", 0), ("text_to_speech", 1)):
        made = make(kind, voice_share=float(share), dropout=0.0)
        for n in range(20):
            arrays = grammar.encode(made(n).document, made.v)
            pure = (arrays["tokens"] == made.v.audio_pad) & (arrays["transcript"] < 0)
            assert not arrays["code_weight"][pure].any() and not arrays["text_weight"][pure].any()
            assert pure.any() or share


def test_segments_are_recordings_of_one_speaker_with_delays_of_their_own():
    made, delays = make("text_to_speech", segments_share=0.7, dropout=0.0), set()
    for n in range(80):
        document = made(n).document
        spoken = [span for span in document if isinstance(span, Speech)]
        texts = [made.spell(span.transcript) for span in spoken]
        assert made.spell(document[0].ids).endswith(" ".join(texts)) and len(set(texts)) == len(texts)
        arrays = grammar.encode(document, made.v)
        opened = np.flatnonzero(arrays["tokens"] == made.v.audiogen_start)
        assert arrays["text_weight"][opened].tolist() == [0, 1][: len(spoken)]  # the first is opened by the prompt
        delays |= {tuple(span.delay for span in spoken)} if len(spoken) == 2 else set()
    assert len(delays) > 4
