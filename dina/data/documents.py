"""The mixture: document number n of a stage, from code shards and the written grammar.

A document is a short conversation of one of eight kinds (phrases.KINDS). Which kind, which records, which wording,
which delay: everything is a function of (seed, stream, n) alone, so any document can be made at any time by anybody; kinds
come in exactly the shares that the mixture gives them. Only training records come in, and no picture that is held out is ever a target.
"""

from __future__ import annotations

import bisect
import typing
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from dina.config import InputError, check_name
from dina.data import phrases
from dina.data.codes import CodeTable
from dina.data.draws import Draws
from dina.grammar import Document, Image, Speech, Text, Vocabulary, cost, draw_delay

KINDS = phrases.KINDS
_ASKS = ("digit", "caption", "other")


def default_options() -> ml_collections.ConfigDict:
    """Fields of a language stage's `options` that say what its documents are.

    `mixture`: weight of each kind, as a share of the documents or of their positions (`mixture_of`). `asks`: weights of what is asked about an image (its digit, a caption, anything
    else). `dropout`: share of text→image and text→speech documents without prompt, which guidance needs.
    `digit_share`: share of words that are digits where any word will do. `noisy_share`: of heard speech.
    `plain_tokens`: longest piece of plain text. Of recordings alone: `voice_share` of text→speech is asked for in the voice of
    another clip, which the system turn plays; `segments_share` of it is two recordings, each a spoken segment of its own.
    """
    return ml_collections.ConfigDict({
        "mixture": dict.fromkeys(KINDS, 1.0), "mixture_of": "documents", "asks": {"digit": 0.6, "caption": 0.2, "other": 0.2},
        "dropout": 0.1, "digit_share": 0.6, "noisy_share": 0.5, "plain_tokens": 48, "voice_share": 0.0, "segments_share": 0.0,
    })


class Sample(typing.NamedTuple):
    """One document and its kind, an index into KINDS."""

    kind: int
    document: Document


class Documents:
    """The endless list of documents of one stage.

    Args:
        options: of `default_options`.
        seed: (seed, stream) or any integers; documents are a function of them and their number.
        vocabulary: with size tags.
        encode: text to ids.
        images, speech: code tables; None only if no kind with weight needs them.
        texts: plain text records.

    Raises:
        InputError: a kind is unknown or has no data; the message names the config key.
    """

    def __init__(self, options: ml_collections.ConfigDict, seed: Sequence[int], vocabulary: Vocabulary,
                 encode: Callable[[str], Sequence[int]], images: CodeTable | None, speech: CodeTable | None,
                 texts: Sequence[str] = ()):
        self.options, self.v = options, vocabulary
        self.images, self.speech = images, speech
        self._encode, self._ids = encode, {}
        self._user, self._end = self.text("", before=(vocabulary.user,)), self.text("", loss=True, after=(vocabulary.eos,))
        self._draws = Draws(seed)
        self._ask_ends = ends(options.asks, _ASKS, "options.asks")
        self._index_images()
        self._index_speech()
        self._texts = [np.array([*encode(text), vocabulary.eos], np.int32) for text in texts]
        self._makers = [getattr(self, f"_{kind}") for kind in KINDS]
        self._check()
        self._kind_ends = kind_ends(self, options, vocabulary)

    def _index_images(self) -> None:
        self._shown = self._painted = np.zeros(0, np.int64)
        if self.images is None:
            return
        f = self.images.fields
        self._image = [dict(zip(("h", "w", "digit", "size", "top", "left"), row, strict=True)) for row in
                       zip(*(f[name].tolist() for name in ("h", "w", "digit", "size", "top", "left")), strict=True)]
        self._shown = np.arange(len(self.images))
        # An arbitrary offset has no words, so no prompt can ask for it.
        known = [aligned == 1 and not phrases.is_held_out(r["digit"], (r["h"], r["w"]))
                 for aligned, r in zip(f["aligned"], self._image, strict=True)]
        self._painted = np.flatnonzero(known)
        self._painted_of = [self._painted[f["digit"][self._painted] == digit] for digit in range(10)]

    def _index_speech(self) -> None:
        self._clean: dict[str, np.ndarray] = {}
        self._noisy: dict[str, np.ndarray] = {}
        if self.speech is None:
            return
        words, noisy = np.array(self.speech.fields["word"]), self.speech.fields["noisy"]
        for word in np.unique(words):
            for pool, flag in ((self._clean, 0), (self._noisy, 1)):
                records = np.flatnonzero((words == word) & (noisy == flag))
                if len(records):
                    pool[str(word)] = records
        self._digits = [word for word in phrases.DIGIT_WORDS if word in self._clean]
        self._others = [word for word in self._clean if word not in phrases.DIGIT_WORDS]

    def _check(self) -> None:
        wanted = {kind for kind in KINDS if self.options.mixture.get(kind, 0) > 0}
        pictures, sounds = {k for k in wanted if "image" in k}, {k for k in wanted if "speech" in k}
        both = wanted & {"conversation"}
        if pictures | both and not (len(self._shown) and len(self._painted)):
            raise InputError(f"options.mixture asks for {min(pictures | both)}, but there are no image codes to show"
                             " and to paint")
        if sounds | both and not self._clean:
            raise InputError(f"options.mixture asks for {min(sounds | both)}, but there are no speech codes")
        missing = [w for w in phrases.DIGIT_WORDS if w not in self._clean]
        if missing and wanted & {"image_to_speech", "speech_to_image", "conversation"}:
            raise InputError(f"speech codes have no clip of {', '.join(missing)}, which options.mixture needs")
        unpainted = [d for d in range(10) if len(self._painted) and not len(self._painted_of[d])]
        if unpainted and both:
            raise InputError(f"image codes have no aligned picture of digit {unpainted[0]}, which conversations need")
        if "plain_text" in wanted and not self._texts:
            raise InputError("options.mixture asks for plain_text, but there are no texts")

    def __call__(self, number: int) -> Sample:
        """Document `number` >= 0."""
        return self.of_kind(kind_of(self._kind_ends, self._draws, number), number)

    def of_kind(self, kind: int, number: int) -> Sample:
        """Document `number` if it were of this kind."""
        return Sample(kind, self._makers[kind](self._draws.at(number)))

    # Parts of documents.

    def text(self, text: str, loss: bool = False, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Text:
        """A text span, ids cached; `before` and `after` are ids around it."""
        key = text, before, after
        if key not in self._ids:
            self._ids[key] = np.array([*before, *(self._encode(text) if text else ()), *after], np.int32)
        return Text(self._ids[key], loss)

    def _ask(self, text: str) -> Text:
        """The user's words after what is shown, and the assistant's tag."""
        return self.text(text, after=(self.v.assistant,))

    def _answer(self, text: str) -> Text:
        return self.text(text, loss=True, after=(self.v.eos,))

    def _prompted(self, text: str) -> Text:
        return self.text(text, before=(self.v.user,), after=(self.v.assistant,))

    def _record(self, record: int) -> dict:
        """Fields as the functions of `phrases` take them."""
        r = self._image[record]
        return {"canvas": (r["h"], r["w"]), "size": r["size"], "top": r["top"], "left": r["left"], "digit": r["digit"]}

    def _picture(self, record: int, target: bool) -> Image:
        r = self._image[record]
        return Image(self.images.codes(record), r["h"], r["w"], target)

    def _word(self, rng) -> str:
        a_digit = rng.random() < self.options.digit_share
        return pick(self._digits if (a_digit and self._digits) or not self._others else self._others, rng)

    def _hear(self, word: str, rng) -> Speech:
        noisy = rng.random() < self.options.noisy_share
        pool = self._noisy if noisy and word in self._noisy else self._clean
        return Speech(self.speech.codes(pick(pool[word], rng)))

    def _say(self, word: str, rng) -> Speech:
        codes, ids = self.speech.codes(pick(self._clean[word], rng)), self.text(word).ids
        return Speech(codes, ids, True, draw_delay(len(ids), len(codes), rng))

    # One function a kind.

    def _image_to_text(self, rng) -> Document:
        record = pick(self._shown, rng)
        about, variant = self._record(record), int(rng.integers(36))
        ask = _ASKS[bisect.bisect_right(self._ask_ends, rng.random())]
        if ask == "caption":
            question, answer = pick(phrases.ASK_CAPTION, rng), phrases.caption(**about, variant=0)
        elif ask == "digit":
            question, answer = pick(phrases.ASK_DIGIT, rng), phrases.DIGIT_WORDS[about["digit"]]
        else:
            question, answer = pick(phrases.questions(**about, variant=variant)[1:], rng)
        return self._user, self._picture(record, False), self._ask(question), self._answer(answer)

    def _text_to_image(self, rng) -> Document:
        record = pick(self._painted, rng)
        words = phrases.caption(**self._record(record), variant=int(rng.integers(36)))
        ask = phrases.instruction("text_to_image", rng, caption=words)
        return (*self._unless_dropped(ask, rng), self._picture(record, True), self._end)

    def _speech_to_text(self, rng) -> Document:
        word = self._word(rng)
        ask = phrases.instruction("speech_to_text", rng)
        return self._user, self._hear(word, rng), self._ask(ask), self._answer(word)

    def _text_to_speech(self, rng) -> Document:
        word = self._word(rng)
        ask = phrases.instruction("text_to_speech", rng, word=word)
        return (*self._unless_dropped(ask, rng), self._say(word, rng), self._end)

    def _unless_dropped(self, ask: str, rng) -> Document:
        """The prompt, or nothing: guidance's unconditional form is what follows the prompt alone (decode/guidance.py)."""
        return () if rng.random() < self.options.dropout else (self._prompted(ask),)

    def _image_to_speech(self, rng) -> Document:
        record = pick(self._shown, rng)
        ask = phrases.instruction("image_to_speech", rng)
        word = phrases.DIGIT_WORDS[self._image[record]["digit"]]
        return self._user, self._picture(record, False), self._ask(ask), self._say(word, rng), self._end

    def _speech_to_image(self, rng) -> Document:
        record = pick(self._painted, rng)
        about = self._record(record)
        word = phrases.DIGIT_WORDS[about.pop("digit")]
        ask = phrases.instruction("speech_to_image", rng, request=phrases.request(**about))
        return self._user, self._hear(word, rng), self._ask(ask), self._picture(record, True), self._end

    def _plain_text(self, rng) -> Document:
        ids, longest = pick(self._texts, rng), self.options.plain_tokens
        first = int(rng.integers(len(ids) - longest + 1)) if len(ids) > longest else 0
        return (Text(ids[first : first + longest], True),)

    def _conversation(self, rng) -> Document:
        shown = pick(self._shown, rng)
        digit = self._image[shown]["digit"]
        painted = pick(self._painted_of[digit], rng)
        turns = phrases.conversation(**self._record(painted), rng=rng)
        if rng.random() < 0.5:
            del turns[1 + int(rng.integers(2))]
        spans: list = []
        for turn in turns:
            spans += [self._user, self._picture(shown, False), self._ask(turn["user"])] if turn["show"] == "image" \
                else [self._prompted(turn["user"])]
            if turn["reply"] == "text":
                spans.append(self._answer(turn["text"]))
            else:
                reply = self._say(turn["text"], rng) if turn["reply"] == "speech" else self._picture(painted, True)
                spans += [reply, self._end]
        return tuple(spans)


def kind_ends(made, options: ml_collections.ConfigDict, vocabulary: Vocabulary, looked_at: int = 64) -> list[float]:
    """Cumulated shares of the kinds among documents, by `options.mixture` and `options.mixture_of`.

    Args:
        made: has `of_kind`; where the mixture is one of positions, the first `looked_at` documents of a kind tell its mean length.
    """
    check_name(options.mixture_of, ("documents", "positions"), "options.mixture_of")
    of_documents = ends(options.mixture, KINDS, "options.mixture")
    if options.mixture_of == "documents":
        return of_documents
    length = lambda kind: np.mean([cost(made.of_kind(kind, n).document, vocabulary).positions for n in range(looked_at)])
    weights = {name: options.mixture[name] / length(kind) for kind, name in enumerate(KINDS) if options.mixture.get(name, 0) > 0}
    return ends(ml_collections.ConfigDict(weights), KINDS, "options.mixture")


def kind_of(kind_ends: Sequence[float], draws: Draws, number: int) -> int:
    """The kind of document `number`: of any first N documents each kind has its share of N, within a few documents."""
    return min(bisect.bisect_right(kind_ends, draws.even(number)), len(kind_ends) - 1)


def pick(items: Sequence, rng: np.random.Generator):
    """One of some items, each as likely."""
    return items[int(rng.random() * len(items))]


def ends(weights: ml_collections.ConfigDict, names: Sequence[str], key: str) -> list[float]:
    """Cumulated shares of `names`, by a config section name -> weight."""
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise InputError(f"{key}.{unknown[0]}: must be one of {', '.join(names)}")
    shares = np.array([float(weights.get(name, 0)) for name in names])
    if (shares < 0).any() or not shares.sum() > 0:
        raise InputError(f"{key}: weights must be >= 0 and not all zero, they are {shares.tolist()}")
    ends = np.cumsum(shares) / shares.sum()
    # The last kind of weight > 0 ends at exactly 1, so that rounding never draws one of weight 0.
    ends[np.flatnonzero(shares)[-1] :] = 1.0
    return ends.tolist()
