"""Files of users as spans of codes, and spans of codes as pictures and waves."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dina.audio import detokenizer, features, sound_stream
from dina.audio import tokenizer as audio_tokenizer
from dina.data import sources
from dina.decode import prompts
from dina.grammar import Image, Speech
from dina.vision import detokenize, preprocess
from dina.vision import tokenizer as visual_tokenizer


SEEN = ("vision_encoder", "vision_quantizer", "pixel_decoder", "refiner")


def parts(config) -> tuple[str, ...]:
    """The trained parts of both tokenizers and detokenizers; of pictures those that the experiment's stages train, or all with imports."""
    trained = {pattern.split("/")[0] for stage in config.get("stages", {}).values() for pattern in stage.train}
    seen = [part for part in SEEN if part in trained or not trained or config.get("imports")]
    return *seen, "audio_encoder", *detokenizer.parts(config.audio)


def read_image(config, path: pathlib.Path | str) -> UInt8[np.ndarray, "H W 3"]:
    """An image file at the size at which the model sees it.

    Raises:
        InputError: missing, truncated, tiny or too elongated; the message names the file.
    """
    vision = config.vision
    image = preprocess.open_image(path)
    return preprocess.resize_image(image, vision.patch * vision.merge, vision.min_pixels, vision.max_pixels, str(path))


def read_speech(config, path: pathlib.Path | str) -> Float[np.ndarray, "N"]:
    """A sound file as the speech tokenizer hears it.

    Raises:
        InputError: missing, truncated, silent or too short; the message names the file.
    """
    wave, rate = sources.read_audio(path)
    return features.prepare_wave(wave, rate, config.audio.features, str(path))


class Media:
    """Both tokenizers and detokenizers of a trained experiment.

    Args:
        config: the experiment.
        variables: {'params', 'stats'} with `parts`.
        rows: images or clips of one compiled call.
    """

    def __init__(self, config, variables: Mapping[str, Any], rows: int = 1):
        self.config, self.variables, self.rows = config, variables, rows
        self.rate = config.audio.target.rate

    @functools.cached_property
    def _tokenize(self):
        return audio_tokenizer.make_tokenize(self.config.audio)

    @functools.cached_property
    def _detokenize(self):
        return detokenizer.make_detokenize(self.config.audio)

    def see(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> list[Image]:
        """Images (from `read_image`) as spans that are shown to the model."""
        vision, spans = self.config.vision, []
        for start in range(0, len(images), self.rows):
            part = [[image] for image in images[start : start + self.rows]]
            part += [[]] * (self.rows - len(part))
            shape = vision.pack.cells, vision.pack.images, vision.encoder.window_cells
            packs = [preprocess.pack_images(row, *shape) for row in part]
            batch = {name: np.stack([pack[name] for pack in packs]) for name in packs[0]}
            codes_BNL = np.asarray(visual_tokenizer.tokenize(vision, self.variables, batch))
            for codes_NL, row in zip(codes_BNL, part, strict=True):
                for image in row:
                    h, w = (side // preprocess.CELL for side in image.shape[:2])
                    spans.append(prompts.shown(codes_NL[: h * w], (h, w)))
        return spans

    def hear(self, waves: Sequence[Float[np.ndarray, "N"]]) -> list[Speech]:
        """Waves (from `read_speech`) as spans that the model hears."""
        params, stats = self.variables["params"], self.variables["stats"]
        codes = audio_tokenizer.tokenize_waves(self._tokenize, self.config.audio, params, stats, waves, self.rows)
        return [Speech(np.asarray(clip, np.int32)) for clip in codes]

    def paint(self, images: Sequence[Image], seed: int = 0, refine: str = "flow") -> list[UInt8[np.ndarray, "H W 3"]]:
        """Pictures of painted spans."""
        codes, grids = [image.codes for image in images], [(image.h, image.w) for image in images]
        how = dict(seed=seed, refine=refine, rows=self.rows)
        return detokenize.detokenize(self.config.vision, self.variables, codes, grids, **how)

    def sound(self, spoken: Sequence[Speech], seed: int = 0) -> list[Float[np.ndarray, "N"]]:
        """Waves at `rate` Hz of spoken spans; speech longer than one chunk is decoded in pieces."""
        longest = sound_stream.longest_piece(self.config.audio)
        pieces = [sound_stream.pieces(s.codes, longest) for s in spoken]
        params, stats = self.variables["params"], self.variables["stats"]
        flat = [piece for parts in pieces for piece in parts]
        parts = self.config.audio, params, stats
        waves = iter(detokenizer.detokenize_codes(self._detokenize, *parts, flat, seed, self.rows))
        return [sound_stream.join_pieces([next(waves) for _ in clip], self.config.audio) for clip in pieces]
