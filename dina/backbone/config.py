"""Settings of the backbone and of the depth heads: frozen dataclasses, and the same fields as a nested ConfigDict.

The defaults are the laptop model of experiments/digits.py; the released sizes are in reference/backbone.md §1.1, §4.
"""

from __future__ import annotations

import dataclasses
import typing

import ml_collections

from dina.config import InputError


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention. Per-head sizes are in values, `theta` is the rotary base."""

    heads: int = 4
    q_rank: int = 96
    kv_rank: int = 64
    nope: int = 32
    rope: int = 16
    v: int = 32
    theta: float = 1e4
    block: int = 128  # queries per causal block; keys after a block's end are never read. 0: all queries at once
    decode: str = "absorbed"  # cached calls: 'absorbed' reads the latents directly, 'expanded' rebuilds keys and values


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Sparse feed-forward: `real` SwiGLU experts and `zero` identity experts behind one router."""

    real: int = 8
    zero: int = 4
    top_k: int = 3
    hidden: int = 128
    scale: float = 2.0  # multiplies every selected probability, identity experts included
    # 'dense' (the truth), 'gather' (bounded buffers), 'ragged' (lax.ragged_dot) bring experts to the tokens where a mesh
    # splits them; 'all_to_all' and 'ragged_all_to_all' bring tokens to the experts (transport.py), and are 'gather' where it does not
    dispatch: str = "gather"
    capacity_factor: float = 1.25  # 'gather': buffer rows per expert over the balanced expectation
    target_top_k: float = 2.0  # balance: expected real experts per token; 0 means all experts equally often
    balance: str = "dynamic"  # 'dynamic' moves a bias by rate * error, 'sign' by rate * sign(error)
    balance_rate: float = 0.1  # halved every `balance_half_life` steps, never below `balance_floor`
    balance_half_life: int = 1000
    balance_floor: float = 0.01

    @property
    def total(self) -> int:
        """Experts behind the router, identity ones included."""
        return self.real + self.zero


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """Hashed n-gram tables: (order - 1) * splits of them, table i with int(ratio * vocab + 2i + 1) rows."""

    order: int = 3
    splits: int = 2
    ratio: float = 5.0
    variant: str = "hf"  # 'hf', 'oe' or 'serving': see dina/backbone/ngram.py
    blank: str = "zero"  # text part of a speech position before the codes whose word is blank: 'zero', or 'row0' as released
    eos: int = 2
    lookup: str = "gather"  # 'gather' (the truth) has whole tables on every device, 'exchange' moves the rows that are read: dina/tables.py
    row_multiple: int = 128  # stored rows per table are rounded up to this; 'exchange': a multiple of the number of devices
    init_std: float = 1.0

    @property
    def tables(self) -> int:
        """Number of tables."""
        return (self.order - 1) * self.splits


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """Depth transformer over the levels of one position."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    ffn_scale: int = 16  # hidden width of all levels together, in units of `width`
    class_multiple: int = 1  # stored classes per level are rounded up to this
    loss_chunk: int = 0  # rows per chunk of the level losses; 0: one chunk
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The trunk: `layers` logical layers, each two attentions, two dense blocks and one sparse block."""

    width: int = 192
    layers: int = 3
    ffn: int = 384
    norm_eps: float = 1e-5
    dtype: str = "float32"  # inputs of matrix products; norms, softmax, router and sums stay float32
    # 'none' keeps all that a layer's backward pass needs, gathered weights too; 'full' recomputes the layer from its input;
    # 'attention', 'experts' and 'attention+experts' too, but for the outputs that they name
    remat: str = "none"
    unroll: int = 3  # logical layers per iteration of the loop over stacked parameters
    attention: AttentionConfig = AttentionConfig()
    experts: ExpertsConfig = ExpertsConfig()


EXCHANGES = ("all_to_all", "ragged_all_to_all")  # dispatches that send tokens to the experts' devices
SECTIONS = {"ngram": NgramConfig(), "visual_head": DepthConfig(), "audio_head": DepthConfig()}
CHOICES = {"dispatch": ("dense", "gather", "ragged", *EXCHANGES), "balance": ("dynamic", "sign"), "variant": ("hf", "oe", "serving"),
           "blank": ("zero", "row0"), "lookup": ("gather", "exchange"),
           "decode": ("absorbed", "expanded"), "remat": ("none", "full", "attention", "experts", "attention+experts"), "dtype": ("float32", "bfloat16")}


def default_config() -> ml_collections.ConfigDict:
    """The laptop model: the fields of `BackboneConfig`, with sections `ngram`, `visual_head`, `audio_head`."""
    tree = dataclasses.asdict(BackboneConfig())
    tree.update({name: dataclasses.asdict(section) for name, section in SECTIONS.items()})
    return ml_collections.ConfigDict(tree)


def parse(cls, node: typing.Mapping[str, typing.Any]):
    """Reads the dataclass `cls` from a config node; keys that `cls` does not have are left for other owners.

    Args:
        cls: BackboneConfig, NgramConfig or DepthConfig.
        node: `config.model` or one of its sections.

    Raises:
        InputError: a missing field, or a string option that does not exist.
    """
    types = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in node:
            raise InputError(f"{cls.__name__}: config key {field.name!r} is missing")
        value = node[field.name]
        if field.name in CHOICES and value not in CHOICES[field.name]:
            raise InputError(f"{cls.__name__}.{field.name} is {value!r}; known: {', '.join(CHOICES[field.name])}")
        nested = dataclasses.is_dataclass(types[field.name])
        values[field.name] = parse(types[field.name], value) if nested else types[field.name](value)
    return cls(**values)
