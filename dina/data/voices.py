"""Human recordings in Debian packages: where they are, who speaks, and what is said.

Tux Paint's stamps (their captions read aloud), the prompts of the Asterisk telephone exchange (five languages) and the dialogs
of the game Fish Fillets (Czech, Dutch, a little English). Facts and counts of each: reference/data.md section 2.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import pathlib
import re
from collections.abc import Iterator, Mapping

from dina.data import pictures
from dina.data.packages import Package


def _debian(name: str, version: str, sha256: str, licence: str) -> Package:
    return Package("debian", name, version, sha256, licence)


def _asterisk(language: str, texts: str, sounds: str, licence: str) -> dict[str, Package]:
    name, version = f"asterisk-core-sounds-{language}", "1.6.1-1"
    return {"texts": _debian(name, version, texts, licence), "sounds": _debian(f"{name}-g722", version, sounds, licence)}


# Name of a source -> what it needs: role -> package.
SPOKEN: dict[str, dict[str, Package]] = {
    "tuxpaint": {"stamps": pictures.DRAWN["tuxpaint"]},
    "asterisk-en": _asterisk("en", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                             "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806", "CC-BY-SA-3.0"),
    "asterisk-es": _asterisk("es", "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
                             "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8", "CC-BY-SA-3.0"),
    "asterisk-fr": _asterisk("fr", "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
                             "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0", "CC-BY-SA-3.0"),
    "asterisk-it": _asterisk("it", "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
                             "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016", "CC-BY-SA-3.0"),
    "asterisk-ru": _asterisk("ru", "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
                             "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b", "CC-BY-3.0"),
    "fillets": {
        "texts": _debian("fillets-ng-data", "1.0.1-1.1", "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84", "GPL-2"),
        "cs": _debian("fillets-ng-data-cs", "1.0.1-1.1", "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14", "GPL-2"),
        "nl": _debian("fillets-ng-data-nl", "1.0.1-1.1", "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10", "GPL-2"),
    },
}
_STRING = r'"((?:[^"\\]|\\.)*)"'
_DIALOG = re.compile(rf"dialogId\(\s*{_STRING}\s*,\s*{_STRING}\s*,\s*{_STRING}\s*\)\s*dialogStr\(\s*{_STRING}\s*\)")
_NOT_SPOKEN = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")  # '[ascending tones]', '(2 seconds of silence)', 'at [@]'


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recorded utterance.

    Attributes:
        package: a key of `SPOKEN`.
        source: unique, 'package/path'.
        path: the file.
        text: what is said.
        language, speaker: as of `clips.About`.
        prompt: what all languages' recordings of the same thing share, '' if nothing.
        picture: source of the stamp whose caption it is, '' if none.
        caption: that caption in English.
    """

    package: str
    source: str
    path: pathlib.Path
    text: str
    language: str
    speaker: str
    prompt: str = ""
    picture: str = ""
    caption: str = ""


LeftOut = collections.defaultdict  # reason -> list of 'source: detail'


def find(package: str, files: Mapping[str, pathlib.Path], left_out: LeftOut) -> list[Recording]:
    """The recordings of a source of `SPOKEN` that have a transcript, in the order of their names.

    Args:
        package: its key.
        files: role -> the folder of `packages.fetch`.
        left_out: gets what is not taken and why.
    """
    finder = {"tuxpaint": _tuxpaint, "fillets": _fillets}.get(package, _asterisk_prompts)
    share = {role: folder / "usr/share" for role, folder in files.items()}
    return sorted(finder(package, share, left_out), key=lambda recording: recording.source)


def said(text: str) -> str:
    """What utterances that say the same share: no case, no punctuation."""
    return " ".join(re.sub(r"[^\w]+|_", " ", text.casefold()).split())


def _tuxpaint(package: str, share: Mapping[str, pathlib.Path], left_out: LeftOut) -> Iterator[Recording]:
    """NAME_desc_fr.ogg reads the line 'fr.utf8=' of NAME.txt; NAME_desc.ogg its first line, which is English."""
    root = share["stamps"] / "tuxpaint/stamps"
    for path in [*root.rglob("*_desc*.ogg"), *root.rglob("*_desc*.wav")]:
        stem, _, tail = path.name.partition("_desc")
        language = tail.split(".")[0].lstrip("_") or "en"
        at = path.with_name(stem)
        name = f"{package}/{at.relative_to(root).as_posix()}"
        source, note = f"{name}_desc_{language}", at.with_name(f"{stem}.txt")
        lines = note.read_text(encoding="utf-8", errors="replace").splitlines() if note.is_file() else []
        words = dict(line.split(".utf8=", 1) for line in lines[1:] if ".utf8=" in line)
        caption = lines[0].strip() if lines else ""
        text = caption if language == "en" else words.get(language, "").strip()
        if not said(text) or not caption:
            left_out["no transcript"].append(f"{source}: {note.name} has no caption in {language!r}")
        else:
            yield Recording(package, source, path, text, language, f"{package}-{language}", "", name, caption)


def _asterisk_prompts(package: str, share: Mapping[str, pathlib.Path], left_out: LeftOut) -> Iterator[Recording]:
    """Lines 'name: text' of one file; the folder of the sounds is named language_COUNTRY_sex_Speaker."""
    (texts,) = share["texts"].glob("doc/*/core-sounds-*.txt.gz")
    words = {}
    for line in gzip.decompress(texts.read_bytes()).decode("utf-8", errors="replace").splitlines():
        name, colon, text = line.partition(": ")
        if colon and not line.startswith(";"):
            words[name.strip()] = " ".join(_NOT_SPOKEN.sub(" ", text).split())
    for folder in (share["sounds"] / "asterisk/sounds").iterdir():
        for path in folder.rglob("*.g722"):
            name = path.relative_to(folder).with_suffix("").as_posix()
            source, text, speaker = f"{package}/{name}", words.get(name, ""), f"asterisk-{folder.name.split('_')[-1]}"
            if not said(text):
                left_out["no transcript"].append(f"{source}: {texts.name} has no words for it")
            else:
                yield Recording(package, source, path, text, package[-2:], speaker, f"asterisk/{name}")


def _fillets(package: str, share: Mapping[str, pathlib.Path], left_out: LeftOut) -> Iterator[Recording]:
    """sound/LEVEL/.../LANGUAGE/ID.ogg says what script/LEVEL/*dialogs_LANGUAGE.lua has for ID; the font is the character's."""
    words: dict[tuple[str, str, str], tuple[str, str]] = {}
    scripts = share["texts"] / "games/fillets-ng/script"
    for script in sorted(scripts.glob("*/*dialogs_*.lua")):
        language = script.stem.split("dialogs_")[1]
        for name, font, _, text in _DIALOG.findall(script.read_text(encoding="utf-8", errors="replace")):
            text = " ".join(re.sub(r"\\(.)", r"\1", text).split())
            words[script.parent.name, language, name] = text, font.removeprefix("font_")
    for folder in sorted(set(share.values())):
        root = folder / "games/fillets-ng/sound"
        for path in sorted(root.rglob("*.ogg")):
            level, language = path.relative_to(root).parts[0], path.parent.name
            source = f"{package}/{path.relative_to(root).with_suffix('').as_posix()}"
            text, character = words.get((level, language, path.stem), ("", ""))
            if not said(text):
                left_out["no transcript"].append(f"{source}: no dialog of that name")
            else:
                speaker = f"{package}-{language}-{character}"
                yield Recording(package, source, path, text, language, speaker, f"fillets/{level}/{path.stem}")
