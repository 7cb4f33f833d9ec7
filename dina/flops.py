"""Analytic FLOPs of a train step of the language model, in a stated formula.

Two per multiply-add of matrix products, nothing else (norms, softmax, routing's sorts and the optimizer are left out). A
product costs once forward and twice backward: once for its input, once for its weight, the latter only where the stage
trains it. Of a token's experts those are counted that it is expected to choose of the real ones (`target_top_k`); identity
experts cost nothing. Attention is causal, so half of its scores are counted, as if a row were one document. Heads count the
positions that have their loss, the bridge the image cells. What remat computes again is apart.

Legend: D width, S positions of a row, L levels, W width of a depth head, V classes.
"""

from __future__ import annotations

from typing import NamedTuple

from dina import grammar, optim
from dina.backbone import config as trunk_config


class Work(NamedTuple):
    """What the rows of a step hold.

    Attributes:
        rows, length: B and S.
        text, visual, audio: positions of a row with the loss of a head.
        cells: image cells of a row.
    """

    rows: int
    length: int
    text: float
    visual: float
    audio: float
    cells: float


class Flops(NamedTuple):
    """Of one global step: by part of the model, and what remat adds."""

    by_group: dict[str, float]
    remat: float

    @property
    def total(self) -> float:
        """Without remat."""
        return sum(self.by_group.values())


def full(stage, pack) -> Work:
    """All buffers of a row full and every position with a text loss: what the compiled program can do at most.

    Args:
        stage: of a language task.
        pack: its whole `options.pack` (`packing.stage_options`).
    """
    return Work(stage.batch, pack.positions, pack.positions, pack.visual, pack.audio, pack.cells)


def expected(stage, pack) -> Work:
    """Buffers of cells and codes full, a text loss where no code is predicted."""
    return full(stage, pack)._replace(text=max(0, pack.positions - pack.visual - pack.audio))


def language(config, stage, work: Work) -> Flops:
    """FLOPs of one step of a language stage.

    Args:
        config: the experiment.
        stage: one of its language stages: what it trains and which losses it has.
        work: see `full`.
    """
    model, voc = trunk_config.parse(trunk_config.BackboneConfig, config.model), grammar.from_config(config)
    trained = lambda *paths: any(optim.matches(path, stage.train) for path in paths)
    tokens = work.rows * work.length
    products, scores = _layers(model)
    heads = {name: _head(trunk_config.parse(trunk_config.DepthConfig, config.model[name]), sizes, model.width)
             for name, sizes in (("visual_head", voc.visual), ("audio_head", voc.audio))}
    wanted = stage.loss_weights
    # (multiply-adds forward, does the stage train the weights)
    forward = {
        "attention": (tokens * products["attention"], trained("backbone/layers")),
        "dense": (tokens * products["dense"], trained("backbone/layers")),
        "experts": (tokens * products["experts"], trained("backbone/layers")),
        "text_head": (work.rows * work.text * model.width * voc.classes * ("text" in wanted), trained("lm_head")),
        "ngram": (tokens * model.width**2, trained("embed/ngram/proj")),
        "embed": (work.rows * work.cells * 3 * model.width * config.model.pre_buffer.hidden, trained("embed/pre_buffer/gate")),
        "depth_heads": (0.0, True),
    }
    by_group = {name: 2 * value * (3 if own else 2) for name, (value, own) in forward.items()}
    by_group["attention"] += 2 * 3 * work.rows * scores * work.length**2 / 2
    again = 0.0
    for name, places in (("visual_head", work.visual), ("audio_head", work.audio)):
        if name.removesuffix("_head") in wanted:
            value = work.rows * places * heads[name]
            by_group["depth_heads"] += 2 * value * (3 if trained(name) else 2)
            again += 2 * value
    again = (again + 2 * forward["text_head"][0]) * (config.model.losses.remat == "full")
    if model.remat != "none":
        again += 2 * sum(forward[name][0] for name in ("attention", "dense", "experts")) + 2 * work.rows * scores * work.length**2 / 2
    return Flops(by_group, again)


def _layers(model) -> tuple[dict[str, float], float]:
    """Multiply-adds a token of all layers' weights, by part; and of attention scores and values a pair of positions."""
    a, e, width = model.attention, model.experts, model.width
    attention = width * a.q_rank + a.q_rank * a.heads * (a.nope + a.rope) + width * (a.kv_rank + a.rope)
    attention += a.kv_rank * a.heads * (a.nope + a.v) + a.heads * a.v * width
    active = e.target_top_k or e.top_k * e.real / e.total
    products = {"attention": 2 * attention, "dense": 2 * 3 * width * model.ffn,
                "experts": active * 3 * width * e.hidden + width * e.total}
    return {name: model.layers * value for name, value in products.items()}, model.layers * 2 * a.heads * (a.nope + a.rope + a.v)


def _head(head, sizes: tuple[int, ...], width: int) -> float:
    """Multiply-adds of a depth head at one position, all levels."""
    levels, hidden = len(sizes), head.ffn_scale * head.width // max(1, len(sizes))
    layer = levels * (4 * head.width**2 + 2 * head.width * hidden) + levels * (levels + 1) * head.width
    return levels * width * head.width + head.layers * layer + head.width * sum(size + 1 for size in sizes)
