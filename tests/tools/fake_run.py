"""A workdir as a finished run leaves it, from synthetic numbers and media: what the report's tests and eyes need."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import PIL.Image
import soundfile

from dina.data import phrases
from dina.eval import metrics, scores

STAGES = {"V0": ("align", ("text", "cells", "pixels")), "V1": ("visual_tokens", ("commit", "cosine")),
          "A1": ("audio_tokens", ("mel", "word")), "sft": ("language", ("text", "visual", "audio"))}


def write(workdir: pathlib.Path, count: int = 24) -> pathlib.Path:
    """Writes a whole run of `count` answers per task and group; returns `workdir`."""
    rng = np.random.default_rng(0)
    _stages(workdir, rng)
    folder = workdir / "eval"
    answers = {task: _answers(folder, task, count, rng) for task in scores.TASKS}
    pictures, clips = _pictures(folder, rng), _clips(folder, rng)
    codebooks = {"visual": metrics.codebook_statistics(rng.integers(0, 256, (3000, 8)), (256,) * 8),
                 "audio": metrics.codebook_statistics(rng.integers(0, 256, (900, 4)), (512, 384, 256, 256))}
    judges = {"digit_judge_canvas_accuracy": metrics.wilson(686, 700), "speech_judge_accuracy": metrics.wilson(399, 400)}
    found = scores.all_scores(answers, pictures, clips, codebooks, judges, 0)
    for name, lines in [*answers.items(), ("image_reconstruction", pictures), ("audio_reconstruction", clips)]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "codebooks.json").write_text(json.dumps(codebooks))
    (folder / "scores.json").write_text(json.dumps(found))
    (folder / "stage.json").write_text(json.dumps({"seconds": 61.0, "peak_memory_mib": 2100, "skipped": ""}))
    (workdir / "demo.json").write_text(json.dumps({"data": 20.0, "tokenizers": 310.0, "language": 420.0, "evaluate": 62.0}))
    return workdir


def _stages(workdir: pathlib.Path, rng) -> None:
    for number, (name, (task, terms)) in enumerate(STAGES.items()):
        folder = workdir / name
        folder.mkdir(parents=True)
        lines = []
        for step in range(10, 610, 10):
            fall = np.exp(-step / 150)
            values = {f"loss/{t}": (i + 1) * (0.2 + 2 * fall) * rng.uniform(0.9, 1.1) for i, t in enumerate(terms)}
            lines.append({"step": step, "time": step / 10, "loss": sum(values.values()), "grad_norm": 1 + fall,
                          "digit_accuracy": min(1.0, 1 - 0.9 * fall * rng.uniform(0.8, 1.2))} | values)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        record = {"stage": name, "task": task, "steps": 600, "examples": 14400, "seconds": 60.0 + 40 * number, "peak_memory_mib": 1500 + 100 * number,
                  "parameters": {f"part_{name}": 400_000 * (number + 1)}, "trained_parameters": 300_000 * (number + 1)}
        (folder / "stage.json").write_text(json.dumps(record))


def _canvas(rng, canvas, box, digit: int) -> np.ndarray:
    """A canvas with a few strokes in the box."""
    pixels = np.zeros((28 * canvas[0], 28 * canvas[1], 3), np.uint8)
    top, left, size = box
    stroke = max(2, size // 9)
    for k in range(1 + digit % 4):
        row = top + size // 6 + k * size // 5
        pixels[row:row + stroke, left + size // 5:left + size - size // 5] = 230
    pixels[top + size // 8:top + size - size // 8, left + size // 2:left + size // 2 + stroke] = 255
    return np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)


def _wave(rng, digit: int, rate: int = 24000) -> np.ndarray:
    t = np.arange(int(0.5 * rate)) / rate
    tone = sum(np.sin(2 * np.pi * (140 + 20 * digit) * h * t) / h for h in range(1, 12))
    return (0.2 * tone * np.hanning(len(t)) + rng.normal(0, 0.003, len(t))).astype(np.float32)


def _answers(folder: pathlib.Path, task: str, count: int, rng) -> list[dict]:
    (folder / task).mkdir(parents=True)
    groups = {"image_to_text": ("main", "any_offset", "caption"), "speech_to_text": ("main", "noisy", "words"),
              "text_to_image": ("main", "new_size"), "text_to_speech": ("main", "words")}.get(task, ("main",))
    lines = []
    for group in groups:
        for index in range(count):
            lines.append(_answer(folder, task, group, index, rng))
    return lines


def _answer(folder: pathlib.Path, task: str, group: str, index: int, rng) -> dict:
    digit = int(rng.integers(10))
    canvas = phrases.CANVASES[index % len(phrases.CANVASES)]
    size, top, left = phrases.placements(canvas)[index % len(phrases.placements(canvas))]
    word = phrases.OTHER_WORDS[index] if group == "words" else phrases.DIGIT_WORDS[digit]
    predicted = digit if rng.random() < 0.92 else (None if task == "image_to_text" else int(rng.integers(10)))
    right = predicted == digit
    place = dict(canvas=canvas, digit=digit, size=size, top=top, left=left)
    record = {"task": task, "group": group, "truth": -1 if group == "words" else digit, "word": word, "predicted": predicted,
              "prompt": "draw " + phrases.caption(**place) if task == "text_to_image" else f"say {word}",
              "answer": word if right else "garden", "extra": {}}
    if group in ("words", "caption"):
        record["extra"]["right"] = right
    if group == "caption":
        record["caption"] = phrases.caption(**place)
    if group == "words":
        record["heard"] = record["answer"]
    if task.endswith("_speech") and group != "words":
        record["extra"]["pocketsphinx"] = predicted
    if task.endswith("_image"):
        record |= {"canvas": list(canvas), "box": [top, left, size]}
    if index < 16:
        source, _, target = task.split("_")
        for field, kind in (("shown", source), ("file", target)):
            name = f"{task}/{group}_{index:04d}_{field}"
            if kind == "image":
                PIL.Image.fromarray(_canvas(rng, canvas, (top, left, size), digit)).save(folder / f"{name}.png")
                record[field] = f"{name}.png"
            elif kind == "speech":
                soundfile.write(folder / f"{name}.wav", _wave(rng, digit), 24000)
                record[field] = f"{name}.wav"
    return record


def _pictures(folder: pathlib.Path, rng) -> list[dict]:
    out = folder / "reconstruction"
    out.mkdir(parents=True)
    rows = []
    for index, canvas in enumerate(phrases.CANVASES):
        size, top, left = phrases.placements(canvas)[-1]
        original = _canvas(rng, canvas, (top, left, size), index % 10)
        if index < 8:
            PIL.Image.fromarray(original).save(out / f"image_{index:02d}_original.png")
        for levels, refined in ((1, False), (2, False), (4, False), (8, False), (8, True)):
            noise = 60 / levels ** 0.5 * (0.7 if refined else 1)
            made = np.clip(original + rng.normal(0, noise, original.shape), 0, 255).astype(np.uint8)
            if index < 8:
                PIL.Image.fromarray(made).save(out / f"image_{index:02d}_{'refined' if refined else f'level_{levels}'}.png")
            rows.append({"index": index, "size": f"{original.shape[0]}x{original.shape[1]}", "levels": levels, "refined": refined,
                         "psnr_db": metrics.psnr_db(made, original), "ssim": metrics.ssim(made, original)})
    return rows


def _clips(folder: pathlib.Path, rng) -> list[dict]:
    out, rows = folder / "reconstruction", []
    for index in range(3):
        wave = _wave(rng, index)
        soundfile.write(out / f"clip_{index:02d}_original.wav", wave, 24000)
        for levels in (1, 2, 4, 8):
            made = wave + rng.normal(0, 0.1 / levels, len(wave))
            soundfile.write(out / f"clip_{index:02d}_level_{levels}.wav", np.clip(made, -1, 1), 24000)
            rows += [{"index": index, "word": "one", "levels": levels, "refined": refined, "mel_l1": 1.0 / levels + 0.05 * refined}
                     for refined in (False, True)]
    return rows
