"""The released text tokenizer: its `tokenizer.json`, the ids of its special tokens, and the layout of a chat.

Source: reference/backbone.md §5.1, §5.2. Nothing is added that the caller did not write: no begin token, no separators.
The specials' ids are asserted when the file is opened, because a port that shifts one by one still looks plausible.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence

import ml_collections

from dina.config import InputError
from dina.grammar.vocabulary import RELEASED_SPECIALS, Vocabulary

FIRST_SPECIAL = 131072
# In the file every name has this after its opening bracket, and one of them is misspelt.
PREFIX = "longcat_"
MISSPELT = {"<video_place>": "<longcat_video_palce>"}
CONTROL = {"<longcat_s>": 1, "</longcat_s>": 2}
ALGORITHM = "released"  # config.text.algorithm of an experiment that uses this tokenizer
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9_]*>")
ROLES = ("<system>", "<user>", "<assistant>")
# What no source names is not asserted; the grammar never writes these.
UNNAMED = tuple(name for name in RELEASED_SPECIALS if name.startswith(("<mask_", "<reserved_", "<video_")))
# A user's turn that ends with one of these asks for a picture or speech: the tag moves behind the assistant's mark.
TRIGGERS = ("<longcat_img_start>", "<longcat_audiogen_start>")


def released_name(name: str) -> str:
    """The file's name of one of the grammar's special tokens: '<img_pad>' is '<longcat_img_pad>'."""
    bracket = "</" if name.startswith("</") else "<"
    return MISSPELT.get(name, f"{bracket}{PREFIX}{name[len(bracket):]}")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat: role 'system', 'user' or 'assistant'."""

    role: str
    content: str


class ReleasedTokenizer:
    """An opened `tokenizer.json`.

    Raises:
        InputError: the package or the file is missing, the file is no tokenizer, or a special token has another id.
    """

    def __init__(self, path: pathlib.Path | str):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise InputError(f"text tokenizer: no file {str(self.path)!r}; the released checkpoint has one")
        import tokenizers  # a second to load, and only for released checkpoints

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the package raises plain Exception
            raise InputError(f"text tokenizer: {str(self.path)!r} is no tokenizer.json ({error})") from None
        self._check()

    def _check(self) -> None:
        wanted = {released_name(name): FIRST_SPECIAL + i for i, name in enumerate(RELEASED_SPECIALS) if name not in UNNAMED}
        wrong = [f"{name} is {self._tokenizer.token_to_id(name)}, not {number}" for name, number in (wanted | CONTROL).items()
                 if self._tokenizer.token_to_id(name) != number]
        for role in ROLES:
            number = self._tokenizer.token_to_id(released_name(role))
            if number is None or number >= FIRST_SPECIAL:
                wrong.append(f"{released_name(role)} is {number}, not a text id below {FIRST_SPECIAL}")
        if wrong:
            raise InputError(f"text tokenizer: {self.path}: special tokens have other ids than the released model's: {'; '.join(wrong[:8])}")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: training data may hold anything, so a special token's name is text like any other."""
        return self._encode(text, specials_are_text=True)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of text in which special tokens are written by their released names, or by the grammar's.

        Raises:
            InputError: a tag that begins as theirs and is none; any other one is text, as code has them.
        """
        for match in _TAG.finditer(text):
            name = match.group()
            if PREFIX in name and self._tokenizer.token_to_id(name) is None:
                raise InputError(f"prompt: unknown special token {name!r} at character {match.start()}; known: {', '.join(RELEASED_SPECIALS)}")
        return self._encode(_TAG.sub(lambda match: self._spelt(match.group()), text), specials_are_text=False)

    @staticmethod
    def _spelt(name: str) -> str:
        return released_name(name) if name in (*RELEASED_SPECIALS, *ROLES) else name

    def _encode(self, text: str, specials_are_text: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = specials_are_text
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def roles(self) -> tuple[int, ...]:
        """Ids of the marks of system, user and assistant."""
        return tuple(self._tokenizer.token_to_id(released_name(role)) for role in ROLES)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens as their names."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def vocabulary(self, base: Vocabulary, grids: Sequence[tuple[int, int]]) -> Vocabulary:
        """`base` with the role tags' ids and the size tags of `grids` as this tokenizer writes them.

        Raises:
            InputError: a size tag is not its brackets, one id for every digit, and one for the space (backbone.md §5.1).
        """
        made = dataclasses.replace(base, named=tuple(zip(ROLES, self.roles(), strict=True))).with_sizes(self.encode, grids)
        for h, w in made.size_ids:
            tag, ids = f"{h} {w}", list(made.size_tag(h, w))
            whole = self.encode_prompt(released_name("<img_token_size>") + tag + released_name("</img_token_size>"))
            if whole != ids or len(ids) != len(tag) + 2:
                raise InputError(f"text tokenizer: {self.path}: the size tag of {tag!r} is {whole}, not its brackets around {len(tag)} ids")
        return made

    def chat(self, messages: Sequence[Message | Mapping[str, str]], reply: bool = True) -> str:
        """The chat as the released template writes it, for `encode_prompt`.

        Args:
            messages: turns; an assistant's turn ends with the end token.
            reply: ends with the assistant's mark, and with the trigger that the last user turn asked with.

        Raises:
            InputError: an unknown role, or a reply wanted after anything but a user's turn.
        """
        turns = [m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in messages]
        if reply and (not turns or turns[-1].role != "user"):
            raise InputError("chat: a reply follows a user's turn")
        parts, trigger = [], ""
        for number, turn in enumerate(turns):
            if f"<{turn.role}>" not in ROLES:
                raise InputError(f"chat: role {turn.role!r} is not one of system, user, assistant")
            content = turn.content
            if reply and number == len(turns) - 1:
                trigger = next((tag for tag in TRIGGERS if content.endswith(tag)), "")
                content = content.removesuffix(trigger) if trigger else content
            parts.append(released_name(f"<{turn.role}>") + content + ("</longcat_s>" if turn.role == "assistant" else ""))
        return "".join(parts) + (released_name("<assistant>") + trigger if reply else "")


def text_config(path: pathlib.Path | str, vocab_size: int = FIRST_SPECIAL, row_multiple: int = 1024) -> ml_collections.ConfigDict:
    """`config.text` of an experiment whose text is that of a `tokenizer.json`.

    Args:
        path: the file; what it holds belongs to the experiment's identity, where it lies does not.
        vocab_size: text ids.
        row_multiple: of the joint table's stored rows.

    Raises:
        InputError: as `ReleasedTokenizer`.
    """
    roles, content = ReleasedTokenizer(path).roles(), pathlib.Path(path).read_bytes()
    return ml_collections.ConfigDict({
        "algorithm": ALGORITHM, "vocab_size": vocab_size, "path": str(path), "sha256": hashlib.sha256(content).hexdigest(),
        "roles": roles, "row_multiple": row_multiple,
    })  # fmt: skip
