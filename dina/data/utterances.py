"""The mixture of recordings: document number n of a stage, from code shards of transcribed speech and of the pictures it describes.

Kinds are those of documents.py, so packs and metrics are the same: speech to its transcript and back, a picture to its caption
and back (a picture's words are the transcripts of its recordings, in any of their languages), a picture to speech about it
and back, transcripts alone; a conversation is a triple: a picture, its caption in text, then the same caption spoken. Speech
may be asked for in the voice of a clip that the system turn plays, and may be two segments, two recordings of one speaker. Which
kind, which recording, which delay: a function of (seed, stream, n) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from dina.config import InputError
from dina.data.codes import CodeTable
from dina.data.documents import KINDS, Sample, kind_ends, kind_of, pick
from dina.data.draws import Draws
from dina.grammar import Document, Image, Speech, Text, Vocabulary, draw_delay

# {text}: what is said; {language}: its two-letter code, left out with its words where it is not known.
ASKS = {
    "speech_to_text": ("what was said", "write what you hear"),
    "text_to_speech": ("say in {language}: {text}", "speak {language}: {text}"),
    "image_to_text": ("what is it in {language}", "describe it in {language}"),
    "text_to_image": ("paint {text}", "draw {text}"),
    "image_to_speech": ("say in {language} what you see", "speak {language}: what is it"),
    "speech_to_image": ("paint it", "draw what you hear"),
}
VOICE = "answer in the voice of this clip"  # of the system turn, before the clip
PICTURED = ("image_to_text", "text_to_image", "image_to_speech", "speech_to_image", "conversation")


class Utterances:
    """The endless list of documents of one stage; like `documents.Documents`.

    Args:
        options: of `documents.default_options`; `asks` and `digit_share` say nothing here.
        seed: (seed, stream) or any integers; documents are a function of them and their number.
        vocabulary: with size tags.
        encode: text to ids.
        speech: code table with the fields text, language, picture and noisy.
        images: code table with the field source, which a recording's `picture` names; None without pictures.

    Raises:
        InputError: a kind is unknown or has no data; the message names the config key.
    """

    def __init__(self, options: ml_collections.ConfigDict, seed: Sequence[int], vocabulary: Vocabulary,
                 encode: Callable[[str], Sequence[int]], speech: CodeTable, images: CodeTable | None = None):
        self.options, self.v, self._encode, self._draws = options, vocabulary, encode, Draws(seed)
        missing = {"text", "language", "picture", "noisy"} - set(speech.fields)
        if missing:
            raise InputError(f"speech codes have no field {min(missing)!r}: they are not of transcribed recordings; tokenise those")
        self.speech, self.images = speech, images
        texts, noisy = speech.fields["text"], speech.fields["noisy"]
        self._clean = np.array([i for i, text in enumerate(texts) if text and not noisy[i]], np.int64)
        self._noisy = {int(speech.fields["record"][i]): i for i in np.flatnonzero(noisy)}
        numbers = {source: i for i, source in enumerate(images.fields["source"])} if images else {}
        self._picture = {int(i): numbers[speech.fields["picture"][i]] for i in self._clean if speech.fields["picture"][i] in numbers}
        self._pictured = np.array(list(self._picture), np.int64)
        self._own: dict[str, list[int]] = {}  # clean recordings of each speaker who is known
        for i in self._clean if "speaker" in speech.fields else ():
            if speech.fields["speaker"][i]:
                self._own.setdefault(speech.fields["speaker"][i], []).append(int(i))
        wanted = [kind for kind in KINDS if options.mixture.get(kind, 0) > 0]
        for kind in wanted:
            if not len(self._pictured if kind in PICTURED else self._clean):
                what = "recordings of pictures that have codes" if kind in PICTURED else "transcribed recordings"
                raise InputError(f"options.mixture asks for {kind}, but there are no {what}")
        self._user, self._end = self._ids("", before=[vocabulary.user]), self._ids("", True, after=[vocabulary.eos])
        self._kind_ends = kind_ends(self, options, vocabulary)

    def __call__(self, number: int) -> Sample:
        """Document `number` >= 0."""
        return self.of_kind(kind_of(self._kind_ends, self._draws, number), number)

    def of_kind(self, kind: int, number: int) -> Sample:
        """Document `number` if it were of this kind."""
        rng, name = self._draws.at(number), KINDS[kind]
        record = int(pick(self._pictured if name in PICTURED else self._clean, rng))
        return Sample(kind, getattr(self, f"_{name}")(record, rng))

    def _ids(self, text: str, loss: bool = False, before: Sequence[int] = (), after: Sequence[int] = ()) -> Text:
        return Text(np.array([*before, *(self._encode(text) if text else ()), *after], np.int32), loss)

    def _ask(self, kind: str, record: int, rng) -> str:
        form, fields = pick(ASKS[kind], rng), self.speech.fields
        if "{language}" in form and not fields["language"][record]:
            form = "say: {text}" if "{text}" in form else "describe it" if kind == "image_to_text" else "say what you see"
        return form.format(text=fields["text"][record], language=fields["language"][record])

    def _shown(self, span, ask: str) -> Document:
        """What the user shows and says, up to the assistant's tag."""
        return self._user, span, self._ids(ask, after=[self.v.assistant])

    def _prompt(self, ask: str, rng) -> Document:
        """The prompt, or nothing for the share that guidance needs."""
        dropped = rng.random() < self.options.dropout
        return () if dropped else (self._ids(ask, before=[self.v.user], after=[self.v.assistant]),)

    def _answer(self, record: int) -> Text:
        return self._ids(self.speech.fields["text"][record], True, after=[self.v.eos])

    def _hear(self, record: int, rng) -> Speech:
        noisy = rng.random() < self.options.noisy_share
        heard = self._noisy.get(int(self.speech.fields["record"][record]), record) if noisy else record
        return Speech(self.speech.codes(heard))

    def _say(self, record: int, rng) -> Speech:
        codes, ids = self.speech.codes(record), self._ids(self.speech.fields["text"][record]).ids
        return Speech(codes, ids, True, draw_delay(len(ids), len(codes), rng))

    def _see(self, record: int, target: bool = False) -> Image:
        number = self._picture[record]
        return Image(self.images.codes(number), int(self.images.fields["h"][number]), int(self.images.fields["w"][number]), target)

    def _speech_to_text(self, record: int, rng) -> Document:
        return *self._shown(self._hear(record, rng), self._ask("speech_to_text", record, rng)), self._answer(record)

    def _text_to_speech(self, record: int, rng) -> Document:
        asked, said = self._ask("text_to_speech", record, rng), [record]
        next_ = self._another(record, self.options.segments_share, rng)
        if next_ is not None:
            asked, said = f"{asked} {self.speech.fields['text'][next_]}", [record, next_]
        prompt = self._prompt(asked, rng)
        voice = self._another(record, self.options.voice_share, rng) if prompt else None
        if voice is not None:
            prompt = self._ids(VOICE, before=[self.v.system]), Speech(self.speech.codes(voice)), *prompt
        return *prompt, *(self._say(one, rng) for one in said), self._end

    def _another(self, record: int, share: float, rng) -> int | None:
        """Another recording of the same speaker, for `share` of the calls, where there is one."""
        if not share or rng.random() >= share:
            return None
        own = self._own.get(self.speech.fields["speaker"][record], [record])
        found = pick(own, rng)
        return found if found != record else None

    def _image_to_text(self, record: int, rng) -> Document:
        return *self._shown(self._see(record), self._ask("image_to_text", record, rng)), self._answer(record)

    def _text_to_image(self, record: int, rng) -> Document:
        return *self._prompt(self._ask("text_to_image", record, rng), rng), self._see(record, True), self._end

    def _image_to_speech(self, record: int, rng) -> Document:
        return *self._shown(self._see(record), self._ask("image_to_speech", record, rng)), self._say(record, rng), self._end

    def _speech_to_image(self, record: int, rng) -> Document:
        return *self._shown(self._hear(record, rng), self._ask("speech_to_image", record, rng)), self._see(record, True), self._end

    def _plain_text(self, record: int, rng) -> Document:
        del rng
        return (Text(self._answer(record).ids[: self.options.plain_tokens], True),)

    def _conversation(self, record: int, rng) -> Document:
        again = self._ids("say it", before=[self.v.user], after=[self.v.assistant])
        return *self._image_to_text(record, rng), again, self._say(record, rng), self._end


def sentences(texts: Sequence[str], languages: Sequence[str]) -> list[str]:
    """What a text tokenizer of recordings is trained on: all transcripts, and every prompt in every language."""
    forms = [form for kind in ASKS.values() for form in kind] + ["say it", VOICE]
    asked = {form.format(text="", language=language).strip() for form in forms for language in languages}
    return [*texts, *sorted(asked)]
