"""The page of a speech tokenizer: clips of people through it at several depths beside Opus, Codec2 and Speex.

Reads `eval/clips.jsonl`, one line a clip and codec (dina/eval/speech_codec.py has its fields), `eval/sounds/`, and
`eval/scores.json` for what is a number of a whole set.
"""

from __future__ import annotations

import html
from typing import Any

from tools.report import figures, samples, sections
from tools.report.inputs import Run, read_json, read_lines

# score, heading, digits
COLUMNS = (("wer_whisper", "words wrong, Whisper", 3), ("wer_sphinx", "words wrong, pocketsphinx", 3), ("stoi", "STOI", 3), ("pesq", "PESQ", 2),
           ("speaker", "same speaker", 3), ("ovrl", "DNSMOS", 2), ("mel_l1", "mel L1", 3))
OURS = "dina"
FIGURES = ("stoi", "wer_whisper", "wer_sphinx")  # scores that are drawn


def header(run: Run) -> str:
    """Title and what was measured."""
    return (f"<h1>Speech in codes</h1>\n"
            f'<p class="lead">Experiment <b>{html.escape(run.title)}</b>: every 80 ms of speech become one position of residual codes. '
            "Everything below was measured on recordings that no stage has heard.</p>")


def tiles(run: Run) -> str:
    """The few numbers to see first: of the deepest codes."""
    ours, found = [name for name in _codecs(run) if name.startswith(f"{OURS}_")], []
    if ours:
        deepest = max(ours, key=lambda name: int(name.split("_")[-1]))
        found.append((f"{run.scores[f'kbps_{deepest}']:.2f} kbit/s", _name(deepest)))
        shown = [column for column in COLUMNS if f"{column[0]}_{deepest}" in run.scores]
        found += [(f"{run.scores[f'{key}_{deepest}']['value']:.{digits}f}", heading) for key, heading, digits in shown[:4]]
    spent = read_json(run.workdir / "processor.json")
    if spent:
        found.append((f"{spent['train'] / 60:.0f} min", "of one processor: recordings and training"))
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in found) + "</div>"


def scores(run: Run) -> str:
    """Every codec and score with its interval, and what can be understood against the rate."""
    codecs, columns = _codecs(run), [c for c in COLUMNS if any(name.startswith(f"{c[0]}_") for name in run.scores)]
    if not codecs:
        return ""
    lines = []
    for codec in codecs:
        cells = "".join(f'<td class="n">{_interval(run.scores.get(f"{key}_{codec}"), digits)}</td>' for key, _, digits in columns)
        lines.append(f'<tr><td class="strong">{html.escape(_name(codec))}</td><td class="n">{run.scores[f"kbps_{codec}"]:.2f}</td>{cells}</tr>')
    head = "".join(f"<th class=n>{heading}</th>" for heading in ("kbit/s", *(c[1] for c in columns)))
    counts = {row["index"] for row in _rows(run)}
    note = (f'<p class="note">{len(counts)} clips; means with 95 % bootstrap intervals. The original is the ceiling of every judge; PESQ, STOI '
            "and the speaker compare with it. Words are judged on English clips alone. Rates are without the headers of files.</p>")
    missing = [heading for key, heading, _ in COLUMNS if (key, heading) not in {c[:2] for c in columns}]
    left = f'<p class="note">Not judged here, for the judge is not installed (extra judges), or no English clip has a text to compare words with: {", ".join(missing)}.</p>' if missing else ""
    shown = "".join(_figure(run, codecs, key, heading) for key, heading, _ in columns if key in FIGURES)
    return f"{note}{shown}<table><tr><th>codec</th>{head}</tr>{''.join(lines)}</table>{left}"


def _figure(run: Run, codecs: list[str], key: str, heading: str) -> str:
    """One score against the rate, with its intervals."""
    series = {}
    for codec in codecs:
        if codec.startswith("original") or f"{key}_{codec}" not in run.scores:
            continue
        name, score = OURS if codec.startswith(f"{OURS}_") else _name(codec), run.scores[f"{key}_{codec}"]
        series.setdefault(name, []).append((run.scores[f"kbps_{codec}"], *(score[end] for end in ("value", "low", "high"))))
    lines = [(name, *zip(*sorted(found), strict=True)) for name, found in series.items()]
    image = figures.points(lines, "kbit/s", heading) if lines else ""
    return f'<figure><img alt="{heading} against rate" src="{image}" style="max-width:560px"></figure>' if lines else ""


def sounds(run: Run) -> str:
    """Kept clips, original and every codec, to hear and to see."""
    kept = [row for row in _rows(run) if row.get("file")]
    blocks = []
    for index in dict.fromkeys(row["index"] for row in kept):
        own = [row for row in kept if row["index"] == index]
        said = f'{html.escape(own[0]["text"])} <span class="note">{html.escape(own[0]["language"])}, {html.escape(own[0]["source"])}</span>'
        players = "".join(samples.sound(run, row["file"], html.escape(_name(f'{row["codec"]}_{row["levels"]}'))) for row in own)
        blocks.append(f'<h3>{said}</h3><div class="clips">{players}</div>')
    return "".join(blocks)


def _codecs(run: Run) -> list[str]:
    """'codec_levels' of everything that was measured, in its order."""
    return [name.removeprefix("kbps_") for name in run.scores if name.startswith("kbps_")]


def _name(codec: str) -> str:
    name, _, levels = codec.rpartition("_")
    return f"{name}, {levels} level{'s' if levels != '1' else ''}" if name == OURS else name.replace("_", " ")


def _rows(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.media("clips.jsonl"))


def _interval(score: dict | None, digits: int) -> str:
    if score is None:
        return ""
    return f'<b>{score["value"]:.{digits}f}</b> <span class="note">{score["low"]:.{digits}f} to {score["high"]:.{digits}f}</span>'


SECTIONS = (
    ("scores", "Scores", scores),
    ("sounds", "Sounds", sounds),
    ("codebooks", "Codebooks", sections.codebooks),
    ("curves", "Learning curves", sections.curves),
    ("cost", "Time and memory", sections.cost),
    ("environment", "Environment", sections.environment),
)
