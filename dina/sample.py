"""Asks a trained experiment: text, images (PNG) and speech (WAV) in and out.

One prompt, a file of prompts, or a conversation:
  python -m dina.sample --config=FILE --workdir=DIR --prompt='paint a small seven at the top left' --size=2x3
  python -m dina.sample --config=FILE --workdir=DIR --prompt='which digit is it' --image=in.png
  python -m dina.sample --config=FILE --workdir=DIR --prompt='say the word river' --reply=speech [--voice=in.wav] [--delay=0]
  python -m dina.sample --config=FILE --workdir=DIR --prompt='say the word river' --reply=speech --stream=>(aplay -t raw -f S16_LE -r 24000)
  python -m dina.sample --config=FILE --workdir=DIR --prompts=FILE.jsonl --out=DIR
  python -m dina.sample --config=FILE --workdir=DIR --interactive
A line of FILE.jsonl is an object with `prompt` and any of `image`, `speech`, `voice`, `reply`, `size`, `seed`, `guidance`. In a
conversation, /image PATH, /speech PATH, /voice PATH, /size HxW, /reply KIND and /seed N say what goes with the next prompt, /new
forgets the turns before, /quit ends. Text is printed, pictures and waves are written to --out (default
DIR/samples). Everything given is checked before the model is loaded. --stream writes speech as raw samples while it is made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dina import config as configs
from dina import model as model_lib
from dina import stages
from dina.config import InputError
from dina.audio.sound_stream import SoundStream
from dina.data import audio_files, packing, utterances
from dina.decode import batching, guidance, media, prompts, streaming
from dina.grammar import Document, Image, Speech, Text, rules
from dina.interrupt import Stopper, abandonable
from dina.train import settle

SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "repetition": float}
TRIGGERS = {"<img_start>": "image", "<audiogen_start>": "speech"}
OPTIONS = {"image_guidance": "guidance", "speech_guidance": "speech_guidance"}  # of config.eval.sampling
ROLES = ("<system>", "<user>", "<assistant>")


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt as the user gave it; `where` names it in errors."""

    prompt: str = ""
    image: str = ""
    speech: str = ""
    voice: str = ""
    reply: str = ""
    size: str = ""
    seed: int | None = None
    guidance: float | None = None
    where: str = "--prompt"


@dataclasses.dataclass(frozen=True)
class Checked:
    """An ask whose every part exists and fits."""

    ids: list[int]
    pixels: np.ndarray | None
    wave: np.ndarray | None
    voice: np.ndarray | None
    reply: str
    grid: tuple[int, int] | None
    seed: int
    guidance: float


class Desk:
    """Checks asks with the vocabulary alone, then answers them with the trained parts, which are loaded once.

    Args:
        config: the experiment.
        workdir: its folder.
        options: command-line options.
    """

    def __init__(self, config, workdir: pathlib.Path, options: argparse.Namespace):
        self.config, self.workdir, self.options = config, workdir, options
        self.vocabulary, self.tokenizer = packing.open_vocabulary(config)
        self.frames = config.audio.features.max_frames // (2 * config.audio.bridge.pool)
        self.how = {}
        sampling = config.eval.sampling  # what the command line leaves open, the experiment's evaluation says
        for name in ("image_guidance", "speech_guidance"):
            if getattr(options, OPTIONS[name]) is None:
                setattr(options, OPTIONS[name], float(sampling[name]))
        options.refine = options.refine or config.eval.refine
        for head in batching.HEADS:
            given = {name: getattr(options, f"{head}_{name}") for name in SETTINGS}
            self.how[head] = sampling[head].to_dict() | {name: value for name, value in given.items() if value is not None}
        batching.check(self._request(prompts.build(self.vocabulary), options.seed, 0, options.guidance))
        self._loaded: tuple[streaming.Generator, media.Media] | None = None
        self._sound: SoundStream | None = None

    def check(self, ask: Ask) -> Checked:
        """Reads files and ids. Raises InputError, naming the ask, for anything that cannot be answered."""
        seed = self.options.seed if ask.seed is None else ask.seed
        try:
            batching.check_seed(seed)
            text, reply = ask.prompt.rstrip(), ask.reply
            for token, kind in TRIGGERS.items():
                if text.endswith(token):
                    text, reply = text.removesuffix(token).rstrip(), reply or kind
            reply = reply or ("image" if ask.size else "text")
            ids = self.tokenizer.encode_prompt(text)
            closed = {number: name for name, number in self.vocabulary.ids.items() if name not in ROLES}
            typed = [closed[i] for i in ids if i in closed]
            if typed:
                raise InputError(
                    f"special token {typed[0]!r} cannot be typed inside a prompt: show files with image and speech,"
                    " choose the reply with reply and size"
                )
            grid = parse_size(ask.size) if ask.size else None
            if grid is not None and reply != "image":
                raise InputError(f"size {ask.size} given for a {reply} reply")
            prompts.build(self.vocabulary, ids, reply=reply, grid=grid)
            self._refuse_untrained(ask, reply)
            pixels = media.read_image(self.config, ask.image) if ask.image else None
            wave, voice = (media.read_speech(self.config, path) if path else None for path in (ask.speech, ask.voice))
        except InputError as error:
            raise InputError(f"{ask.where}: {error}") from None
        guidance = self.options.guidance if ask.guidance is None else ask.guidance
        return Checked(ids, pixels, wave, voice, reply, grid, seed, guidance)

    def _refuse_untrained(self, ask: Ask, reply: str) -> None:
        there = media.parts(self.config)
        needed = {"vision_quantizer": bool(ask.image), "pixel_decoder": reply == "image", "refiner": reply == "image" and self.options.refine == "flow"}
        for part, wanted in needed.items():
            if wanted and part not in there:
                raise InputError(f"this needs the trained part {part}, which no stage of the experiment trains")

    def answer(self, asks: Sequence[Checked], before: Document = ()) -> list[tuple[prompts.Prompt, batching.Reply]]:
        """Prompts and replies, in order; `before` are earlier turns."""
        generate, _ = self._parts(len(asks))
        made = self._prompts(asks, before)
        pairs = enumerate(zip(made, asks, strict=True))
        requests = [self._request(prompt, ask.seed, number, ask.guidance) for number, (prompt, ask) in pairs]
        return list(zip(made, generate(requests), strict=True))

    def stream(self, ask: Checked) -> Iterator[streaming.Spoken]:
        """A spoken reply while it is made, with the samples that `answer` would give."""
        generate, tools = self._parts(1)
        if self._sound is None:
            self._sound = SoundStream(self.config.audio, tools.variables["params"], tools.variables["stats"], ask.seed)
        (prompt,) = self._prompts([ask])
        yield from streaming.speak(generate, self._request(prompt, ask.seed, 0, ask.guidance), self._sound)

    def _prompts(self, asks: Sequence[Checked], before: Document = ()) -> list[prompts.Prompt]:
        _, tools = self._parts(len(asks))
        images = iter(tools.see([ask.pixels for ask in asks if ask.pixels is not None]))
        clips, voices = (iter(tools.hear([wave for wave in waves if wave is not None]))
                         for waves in ([ask.wave for ask in asks], [ask.voice for ask in asks]))
        made = []
        for ask in asks:
            shown = [next(images)] if ask.pixels is not None else []
            shown += [next(clips)] if ask.wave is not None else []
            voice = prompts.voice(self.tokenizer.encode(utterances.VOICE), next(voices), self.vocabulary) if ask.voice is not None else ()
            made.append(prompts.build(self.vocabulary, ask.ids, shown, ask.reply, ask.grid, (*voice, *before)))
        return made

    def _request(self, prompt: prompts.Prompt, seed: int, number: int, guidance: float) -> batching.Request:
        return batching.Request(
            prompt, seed, number, **self.how, image_guidance=guidance if prompt.reply == "image" else 1.0,
            speech_guidance=self.options.speech_guidance if prompt.reply == "speech" else 1.0,
            delay=rules.SERIAL if self.options.delay is None else self.options.delay, max_text=self.options.max_text,
            max_frames=self.frames, segments=self.options.segments,
            stop="eos" if prompt.reply == "text" or (prompt.reply == "speech" and self.options.segments > 1) else "span",
        )  # fmt: skip

    def _parts(self, asks: int) -> tuple[streaming.Generator, media.Media]:
        if self._loaded is None:
            settle(self.config)
            params, stats = stages.load_parts(self.config, self.workdir, [*media.parts(self.config), *model_lib.PARTS])
            model = model_lib.build(self.config.model, self.vocabulary)
            many = asks > 1  # two compiled sizes; a guided request takes two rows
            generate = streaming.Generator(
                model, {part: params[part] for part in model_lib.PARTS}, {"backbone": stats["backbone"]},
                32 if many else 2, unconditional=self.options.unconditional,
            )  # fmt: skip
            tools = media.Media(self.config, {"params": params, "stats": stats}, 8 if many else 1)
            self._loaded = generate, tools
        return self._loaded

    def show(self, reply: batching.Reply, seed: int, stem: str) -> Iterator[str]:
        """Writes what a reply holds and yields a line for each part."""
        _, tools = self._parts(1)
        count = 0
        for span in reply.document:
            if isinstance(span, Text):
                yield self.tokenizer.decode(span.ids)
                continue
            name = stem + (f"-{count}" if count else "")
            count += 1
            if isinstance(span, Image):
                path = save_image(self.options.out, name, tools.paint([span], seed, self.options.refine)[0])
                yield f"[image {span.h}x{span.w}] {path}"
            else:
                path = save_wave(self.options.out, name, tools.sound([span], seed)[0], tools.rate)
                yield f"[speech] {self.tokenizer.decode(span.transcript or ())} {path}".replace("  ", " ")
        if not reply.document:
            yield "[nothing]"


def parse_size(text: str) -> tuple[int, int]:
    """'2x3' -> (2, 3), height and width in cells of 28 pixels. Raises InputError."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text.strip())
    if not match or not int(match[1]) * int(match[2]):
        raise InputError(f"size {text!r} is not HxW, height and width in cells of 28 pixels, such as 2x3")
    return int(match[1]), int(match[2])


def read_asks(path: pathlib.Path) -> list[Ask]:
    """Asks of a JSON-lines file. Raises InputError naming file, line and key."""
    if not path.is_file():
        raise InputError(f"--prompts: no such file {str(path)!r}")
    fields = {field.name: field for field in dataclasses.fields(Ask) if field.name != "where"}
    numbers = {"seed": int, "guidance": (int, float)}
    asks = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(record, dict) or "prompt" not in record:
            raise InputError(f"{where}: must be an object with the key 'prompt'")
        for key, value in record.items():
            if key not in fields:
                raise InputError(f"{where}: unknown key {key!r}; known: {', '.join(fields)}")
            if isinstance(value, bool) or not isinstance(value, numbers.get(key, str)):
                wanted = "a number" if key in numbers else "text"
                raise InputError(f"{where}: key {key!r} holds {value!r}, which is not {wanted}")
        asks.append(Ask(**record, where=where))
    if not asks:
        raise InputError(f"--prompts: {str(path)!r} holds no prompt")
    return asks


def save_image(folder: pathlib.Path, name: str, image_HWC: np.ndarray) -> pathlib.Path:
    """Writes a PNG, whole or not at all."""
    return _save(folder / f"{name}.png", lambda part: PIL.Image.fromarray(image_HWC).save(part, format="PNG"))


def save_wave(folder: pathlib.Path, name: str, wave_N: np.ndarray, rate: int) -> pathlib.Path:
    """Writes a 16-bit WAV, whole or not at all."""
    import soundfile

    return _save(folder / f"{name}.wav", lambda part: soundfile.write(part, wave_N, rate, "PCM_16", format="WAV"))


def _save(path: pathlib.Path, write) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def remembered(prompt: prompts.Prompt, reply: batching.Reply, eos: int) -> Document:
    """The turn as a later prompt may repeat it: without the opening that the reply's span writes itself."""
    spans = prompt.document[:-1]
    for span in reply.document:
        if isinstance(span, Speech) and span.transcript is not None:
            # Training has no speech whose frames end before its transcript does; such a reply is repeated later.
            span = dataclasses.replace(span, delay=max(span.delay, len(span.transcript) - len(span.codes)))
        spans = (*spans, span)
    return (*spans, Text((eos,)))


def converse(desk: Desk, lines: Iterator[str]) -> None:
    """Answers prompts line by line; what is wrong with one is said, and the conversation goes on."""
    before: Document = ()
    given: dict[str, Any] = {}
    turn = 0
    for line in (line.strip() for line in lines):
        command, _, value = line.partition(" ")
        if line in ("/quit", "/exit"):
            return
        try:
            if line == "/new":
                before, given = (), {}
            elif command in ("/image", "/speech", "/voice", "/size", "/reply"):
                given[command[1:]] = value.strip()
            elif command == "/seed":
                given["seed"] = _integer(value)
            elif command.startswith("/"):
                raise InputError(f"unknown command {command!r}; known: /image /speech /voice /size /reply /seed /new /quit")
            elif line:
                ask = desk.check(Ask(line, **given, where=f"turn {turn}"))
                ((prompt, reply),) = desk.answer([ask], before)
                print("\n".join(desk.show(reply, ask.seed, f"turn-{turn:03d}")), flush=True)
                before, given, turn = remembered(prompt, reply, desk.vocabulary.eos), {}, turn + 1
        except InputError as error:
            print(f"dina: {error}", flush=True)
            given = {}


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"/seed {text!r} is not a whole number") from None


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dina.sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="experiments/X.py[:variant,key=value,...]")
    add("--workdir", required=True, type=pathlib.Path)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", help="what the user says")
    mode.add_argument("--prompts", type=pathlib.Path, help="a JSON-lines file of prompts")
    mode.add_argument("--interactive", action="store_true")
    add("--image", default="", help="an image file that the user shows")
    add("--speech", default="", help="a sound file that the user plays")
    add("--voice", default="", help="a sound file of the voice in which to speak")
    add("--reply", default="", choices=("", *prompts.REPLIES), help="default: image with --size, else text")
    add("--size", default="", help="HxW in cells of 28 pixels of the image to paint")
    add("--seed", type=int, default=0)
    add("--guidance", type=float, help="of images; 1 is none; default config.eval.sampling.image_guidance")
    add("--speech_guidance", type=float, help="of speech; 1 is none; default config.eval.sampling.speech_guidance")
    add("--unconditional", default="suffix", choices=guidance.VARIANTS, help="the silent prompt of guidance")
    add("--delay", type=int, help="of speech behind its transcript; default: speak when the transcript is done")
    add("--segments", type=int, default=1, help="most spoken segments of a reply")
    add("--stream", type=pathlib.Path, metavar="FILE", help="raw 16-bit samples of a spoken reply go there while it is made")
    add("--max_text", type=int, default=64)
    add("--refine", choices=("flow", "none"), help="whether painted images pass the refiner; default config.eval.refine")
    add("--out", type=pathlib.Path, help="default WORKDIR/samples")
    for head in batching.HEADS:
        for name, kind in SETTINGS.items():
            what = f"default config.eval.sampling.{head}" + ("; 0 takes the likeliest" if name == "temperature" else "")
            add(f"--{head}_{name}", type=kind, help=what)
    options = parser.parse_args(argv)
    options.out = options.out or options.workdir / "samples"
    return options


def main(argv: list[str]) -> int:
    """Command line."""
    options = options_of(argv)
    with contextlib.closing(Stopper()), abandonable("sampling"):
        return _run(configs.load(options.config), options)


def _run(config, options) -> int:
    if not options.workdir.is_dir():
        raise InputError(f"--workdir: no folder {str(options.workdir)!r}; dina.train makes it")
    config.run.workdir = str(options.workdir)
    desk = Desk(config, options.workdir, options)
    if options.interactive and not options.stream:
        converse(desk, iter(sys.stdin))
        return 0
    if options.prompts:
        asks = read_asks(options.prompts)
    else:
        asks = [Ask(options.prompt or "", options.image, options.speech, options.voice, options.reply, options.size)]
    checked = [desk.check(ask) for ask in asks]
    if options.stream:
        if not options.prompt or checked[0].reply != "speech":
            raise InputError("--stream: plays one reply; give --prompt and --reply=speech")
        return _play(desk, checked[0], options)
    for number, (ask, (_, reply)) in enumerate(zip(checked, desk.answer(checked), strict=True)):
        for line in desk.show(reply, ask.seed, f"sample-{number:03d}"):
            print(line if len(checked) == 1 else f"{number}: {line}", flush=True)
    return 0


def _play(desk: Desk, ask: Checked, options) -> int:
    """Writes a spoken reply as it is made, then says what `show` would."""
    text, waves = [], []
    try:
        with options.stream.open("wb", buffering=0) as out:
            for part in desk.stream(ask):
                out.write(audio_files.to_int16(part.wave_N).tobytes())
                waves, text = [*waves, part.wave_N], [*text, *part.text]
    except OSError as error:
        raise InputError(f"--stream={options.stream}: cannot be written ({error})") from None
    wave_N = np.concatenate(waves)
    path = save_wave(options.out, "sample-000", wave_N, desk.config.audio.target.rate) if len(wave_N) else "[nothing]"
    print(f"[speech] {desk.tokenizer.decode(text)} {path}".replace("  ", " "), flush=True)
    return 0


if __name__ == "__main__":
    configs.run_main(main)
