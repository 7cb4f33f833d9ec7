"""Builds report.html: one self-contained page from what a run left in its workdir.

What is read (anything missing is left out, and the page says so):
  demo.json                          {phase: seconds}, written by tools/demo.py
  <stage>/stage.json                 seconds, peak_memory_mib, steps, examples, parameters {part: count}, trained_parameters
  <stage>/metrics.jsonl              one line per logged step: {"step": 10, "time": 3.1, "loss": 2.0, "loss/text": 1.2,
                                     "digit_accuracy": 0.4, ...}
  eval/stage.json                    seconds, peak_memory_mib, skipped (why a judge was left out)
  eval/scores.json                   the flat scores, each a number or {value, low, high, n}
  eval/<task>.jsonl                  judged answers: task, group, prompt, truth, word, answer, predicted, extra, and for
                                     kept media `shown` and `file`, paths below eval/; canvas [rows, cols], box [top,
                                     left, size] for paintings; `caption` and `heard` where asked for
  eval/image_reconstruction.jsonl    index, size, levels, refined, psnr_db, ssim
  eval/audio_reconstruction.jsonl    index, word, levels, refined, mel_l1
  eval/codebooks.json                {'visual'|'audio': {usage, perplexity, sizes, window}}
  eval/reconstruction/               image_NN_{original,level_L,refined}.png, clip_NN_{original,level_L}.wav
"""

from __future__ import annotations

import html
import pathlib
import string

from tools.report import samples, sections
from tools.report.inputs import Run

TEMPLATE = pathlib.Path(__file__).with_name("template.html")
# anchor, heading, function of the run that gives the section's HTML ('' = nothing to show)
SECTIONS = (
    ("scores", "Scores", sections.scores),
    ("paints", "It paints", samples.painted),
    ("sees", "It sees", samples.described),
    ("talks", "It talks", samples.spoken),
    ("hears", "It hears", samples.heard),
    ("pictures", "Pictures through the tokenizer", samples.picture_levels),
    ("sounds", "Speech through the tokenizer", samples.clip_levels),
    ("confusions", "What is taken for what", sections.confusions),
    ("codebooks", "Codebooks", sections.codebooks),
    ("curves", "Learning curves", sections.curves),
    ("cost", "Time and memory", sections.cost),
    ("environment", "Environment", sections.environment),
)


def build(run: Run, parts=SECTIONS, header=sections.header, tiles=sections.tiles) -> str:
    """The whole page as text; it refers to nothing outside itself.

    Args:
        run: what is shown.
        parts: (anchor, heading, function of the run) of each section.
        header, tiles: functions of the run for what comes before them.
    """
    shown = [(anchor, heading, made) for anchor, heading, make in parts if (made := make(run))]
    nav = "".join(f'<a href="#{anchor}">{html.escape(heading)}</a>' for anchor, heading, _ in shown)
    blocks = [header(run), f"<nav>{nav}</nav>", tiles(run)]
    blocks += [f'<h2 id="{anchor}">{html.escape(heading)}</h2>\n{made}' for anchor, heading, made in shown]
    blocks.append(sections.footer(run))
    page = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return page.substitute(title=html.escape(f"dina: {run.title}"), body="\n".join(blocks))
