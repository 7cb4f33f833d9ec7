"""Names and layouts of the released audio tokenizer: encoder, quantizer, mel decoder, flow (tokenizers.md B, H).

All of it stands in the main checkpoint under `model.audio_tokenizer`. Position tables are sinusoids that our modules
compute themselves; they are carried along, as is the prenet's, which the release stores but never adds (quirk Q18).

Dimensions (a number behind a letter: the same once more): b mel bands that the encoder reads, d width of encoder and mel
decoder, f hidden, k kernel, p frames of a code, z a code's vector, K codes of a level, n positions, m mel bands that the
decoders predict, cN channels of the post-net's layer N; of the flow w width and h hidden of the prenet, g its first layer,
x what the estimator reads, e time embedding, lN channels of level N, jN twice that, a attention's width, iN and oN what the
feed-forward's first matrix gives and its second one takes; s is one.
"""

from __future__ import annotations

from dina.audio.encoder import AudioEncoder
from dina.audio.flow import ACTS, Flow
from dina.audio.mel_decoder import MelDecoder
from dina.convert.rules import Rule
from dina.quantize.rvq import RVQConfig

TOKENIZER = "model.audio_tokenizer."
BRIDGE = "audio_bridge_model"
ENCODER, QUANTIZER, DECODER, FLOW = (f"params/{part}" for part in ("audio_encoder", "audio_quantizer", "audio_decoder", "flow"))


def _dense(ours: str, theirs: str, wide: str, narrow: str, bias: bool = True) -> list[Rule]:
    """A dense layer from `narrow` to `wide`."""
    kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", f"{wide} {narrow} -> {narrow} {wide}")
    return [kernel, *_bias(ours, theirs, wide)] if bias else [kernel]


def _bias(ours: str, theirs: str, width: str) -> list[Rule]:
    return [Rule(f"{ours}/bias", f"{theirs}.bias", f"{width} -> {width}")]


def _norm(ours: str, theirs: str, width: str, bias: bool = True) -> list[Rule]:
    """A norm's scale, and its bias if it has one."""
    scale = Rule(f"{ours}/scale", f"{theirs}.weight", f"{width} -> {width}")
    return [scale, *_bias(ours, theirs, width)] if bias else [scale]


def _conv(ours: str, theirs: str, wide: str, narrow: str, kernel: str = "k") -> list[Rule]:
    """A convolution from `narrow` to `wide`."""
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", f"{wide} {narrow} {kernel} -> {kernel} {narrow} {wide}"), *_bias(ours, theirs, wide)]


def _transposed(ours: str, theirs: str, wide: str, narrow: str, kernel: str = "k") -> list[Rule]:
    """A transposed convolution, which is stored the other way round."""
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", f"{narrow} {wide} {kernel} -> {kernel} {narrow} {wide}"), *_bias(ours, theirs, wide)]


def _point(ours: str, theirs: str, wide: str, narrow: str) -> list[Rule]:
    """A convolution of width one, a dense layer of ours."""
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", f"{wide} {narrow} s -> {narrow} ({wide} s)"), *_bias(ours, theirs, wide)]


def _layer(ours: str, theirs: str, width: str, hidden: str, norm: str = "layer") -> list[Rule]:
    """A transformer layer of encoder, mel decoder or prenet; an RMS norm has no bias."""
    layered, again = norm == "layer", f"{width}2"
    rules = [*_norm(f"{ours}/attention_norm", f"{theirs}.self_attn_layer_norm", width, layered),
             *_norm(f"{ours}/ff_norm", f"{theirs}.final_layer_norm", width, layered),
             *_dense(f"{ours}/fc1", f"{theirs}.fc1", hidden, width), *_dense(f"{ours}/fc2", f"{theirs}.fc2", width, hidden)]  # fmt: skip
    for part in ("q", "k", "v", "out"):
        rules += _dense(f"{ours}/{part}", f"{theirs}.self_attn.{part}_proj", width, again, bias=part != "k")
    return rules


def positions(part: str, theirs: str, width: str) -> list[Rule]:
    """A table of sinusoids, carried along."""
    return [Rule(f"carried/{part}/positions", theirs, f"n {width} -> n {width}")]


def encoder(prefix: str = TOKENIZER) -> list[Rule]:
    """Encoder and bridge."""
    theirs, ours = f"{prefix}{BRIDGE}", f"{ENCODER}/bridge"
    # A convolution with k = stride is a product with the joined frames, the earlier one first.
    gated = [Rule(f"{ours}/{name}/kernel", f"{theirs}.{name}_proj.weight", "z d p -> (p d) z") for name in ("gate", "up")]
    return [*whisper(f"{prefix}audio_model"), *gated, *_dense(f"{ours}/down", f"{theirs}.down_proj", "z", "z2", bias=False),
            *_norm(f"{ours}/norm", f"{theirs}.layer_norm", "z")]  # fmt: skip


def whisper(model: str) -> list[Rule]:
    """The encoder under the name `model`, without its positions; Whisper has the same tensors."""
    ours = f"{ENCODER}/encoder"
    return [*_conv(f"{ours}/conv1", f"{model}.conv1", "d", "b"), *_conv(f"{ours}/conv2", f"{model}.conv2", "d", "d2"),
            *_layer(f"{ours}/layer{{layer}}", f"{model}.layers.{{layer}}", "d", "f"), *_norm(f"{ours}/norm", f"{model}.layer_norm", "d")]  # fmt: skip


def encoder_sizes(module: AudioEncoder, mels: int, places: int = 0) -> tuple[dict, dict]:
    """(counts, sizes) of `encoder`, `whisper` and their positions, of which the table has `places`."""
    e, pool = module.encoder, module.bridge.pool
    sizes = {"b": mels, "d": e.width, "d2": e.width, "f": e.ff, "k": 3, "p": pool, "n": places}
    return {"layer": e.layers}, sizes | {"z": pool * e.width, "z2": pool * e.width}


def codebooks(prefix: str = TOKENIZER) -> list[Rule]:
    """Codes of every level."""
    return [_book("codebook", "embed", "K z -> K z", prefix)]


def averages(prefix: str = TOKENIZER) -> list[Rule]:
    """The moving averages behind the codes."""
    return [_book("sum", "embed_avg", "K z -> K z", prefix), _book("count", "cluster_size", "K -> K", prefix)]


def _book(ours: str, name: str, axes: str, prefix: str) -> Rule:
    theirs = f"{prefix}{BRIDGE}.vq_list.{{level}}.codebook.{name}"
    return Rule(f"stats/audio_quantizer/{ours}/{{level}}", theirs, axes, by="level", exact=True)


def projection(prefix: str = TOKENIZER) -> list[Rule]:
    """Summed code vectors to the decoder's width."""
    return _dense(f"{QUANTIZER}/proj_decoder", f"{prefix}{BRIDGE}.proj_decoder", "d", "z")


def quantizer_sizes(cfg: RVQConfig, width: int) -> tuple[dict, dict]:
    """(counts, sizes) of `codebooks`, `averages` and `projection` before a decoder of `width`."""
    return {"level": cfg.levels}, {"z": cfg.dim, "K": cfg.sizes, "d": width}


def decoder(module: MelDecoder, prefix: str = TOKENIZER) -> list[Rule]:
    """The mel decoder with its two mels."""
    ours, theirs = f"{DECODER}/frames", f"{prefix}audio_decoder"
    rules = [*_transposed(f"{ours}/dconv1", f"{theirs}.dconv1.conv", "d", "d2"), *_norm(f"{ours}/dconv1/norm", f"{theirs}.dconv1.norm", "d"),
             *_layer(f"{ours}/layer{{layer}}", f"{theirs}.layers.{{layer}}", "d", "f"), *_norm(f"{ours}/norm", f"{theirs}.layer_norm", "d"),
             *_transposed(f"{DECODER}/head/dconv2", f"{theirs}.dconv2.conv", "m", "d"),
             *_norm(f"{DECODER}/head/dconv2/norm", f"{theirs}.dconv2.norm", "m")]  # fmt: skip
    post, layers = f"{DECODER}/head/post_net", f"{theirs}.post_net.layers"
    count = len(module.head.post_channels) - 1
    for i in range(count):  # convolution, norm and activation are numbered one after the other
        rules += _conv(f"{post}/conv{i}", f"{layers}.{3 * i}", f"c{i}", f"c{i - 1}_2" if i else "m", "k5")
        rules += _norm(f"{post}/norm{i}", f"{layers}.{3 * i + 1}", f"c{i}")
    return rules + _point(f"{post}/out", f"{layers}.{3 * count}", "m", f"c{count - 1}_2" if count else "m2")


def decoder_sizes(module: MelDecoder, places: int = 0) -> tuple[dict, dict]:
    """(counts, sizes) of `decoder` and its positions."""
    frames, head = module.frames, module.head
    sizes = {"d": frames.width, "d2": frames.width, "f": frames.ff, "k": frames.kernel, "k5": 5, "m": head.mels, "m2": head.mels, "s": 1}
    for i, channels in enumerate(head.post_channels[:-1]):
        sizes |= {f"c{i}": channels, f"c{i}_2": channels}
    return {"layer": frames.layers}, sizes | {"n": places}


def flow(module: Flow, prefix: str = TOKENIZER) -> list[Rule]:
    """Prenet and estimator."""
    theirs = f"{prefix}audio_flow_matching_decoder"
    return [*_prenet(f"{FLOW}/prenet", f"{theirs}.prenet"), *_estimator(module, f"{FLOW}/estimator", f"{theirs}.conditional_decoder")]


def _prenet(ours: str, theirs: str) -> list[Rule]:
    return [*_dense(f"{ours}/in1", f"{theirs}.in_mlp.0", "g", "d"), *_dense(f"{ours}/in2", f"{theirs}.in_mlp.2", "w", "g"),
            *_layer(f"{ours}/layer{{layer}}", f"{theirs}.transformer_layers.{{layer}}", "w", "h", norm="rms"),
            *_norm(f"{ours}/norm", f"{theirs}.final_norm", "w", bias=False),
            *_dense(f"{ours}/out", f"{theirs}.out_proj", "m", "w", bias=False)]  # fmt: skip


def _estimator(module: Flow, ours: str, theirs: str) -> list[Rule]:
    last = len(module.estimator.channels) - 1
    rules = [*_dense(f"{ours}/time1", f"{theirs}.time_mlp.linear_1", "e", "x"), *_dense(f"{ours}/time2", f"{theirs}.time_mlp.linear_2", "e", "e2")]
    stages = [(f"down{i}", f"down_blocks.{i}", i, f"l{i - 1}_2" if i else "x") for i in range(last + 1)]
    stages.append(("middle{middle}", "mid_blocks.{middle}", last, f"l{last}_2"))
    # The released way up counts its blocks from the deepest level.
    stages += [(f"up{i}", f"up_blocks.{last - i}", max(i - 1, 0), f"j{i}") for i in range(last + 1)]
    for name, block, level, before in stages:
        rules += _res(f"{ours}/{name}_res", f"{theirs}.{block}.0", f"l{level}", before)
        rules += _attention(f"{ours}/{name}_attention{{block}}", f"{theirs}.{block}.1.{{block}}", level)
    for i in range(last + 1):
        below = max(i - 1, 0)
        rules += _conv(f"{ours}/down{i}_conv", f"{theirs}.down_blocks.{i}.2{'.conv' if i < last else ''}", f"l{i}", f"l{i}_2")
        up, change = f"{theirs}.up_blocks.{last - i}.2", (f"l{below}", f"l{below}_2")
        rules += _transposed(f"{ours}/up{i}_conv", f"{up}.conv", *change, "k4") if i else _conv(f"{ours}/up0_conv", up, *change)
    rules += _causal(f"{ours}/final_block", f"{theirs}.final_block", "l0", "l0_2")
    return rules + _point(f"{ours}/final", f"{theirs}.final_proj", "m", "l0")


def _causal(ours: str, theirs: str, wide: str, narrow: str) -> list[Rule]:
    return [*_conv(f"{ours}/conv", f"{theirs}.block.0", wide, narrow), *_norm(f"{ours}/norm", f"{theirs}.block.2", wide)]


def _res(ours: str, theirs: str, wide: str, narrow: str) -> list[Rule]:
    return [*_causal(f"{ours}/block1", f"{theirs}.block1", wide, narrow), *_causal(f"{ours}/block2", f"{theirs}.block2", wide, f"{wide}_2"),
            *_dense(f"{ours}/time", f"{theirs}.mlp.1", wide, "e"), *_point(f"{ours}/shortcut", f"{theirs}.res_conv", wide, narrow)]  # fmt: skip


def _attention(ours: str, theirs: str, level: int) -> list[Rule]:
    width, inner = f"l{level}", "a"
    rules = [*_norm(f"{ours}/norm1", f"{theirs}.norm1", width), *_norm(f"{ours}/norm2", f"{theirs}.norm3", width),
             *_dense(f"{ours}/out", f"{theirs}.attn1.to_out.0", width, inner), *_dense(f"{ours}/fc1", f"{theirs}.ff.net.0.proj", f"i{level}", width),
             *_dense(f"{ours}/fc2", f"{theirs}.ff.net.2", width, f"o{level}")]  # fmt: skip
    for part in "qkv":
        rules += _dense(f"{ours}/{part}", f"{theirs}.attn1.to_{part}", inner, width, bias=False)
    return rules


def flow_sizes(module: Flow, width: int, places: int = 0) -> tuple[dict, dict]:
    """(counts, sizes) of `flow` and the prenet's positions, behind hidden frames of `width`."""
    p, e = module.prenet, module.estimator
    gated, _ = ACTS[e.act]
    sizes = {"d": width, "w": p.width, "w2": p.width, "g": 4 * p.width, "h": p.ff, "m": p.mels, "n": places, "k": 3, "k4": 4, "s": 1,
             "x": 2 * p.mels, "e": 4 * e.channels[0], "e2": 4 * e.channels[0], "a": e.heads * e.head_dim}  # fmt: skip
    for i, channels in enumerate(e.channels):
        sizes |= {f"l{i}": channels, f"l{i}_2": channels, f"j{i}": 2 * channels, f"i{i}": (8 if gated else 4) * channels, f"o{i}": 4 * channels}
    return {"layer": p.layers, "middle": e.middle, "block": e.blocks}, sizes
