"""Text tokenizer: round trips, determinism, single-piece words, special tokens."""

import pytest

from dina.config import InputError
from dina.data import corpus, digits, phrases
from dina.text import tokenizer as T


@pytest.fixture(scope="module")
def texts():
    return corpus.tokenizer_texts(digits.default_config())


@pytest.fixture(scope="module")
def path(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.model"
    T.train_tokenizer(texts, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return T.TextTokenizer(path, ["<img_start>", "</img_size>"])


def test_same_texts_same_file(texts, path, tmp_path):
    T.train_tokenizer(texts, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", [
    "a small seven at the top left", "Héllo, wörld: 漢字 \U0001f600", "two  spaces", "x <y> z", ""])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and all(3 < i < 512 for i in ids)


def test_round_trip_of_unseen_prose(tokenizer):
    for row in corpus.records(digits.default_config(), "test"):
        assert tokenizer.decode(tokenizer.encode(row["text"])) == row["text"]


def test_scored_words_are_single_pieces(tokenizer):
    words = [*phrases.DIGIT_WORDS, *phrases.SIZES, *phrases.VERTICAL, *phrases.HORIZONTAL]
    pieces = [tokenizer.piece(word) for word in words]
    assert None not in pieces and len(set(pieces)) == len(words)
    assert tokenizer.piece("unquestionably") is None


def test_ids_are_where_the_grammar_expects_them(tokenizer):
    assert (tokenizer.vocab_size, T.UNK, T.BOS, T.EOS, T.PAD) == (512, 0, 1, 2, 3)
    assert tokenizer.decode([T.BOS, *tokenizer.encode("seven"), T.EOS, T.PAD]) == "seven"


def test_special_tokens_in_prompts(tokenizer):
    ids = tokenizer.encode_prompt("paint a seven<img_start></img_size>now")
    assert ids == [*tokenizer.encode("paint a seven"), 512, 513, *tokenizer.encode("now")]
    assert tokenizer.decode(ids) == "paint a seven<img_start></img_size>now"
    assert tokenizer.encode_prompt("3 < 4 > 2") == tokenizer.encode("3 < 4 > 2")


def test_unknown_special_token_is_named(tokenizer):
    with pytest.raises(InputError, match="<dina_foo>") as caught:
        tokenizer.encode_prompt("paint <dina_foo> now")
    assert "<img_start>" in str(caught.value)
    assert tokenizer.encode("paint <dina_foo> now")  # plain text may hold anything


def test_specials_may_have_given_ids(path):
    tokenizer = T.TextTokenizer(path, {"<a>": 700})
    assert tokenizer.encode_prompt("<a>") == [700] and tokenizer.decode([700, 701]) == "<a><701>"


def test_bad_model_files_are_named(tmp_path):
    with pytest.raises(InputError, match="none.model"):
        T.TextTokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="bad.model"):
        T.TextTokenizer(tmp_path / "bad.model")


def test_impossible_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="text.vocab_size"):
        T.train_tokenizer(["a b"], tmp_path / "x.model", 512)
    assert not (tmp_path / "x.model").exists()
