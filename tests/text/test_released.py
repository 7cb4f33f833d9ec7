"""The released tokenizer's ids, size tags and chat layout, on a tokenizer.json with its special tokens and a tiny text part."""

import json

import pytest

from dina.config import InputError
from dina.grammar import vocabulary as voc
from dina.text import released
from dina.text.released import Message, ReleasedTokenizer


def write(path, shift=0, names=None):
    """Byte-level BPE without merges, filled up with unused pieces to the released number."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = ["<unk>", "<longcat_s>", "</longcat_s>", "<pad>", "<longcat_system>", "<longcat_user>", "<longcat_assistant>", *alphabet]
    text += [f"unused{i}" for i in range(released.FIRST_SPECIAL + shift - len(text))]
    specials = [released.released_name(name) for name in (names or voc.RELEASED_SPECIALS)]
    vocabulary = {token: i for i, token in enumerate(text + specials)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<longcat_s>", "</longcat_s>", "<longcat_system>", "<longcat_user>", "<longcat_assistant>", *specials])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ReleasedTokenizer(write(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def test_names_follow_the_released_spelling():
    assert released.released_name("<img_pad>") == "<longcat_img_pad>"
    assert released.released_name("</img_token_size>") == "</longcat_img_token_size>"
    assert released.released_name("<video_place>") == "<longcat_video_palce>"


def test_a_size_tag_is_seven_ids_for_two_digits_each(tokenizer):
    vocabulary = tokenizer.vocabulary(voc.released(), [(37, 37), (1, 4)])
    tag = vocabulary.size_tag(37, 37)
    assert len(tag) == 7 and tag[0] == 131090 and tag[-1] == 131091
    assert list(tag) == tokenizer.encode_prompt("<longcat_img_token_size>37 37</longcat_img_token_size>")
    assert tokenizer.decode(tag[1:-1]) == "37 37"
    assert vocabulary.img_start == 131106 and vocabulary.audiotext_pad == 131122 and vocabulary.user == 5


def test_a_chat_has_no_separators_and_moves_the_trigger(tokenizer):
    turns = [Message("system", "S"), Message("user", "hi"), Message("assistant", "yes"), {"role": "user", "content": "paint<longcat_img_start>"}]
    assert tokenizer.chat(turns) == ("<longcat_system>S<longcat_user>hi<longcat_assistant>yes</longcat_s><longcat_user>paint"
                                     "<longcat_assistant><longcat_img_start>")  # fmt: skip
    ids = tokenizer.encode_prompt(tokenizer.chat([Message("user", "say it<longcat_audiogen_start>")]))
    assert ids[0] == 5 and ids[-2:] == [6, 131123]
    assert tokenizer.chat(turns[:3], reply=False).endswith("yes</longcat_s>")
    # Inside a turn a tag is content.
    assert tokenizer.chat([Message("user", "<longcat_img_start>x<longcat_img_end>")]).endswith("<longcat_img_end><longcat_assistant>")


def test_text_comes_back(tokenizer):
    text = "Grüße, 世界 <longcat_audio_start>"
    ids = tokenizer.encode_prompt(text)
    assert ids[-1] == 131103 and tokenizer.decode(ids) == text and 1 not in ids
    plain = tokenizer.encode(text)
    assert len(plain) > len(ids) and max(plain) < 131072 and tokenizer.decode(plain) == text
    assert tokenizer.encode_prompt("<audio_start>") == [131103]
    with pytest.raises(InputError, match="unknown special token '<longcat_video>' at character 2"):
        tokenizer.encode_prompt("a <longcat_video>")
    assert tokenizer.encode_prompt("a List<String>") == tokenizer.encode("a List<String>")


def test_other_ids_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="<longcat_img_token_size> is 131091, not 131090"):
        ReleasedTokenizer(write(tmp_path / "shifted.json", shift=1))
    swapped = list(voc.RELEASED_SPECIALS)
    at = swapped.index("<img_end>")
    swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
    with pytest.raises(InputError, match="<longcat_img_end> is 131108, not 131107; <longcat_img_pad> is 131107"):
        ReleasedTokenizer(write(tmp_path / "swapped.json", names=swapped))


def test_bad_files_and_chats_are_named(tokenizer, tmp_path):
    with pytest.raises(InputError, match="no file .*nothing.json"):
        ReleasedTokenizer(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(InputError, match="broken.json' is no tokenizer.json"):
        ReleasedTokenizer(tmp_path / "broken.json")
    with pytest.raises(InputError, match="role 'robot' is not one of"):
        tokenizer.chat([Message("robot", "x"), Message("user", "y")])
    with pytest.raises(InputError, match="a reply follows a user's turn"):
        tokenizer.chat([Message("assistant", "x")])
