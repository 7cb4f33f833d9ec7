"""Names and layouts of the released visual tokenizer and its detokenizers (tokenizers.md A).

Encoder, bridge and quantizer stand in the main checkpoint under `model.visual_tokenizer`, pixel decoder and refiner in a
file of their own. Our stacks of layers are one tensor each, with the layer first.

Dimensions (a 2 behind a letter: the same once more): of encoder and bridge d width, q queries, keys and values together,
f hidden, c t y x a patch, m four patches, z a cell's feature; of the quantizer K codes of a level, P padding rows, v code
vector; of pixel decoder and refiner w width, f hidden, u four patches, o values of a patch or latent token, k head width,
g key-value heads' widths, s sinusoids, e time embedding, p projected code vector, r references, a modulation; of the
autoencoder cN channels of level N, l latent channels, j mean and variance, i image channels, y x a 3x3 kernel, n m a 1x1.
"""

from __future__ import annotations

from dina.convert.rules import Rule
from dina.quantize.rvq import RVQConfig
from dina.vision.bridge import MERGED, VisionEncoder
from dina.vision.kl import KLAutoencoder
from dina.vision.pixel_decoder import CHILDREN, PixelDecoder
from dina.vision.preprocess import PATCH, PATCH_DIM, TEMPORAL
from dina.vision.refiner import TIME_FREQUENCIES, Refiner

TOKENIZER = "model.visual_tokenizer."
BOOKS = "visual_bridge_model.quantizer.quantize.codebooks.{level}"
ENCODER, QUANTIZER, DECODER, REFINER = (f"params/{part}" for part in ("vision_encoder", "vision_quantizer", "pixel_decoder", "refiner"))


def _dense(ours: str, theirs: str, wide: str, narrow: str, bias: bool = True) -> list[Rule]:
    """A dense layer from `narrow` to `wide`."""
    kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", f"{wide} {narrow} -> {narrow} {wide}")
    return [kernel, Rule(f"{ours}/bias", f"{theirs}.bias", f"{wide} -> {wide}")] if bias else [kernel]


def _scale(ours: str, theirs: str, width: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight", f"{width} -> {width}")]


def _scale_and_bias(ours: str, theirs: str, width: str) -> list[Rule]:
    return [*_scale(ours, theirs, width), Rule(f"{ours}/bias", f"{theirs}.bias", f"{width} -> {width}")]


def encoder(prefix: str = TOKENIZER) -> list[Rule]:
    """Vision transformer and bridge."""
    return [*tower(f"{prefix}visual_model"), *bridge(f"{prefix}visual_bridge_model.bridge")]


def tower(model: str) -> list[Rule]:
    """The vision transformer under the name `model`; Qwen2.5-VL has the same tensors."""
    vit, mine, block = f"{ENCODER}/vit", f"{ENCODER}/vit/blocks", f"{model}.blocks.{{layer}}"
    return [
        Rule(f"{vit}/patch_embed/kernel", f"{model}.patch_embed.proj.weight", "d c t y x -> (c t y x) d"),
        *_scale(f"{mine}/norm1", f"{block}.norm1", "d"),
        *_scale(f"{mine}/norm2", f"{block}.norm2", "d"),
        *_dense(f"{mine}/qkv", f"{block}.attn.qkv", "q", "d"),
        *_dense(f"{mine}/proj", f"{block}.attn.proj", "d", "d2"),
        *_dense(f"{mine}/gate", f"{block}.mlp.gate_proj", "f", "d"),
        *_dense(f"{mine}/up", f"{block}.mlp.up_proj", "f", "d"),
        *_dense(f"{mine}/down", f"{block}.mlp.down_proj", "d", "f"),
    ]


def bridge(name: str) -> list[Rule]:
    """The bridge; Qwen2.5-VL calls it the merger."""
    ours = f"{ENCODER}/bridge"
    return [*_scale(f"{ours}/ln_q", f"{name}.ln_q", "d"), *_dense(f"{ours}/fc1", f"{name}.mlp.0", "m", "m2"),
            *_dense(f"{ours}/fc2", f"{name}.mlp.2", "z", "m")]  # fmt: skip


def encoder_sizes(module: VisionEncoder) -> tuple[dict, dict]:
    """(counts, sizes) of `encoder`, `tower` and `bridge`."""
    d = module.vit.width
    sizes = {"d": d, "d2": d, "q": 3 * d, "f": module.vit.ff, "c": 3, "t": TEMPORAL, "y": PATCH, "x": PATCH}
    return {"layer": module.vit.depth}, sizes | {"m": MERGED * d, "m2": MERGED * d, "z": module.bridge.out_dim}


def quant_conv(prefix: str = TOKENIZER) -> list[Rule]:
    """The perceptron before the quantizer."""
    ours, theirs = f"{QUANTIZER}/quant_conv", f"{prefix}visual_bridge_model.quantizer.quant_conv"
    return [*_scale_and_bias(f"{ours}/norm", f"{theirs}.0", "z"), *_dense(f"{ours}/fc1", f"{theirs}.1", "z", "z2"),
            *_dense(f"{ours}/fc2", f"{theirs}.3", "v", "z")]  # fmt: skip


def codebooks(cfg: RVQConfig, prefix: str = TOKENIZER) -> list[Rule]:
    """Codes and the row below them, which is never searched. A shared book is stored once per level."""
    return [_book(cfg, f"{path}/vision_quantizer/{ours}", f"{prefix}{BOOKS}.embed", axes, cut=("K", "P"))
            for path, ours, axes in (("stats", "codebook", "K v -> K v"), ("carried", "padding", "P v -> P v"))]  # fmt: skip


def averages(cfg: RVQConfig, prefix: str = TOKENIZER) -> list[Rule]:
    """The moving averages behind the codes."""
    return [_book(cfg, f"stats/vision_quantizer/{ours}", f"{prefix}{BOOKS}.{name}", axes)
            for ours, name, axes in (("sum", "embed_ema", "K v -> K v"), ("count", "cluster_size_ema", "K -> K"))]  # fmt: skip


def _book(cfg: RVQConfig, ours: str, theirs: str, axes: str, cut: tuple[str, ...] = ()) -> Rule:
    """What a level has of its own in the release; a shared one is the same in all levels there, and one of ours."""
    if cfg.codebook == "shared":
        return Rule(f"{ours}/0", theirs, axes, exact=True, cut=cut, copies="level")
    return Rule(f"{ours}/{{level}}", theirs, axes, by="level", exact=True, cut=cut)


def quantizer_sizes(cfg: RVQConfig, width: int) -> tuple[dict, dict]:
    """(counts, sizes) of `quant_conv`, `codebooks` and `averages` behind features of `width`."""
    return {"level": cfg.levels}, {"z": width, "z2": width, "v": cfg.dim, "K": cfg.sizes, "P": 1}


def pixel_decoder(module: PixelDecoder, prefix: str = "image_decoder") -> list[Rule]:
    """The pixel decoder; what an option leaves out has no rule."""
    mine, layer = f"{DECODER}/layers", f"{prefix}.encoder.layers.{{layer}}"
    rules = [
        *_dense(f"{DECODER}/post_quant", f"{prefix}.post_quant_conv", "w", "v"),
        *_scale(f"{DECODER}/post_quant_norm", f"{prefix}.post_quant_norm", "w"),
        *_scale(f"{DECODER}/unmerge_norm", f"{prefix}.patch_unmerger.ln_q", "w"),
        *_dense(f"{DECODER}/unmerge1", f"{prefix}.patch_unmerger.mlp.0", "u", "w"),
        *_dense(f"{DECODER}/unmerge2", f"{prefix}.patch_unmerger.mlp.2", "u", "u2"),
        *_scale(f"{DECODER}/norm_in", f"{prefix}.norm_in", "w"),
        *_scale(f"{mine}/norm1", f"{layer}.layer_norm1", "w"),
        *_scale(f"{mine}/norm2", f"{layer}.layer_norm2", "w"),
        *_dense(f"{mine}/out", f"{layer}.self_attn.out_proj", "w", "w2"),
        *_scale(f"{DECODER}/norm_out", f"{prefix}.norm_out", "w"),
        *_dense(f"{DECODER}/head1", f"{prefix}.decoder_head.0", "f", "w"),
        *_dense(f"{DECODER}/head2", f"{prefix}.decoder_head.2", "o", "f"),
    ]
    for part in "qkv":
        rules += _dense(f"{mine}/{part}", f"{layer}.self_attn.{part}_proj", "w", "w2", bias=part in module.qkv_bias)
    wide = {"w1": "w1", "w2": "w2"} if module.ffn == "swiglu" else {"w1": "fc1"}
    for ours, theirs in wide.items():
        rules += _dense(f"{mine}/{ours}", f"{layer}.mlp.{theirs}", "f", "w")
    rules += _dense(f"{mine}/w3", f"{layer}.mlp.{'w3' if module.ffn == 'swiglu' else 'fc2'}", "w", "f")
    if module.norms == "sub":
        rules += [*_scale(f"{mine}/norm_attn", f"{layer}.self_attn.inner_attn_ln", "w"), *_scale(f"{mine}/norm_ff", f"{layer}.mlp.ffn_ln", "f")]
    return rules


def pixel_decoder_sizes(module: PixelDecoder, dim: int) -> tuple[dict, dict]:
    """(counts, sizes) of `pixel_decoder` behind code vectors of `dim`."""
    w = module.width
    return {"layer": module.depth}, {"w": w, "w2": w, "v": dim, "u": CHILDREN * w, "u2": CHILDREN * w, "f": module.ff, "o": PATCH_DIM}


def refiner(module: Refiner, prefix: str = "image_refiner", layers: str = "layers") -> list[Rule]:
    """The refiner's transformer, with the projection of the code vectors where it has one.

    `layers`: some readers of the release call the joint layers `transformer_blocks` (tokenizers.md A.7).
    """
    ours, theirs = f"{REFINER}/dit", f"{prefix}.base_transformer"
    embed = f"{theirs}.time_caption_embed"
    rules = [
        *_dense(f"{ours}/x_embedder", f"{theirs}.x_embedder", "w", "o"),
        *_dense(f"{ours}/ref_embedder", f"{theirs}.ref_image_patch_embedder", "w", "o"),
        Rule(f"{ours}/image_index_embedding", f"{theirs}.image_index_embedding", "r w -> r w"),
        *_dense(f"{ours}/time1", f"{embed}.timestep_embedder.linear_1", "e", "s"),
        *_dense(f"{ours}/time2", f"{embed}.timestep_embedder.linear_2", "e", "e2"),
        *_scale(f"{ours}/caption_norm", f"{embed}.caption_embedder.0", "p"),
        *_dense(f"{ours}/caption_embedder", f"{embed}.caption_embedder.1", "w", "p"),
        *_dense(f"{ours}/modulate_out", f"{theirs}.norm_out.linear_1", "w", "e"),
        *_dense(f"{ours}/out", f"{theirs}.norm_out.linear_2", "o", "w"),
    ]
    if module.cond_dim:
        rules += _dense(f"{ours}/cond_proj", f"{prefix}.cond_proj", "p", "v")
    rules += _blocks(f"{ours}/context_refiner", f"{theirs}.context_refiner.{{few}}", "none")
    for mine, name in (("noise_refiner", "noise_refiner.{few}"), ("ref_refiner", "ref_image_refiner.{few}"), ("layers", f"{layers}.{{layer}}")):
        rules += _blocks(f"{ours}/{mine}", f"{theirs}.{name}", "time")
    return rules


def _blocks(ours: str, theirs: str, modulation: str) -> list[Rule]:
    first = "norm1.norm" if modulation == "time" else "norm1"
    rules = [
        *_dense(f"{ours}/attn/to_q", f"{theirs}.attn.to_q", "w", "w2", bias=False),
        *_dense(f"{ours}/attn/to_k", f"{theirs}.attn.to_k", "g", "w", bias=False),
        *_dense(f"{ours}/attn/to_v", f"{theirs}.attn.to_v", "g", "w", bias=False),
        *_dense(f"{ours}/attn/to_out", f"{theirs}.attn.to_out.0", "w", "w2", bias=False),
        *_scale(f"{ours}/attn/norm_q", f"{theirs}.attn.norm_q", "k"),
        *_scale(f"{ours}/attn/norm_k", f"{theirs}.attn.norm_k", "k"),
        *_dense(f"{ours}/linear_1", f"{theirs}.feed_forward.linear_1", "f", "w", bias=False),
        *_dense(f"{ours}/linear_2", f"{theirs}.feed_forward.linear_2", "w", "f", bias=False),
        *_dense(f"{ours}/linear_3", f"{theirs}.feed_forward.linear_3", "f", "w", bias=False),
        *_scale(f"{ours}/norm1", f"{theirs}.{first}", "w"),
    ]
    for name in ("norm2", "ffn_norm1", "ffn_norm2"):
        rules += _scale(f"{ours}/{name}", f"{theirs}.{name}", "w")
    return rules + (_dense(f"{ours}/modulate", f"{theirs}.norm1.linear", "a", "e") if modulation == "time" else [])


def refiner_sizes(module: Refiner, dim: int) -> tuple[dict, dict]:
    """(counts, sizes) of `refiner` behind code vectors of `dim`."""
    w, k, e = module.width, module.width // module.heads, module.time_width
    sizes = {"w": w, "w2": w, "o": module.token_dim, "r": module.references, "e": e, "e2": e, "s": 2 * TIME_FREQUENCIES, "a": 4 * w,
             "v": dim, "p": module.cond_dim or dim, "k": k, "g": module.kv_heads * k, "f": module.ff}  # fmt: skip
    return {"few": module.refiner_layers, "layer": module.depth}, sizes


def autoencoder(module: KLAutoencoder, prefix: str = "image_refiner.vae") -> list[Rule]:
    """The latent space's encoder and decoder; levels differ in channels, so each layer has its own tensors."""
    ours, last = f"{REFINER}/autoencoder", len(module.channels) - 1
    top, rules = f"c{last}", []
    for side, first, bottom, (begin, end) in (("encoder", "c0", top, "ij"), ("decoder", top, "c0", "li")):
        mine, theirs = f"{ours}/{side}", f"{prefix}.{side}"
        rules += _conv(f"{mine}/conv_in", f"{theirs}.conv_in", first, begin)
        rules += _middle(f"{mine}/mid", f"{theirs}.mid_block", top)
        rules += _scale_and_bias(f"{mine}/norm_out", f"{theirs}.conv_norm_out", bottom)
        rules += _conv(f"{mine}/conv_out", f"{theirs}.conv_out", end, bottom)
    for level in range(last + 1):
        # The released decoder counts its levels from the deepest.
        sides = (("encoder/down", f"encoder.down_blocks.{level}", level - 1, 0), ("decoder/up", f"decoder.up_blocks.{last - level}", level + 1, 1))
        for side, block, neighbour, more in sides:
            mine, theirs = f"{ours}/{side}_{level}", f"{prefix}.{block}"
            for layer in range(module.layers + more):
                before = neighbour if layer == 0 and 0 <= neighbour <= last else level
                shortcut = module.channels[before] != module.channels[level]
                rules += _resnet(f"{mine}_{layer}", f"{theirs}.resnets.{layer}", f"c{before}", f"c{level}", shortcut)
        if level < last:
            rules += _conv(f"{ours}/encoder/down_{level}", f"{prefix}.encoder.down_blocks.{level}.downsamplers.0.conv", f"c{level}", f"c{level}_2")
        if level:
            rules += _conv(f"{ours}/decoder/up_{level}", f"{prefix}.decoder.up_blocks.{last - level}.upsamplers.0.conv", f"c{level}", f"c{level}_2")
    if module.point_convs == "both":
        rules += [*_conv(f"{ours}/encoder/point", f"{prefix}.quant_conv", "j", "j2", "n m"),
                  *_conv(f"{ours}/decoder/point", f"{prefix}.post_quant_conv", "l", "l2", "n m")]  # fmt: skip
    return rules


def _conv(ours: str, theirs: str, wide: str, narrow: str, kernel: str = "y x") -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", f"{wide} {narrow} {kernel} -> {kernel} {narrow} {wide}"),
            Rule(f"{ours}/bias", f"{theirs}.bias", f"{wide} -> {wide}")]  # fmt: skip


def _resnet(ours: str, theirs: str, narrow: str, wide: str, has_shortcut: bool) -> list[Rule]:
    rules = [
        *_scale_and_bias(f"{ours}/norm1", f"{theirs}.norm1", narrow),
        *_conv(f"{ours}/conv1", f"{theirs}.conv1", wide, f"{narrow}_2"),
        *_scale_and_bias(f"{ours}/norm2", f"{theirs}.norm2", wide),
        *_conv(f"{ours}/conv2", f"{theirs}.conv2", wide, f"{wide}_2"),
    ]
    return rules + (_conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut", wide, narrow, "n m") if has_shortcut else [])


def _middle(ours: str, theirs: str, width: str) -> list[Rule]:
    attention = f"{theirs}.attentions.0"
    rules = _scale_and_bias(f"{ours}/norm", f"{attention}.group_norm", width)
    for mine, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
        rules += _dense(f"{ours}/{mine}", f"{attention}.{name}", width, f"{width}_2")
    for i in range(2):
        rules += _resnet(f"{ours}/resnet_{i}", f"{theirs}.resnets.{i}", width, width, False)
    return rules


def autoencoder_sizes(module: KLAutoencoder) -> tuple[dict, dict]:
    """(counts, sizes) of `autoencoder`."""
    sizes = {"i": 3, "l": module.latent, "l2": module.latent, "j": 2 * module.latent, "j2": 2 * module.latent, "y": 3, "x": 3, "n": 1, "m": 1}
    for level, channels in enumerate(module.channels):
        sizes |= {f"c{level}": channels, f"c{level}_2": channels}
    return {}, sizes
