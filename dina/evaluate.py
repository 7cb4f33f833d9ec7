"""Scores a trained experiment: `python -m dina.evaluate --config=experiments/X.py[:arg] --workdir=DIR`.

Asks the model held-out questions of every task kind, lets judges that never saw the model decide, measures
reconstruction at several levels and codebook usage, and writes `<workdir>/eval/`:
  <task>.jsonl                  one judged answer a line (fields: dina/eval/scores.py), with `file` where media was kept
  image_reconstruction.jsonl    PSNR and SSIM per picture, levels, refiner
  audio_reconstruction.jsonl    mel distance per clip and levels
  codebooks.json, scores.json   usage; every score, flat: the numbers of report.json
  */*.png, */*.wav              answers, originals and reconstructions for the report's page
Everything is drawn by config.eval.seed, so the same checkpoint gives the same scores. Answers are kept one by one in
`<workdir>/answers` as soon as they are given (dina/eval/answers.py): a job that was killed asks the rest only, and a
finished evaluation of the same model is read, not made again. With --stage, committed checkpoints of an unfinished stage
are scored as well, newest first, each in `<workdir>/scored/<stage>-<step>`; with --watch until that stage is finished.
Exit codes: 0 done, 75 interrupted (run it again), 2 bad input, 1 bug.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import soundfile

from dina import checkpoint, config as configs, metrics as run_metrics, promote
from dina.config import InputError
from dina.data import mnist, phrases, sources
from dina.eval import reconstruction, scores as scoring
from dina.eval.answers import Answers
from dina.eval.digit_judge import DigitJudge, to_crop
from dina.eval.generation import Answer, Generator
from dina.eval.metrics import Score, wilson
from dina.eval.prompts import Prompts, Question
from dina.eval.speech_judge import Clip, PocketSphinx, SpeechJudge
from dina.interrupt import Stopper, abandonable
from dina.train import settle

TASK_VERSION = 1  # raise it when this file or dina/eval asks or judges in another way
ASKED_AT_ONCE = 256  # questions; what a killed job may have to ask again


class Judges:
    """Everybody who decides about answers, fitted on real data only, with their own accuracies in `ceilings`.

    Attributes:
        digits, words, spoken: a digit painter's judge, a judge of all words, and one of the ten digit words.
        sphinx: the second opinion, or None; then `skipped` says why.
    """

    def __init__(self, config, resynthesize):
        pixels, labels = mnist.load()
        split = mnist.split(config.data.mnist, labels)
        self.digits = DigitJudge(pixels[split["train"]], labels[split["train"]])
        judge = sources.load_all(config, "speech", "judge")
        self.words = SpeechJudge(waves_of(judge), judge["word"], config.eval.seed)
        self.spoken = self.words.among(phrases.DIGIT_WORDS)
        self.skipped = ""
        try:
            self.sphinx = PocketSphinx(phrases.DIGIT_WORDS)
        except ImportError as error:
            self.sphinx, self.skipped = None, f"pocketsphinx: not installed (extra 'judges'): {error}"
        self.ceilings = {"digit_judge_accuracy": self.digits.ceiling(pixels[split["test"]], labels[split["test"]])}
        self.ceilings |= self._canvas_ceiling(config) | self._speech_ceilings(config, resynthesize)

    def _canvas_ceiling(self, config) -> dict[str, Score]:
        """The digit judge on real held-out canvases, cropped by their words exactly as painted ones are."""
        test = sources.load_all(config, "images", "test")
        keep = np.flatnonzero(np.asarray(test["aligned"]) == 1)[:700]
        crops = [to_crop(test["image"][i], (test["top"][i], test["left"][i], test["size"][i])) for i in keep]
        right = self.digits.predict(np.array(crops)) == np.asarray(test["digit"])[keep]
        return {"digit_judge_canvas_accuracy": wilson(int(right.sum()), len(right))}

    def _speech_ceilings(self, config, resynthesize) -> dict[str, Score]:
        found = {}
        for name in ("test", "valid"):
            columns = sources.load_all(config, "speech", name)
            clips, digit = waves_of(columns), np.asarray(columns["digit"])
            tens = [i for i in range(len(clips)) if digit[i] >= 0]
            tens_clips, tens_words = [clips[i] for i in tens], [columns["word"][i] for i in tens]
            voices = "" if name == "test" else "_valid_voices"
            found[f"speech_judge_accuracy{voices}"] = self.spoken.ceiling(tens_clips, tens_words)
            if name == "test":
                found["speech_judge_words_accuracy"] = self.words.ceiling(clips, columns["word"])
                again = self.spoken.ceiling(tens_clips[:160], tens_words[:160], resynthesize)
                found["speech_judge_resynthesized_accuracy"] = again
                if self.sphinx is not None:
                    right = [h == w for h, w in zip(self.sphinx.predict(tens_clips), tens_words, strict=True)]
                    found["pocketsphinx_accuracy"] = wilson(sum(right), len(right))
        return found

    def judge(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """One record per answer, as dina/eval/scores.py wants them."""
        clips = [(a.wave, a.rate) for q, a in zip(questions, answers, strict=True) if q.reply == "speech"]
        spoken, words = iter(self.spoken.predict(clips)), iter(self.words.predict(clips))
        second = iter(self.sphinx.predict(clips)) if self.sphinx and clips else None
        records = []
        for question, answer in zip(questions, answers, strict=True):
            record = {"task": question.task, "group": question.group, "prompt": question.prompt, "truth": question.truth,
                      "word": question.word, "answer": answer.text, "extra": {}}
            if question.reply == "text":
                record["predicted"] = scoring.digit_named(answer.text)
                if question.group == "words":
                    record["extra"]["right"] = answer.text.strip() == question.word
                if question.caption is not None:
                    record["caption"] = question.caption
                    said, meant = (scoring.caption_meaning(text) for text in (answer.text, question.caption))
                    record["extra"]["right"] = said == meant
            elif question.reply == "image":
                record["predicted"] = self.digits.judge(answer.image, question.box)
                record |= {"canvas": list(question.canvas), "box": list(question.box)}
            else:
                self._hear(record, question, answer, next(spoken), next(words), next(second) if second else None)
            records.append(record)
        return records

    def _hear(self, record, question, answer, digit_word, word, second) -> None:
        record["predicted"] = phrases.DIGIT_WORDS.index(digit_word)
        record["extra"]["transcript_right"] = answer.text.strip() == question.word
        if question.group == "words":
            record["predicted"], record["heard"] = None, word
            record["extra"]["right"] = word == question.word
        elif self.sphinx is not None:
            record["extra"]["pocketsphinx"] = phrases.DIGIT_WORDS.index(second) if second else None


def waves_of(columns) -> list[Clip]:
    """The 24 kHz clips of speech columns, as the judges take them."""
    return [(np.asarray(wave, np.float32) / 32768, 24000) for wave in columns["audio24"]]


Asked = dict[str, tuple[list[Question], list[Answer]]]


def ask_all(config, generator: Generator, prompts: Prompts, answers: Answers) -> Asked:
    """Asks the questions of every task that have no kept answer; returns task -> (questions, answers)."""
    questions = {task: prompts.questions(task) for task in scoring.TASKS}
    # Requests of all tasks together fill the same few batches and compiled programs.
    everything = [question for part in questions.values() for question in part]
    begun, given, asked = time.time(), [], 0
    for start in range(0, len(everything), ASKED_AT_ONCE):
        part, seed = everything[start : start + ASKED_AT_ONCE], (config.eval.seed + start) % 2**31
        names = [answers.name(question, start + number, seed) for number, question in enumerate(part)]
        found = [answers.get(name) for name in names]
        if any(answer is None for answer in found):
            found, asked = generator.answer(part, seed=seed), asked + len(part)
            for name, answer in zip(names, found, strict=True):
                answers.put(name, answer)
        given += found
    print(f"dina: {asked} of {len(everything)} prompts asked in {time.time() - begun:.0f} s, the others had been before", flush=True)
    replies = iter(given)
    return {task: (part, [next(replies) for _ in part]) for task, part in questions.items()}


def judge_all(config, asked: Asked, judges: Judges, folder: pathlib.Path) -> dict[str, list[dict]]:
    """Judges and writes the answers of every task; returns task -> records."""
    found = {}
    for task, (questions, answers) in asked.items():
        records = judges.judge(questions, answers)
        keep_media(folder / task, questions, answers, records, config.eval.media)
        write_lines(folder / f"{task}.jsonl", records)
        found[task] = records
        shown = ", ".join(f"{key} {s['value']:.3f}" for key, s in scoring.task_scores(task, records).items())
        print(f"dina: {shown}", flush=True)
    return found


def keep_media(folder: pathlib.Path, questions, answers, records, count: int) -> None:
    """Saves what was shown and what came back of the first `count` prompts of each group; names it in the records."""
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, int] = {}
    for index, (question, answer, record) in enumerate(zip(questions, answers, records, strict=True)):
        kept[question.group] = kept.get(question.group, 0) + 1
        if kept[question.group] > count:
            continue
        media = {"shown": (question.image, question.wave, 16000), "file": (answer.image, answer.wave, answer.rate)}
        for field, (image, wave, rate) in media.items():
            name = f"{question.group}_{index:04d}_{field}"
            if image is not None:
                PIL.Image.fromarray(image).save(folder / f"{name}.png")
                record[field] = f"{folder.name}/{name}.png"
            elif wave is not None:
                soundfile.write(folder / f"{name}.wav", wave, rate, subtype="PCM_16")
                record[field] = f"{folder.name}/{name}.wav"


def write_lines(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
    """JSON lines, complete or not there at all."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.replace(path)


def model_digest(config, workdir: pathlib.Path) -> str:
    """A hash over all finished stages and imports in `workdir`: what an evaluation depends on beside its settings."""
    found = hashlib.sha256()
    for name in (*config.get("order", ()), *config.get("imports", {})):
        path = workdir / name / "stage.json"
        found.update(f"{name} ".encode() + (path.read_bytes() if path.is_file() else b"-"))
    return found.hexdigest()


def evaluate(config, workdir: pathlib.Path) -> dict[str, Any]:
    """Scores the trained model of `workdir`; writes `<workdir>/eval/` and returns the scores.

    Raises:
        InputError: a part is not trained yet, the data is not prepared, or the workdir belongs to another config.
    """
    begun, workdir = time.time(), pathlib.Path(workdir)
    folder = workdir / "eval"
    about = f"{TASK_VERSION}/{configs.identity(config)}/{model_digest(config, workdir)}"
    if (scores := finished(folder, about)) is not None:
        print(f"dina: {folder}: this model was scored before", flush=True)
        return scores
    settle(config)  # the compile cache
    generator = Generator(config, workdir)
    if folder.exists():
        shutil.rmtree(folder)  # of an earlier evaluation: the page must not mix two
    folder.mkdir(parents=True)
    images, speech = (sources.load_all(config, kind, "test") for kind in ("images", "speech"))
    # Judges are fitted on one core in the time in which the model answers.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        fitting = pool.submit(Judges, config, generator.resynthesize)
        asked = ask_all(config, generator, Prompts(config.eval, images, speech), Answers(workdir / "answers", about))
        pictures = reconstruction.pictures(config, generator, images, folder)
        clips = reconstruction.clips(config, generator, speech, folder)
        codebooks = reconstruction.codebooks(config, generator, images, speech)
        judges = fitting.result()
    answers = judge_all(config, asked, judges, folder)
    write_lines(folder / "image_reconstruction.jsonl", pictures)
    write_lines(folder / "audio_reconstruction.jsonl", clips)
    (folder / "codebooks.json").write_text(json.dumps(codebooks, indent=1))
    scores = scoring.all_scores(answers, pictures, clips, codebooks, judges.ceilings, config.eval.seed)
    record = {"stage": "eval", "seconds": round(time.time() - begun, 1), "skipped": judges.skipped, "about": about,
              "peak_memory_mib": round(run_metrics.peak_memory_mib())}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    write_lines(folder / "stage.json", [record])  # last: it says that all else is there
    return scores


def finished(folder: pathlib.Path, about: str) -> dict[str, Any] | None:
    """The scores of a finished evaluation of this very model with these settings, or None."""
    try:
        if json.loads((folder / "stage.json").read_text())["about"] == about:
            return json.loads((folder / "scores.json").read_text())
    except (OSError, ValueError, KeyError, TypeError):  # none, unfinished, damaged, or of an earlier version: made again
        pass
    return None


def score_stage(config, workdir: pathlib.Path, stage: str, watch: float = 0.0) -> dict[str, dict]:
    """Scores committed checkpoints of `stage`, newest first, and those that come while it works.

    Args:
        watch: seconds between two looks, until the stage is finished; 0 = until none is left.

    Returns:
        `<stage>-<step>` -> scores. A step that is pruned or damaged meanwhile is said and passed over.
    """
    if stage not in config.stages:
        raise InputError(f"--stage: no stage {stage!r} in this experiment; it has {', '.join(config.stages)}")
    found: dict[str, dict] = {}
    while True:
        left = [name for name in promote.names(workdir / stage) if f"{stage}-{name.step}" not in found]
        if left:
            key, target = f"{stage}-{left[0].step}", workdir / "scored" / f"{stage}-{left[0].step}"
            try:
                promote.promote(workdir, stage, left[0], target)
                found[key] = evaluate(config, target)
            except (InputError, FileNotFoundError) as error:
                if (workdir / stage / "checkpoints" / f"{left[0]}.json").exists() and "is damaged" not in str(error):
                    raise
                print(f"dina: {key} is passed over: {error}", flush=True)
                found[key] = {}
        elif not watch or checkpoint.finished(workdir / stage) is not None:
            return found
        else:
            time.sleep(watch)


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dina.evaluate", description=__doc__)
    parser.add_argument("--config", required=True, help="experiments/X.py[:variant,key=value,...]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--stage", default="", help="score this stage's committed checkpoints too, newest first")
    parser.add_argument("--watch", type=float, default=0.0, help="with --stage: look again after so many seconds until it is finished")
    args = parser.parse_args(argv)
    config = configs.load(args.config)
    with contextlib.closing(Stopper()), abandonable("evaluating"):  # every answer is kept when it is given
        if args.stage:
            scores = score_stage(config, args.workdir, args.stage, args.watch)
        else:
            scores = evaluate(config, args.workdir)
    print(json.dumps({key: s["value"] if isinstance(s, dict) and "value" in s else s for key, s in scores.items()}, indent=1))
    return 0


if __name__ == "__main__":
    configs.run_main(main)
