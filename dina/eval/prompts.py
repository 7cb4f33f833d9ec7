"""What the evaluation asks: held-out pictures, clips of unseen voices and captions, drawn by a seed, with the truth.

Every prompt is a `Question`: what the user shows and says, in which form the answer comes back, and how it is judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from dina.audio.augment import add_noise, add_room
from dina.data import phrases
from dina.eval.speech_judge import RATE

# The 'noisy' rows: 0.3 s of reverberation at a quarter of the energy, then pink noise 10 dB below the speech.
_ROOM_SECONDS, _ROOM_WET, _NOISE_DB, _NOISE_SLOPE = 0.3, 0.25, 10.0, 1.0


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        task: one of scores.TASKS.
        group: one of scores.SUFFIX.
        prompt: the user's text.
        truth: digit, -1 for other words.
        word: the word that the answer should say or name.
        reply: 'text', 'image' or 'speech'.
        image: uint8 [H, W, 3] shown, or None.
        wave: float 16 kHz heard, or None.
        canvas: (rows, cols) in cells of a picture to paint, or None.
        box: (top, left, size) in pixels where its digit must stand, or None.
        caption: the right caption, where one is asked for.
    """

    task: str
    group: str
    prompt: str
    truth: int
    word: str
    reply: str
    image: np.ndarray | None = None
    wave: np.ndarray | None = None
    canvas: tuple[int, int] | None = None
    box: tuple[int, int, int] | None = None
    caption: str | None = None


def default_config() -> ml_collections.ConfigDict:
    """`config.eval`: seed, prompts per task and group (at most what is held out), windows, how answers are sampled."""
    return ml_collections.ConfigDict({
        "seed": 11,
        "image_to_text": {"main": 600, "any_offset": 150, "new_size": 150, "caption": 150},
        "speech_to_text": {"main": 400, "noisy": 150, "words": 300},
        "text_to_image": {"main": 300, "new_size": 100},
        "text_to_speech": {"main": 240, "words": 60},
        "image_to_speech": {"main": 150, "any_offset": 30},
        "speech_to_image": {"main": 200},
        "reconstruct_images": 240, "reconstruct_clips": 24,
        "codebook_images": 1400, "codebook_clips": 1024,  # windows of the usage and perplexity
        # Rows of a batch, unguided ones included; prompt and reply positions are rounded up to `step`: the longest of
        # either is below 48 here, so one compiled program serves all tasks.
        "rows": 128, "step": 48,
        # Text is the likeliest one; codes at temperature 1 are too wild: levels 2 to 8 stay near 4 nats.
        "sampling": {"text": {"temperature": 0.0}, "visual": {"temperature": 0.6}, "audio": {"temperature": 0.6},
                     "image_guidance": 1.25, "speech_guidance": 1.0},
        "refine": "flow",  # painted pictures: 'flow' passes the refiner, 'none' is the pixel decoder's
        "media": 16,  # pictures and clips of each kind that are kept for the page
    })


Columns = Mapping[str, Any]


class Prompts:
    """Draws questions from held-out records.

    Args:
        config: `config.eval`.
        images, speech: columns of the test split (dina/data/sources.py `load_all`).
    """

    def __init__(self, config: ml_collections.ConfigDict, images: Columns, speech: Columns):
        self.config, self.images, self.speech = config, images, speech
        canvases = [(image.shape[0] // phrases.CELL, image.shape[1] // phrases.CELL) for image in images["image"]]
        new = np.array([phrases.is_held_out(d, c) for d, c in zip(images["digit"], canvases, strict=True)])
        aligned = np.asarray(images["aligned"]) == 1
        self.canvases = canvases
        self.picture_groups = {"main": np.flatnonzero(aligned & ~new), "new_size": np.flatnonzero(aligned & new),
                               "any_offset": np.flatnonzero(~aligned)}
        digit = np.asarray(speech["digit"])
        self.clip_groups = {"main": np.flatnonzero(digit >= 0), "words": np.flatnonzero(digit < 0)}

    def questions(self, task: str) -> list[Question]:
        """All questions of a task, in a fixed order; the same seed gives the same list."""
        rng = np.random.default_rng([self.config.seed, sum(map(ord, task))])
        return [question for group, count in self.config[task].items()
                for question in getattr(self, f"_{task}")(group, count, rng)]

    def pictures(self, group: str, count: int, rng: np.random.Generator) -> list[int]:
        """Indices of held-out pictures of a group; fewer if there are fewer."""
        return [int(i) for i in rng.permutation(self.picture_groups[group])[:count]]

    def clips(self, group: str, count: int, rng: np.random.Generator) -> list[int]:
        """Indices of clips of unseen voices: digit words ('main') or others ('words')."""
        return [int(i) for i in rng.permutation(self.clip_groups[group])[:count]]

    def wave(self, index: int) -> np.ndarray:
        """A clip as float at 16 kHz."""
        return np.asarray(self.speech["audio16"][index], np.float32) / 32768

    def _place(self, i: int) -> dict[str, Any]:
        names = ("size", "top", "left")
        return {"canvas": self.canvases[i]} | {name: int(self.images[name][i]) for name in names}

    def _image_to_text(self, group, count, rng):
        for i in self.pictures("main" if group == "caption" else group, count, rng):
            digit = int(self.images["digit"][i])
            shown = dict(task="image_to_text", truth=digit, word=phrases.DIGIT_WORDS[digit], reply="text",
                         image=self.images["image"][i])
            if group == "caption":
                prompt = phrases.ASK_CAPTION[rng.integers(len(phrases.ASK_CAPTION))]
                yield Question(group="caption", prompt=prompt, caption=phrases.caption(digit=digit, **self._place(i)), **shown)
            else:
                yield Question(group=group, prompt=phrases.ASK_DIGIT[rng.integers(len(phrases.ASK_DIGIT))], **shown)

    def _speech_to_text(self, group, count, rng):
        for i in self.clips("words" if group == "words" else "main", count, rng):
            wave = self.wave(i)
            if group == "noisy":
                wave = add_room(rng, wave, _ROOM_SECONDS, RATE, _ROOM_WET)
                wave = np.clip(add_noise(rng, wave, _NOISE_DB, _NOISE_SLOPE), -1, 1)
            yield Question("speech_to_text", group, phrases.instruction("speech_to_text", rng),
                           int(self.speech["digit"][i]), self.speech["word"][i], "text", wave=wave)

    def _text_to_image(self, group, count, rng):
        for i in self.pictures(group, count, rng):
            digit, place = int(self.images["digit"][i]), self._place(i)
            caption = phrases.caption(digit=digit, variant=int(rng.integers(4)), **place)
            yield Question("text_to_image", group, phrases.instruction("text_to_image", rng, caption=caption), digit,
                           phrases.DIGIT_WORDS[digit], "image", canvas=place["canvas"], box=named_box(**place))

    def _text_to_speech(self, group, count, rng):
        known = phrases.OTHER_WORDS if group == "words" else phrases.DIGIT_WORDS
        for word in (known[int(i)] for i in rng.permutation(np.arange(count) % len(known))):
            yield Question("text_to_speech", group, phrases.instruction("text_to_speech", rng, word=word),
                           known.index(word) if group == "main" else -1, word, "speech")

    def _image_to_speech(self, group, count, rng):
        for i in self.pictures(group, count, rng):
            digit = int(self.images["digit"][i])
            yield Question("image_to_speech", group, phrases.instruction("image_to_speech", rng), digit,
                           phrases.DIGIT_WORDS[digit], "speech", image=self.images["image"][i])

    def _speech_to_image(self, group, count, rng):
        clips = self.clips("main", count, rng)
        for i, clip in zip(self.pictures(group, len(clips), rng), clips, strict=False):
            digit, place = int(self.speech["digit"][clip]), self._place(i)
            prompt = phrases.instruction("speech_to_image", rng, request=phrases.request(**place))
            yield Question("speech_to_image", group, prompt, digit, phrases.DIGIT_WORDS[digit], "image",
                           wave=self.wave(clip), canvas=place["canvas"], box=named_box(**place))


def named_box(canvas: tuple[int, int], size: int, top: int, left: int) -> tuple[int, int, int]:
    """The box that the words of a placement name, read back from the words."""
    named = phrases.words(canvas, size, top, left)
    if named is None:
        raise ValueError(f"placement {size} px at {top}, {left} has no words on canvas {canvas}")
    return phrases.box(canvas, *named)
