"""Prose: real sentences, bounded, split without overlap."""

from dina.data import corpus, digits, phrases


def test_splits_cover_the_prose_without_overlap():
    data = digits.default_config()
    texts = {split: [row["text"] for row in corpus.records(data, split)] for split in corpus.SPLITS}
    every = [text for split in texts.values() for text in split]
    assert sorted(every) == sorted(corpus.paragraphs(200)) and len(every) == len(set(every)) > 1000
    for split, share in (("train", 0.9), ("valid", 0.05), ("test", 0.05)):
        assert abs(len(texts[split]) / len(every) - share) < 0.03


def test_records_are_prose():
    texts = corpus.paragraphs(200)
    assert all(20 <= len(text) <= 200 and text.isascii() and "\n" not in text for text in texts)
    assert not any("::=" in text or ">>>" in text for text in texts)


def test_tokenizer_texts_hold_the_grammar_and_no_test_prose():
    data = digits.default_config()
    texts = set(corpus.tokenizer_texts(data))
    assert set(phrases.sentences()) <= texts
    assert not texts & {row["text"] for row in corpus.records(data, "test")}
