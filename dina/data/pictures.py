"""Captioned pictures in Debian packages and in installed Python packages: where they are and what they show.

Tux Paint stamps (photographs cut out, drawings, signs), Art4Apps cartoons (in pysiogame), the Open Clip Art library, and the
photographs that scikit-image and scikit-learn bring. Facts and counts of each: reference/data.md section 1.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import pathlib
import re
import xml.etree.ElementTree
from collections.abc import Iterator

from dina.data.packages import Package

DRAWN = {
    "tuxpaint": Package("debian", "tuxpaint-stamps-default", "2022.06.04-1",
                        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", "GPL-2"),
    # Debian calls the pictures public domain; Art4Apps, where they are from, publishes them under CC BY-SA 3.0.
    "art4apps": Package("debian", "pysiogame", "4.20.01-1",
                        "6b22766dfd8ef3a046c2665fe2598ac8a1ecee3d331bda38accf53de65bc59bf", "CC-BY-SA-3.0 (Art4Apps)"),
    "openclipart": Package("debian", "openclipart-svg", "1:0.18+dfsg-19",
                           "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", "public domain"),
}
# The rest of the library is user-interface icons, logos, plain shapes and signs.
CLIPART = ("animals", "buildings", "containers", "education", "electronics", "food", "geography", "office", "people", "plants",
           "recreation", "science", "tools", "transportation")
# Not the test patterns, drawings, documents, medical pictures and the second eye of the stereo pair.
PHOTOS = {
    "scikit-image": ("skimage", "data", "BSD-3-Clause, single pictures CC0 or public domain", {
        "astronaut.png": "An astronaut in an orange suit.", "brick.png": "A brick wall.",
        "camera.png": "A man with a camera.", "chelsea.png": "A tabby cat.", "coffee.png": "A cup of coffee.",
        "coins.png": "Ancient coins.", "grass.png": "Grass.", "gravel.png": "Gravel.",
        "hubble_deep_field.jpg": "Galaxies in deep space.", "moon.png": "The surface of the moon.",
        "motorcycle_left.png": "A motorcycle in a garage.", "rocket.jpg": "A rocket on the launch pad."}),
    "scikit-learn": ("sklearn", "datasets/images", "CC-BY-2.0", {
        "china.jpg": "A Chinese temple.", "flower.jpg": "A yellow flower."}),
}
_JUNK = re.compile(r"@|http|www\.|[#/\\]|clip ?art|collection|untitled|unknown|no title|\bsvg\b|\bpng\b|\bby\b", re.IGNORECASE)
_ICON = re.compile(r"(^|[/_-])(icons?|aiga)([/_-]|$)")
_LONGEST = 80  # characters of a clip art title; longer ones are notes of the author


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture file.

    Attributes:
        package: a key of `DRAWN` or `PHOTOS`.
        source: 'package/path without ending', unique.
        path: the file.
        caption: English.
    """

    package: str
    source: str
    path: pathlib.Path
    caption: str


LeftOut = collections.defaultdict  # reason -> list of 'source: detail'


def find(package: str, files: pathlib.Path, left_out: LeftOut) -> list[Picture]:
    """The captioned pictures of an unpacked package of `DRAWN`, in the order of their sources.

    Args:
        package: its key.
        files: the folder of `packages.fetch`.
        left_out: gets what is not taken and why.
    """
    return sorted(_FINDERS[package](files / "usr/share", left_out), key=lambda picture: picture.source)


def photographs() -> list[Picture]:
    """The natural photographs of the installed packages; ones that an installation lacks are missing."""
    found = []
    for package, (module, folder, _, captions) in PHOTOS.items():
        spec = importlib.util.find_spec(module)
        root = pathlib.Path(spec.origin).parent / folder if spec else None
        found += [Picture(package, f"{package}/{pathlib.Path(name).stem}", root / name, caption)
                  for name, caption in captions.items() if root and (root / name).is_file()]
    return found


def normal_caption(caption: str) -> str:
    """What captions that say the same share: no case, article, punctuation or trailing number."""
    words = re.sub(r"[^\w]+|_", " ", caption.casefold()).split()
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    while len(words) > 1 and words[-1].isdigit():
        words = words[:-1]
    return " ".join(words)


def _tuxpaint(share: pathlib.Path, left_out: LeftOut) -> Iterator[Picture]:
    """NAME.txt describes NAME.svg or NAME.png; its first line is English."""
    root = share / "tuxpaint/stamps"
    for path in [*root.rglob("*.svg"), *root.rglob("*.png")]:
        stem = path.with_suffix("")
        source = f"tuxpaint/{stem.relative_to(root).as_posix()}"
        note = path.with_suffix(".txt")
        drawing = path.with_suffix(".svg")
        if path.suffix == ".png" and drawing.is_file() and b"<text" not in drawing.read_bytes():
            left_out["duplicate"].append(f"{source}.png: there is a drawing of it")
        elif path.suffix == ".svg" and path.with_suffix(".png").is_file() and b"<text" in path.read_bytes():
            left_out["text"].append(f"{source}.svg: it has text; its PNG is taken")
        elif not note.is_file() or not (caption := _first_line(note)):
            left_out["no caption"].append(source)
        else:
            yield Picture("tuxpaint", source, path, caption)


def _first_line(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0].strip() if lines else ""


def _art4apps(share: pathlib.Path, left_out: LeftOut) -> Iterator[Picture]:
    """The name of a file is the word."""
    del left_out
    root = share / "games/pysiogame/res/images/art4apps"
    for path in root.rglob("*.jpg"):
        yield Picture("art4apps", f"art4apps/{path.relative_to(root).with_suffix('').as_posix()}", path,
                      path.stem.replace("_", " ").strip())


def _openclipart(share: pathlib.Path, left_out: LeftOut) -> Iterator[Picture]:
    """Captions are the titles in the files, which authors wrote or did not."""
    root = share / "openclipart/svg"
    for category in CLIPART:
        for path in (root / category).rglob("*.svg"):
            name = path.relative_to(root).with_suffix("").as_posix()
            source = f"openclipart/{name}"
            if path.is_symlink():
                left_out["duplicate"].append(f"{source}: a link to another picture")
            elif _ICON.search(name):
                left_out["icon"].append(source)
            else:
                try:
                    caption, licence = _metadata(path)
                except (xml.etree.ElementTree.ParseError, ValueError, LookupError) as error:
                    left_out["corrupt"].append(f"{source}: {error}")
                    continue
                if licence and "publicdomain" not in licence.lower():
                    left_out["licence"].append(f"{source}: {licence}")
                elif not caption:
                    left_out["no caption"].append(source)
                else:
                    yield Picture("openclipart", source, path, caption)


def _metadata(path: pathlib.Path) -> tuple[str, str]:
    """('' or the first good one of title and description, '' or the licence's address) of a drawing."""
    root = xml.etree.ElementTree.parse(path).getroot()
    work = next((node for node in root.iter() if node.tag.endswith("}Work")), None)
    if work is None:
        return "", ""
    said = {node.tag.rpartition("}")[2]: node for node in work}
    licence = next(iter(said["license"].attrib.values()), "") if "license" in said else ""
    texts = (" ".join((said[name].text or "").replace("_", " ").split()) for name in ("title", "description") if name in said)
    return next((text for text in texts if _good_title(text)), ""), licence


def _good_title(text: str) -> bool:
    return 2 < len(text) <= _LONGEST and not _JUNK.search(text) and sum(c.isalpha() for c in text) > len(text) / 2


_FINDERS = {"tuxpaint": _tuxpaint, "art4apps": _art4apps, "openclipart": _openclipart}
