"""Text to ids and back: SentencePiece, plus the special tokens of the grammar.

Ids [0, vocab_size) are pieces (0 unknown, 1 begin, 2 end, 3 padding; bytes as a fallback, so nothing is unknown);
specials lie above and are the grammar's business: their names, of the form `<name>` or `</name>`, are passed in.
"""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import ml_collections
import sentencepiece

from dina.config import InputError

UNK, BOS, EOS, PAD = 0, 1, 2, 3
_SPECIAL = re.compile(r"</?[A-Za-z][A-Za-z0-9_]*>")


def default_config() -> ml_collections.ConfigDict:
    """Rows of the text vocabulary (byte pieces included) and SentencePiece's algorithm, 'unigram' or 'bpe'."""
    return ml_collections.ConfigDict({"vocab_size": 512, "algorithm": "unigram"})


def train_tokenizer(texts: Iterable[str], path: pathlib.Path | str, vocab_size: int = 512,
                    algorithm: str = "unigram") -> None:
    """Trains a SentencePiece model on `texts` and writes it to `path`; the same texts give the same file.

    Args:
        texts: training sentences; repeats count.
        path: model file to write.
        vocab_size: exact number of ids, of which 256 are bytes and 4 control.
        algorithm: 'unigram' or 'bpe'.

    Raises:
        InputError: the texts do not allow that vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, model_type=algorithm,
            byte_fallback=True, unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=PAD, character_coverage=1.0,
            # One thread and no shuffling: the result must not depend on the machine.
            num_threads=1, shuffle_input_sentence=False, normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=4096, minloglevel=2)
    except (RuntimeError, OSError) as error:
        raise InputError(f"config key text.vocab_size: no {algorithm} tokenizer of {vocab_size} pieces"
                         f" can be trained on this corpus ({str(error).splitlines()[-1]})") from None
    pathlib.Path(path).write_bytes(model.getvalue())


class TextTokenizer:
    """A trained model and the special tokens that prompts may hold.

    Args:
        path: model file of `train_tokenizer`.
        specials: name -> id of the special tokens, or their names in order from `vocab_size` on.

    Raises:
        InputError: the file is missing or is no SentencePiece model.
    """

    def __init__(self, path: pathlib.Path | str, specials: Mapping[str, int] | Sequence[str] = ()) -> None:
        path = pathlib.Path(path)
        if not path.is_file():
            raise InputError(f"text tokenizer: no model file {str(path)!r}; preparing the data makes it")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError:
            raise InputError(f"text tokenizer: {str(path)!r} is not a SentencePiece model") from None
        self.vocab_size: int = self._model.vocab_size()
        if not isinstance(specials, Mapping):
            specials = {name: self.vocab_size + i for i, name in enumerate(specials)}
        self.specials: dict[str, int] = dict(specials)
        self._names = {number: name for name, number in self.specials.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: training data may hold anything, so `<name>` is text like any other."""
        return self._model.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a user's prompt, in which `<name>` is a special token.

        Raises:
            InputError: a special token that the grammar does not know.
        """
        ids, start = [], 0
        for match in _SPECIAL.finditer(text):
            name = match.group()
            if name not in self.specials:
                known = ", ".join(self.specials) or "none"
                raise InputError(f"prompt: unknown special token {name!r} at character {match.start()}; known: {known}")
            ids += self.encode(text[start:match.start()]) + [self.specials[name]]
            start = match.end()
        return ids + self.encode(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; specials come back as their names, control pieces as nothing, other ids above as '<id>'."""
        parts, run = [], []
        for number in (int(number) for number in ids):
            if number < self.vocab_size:
                run.append(number)
                continue
            parts += [self._model.decode(run), self._names.get(number, f"<{number}>")]
            run = []
        return "".join([*parts, self._model.decode(run)])

    def piece(self, text: str) -> int | None:
        """The id of `text` if it is a single piece at the start of a word, else None."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None
