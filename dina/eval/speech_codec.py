"""Scores a speech tokenizer as a codec: `python -m dina.eval.speech_codec --config=experiments/X.py --workdir=DIR`.

Held-out clips of split 'test', none longer than a chunk, go to codes and back at several depths, beside Opus, Speex and Codec2, and
beside themselves ('original': the judges' ceiling). A judge that is not installed (extra `judges`) is named and left out.
Writes to `<workdir>/eval/`:
  clips.jsonl      one line a clip and codec: index, source, language, text, seconds, codec ('dina', 'original', 'opus_6000', ...),
                   levels, kbps (of codes, whole bits; of coded frames without the file's headers), mel_l1, and of the judges that
                   are there pesq, stoi, speaker, of some clips ovrl, sig, bak, p808, of some English ones heard_whisper and
                   heard_sphinx; `file` where one was kept
  sounds/          kept originals and reconstructions, 16 kHz
  codebooks.json   usage and perplexity of every level over the codes of these clips
  scores.json      mean of every score of every codec with its interval, word error rates, and the protocol of each number

Letters: N samples, L levels.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import soundfile

from dina import config as configs, metrics as run_metrics, stages
from dina.audio import detokenizer, features, tokenizer
from dina.config import InputError
from dina.data import audio_files, cache, sources
from dina.eval import metrics, speech_coders, speech_scores, words
from dina.eval.codec import command, spread, write
from dina.eval.protocol import Protocol

LEVELS = (1, 2, 4, 8)
CLIPS = 72  # most clips, evenly over the languages; those for the recognisers come on top
# Recognisers take 1 s of a processor a clip, DNSMOS 2 s, and there are nine codecs and depths.
HEARD = 40  # most English clips, for the recognisers
RATED = 24  # most clips for DNSMOS, evenly over all
RATE = 16_000
_SHORTEST = 0.7  # seconds: the judges hear nothing in less
_SHOWN = 8  # clips whose sounds are kept
_SHIFT = 0.06  # seconds by which a codec may be late or early
_SEED = 0


def align(original_N: np.ndarray, wave_N: np.ndarray) -> np.ndarray:
    """The wave moved by up to `_SHIFT` so that its loudness follows the original's: codecs look ahead, and judges compare samples."""
    step, most = RATE // 1000, round(_SHIFT * 1000)
    # 20 ms: longer than a period of any voice, so that loudness and not phase decides.
    smooth = lambda x: np.convolve(np.abs(x), np.ones(RATE // 50) / (RATE // 50), "same")[::step]
    size = max(len(original_N), len(wave_N))
    one, other = (smooth(np.pad(x, (0, size - len(x)))) for x in (original_N, wave_N))
    one, other = one - one.mean(), np.pad(other - other.mean(), most)
    fit = [float(one @ other[shift : shift + len(one)]) for shift in range(2 * most + 1)]
    late = (int(np.argmax(fit)) - most) * step
    return wave_N[late:] if late > 0 else np.concatenate([np.zeros(-late, wave_N.dtype), wave_N])


def mel_l1(original_N: np.ndarray, wave_N: np.ndarray, recon) -> float:
    """Nepers between the ln mels (`audio.recon`) of two waves of one length."""
    # Whole seconds, so that clips of all lengths are few programs.
    mel = lambda x: np.asarray(features.ln_mel(np.pad(x, (0, -len(x) % RATE))[None], recon))[0][: len(x) // recon.hop]
    return metrics.mel_l1(mel(wave_N), mel(original_N))


def read(config, split: str = "test") -> list[dict[str, Any]]:
    """The clips to score, as records with `wave` (float32, 16 kHz) and `index`.

    At most `CLIPS` of all languages, then English ones up to `HEARD`; the same ones at every call.
    """
    source, f = sources.open_source(config, "speech", split), config.audio.features
    if source.notes is None:
        raise InputError("config section data: these scores need a data set of clips with transcripts (dina/data/clips.py)")
    fits = [i for i, note in enumerate(source.notes) if _SHORTEST * f.rate <= note["samples16"] <= f.max_frames * f.hop]
    by_language: dict[str, list[int]] = {}
    for i in np.random.default_rng(_SEED).permutation(len(fits)):
        by_language.setdefault(source.notes[fits[i]]["language"], []).append(fits[i])
    turns = [(turn, language) for language, own in by_language.items() for turn in range(len(own))]
    chosen = [by_language[language][turn] for turn, language in sorted(turns)[:CLIPS]]
    chosen += [i for i in by_language.get("en", []) if _english(source.notes[i])][:HEARD]
    found = []
    for index in dict.fromkeys(chosen):
        record = source[index]
        found.append(record | {"index": index, "wave": record["audio16"].astype(np.float32) / 32767})
    if not found:
        raise InputError(f"config section data: split {split!r} has no clip of {_SHORTEST} s to {f.max_frames * f.hop / f.rate:g} s")
    return found


def _english(record: dict[str, Any]) -> bool:
    """Whether recognisers can be asked for its words: pieces of a longer recording have none."""
    return record["language"] == "en" and bool(words.normal(record["text"]))


class Judges:
    """All judges that are there; what is not is printed once, with what to do.

    Attributes:
        against: score -> (original, wave) -> number.
        alone: scores of a wave by itself: wave -> {score: number}, or None.
        listeners: name -> recogniser.
        protocols: score -> what it was made with.
    """

    def __init__(self, data_dir: pathlib.Path, recon):
        package = speech_scores.version
        self.against: dict[str, Callable] = {"mel_l1": lambda one, other: mel_l1(one, other, recon)}
        self.alone, self.listeners, self.left_out = None, {}, []
        self.protocols = {"mel_l1": ("ln mel, audio.recon", "")}
        for name, judge in (("pesq", "pesq"), ("stoi", "pystoi")):
            if self._there(judge, lambda judge=judge: speech_scores.need(judge)):
                self.against[name] = getattr(speech_scores, name)
                self.protocols[name] = (f"{package(judge)}, {'wide band' if name == 'pesq' else 'not extended'}", "")
        similarity = self._there("speaker", lambda: speech_scores.speaker_judge(data_dir))
        if similarity:
            self.against["speaker"] = similarity
            weights = speech_scores.speaker.PACKAGE
            self.protocols["speaker"] = (f"cosine, {weights.name} {weights.version}, its pauses kept", weights.sha256[:16])
        if self._there("speechmos", lambda: speech_scores.need("speechmos")):
            self.alone = speech_scores.dnsmos
            self.protocols |= dict.fromkeys(("ovrl", "sig", "bak", "p808"), (package("speechmos"), ""))
        for name, listener in (("whisper", speech_scores.Whisper), ("sphinx", speech_scores.Sphinx)):
            made = self._there(name, listener)
            if made:
                self.listeners[name] = made
                self.protocols[f"wer_{name}"] = (f"word error rate, normaliser {words.NORMALISER}", made.name)

    def _there(self, name: str, make: Callable):
        try:
            return make()
        except InputError as error:
            print(f"dina: speech: left out: {name}: {error}", flush=True)
            self.left_out.append(name)
            return None

    def scores(self, original: np.ndarray, wave: np.ndarray, rate: bool) -> dict[str, float]:
        """All numbers of one clip, those of DNSMOS if `rate`; not finite ones are left out."""
        found = {name: judge(original, wave) for name, judge in self.against.items()}
        found |= self.alone(wave) if self.alone and rate else {}
        return {name: round(value, 5) for name, value in found.items() if math.isfinite(value)}


class Measured:
    """Scores as they are made: `rows` for clips.jsonl, `scores` for scores.json."""

    def __init__(self, records: Sequence[dict[str, Any]], judges: Judges, folder: pathlib.Path):
        self.records, self.judges, self.folder = records, judges, folder
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, Any] = {}
        self.shown, self.rated = spread(len(records), _SHOWN), spread(len(records), RATED)
        self.reference = cache.key([record["source"] for record in records])

    def add(self, codec: str, levels: int, made: Sequence[np.ndarray], sizes: Sequence[float]) -> None:
        """Scores what a codec made of all clips.

        Args:
            codec, levels: its name, and how many levels of codes (0 if it has none).
            made: waves at 16 kHz.
            sizes: bits of each.
        """
        rows, english = [], [i for i, record in enumerate(self.records) if _english(record)][:HEARD]
        for i, (record, wave, bits) in enumerate(zip(self.records, made, sizes, strict=True)):
            original = record["wave"]
            wave = wave if codec == "original" else align(original, wave)
            wave = np.clip(speech_scores.same_length(original, wave, 1)[1], -1, 1)
            row = {name: record[name] for name in ("index", "source", "language", "text")}
            row |= {"seconds": round(len(original) / RATE, 3), "codec": codec, "levels": levels,
                    "kbps": round(bits / len(original) * RATE / 1000, 4)}
            row |= self.judges.scores(original, wave, i in self.rated)
            if i in self.shown:
                row["file"] = self._keep(i, f"{codec}_{levels}", wave)
            rows.append(row)
            made[i] = wave
        for name, listener in self.judges.listeners.items() if english else ():
            heard = listener.transcribe([made[i] for i in english])
            for i, text in zip(english, heard, strict=True):
                rows[i][f"heard_{name}"] = text
            self._score(f"wer_{name}", codec, levels, words.error_rate([self.records[i]["text"] for i in english], heard, _SEED))
        for name in sorted({name for row in rows for name in row} & set(self.judges.protocols)):
            self._score(name, codec, levels, metrics.bootstrap([row[name] for row in rows if name in row], _SEED))
        self.scores[f"kbps_{codec}_{levels}"] = float(sum(sizes) / sum(len(r["wave"]) for r in self.records) * RATE / 1000)
        self.rows += rows
        print(f"dina: speech: {codec} {levels or ''} done", flush=True)

    def _score(self, name: str, codec: str, levels: int, score: dict) -> None:
        metric, network = self.judges.protocols[name]
        protocol = Protocol(metric, self.reference, "16 kHz soxr HQ, aligned by loudness", network, _SEED)
        self.scores[f"{name}_{codec}_{levels}"] = protocol.stamp(score)

    def _keep(self, index: int, name: str, wave: np.ndarray) -> str:
        path = pathlib.Path("sounds") / f"{index:04d}_{name}.wav"
        (self.folder / "sounds").mkdir(parents=True, exist_ok=True)
        soundfile.write(self.folder / path, audio_files.to_int16(wave), RATE)
        return str(path)


def evaluate(config, workdir: pathlib.Path) -> None:
    """Measures the workdir's tokenizer and writes everything.

    Raises:
        InputError: a stage is not finished, the data is not prepared, or has no fitting clip in split 'test'.
    """
    begun, folder, audio = time.time(), workdir / "eval", config.audio
    parts = ["audio_encoder", *detokenizer.parts(audio)]
    params, stats = stages.load_parts(config, workdir, parts)
    records = read(config)
    measured = Measured(records, Judges(cache.directory(config), audio.recon), folder)
    waves = [record["wave"] for record in records]
    measured.add("original", 0, list(waves), [16.0 * len(wave) for wave in waves])
    codes = tokenizer.tokenize_waves(tokenizer.make_tokenize(audio), audio, params, stats, waves)
    bits_L = np.cumsum([math.ceil(math.log2(size)) for size in audio.quantizer.sizes])
    detokenize = detokenizer.make_detokenize(audio)
    for levels in sorted({n for n in LEVELS if n < len(bits_L)} | {len(bits_L)}):
        # Levels that are left out are absent codes: one compiled program serves all depths.
        some = [np.where(np.arange(len(bits_L)) < levels, code, -1) for code in codes]
        made = detokenizer.detokenize_codes(detokenize, audio, params, stats, some)
        made = [audio_files.resample(np.asarray(wave, np.float32), audio.target.rate, RATE) for wave in made]
        measured.add("dina", levels, made, [float(len(code) * bits_L[levels - 1]) for code in codes])
    try:
        others = speech_coders.coders(cache.directory(config))
    except InputError as error:
        print(f"dina: speech: left out: Codec2 and Speex: {error}", flush=True)
        others = {"opus_6000": lambda wave: speech_coders.opus(wave, 6000)}
    for name, coder in others.items():
        try:
            coded = [coder(wave) for wave in waves]
        except InputError as error:
            print(f"dina: speech: left out: {name}: {error}", flush=True)
            continue
        measured.add(name, 0, [one.wave for one in coded], [8.0 * one.payload_bytes for one in coded])
    health = {"audio": metrics.codebook_statistics(np.concatenate(codes), audio.quantizer.sizes)}
    write(folder / "codebooks.json", json.dumps(health, indent=1))
    write(folder / "clips.jsonl", "\n".join(json.dumps(row) for row in measured.rows) + "\n")
    write(folder / "scores.json", json.dumps(measured.scores, indent=1))
    record = {"seconds": round(time.time() - begun, 1), "peak_memory_mib": round(run_metrics.peak_memory_mib()), "skipped": ", ".join(measured.judges.left_out)}
    write(folder / "stage.json", json.dumps(record, indent=1))
    print(table(measured.scores), flush=True)


def table(scores: dict[str, Any]) -> str:
    """The scores as lines: one a codec, one column a score."""
    names = ("wer_whisper", "wer_sphinx", "stoi", "pesq", "speaker", "ovrl", "mel_l1")
    lines = [f"{'codec':14}{'kbps':>8}" + "".join(f"{name:>13}" for name in names)]
    for key in (key for key in scores if key.startswith("kbps_")):
        codec = key.removeprefix("kbps_")
        cells = [f"{scores[f'{name}_{codec}']['value']:13.3f}" if f"{name}_{codec}" in scores else f"{'-':>13}" for name in names]
        lines.append(f"{codec:14}{scores[key]:8.2f}" + "".join(cells))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line."""
    return command(argv, "python -m dina.eval.speech_codec", __doc__, evaluate)


if __name__ == "__main__":
    configs.run_main(main)
