"""The page's sections of samples: painted digits, described pictures, spoken and understood words, reconstructions."""

from __future__ import annotations

import html
import re
from typing import Any

import PIL.Image

from dina.data.phrases import DIGIT_WORDS
from tools.report import figures
from tools.report.inputs import Run

_PAINTED, _TEXTS, _CLIPS, _STRIPS = 16, 8, 8, 8  # shown of each kind
_AXES = f'<p class="note">Spectrograms: 0 to {figures.TOP_HERTZ // 1000} kHz upwards, {figures.SPAN_SECONDS:g} s to the right, 80 dB deep.</p>'
_ZOOM = 1.25  # screen pixels per pixel of a canvas


def picture(run: Run, name: str, box=None, zoom: float = _ZOOM) -> str:
    """A kept picture, its pixels visible; `box` (top, left, size) is outlined."""
    path = run.media(name)
    with PIL.Image.open(path) as image:
        width, height = image.size
    frame = ""
    if box is not None:
        top, left, size = (v * zoom for v in box)
        frame = f'<i style="top:{top:.0f}px;left:{left:.0f}px;width:{size:.0f}px;height:{size:.0f}px"></i>'
    return (f'<span class="canvas"><img alt="" width="{width * zoom:.0f}" height="{height * zoom:.0f}" '
            f'src="{figures.data_address(path)}">{frame}</span>')


def sound(run: Run, name: str, caption: str) -> str:
    """A kept clip: spectrogram, player, caption (HTML)."""
    path = run.media(name)
    return (f'<figure><img alt="spectrogram" src="{figures.spectrogram(path)}">'
            f'<audio controls preload="none" src="{figures.data_address(path)}"></audio><figcaption>{caption}</figcaption></figure>')


def verdict(right: bool, read: Any, how: str) -> str:
    """'read as seven' with a mark."""
    return f'<span class="{"ok" if right else "miss"}">{"✓" if right else "✗"} {how} {html.escape(str(read))}</span>'


def digit_word(digit: int | None) -> str:
    """The digit's word; 'no digit' for None."""
    return "no digit" if digit is None or digit < 0 else DIGIT_WORDS[digit]


def kept(run: Run, task: str, group: str, field: str = "file") -> list[dict]:
    """Answers of a group whose media were kept."""
    return [r for r in run.answers.get(task, ()) if r["group"] == group and field in r]


def painted(run: Run) -> str:
    """Painted canvases with their prompts; the outlined box is all that the judge sees."""
    blocks = []
    titles = (("text_to_image", "new_size", "From words, on canvases that training never showed with this digit"),
              ("text_to_image", "main", "From words"), ("speech_to_image", "main", "From a spoken digit"))
    for task, group, title in titles:
        cards = []
        for record in kept(run, task, group)[:_PAINTED]:
            right = record["predicted"] == record["truth"]
            heard = f', having heard “{record["word"]}”' if task == "speech_to_image" else ""
            rows, columns = record["canvas"]
            cards.append(f"<figure>{picture(run, record['file'], record['box'])}<figcaption><b>{html.escape(record['prompt'])}</b>{heard}<br>"
                         f"{28 * columns}×{28 * rows} px · {verdict(right, digit_word(record['predicted']), 'read as')}</figcaption></figure>")
        if cards:
            blocks.append(f'<h3>{title}</h3><div class="cards">{"".join(cards)}</div>')
    note = ('<p class="note">First sample of each prompt, not chosen. The outline is the box that the prompt\'s position and size words '
            "name: the classifier sees only this crop, so a digit elsewhere is wrong.</p>")
    return note + "".join(blocks) if blocks else ""


def described(run: Run) -> str:
    """Held-out pictures with the model's words."""
    blocks = []
    titles = (("caption", "Descriptions"), ("main", "Digits named"), ("any_offset", "At arbitrary pixel offsets"))
    for group, title in titles:
        cards = []
        for record in kept(run, "image_to_text", group, "shown")[:_TEXTS]:
            right = record["extra"].get("right", record["predicted"] == record["truth"])
            truth = record.get("caption") or digit_word(record["truth"])
            mark = '<span class="ok">✓</span>' if right else f'<span class="miss">✗ it is “{html.escape(truth)}”</span>'
            cards.append(f'<div class="sample"><div>{picture(run, record["shown"], zoom=1.1)}</div><div><span class="ask">'
                         f'{html.escape(record["prompt"])}</span><br><span class="say">{html.escape(record["answer"])}</span> {mark}</div></div>')
        if cards:
            blocks.append(f'<h3>{title}</h3><div class="samples">{"".join(cards)}</div>')
    return "".join(blocks)


def spoken(run: Run) -> str:
    """Spoken answers with what the recogniser hears."""
    blocks = []
    titles = (("text_to_speech", "main", "Digits from words"), ("text_to_speech", "words", "Other words"),
              ("image_to_speech", "main", "The digit in a picture, said aloud"))
    for task, group, title in titles:
        cards = []
        for record in kept(run, task, group)[:_CLIPS]:
            heard = record.get("heard") or digit_word(record["predicted"])
            shown = f'{picture(run, record["shown"], zoom=0.8)}<br>' if task == "image_to_speech" and "shown" in record else ""
            caption = f'{shown}<b>{html.escape(record["prompt"])}</b><br>{verdict(heard == record["word"], heard, "heard as")}'
            cards.append(sound(run, record["file"], caption))
        if cards:
            blocks.append(f'<h3>{title}</h3><div class="clips">{"".join(cards)}</div>')
    return _AXES + "".join(blocks) if blocks else ""


def heard(run: Run) -> str:
    """Clips of unseen voices with the words that the model writes."""
    blocks = []
    for group, title in (("main", "Digits, unseen voices"), ("noisy", "In noise and a room"), ("words", "Other words")):
        cards = []
        for record in kept(run, "speech_to_text", group, "shown")[:_CLIPS // 2 if group != "words" else _CLIPS]:
            right = record["answer"].strip() == record["word"]
            truth = "" if right else f" (it is “{html.escape(record['word'])}”)"
            cards.append(sound(run, record["shown"], f"<b>{html.escape(record['prompt'])}</b><br>{verdict(right, record['answer'], 'it writes:')}{truth}"))
        if cards:
            blocks.append(f'<h3>{title}</h3><div class="clips">{"".join(cards)}</div>')
    return _AXES + "".join(blocks) if blocks else ""


def _levels(names: list[str]) -> list[int]:
    return sorted({int(found[1]) for name in names if (found := re.search(r"_level_(\d+)\.", name))})


def _heading(level: int) -> str:
    return "1 level" if level == 1 else f"{level} levels"


def picture_levels(run: Run) -> str:
    """Originals beside reconstructions at 1, 2, 4, 8 levels and after the refiner, and the distances."""
    files = sorted(p.name for p in run.media("reconstruction").glob("image_*.png")) if run.pictures else []
    if not files:
        return ""
    levels = _levels(files)
    kinds = ["original", *(f"level_{n}" for n in levels), "refined"]
    cells = "".join(f'<span class="head">{h}</span>' for h in ["original", *map(_heading, levels), "after the refiner"])
    for number in sorted({name[6:8] for name in files})[:_STRIPS]:
        cells += "".join(picture(run, f"reconstruction/image_{number}_{kind}.png") if f"image_{number}_{kind}.png" in files else "<span></span>"
                         for kind in kinds)
    strip = f'<div class="strip" style="grid-template-columns:repeat({len(kinds)},max-content)">{cells}</div>'
    return strip + _picture_table(run, levels)


def _picture_table(run: Run, levels: list[int]) -> str:
    """PSNR and SSIM by levels and by canvas size."""
    settings = [(n, False) for n in levels] + [(max(levels), True)]
    sizes = sorted({row["size"] for row in run.pictures}, key=lambda s: [int(v) for v in s.split("x")])
    mean = lambda rows, key: sum(r[key] for r in rows) / len(rows)
    lines = []
    for size in ["all canvases", *sizes]:
        rows = [r for r in run.pictures if size in ("all canvases", r["size"])]
        cells = ""
        for level, refined in settings:
            part = [r for r in rows if r["levels"] == level and r["refined"] == refined]
            cells += f'<td class="n">{mean(part, "psnr_db"):.1f} <span class="note">/ {mean(part, "ssim"):.2f}</span></td>' if part else "<td></td>"
        count = len({r["index"] for r in rows})
        height, _, width = size.partition("x")
        lines.append(f'<tr><td class="strong">{f"{width}×{height} px" if width else size}</td>{cells}<td class="n">{count}</td></tr>')
    head = "".join(f"<th class=n>{h}</th>" for h in [*map(_heading, levels), "after the refiner", "pictures"])
    return (f'<h3>PSNR in dB / SSIM</h3><p class="note">Mean over held-out canvases. Large canvases are mostly black, which flatters '
            f"PSNR: compare within a row.</p><table><tr><th>canvas, width × height</th>{head}</tr>{''.join(lines)}</table>")


def clip_levels(run: Run) -> str:
    """Original clips beside their reconstructions, with spectrograms, and the mel distance per level."""
    files = sorted(p.name for p in run.media("reconstruction").glob("clip_*.wav")) if run.clips else []
    if not files:
        return ""
    levels = _levels(files)
    rows = []
    for number in sorted({name[5:7] for name in files}):
        cards = [sound(run, f"reconstruction/clip_{number}_original.wav", "<b>original</b>")]
        cards += [sound(run, f"reconstruction/clip_{number}_level_{n}.wav", f"<b>{_heading(n)}</b>") for n in levels
                  if f"clip_{number}_level_{n}.wav" in files]
        rows.append(f'<div class="clips" style="grid-template-columns:repeat({len(levels) + 1},minmax(150px,1fr))">{"".join(cards)}</div>')
    lines = []
    for level in levels:
        cells = ""
        for refined in (False, True):
            part = [r["mel_l1"] for r in run.clips if r["levels"] == level and r["refined"] == refined]
            cells += f'<td class="n">{sum(part) / len(part):.3f}</td>' if part else "<td></td>"
        lines.append(f"<tr><td>{_heading(level)}</td>{cells}</tr>")
    return ("".join(rows) + '<h3>Mean distance of log-mel spectrograms, in nepers</h3><table style="width:auto"><tr><th>codes used</th>'
            f"<th class=n>mel decoder</th><th class=n>after flow matching</th></tr>{''.join(lines)}</table>")
