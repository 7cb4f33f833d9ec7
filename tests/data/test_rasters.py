"""Pictures become pixels on white at the size asked for; what cannot is told with a reason."""

import io

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from dina.config import InputError
from dina.data import rasters
from dina.vision import preprocess

# A red bar of 40x10 on a page of 400x400.
PAGE = '<svg xmlns="http://www.w3.org/2000/svg" width="400" height="400"><rect x="300" y="20" width="40" height="10" {}/>{}</svg>'


def _svg(tmp_path, style='fill="red"', more=""):
    path = tmp_path / "a.svg"
    path.write_text(PAGE.format(style, more))
    return path


def _png(tmp_path, image):
    image.save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("fit, size", [("longest", (16, 64)), ("shortest", (64, 256)), ("area", (32, 128))])
def test_a_drawing_gets_the_size_without_its_page(tmp_path, fit, size):
    pixels = rasters.load(_svg(tmp_path), 64, fit)
    assert np.abs(np.subtract(pixels.shape[:2], size)).max() <= 0.05 * max(size)
    inside = pixels[2:-2, 2:-2].reshape(-1, 3)
    assert (inside == (255, 0, 0)).all()


@pytest.mark.parametrize("unit", ["pt", "mm", "%"])
def test_pages_measured_otherwise_are_drawn_too(tmp_path, unit):
    path = _svg(tmp_path)
    size = f'width="90{unit}" height="90{unit}" viewBox="0 0 400 400"'
    path.write_text(path.read_text().replace('width="400" height="400"', size))
    assert rasters.load(path, 64, "longest").shape[1] in range(60, 68)


def test_pixels_are_reduced_but_not_enlarged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    path = _png(tmp_path, PIL.Image.fromarray(noise))
    np.testing.assert_array_equal(rasters.load(path, 60, "longest"), noise)
    np.testing.assert_array_equal(rasters.load(path, 500, "longest"), noise)
    assert rasters.load(path, 30, "longest").shape == (20, 30, 3)
    assert rasters.load(path, 30, "shortest").shape == (30, 45, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white_and_empty_margins_are_cut(tmp_path, mode):
    image = PIL.Image.new("RGBA", (50, 40), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 30, 20))
    image.paste((0, 0, 0, 0), (15, 12, 25, 18))
    pixels = rasters.load(_png(tmp_path, image.convert(mode)), 100, "longest")
    assert pixels.shape == (10, 20, 3) and (pixels[0, 0] == 0).all() and (pixels[5, 10] == 255).all()


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 40 * 30).round().astype(np.uint16).reshape(30, 40)
    want = (ramp / 257).round().astype(np.uint8)[..., None].repeat(3, 2)
    path = _png(tmp_path, PIL.Image.fromarray(ramp))
    with PIL.Image.open(path) as image:
        assert image.mode.startswith("I")
        np.testing.assert_array_equal(rasters.on_white(image), want)
    np.testing.assert_array_equal(rasters.load(path, 40, "longest"), want)
    np.testing.assert_array_equal(rasters.on_white(PIL.Image.fromarray(ramp.astype(np.int32))), want)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_as_their_notes_say(tmp_path, orientation):
    noise = np.random.default_rng(0).integers(0, 200, (20, 30, 3), np.uint8)
    notes = PIL.Image.Exif()
    notes[PIL.ExifTags.Base.Orientation] = orientation
    PIL.Image.fromarray(noise).save(tmp_path / "a.png", exif=notes)
    # Where the standard puts row 0 and column 0 of what is stored.
    top = {1: noise, 2: noise[:, ::-1], 3: noise[::-1, ::-1], 4: noise[::-1]}
    side = {5: noise, 6: noise[::-1], 7: noise[::-1, ::-1], 8: noise[:, ::-1]}
    want = top[orientation] if orientation < 5 else side[orientation].transpose(1, 0, 2)
    with PIL.Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(rasters.on_white(image), want)
    np.testing.assert_array_equal(rasters.load(tmp_path / "a.png", 30, "longest"), want)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("notes", [b"Exif\0\0no notes", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"MM\0*\0\0"])
def test_damaged_notes_are_no_damage_of_the_picture(tmp_path, notes):
    noise = np.random.default_rng(0).integers(0, 200, (20, 30, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "a.png", exif=notes)
    with PIL.Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(rasters.on_white(image), noise)


@pytest.mark.parametrize("make, reason", [
    (lambda t: _svg(t, 'fill="none"'), "blank"),
    (lambda t: _svg(t, 'fill="white"'), "blank"),
    (lambda t: _svg(t, more='<text x="1" y="9">a</text>'), "text"),
    (lambda t: _svg(t, more="<broken"), "corrupt"),
    (lambda t: _png(t, PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 0))), "blank"),
    (lambda t: (t / "b.png", (t / "b.png").write_bytes(b"no image"))[0], "corrupt"),
])
def test_what_is_of_no_use_has_a_reason(tmp_path, make, reason):
    with pytest.raises(rasters.Unusable) as caught:
        rasters.load(make(tmp_path), 64, "longest")
    assert caught.value.args[0] == reason


def test_a_truncated_picture_is_corrupt(tmp_path):
    path = _png(tmp_path, PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(rasters.Unusable, match="corrupt"):
        rasters.load(path, 64, "longest")


def test_an_unknown_fit_is_named(tmp_path):
    with pytest.raises(InputError, match="data.fit.*'width'"):
        rasters.load(_svg(tmp_path), 64, "width")


def _distance(a, b):
    return int(np.bitwise_count(rasters.fingerprint(a) ^ rasters.fingerprint(b)).sum())


def test_fingerprints_see_through_size_margin_and_compression():
    rng = np.random.default_rng(0)
    blobs = [np.asarray(PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((90, 90), 3)) for _ in range(8)]
    blobs = [np.minimum(blob, 240) for blob in blobs]
    for blob in blobs:
        small = np.asarray(PIL.Image.fromarray(blob).resize((60, 60), 3))
        framed = np.pad(blob, ((9, 30), (5, 0), (0, 0)), constant_values=255)
        file = io.BytesIO()
        PIL.Image.fromarray(blob).save(file, "JPEG", quality=80)
        packed = np.asarray(PIL.Image.open(file))
        assert max(_distance(blob, other) for other in (small, framed, packed)) <= 8
    assert min(_distance(a, b) for i, a in enumerate(blobs) for b in blobs[:i]) > 24


@pytest.mark.parametrize("size", [(223, 224), (230, 230), (100, 800), (13, 14), (448, 40)])
def test_native_means_that_preprocessing_does_not_enlarge(size):
    pixels = 224 * 224
    target = preprocess.smart_resize(*size, min_pixels=pixels, max_pixels=1 << 30)
    rounded = tuple(max(28, round(side / 28) * 28) for side in size)
    assert rasters.is_native(*size, pixels) == int(target == rounded)
