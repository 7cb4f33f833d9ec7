"""The stamps data set on a small fake package tree: what is taken, what is left out and why, and who may be in which split."""

import io
import json

import ml_collections
import numpy as np
import PIL.Image
import pytest

from dina.config import InputError
from dina.data import packages, pictures, sources, stamps

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{more}{rects}</svg>'
WORK = ('<metadata xmlns:c="http://web.resource.org/cc/" xmlns:d="http://purl.org/dc/elements/1.1/"><c:Work>'
        '<d:title>{title}</d:title><d:description>{more}</d:description>'
        '<d:creator><c:Agent><d:title>An author</d:title></c:Agent></d:creator>'
        '<c:license resource="x/{licence}"/></c:Work></metadata>')


def _drawing(seed, title="", more="", licence="PublicDomain", w=40, h=40):
    """A mosaic, so that no two look alike."""
    rng = np.random.default_rng(seed)
    rects = "".join(f'<rect x="{x}" y="{y}" width="8" height="8" fill="#{rng.integers(1 << 23):06x}"/>'
                    for x in range(0, w, 8) for y in range(0, h, 8))
    return SVG.format(w=w, h=h, rects=rects, more=WORK.format(title=title, more=more, licence=licence) if title else "")


def _photo(seed, size=(48, 60), file_format="PNG"):
    blobs = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 240, (7, 7, 3), np.uint8)).resize(size, 3)
    out = io.BytesIO()
    blobs.save(out, file_format)
    return out.getvalue()


def _write(root, files):
    for name, content in files.items():
        path = root / "usr/share" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder per package, as `packages.fetch` gives it."""
    root = tmp_path_factory.mktemp("tree")
    at = "tuxpaint/stamps"
    stamp = lambda name, number, caption: {f"{at}/{name}.png": _photo(number), f"{at}/{name}.txt": caption}
    tux = {}
    for i in range(40):
        tux |= stamp(f"animals/beast{i}", i, f"A beast called {chr(97 + i % 26)}{i // 26}x.\nfr.utf8=Une bete.\n")
    for i in range(3):
        tux |= stamp(f"animals/owl{i}", 100 + i, f"{('An owl.', 'The Owl', 'owl 2')[i]}\n")
    tux["tuxpaint/stamps/animals/beast0.svg"] = _drawing(200)  # has its PNG and its caption beside it
    tux |= stamp("copy", 1, "Another name for beast 1.")
    tux["tuxpaint/stamps/animals/owl0_mirror.png"] = _photo(103)
    tux |= stamp("broken", 104, "Broken.")
    tux["tuxpaint/stamps/broken.png"] = tux["tuxpaint/stamps/broken.png"][:900]
    tux |= {"tuxpaint/stamps/tiny.png": _photo(105, (20, 60)), "tuxpaint/stamps/tiny.txt": "Tiny."}
    tux |= {"tuxpaint/stamps/long.png": _photo(106, (300, 40)), "tuxpaint/stamps/long.txt": "Long."}
    _write(root / "tuxpaint", tux)
    at = "games/pysiogame/res/images/art4apps"
    art = {f"{at}/{group}/wild_thing_{chr(97 + i % 26)}{i // 26}x.jpg": _photo(300 + i, file_format="JPEG")
           for i, group in enumerate(["animals"] * 20 + ["food"] * 20)}
    art[f"{at}/animals/owl.jpg"] = _photo(340, file_format="JPEG")
    _write(root / "art4apps", art)
    clips = {f"openclipart/svg/{pictures.CLIPART[i % 14]}/clip{i}.svg": _drawing(400 + i, f"Clip {chr(97 + i)}z")
             for i in range(20)}
    clips["openclipart/svg/food/bad_title.svg"] = _drawing(420, "me@mail.org", "A good description")
    clips["openclipart/svg/food/no_title.svg"] = _drawing(421, "123", "www.site.org")
    clips["openclipart/svg/food/mine.svg"] = _drawing(422, "Mine", licence="by-nc")
    clips["openclipart/svg/food/icon_bun.svg"] = _drawing(423, "Bun")
    clips["openclipart/svg/food/torn.svg"] = _drawing(424, "Torn")[:300]
    clips["openclipart/svg/food/word.svg"] = _drawing(425, "Word").replace("</svg>", "<text>a</text></svg>")
    clips["openclipart/svg/logos/logo.svg"] = _drawing(426, "A logo")
    _write(root / "openclipart", clips)
    (root / "openclipart/usr/share/openclipart/svg/food/link.svg").symlink_to("icon_bun.svg")
    return root


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    """(config, data_dir) of a prepared data set."""
    config = ml_collections.ConfigDict({"data": stamps.default_config()})
    config.data.update({"side": 64, "native_pixels": 56 * 56, "shares": {"valid": 0.1, "test": 0.2}})
    data_dir = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        _use(tree, patch)
        sources.prepare(config, data_dir)
    return config, data_dir


def _use(tree, patch):
    """The fake packages, and two of the photographs."""
    names = {package.name: key for key, package in pictures.DRAWN.items()}
    patch.setattr(packages, "fetch", lambda package, data_dir: tree / names[package.name])
    few = {name: (*rest, {file: files[file] for file in list(files)[:1]}) for name, (*rest, files) in pictures.PHOTOS.items()}
    patch.setattr(pictures, "PHOTOS", few)


def _all(made):
    return {split: sources.load_all(made[0], "images", split, made[1]) for split in stamps.SPLITS}


def test_columns_have_what_training_wants(made):
    columns = _all(made)["train"]
    assert set(columns) == {"image", "caption", "source", "native", "split"}
    for image, native in zip(columns["image"], columns["native"], strict=True):
        assert image.dtype == np.uint8 and image.shape[2] == 3 and max(image.shape) <= 66
        assert native == (min(image.shape[:2]) >= 42)
    captions = dict(zip(columns["source"], columns["caption"]))
    for split in _all(made).values():
        captions |= dict(zip(split["source"], split["caption"]))
    assert captions["tuxpaint/animals/beast3"] == "A beast called d0x."
    assert captions["art4apps/food/wild_thing_z0x"] == "wild thing z0x"
    assert captions["openclipart/food/bad_title"] == "A good description"
    assert "openclipart/logos/logo" not in captions


def test_a_drawing_is_taken_before_the_pixels_of_it(made):
    image = next(image for columns in _all(made).values() for image, source in zip(columns["image"], columns["source"])
                 if source == "tuxpaint/animals/beast0")
    assert image.shape[:2] == (64, 64)  # the PNG has 60x48


def test_what_is_left_out_is_counted_with_its_reason(made):
    manifest = stamps.manifest(*made)
    lines = json.loads((stamps.cache_path(*made) / "left_out.json").read_text())
    assert manifest["left_out"] == {reason: len(names) for reason, names in lines.items()}
    reasons = {name.split(":")[0]: reason for reason, names in lines.items() for name in names}
    assert reasons == {
        "tuxpaint/animals/beast0.png": "duplicate", "tuxpaint/copy": "duplicate", "tuxpaint/animals/owl0_mirror": "no caption",
        "tuxpaint/broken": "corrupt", "tuxpaint/tiny": "too small", "tuxpaint/long": "aspect ratio",
        "openclipart/food/no_title": "no caption", "openclipart/food/mine": "licence", "openclipart/food/icon_bun": "icon",
        "openclipart/food/torn": "corrupt", "openclipart/food/word": "text", "openclipart/food/link": "duplicate",
    }


def test_splits_share_neither_picture_nor_caption(made):
    split_of, pixels = {}, {}
    for split, columns in _all(made).items():
        for image, caption, source in zip(columns["image"], columns["caption"], columns["source"]):
            assert split_of.setdefault(pictures.normal_caption(caption), split) == split
            assert pixels.setdefault(image.tobytes(), source) == source
    owls = {split for split, columns in _all(made).items() for caption in columns["caption"] if "owl" in caption.lower()}
    assert len(owls) == 1


def test_every_split_has_its_share_of_every_package(made):
    manifest = stamps.manifest(*made)
    assert sum(manifest["counts"][split] for split in stamps.SPLITS) == 43 + 41 + 21
    for package, total in {"tuxpaint": 43, "art4apps": 41, "openclipart": 21}.items():
        for split, share in {"valid": 0.1, "test": 0.2}.items():
            # The owls are a group of two packages, four in all, and count where the first of them is.
            assert share * total - 5 < manifest["by_package"][split].get(package, 0) <= share * total + 3
    assert {source["licence"] for source in manifest["sources"]} >= {"GPL-2", "public domain"}


def test_photographs_are_a_split_of_their_own(made):
    columns = sources.load_all(made[0], "images", "photos", made[1])
    assert "scikit-image/astronaut" in columns["source"] and "scikit-learn/china" in columns["source"]
    assert max(columns["image"][columns["source"].index("scikit-image/astronaut")].shape) == 512
    assert all(native == 1 for native in columns["native"])


def test_the_same_again_and_another_key_for_another_seed(made, tree, tmp_path, monkeypatch):
    config = made[0].copy_and_resolve_references()
    _use(tree, monkeypatch)
    again = sources.prepare(config, tmp_path)
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (stamps.cache_path(*made), again))
    assert one | {"seconds": 0} == two | {"seconds": 0}
    for split, columns in _all(made).items():
        assert sources.load_all(config, "images", split, tmp_path)["source"] == columns["source"]
    config.data.seed = 1
    assert stamps.cache_path(config, tmp_path).name != again.name


def test_bad_options_are_named_and_leave_nothing(made, tree, tmp_path, monkeypatch):
    _use(tree, monkeypatch)
    config = made[0].copy_and_resolve_references()
    config.data.packages = ("tuxpaint", "photographs")
    with pytest.raises(InputError, match="data.packages"):
        sources.prepare(config, tmp_path)
    config.data.update({"packages": ("openclipart",), "limit": 4})
    with pytest.raises(InputError, match="4 pictures are too few"):
        sources.prepare(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_not_prepared_says_so(made, tmp_path):
    with pytest.raises(InputError, match="dina.data.stamps.prepare"):
        sources.open_source(made[0], "images", "test", tmp_path)
    with pytest.raises(InputError, match="speech.*must be one of images"):
        sources.open_source(made[0], "speech", "test", made[1])
