"""What the tokenizers keep: originals beside reconstructions at several levels, and how evenly codes are used.

Levels are limited by writing -1 (absent) over the later codes, so one compiled program serves every depth.

Letters: U cells or frames; L levels.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import soundfile

from dina.eval import metrics
from dina.eval.generation import Generator
from dina.eval.scores import LEVELS

# Canvases shown on the page: small and large ones, wide and tall ones.
_SHOWN = 8


def first_levels(codes: Sequence[np.ndarray], levels: int) -> list[np.ndarray]:
    """Codes [U, L] with everything after the first `levels` levels absent (-1)."""
    return [np.where(np.arange(code.shape[1]) < levels, code, -1).astype(np.int32) for code in codes]


def depths(levels: int) -> list[int]:
    """The depths to report for a tokenizer of `levels` levels: 1, 2, 4, 8, as far as it has them, and all."""
    return sorted({n for n in LEVELS if n < levels} | {levels})


def pictures(config, generator: Generator, images, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reconstructs held-out pictures at every depth and after the refiner; keeps PNGs of the first few of each size."""
    rng = np.random.default_rng([config.eval.seed, 1])
    chosen = [int(i) for i in rng.permutation(len(images["image"]))[:config.eval.reconstruct_images]]
    truth = [np.asarray(images["image"][i]) for i in chosen]
    codes = generator.image_codes(truth)
    grids = [(image.shape[0] // 28, image.shape[1] // 28) for image in truth]
    settings = [(n, False) for n in depths(codes[0].shape[1])] + [(codes[0].shape[1], True)]
    shown = _spread([image.shape[:2] for image in truth], _SHOWN)
    out = folder / "reconstruction"
    out.mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(shown):
        PIL.Image.fromarray(truth[i]).save(out / f"image_{number:02d}_original.png")
    rows = []
    for levels, refined in settings:
        made = generator.decode_images(first_levels(codes, levels), grids, refined, seed=config.eval.seed)
        for i, (image, original) in enumerate(zip(made, truth, strict=True)):
            rows.append({"index": chosen[i], "size": f"{original.shape[0]}x{original.shape[1]}", "levels": levels,
                         "refined": refined, "psnr_db": metrics.psnr_db(image, original),
                         "ssim": metrics.ssim(image, original)})
            if i in shown:
                name = "refined" if refined else f"level_{levels}"
                PIL.Image.fromarray(image).save(out / f"image_{shown.index(i):02d}_{name}.png")
    return rows


def _spread(sizes: Sequence[tuple[int, int]], count: int) -> list[int]:
    """Indices of `count` pictures, of as many different sizes as there are, small ones first."""
    seen: dict[tuple[int, int], int] = {}
    rank = []
    for index, size in enumerate(sizes):
        seen[size] = seen.get(size, 0) + 1
        rank.append((seen[size], index))
    chosen = [index for _, index in sorted(rank)[:count]]
    return sorted(chosen, key=lambda i: (sizes[i][0] * sizes[i][1], sizes[i]))


def clips(config, generator: Generator, speech, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Mel distance of held-out clips at every depth; keeps WAVs of the first few."""
    rng = np.random.default_rng([config.eval.seed, 2])
    chosen = [int(i) for i in rng.permutation(len(speech["audio16"]))[:config.eval.reconstruct_clips]]
    codes = generator.speech_codes([np.asarray(speech["audio16"][i], np.float32) / 32768 for i in chosen])
    original = [np.asarray(speech["audio24"][i], np.float32) / 32768 for i in chosen]
    out = folder / "reconstruction"
    out.mkdir(parents=True, exist_ok=True)
    shown = min(len(chosen), 4)
    for number in range(shown):
        soundfile.write(out / f"clip_{number:02d}_original.wav", original[number], 24000, subtype="PCM_16")
    rows, top = [], codes[0].shape[1]
    for levels in depths(top):
        for i, sound in enumerate(generator.decode_speech(first_levels(codes, levels), seed=config.eval.seed)):
            distances = generator.mel_distances(sound, original[i])
            rows += [{"index": chosen[i], "word": speech["word"][chosen[i]], "levels": levels, "refined": refined,
                      "mel_l1": distance} for refined, distance in distances.items()]
            if i < shown:
                name = out / f"clip_{i:02d}_level_{levels}.wav"
                soundfile.write(name, sound.wave, generator.rate, subtype="PCM_16")
    return rows


def codebooks(config, generator: Generator, images, speech) -> dict[str, Any]:
    """Usage and perplexity of every level over windows of held-out pictures and clips."""
    rng = np.random.default_rng([config.eval.seed, 3])
    some = lambda column, count: [column[int(i)] for i in rng.permutation(len(column))[:count]]
    seen = np.concatenate(generator.image_codes([np.asarray(x) for x in some(images["image"], config.eval.codebook_images)]))
    waves = some(speech["audio16"], config.eval.codebook_clips)
    heard = np.concatenate(generator.speech_codes([np.asarray(w, np.float32) / 32768 for w in waves]))
    return {"visual": metrics.codebook_statistics(seen, config.vision.quantizer.sizes),
            "audio": metrics.codebook_statistics(heard, config.audio.quantizer.sizes)}
