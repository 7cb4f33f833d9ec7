"""Tables of the visual tokenizer: both directions, all of our parameters, the release's own counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.convert import rules, visual
from dina.optim import flatten
from dina.quantize import rvq
from dina.vision import kl, refine
from dina.vision.bridge import Bridge, VisionEncoder
from dina.vision.encoder import VisionTransformer
from dina.vision.pixel_decoder import PixelDecoder
from dina.vision.refiner import Refiner
from dina.vision.tokenizer import QuantConv


def encoder(width=8, depth=2, heads=2, ff=6, out=5):
    return VisionEncoder(VisionTransformer(width, depth, heads, ff, (1,), 64, parent=None), Bridge(out, parent=None))


def refiner(width=24, depth=2, few=1, heads=4, kv_heads=2, ff=10, cond=7, token=8, **options):
    return Refiner(width, depth, few, heads, kv_heads, ff, cond, 5, token, parent=None, **options)


SEPARATE, SHARED = rvq.RVQConfig((4, 3), 5), rvq.RVQConfig((4, 4, 4), 5, codebook="shared")
LATENT = kl.KLAutoencoder((4, 8), 1, 3, 2, point_convs="both")
PLAIN = PixelDecoder(16, 2, 2, 12, visual.PATCH_DIM, norms="pre", ffn="gelu", qkv_bias="qkv", parent=None)
SUB = PixelDecoder(16, 2, 2, 12, visual.PATCH_DIM, parent=None)
quantizer = lambda cfg: ([*visual.quant_conv(), *visual.codebooks(cfg), *visual.averages(cfg)], *visual.quantizer_sizes(cfg, 6))
TABLES = {
    "encoder": (visual.encoder(), *visual.encoder_sizes(encoder())),
    "separate": quantizer(SEPARATE),
    "shared": quantizer(SHARED),
    "plain": (visual.pixel_decoder(PLAIN), *visual.pixel_decoder_sizes(PLAIN, 5)),
    "sub": (visual.pixel_decoder(SUB), *visual.pixel_decoder_sizes(SUB, 5)),
    "refiner": (visual.refiner(refiner()), *visual.refiner_sizes(refiner(), 5)),
    "latent": (visual.autoencoder(LATENT), *visual.autoencoder_sizes(LATENT)),
}


def pack():
    integers = jnp.ones((1, 4), jnp.int32)
    names = dict.fromkeys(("segment", "row", "col", "window"), integers)
    return names | {"patches": jnp.zeros((1, 4, visual.PATCH_DIM)), "grid": jnp.ones((1, 1, 2), jnp.int32)}


def initial(name):
    """(our path, what makes the parameters there)."""
    key, one = jax.random.key(0), jnp.ones((1, 1))
    if name == "refiner":
        x, layout = jnp.zeros((1, 4, 8)), refine.token_layout(1, 4, 4)
        args = (x, one, jnp.zeros((1, 2, 5)), x, refine.cell_pack(1, 2), layout, {"cond": one, "ref": one})
        return "params/refiner/dit", functools.partial(refiner().init, key, *args)
    made = {
        "encoder": ("params/vision_encoder", lambda: encoder().init(key, pack())),
        "separate": ("params/vision_quantizer/quant_conv", lambda: QuantConv(5).init(key, jnp.zeros((1, 6)))),
        "plain": ("params/pixel_decoder", lambda: PLAIN.init(key, jnp.zeros((1, 1, 5)), pack())),
        "sub": ("params/pixel_decoder", lambda: SUB.init(key, jnp.zeros((1, 1, 5)), pack())),
    }
    return made[name]


def released(name):
    """(our pieces by path, random tensors under the released names)."""
    groups, random = rules.by_path(rules.pieces(*TABLES[name])), np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for group in groups.values():
        for piece in group:
            first = next((p for p in group if p.slices == piece.slices), piece)
            fresh = tensors.get(piece.name, random.normal(size=piece.shape).astype(np.float32))
            tensors[piece.name] = tensors[first.name] if piece.copy else fresh
    return groups, tensors


@pytest.mark.parametrize("name", TABLES)
def test_export_of_an_import_is_equal(name):
    groups, tensors = released(name)
    again = rules.disassemble(groups, rules.assemble_all(groups, tensors.__getitem__))
    assert again.keys() == tensors.keys()
    for tensor in tensors:
        np.testing.assert_array_equal(again[tensor], tensors[tensor])


@pytest.mark.parametrize("name", ["encoder", "separate", "plain", "sub", "refiner"])
def test_the_table_fills_all_parameters_and_no_others(name):
    groups, tensors = released(name)
    path, init = initial(name)
    shapes = {f"{path}/{at}": leaf.shape for at, leaf in flatten(jax.eval_shape(init)["params"]).items()}
    filled = {at: array.shape for at, array in rules.assemble_all(groups, tensors.__getitem__).items() if at.startswith("params/")}
    assert filled == shapes


def test_statistics_and_latent_space_have_the_modules_shapes():
    for name, cfg in (("separate", SEPARATE), ("shared", SHARED)):
        groups, tensors = released(name)
        filled = {at: array.shape for at, array in rules.assemble_all(groups, tensors.__getitem__).items() if at.startswith("stats/")}
        stats = flatten(rvq.init_stats(cfg, jax.random.key(0)))
        assert filled == {f"stats/vision_quantizer/{at}": leaf.shape for at, leaf in stats.items()}
    groups, tensors = released("latent")
    ours = rules.assemble_all(groups, tensors.__getitem__)
    image, latent = jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 2, 2, 3))
    for side, module, x in (("encoder", kl.Encoder(LATENT), image), ("decoder", kl.Decoder(LATENT), latent)):
        shapes = flatten(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
        root = f"params/refiner/autoencoder/{side}/"
        assert {at: leaf.shape for at, leaf in shapes.items()} == {at[len(root):]: a.shape for at, a in ours.items() if at.startswith(root)}


def test_a_level_with_another_book_than_the_shared_one_is_named():
    groups, tensors = released("shared")
    name = "model.visual_tokenizer.visual_bridge_model.quantizer.quantize.codebooks.2.embed"
    tensors[name] = tensors[name] + np.eye(5)
    with pytest.raises(InputError, match=r"codebooks.2.embed differs from .*codebooks.0.embed"):
        rules.assemble_all(groups, tensors.__getitem__)


def test_counts_are_those_of_the_release():
    """Tensors and values of the published files (tokenizers.md section 0): every shape and name of the big model is right."""
    big = {
        "encoder": (encoder(1280, 32, 16, 3420, 3584), visual.encoder, visual.encoder_sizes),
        "decoder": (PixelDecoder(1024, 32, 16, 2730, visual.PATCH_DIM, parent=None), visual.pixel_decoder, visual.pixel_decoder_sizes),
        "refiner": (refiner(2520, 32, 2, 21, 7, 10240, 2048, 64), visual.refiner, visual.refiner_sizes),
        "latent": (kl.KLAutoencoder(), visual.autoencoder, visual.autoencoder_sizes),
    }
    found = {}
    for name, (module, table, sizes) in big.items():
        made = table() if name == "encoder" else table(module)
        found[name] = list(rules.pieces(made, *(sizes(module, 3584) if name in ("decoder", "refiner") else sizes(module))))
    values = lambda pieces: sum(math.prod(piece.shape) for piece in pieces)
    vit = [piece for piece in found["encoder"] if ".visual_model." in piece.name]
    assert (len(vit), len(found["encoder"]) - len(vit), values(vit)) == (385, 5, 631_975_680)
    assert (len(found["decoder"]), values(found["decoder"])) == (558, 433_743_858)
    assert values(found["latent"]) == 83_819_683
    assert (len(found["refiner"]) + len(found["latent"]), values(found["refiner"]) + values(found["latent"])) == (828, 4_058_323_163)
    book = rvq.RVQConfig((16384,) * 8, 3584, codebook="shared")
    table = [*visual.quant_conv(), *visual.codebooks(book), *visual.averages(book)]
    assert len({piece.name for piece in rules.pieces(table, *visual.quantizer_sizes(book, 3584))}) == 30
