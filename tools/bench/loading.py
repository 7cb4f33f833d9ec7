"""Loading training batches: what one core makes of code shards, packed, in the shapes of pre-training. There is no peer to run beside."""

from __future__ import annotations

import gc
import pathlib
import statistics
import tempfile
import time

import numpy as np

from dina.data import codes, packing, utterances
from dina.grammar import Text, Vocabulary
from dina.text import tokenizer as text
from experiments import longcat_next
from tools.bench import harness

ROWS, STEPS = 8, 24  # of a timed round, in which about two windows of documents are planned
WORDS, PIECES = 4_000, 2048
# As the recordings and pictures that we have: 2.2 s of speech at 12.5 frames a second, up to 256 cells a picture.
FRAMES, CLIPS, PICTURES, SIDES, PROSE = 27, 6_000, 1_000, (12, 14, 16, 18), 1_024


def shards(workdir: pathlib.Path, random: np.random.Generator) -> list[str]:
    """Writes code shards of made-up recordings and of the pictures that half of them describe; returns the transcripts."""
    words = ["".join(random.choice(list("abcdefghilmnorstu"), size=random.integers(2, 9))) for _ in range(WORDS)]
    audio, visual = longcat_next.AUDIO_CODES, longcat_next.VISUAL_CODES
    say = lambda: " ".join(words[int(i)] for i in random.zipf(1.3, size=random.integers(3, 14)) % WORDS)
    draw = lambda count, sizes: np.stack([random.integers(0, size, count) for size in sizes], 1)
    speech = [{"text": say(), "language": "en", "speaker": "s", "picture": f"p{n}" if n < CLIPS // 2 else "", "noisy": 0, "record": n,
               "codes": draw(max(4, int(random.gamma(2.0, FRAMES / 2))), audio)} for n in range(CLIPS)]  # fmt: skip
    images = []
    for n in range(PICTURES):
        h, w = (int(side) for side in random.choice(SIDES, 2))
        images.append({"h": h, "w": w, "source": f"p{n}", "caption": say(), "record": n, "codes": draw(h * w, visual)})
    for kind, records, sizes in (("speech", speech, audio), ("images", images, visual)):
        codes.write_shard(codes.shard_path(workdir, kind, "train", 0, 1), kind, records, "bench")
        codes.finish(workdir, kind, len(sizes), {"train": 1})
    return [record["text"] for record in speech]


class WithProse(utterances.Utterances):
    """Plain text is prose, not transcripts of ten words."""

    prose = Text(np.random.default_rng(1).integers(4, PIECES, PROSE).astype(np.int32), True)

    def _plain_text(self, record, rng):
        del record, rng
        return (self.prose,)


def open_batches(workdir: pathlib.Path, stage) -> packing.PackedDocuments:
    """Batches of `stage` over the made-up recordings."""
    texts = shards(workdir, np.random.default_rng(0))
    path = workdir / "text.model"
    text.train_tokenizer(utterances.sentences(texts, ["en"]), path, PIECES)
    encode = text.TextTokenizer(path).encode
    vocabulary = Vocabulary(PIECES, audio=longcat_next.AUDIO_CODES, visual=longcat_next.VISUAL_CODES).with_sizes(encode, [(h, w) for h in SIDES for w in SIDES])
    options = packing.stage_options(stage)
    speech, images = (codes.load_codes(workdir, kind, "train") for kind in ("speech", "images"))
    made = WithProse(options, (0, 0), vocabulary, encode, speech, images)
    return packing.PackedDocuments(made, vocabulary, options.pack, ROWS, (0, 1))


def packed_loader(rounds: int | None) -> dict:
    """Positions a second of one core, and the share of them that is padding, of the pre-training stage's rows."""
    with tempfile.TemporaryDirectory() as folder:
        batches = open_batches(pathlib.Path(folder), longcat_next.get_config().stages.pretrain)
        gc.freeze()  # as packing.open_batches does
        batches.batch(0)
        rates, used = [], []
        for number in range(rounds or 5):
            begun = time.process_time()
            made = [batches.batch(1 + number * STEPS + step) for step in range(STEPS)]
            rates.append(sum(b["segment"].size for b in made) / (time.process_time() - begun))
            used += [float((b["segment"] > 0).mean()) for b in made]
    return {
        "name": "packed_loader", "ours": statistics.median(rates), "unit": "positions/s a core", "padding": 1 - statistics.mean(used),
        "row": batches.budget, "documents_left_out": dict(batches.errors), "samples": {"ours": rates}, "machine": harness.machine_name(),
    }  # fmt: skip
