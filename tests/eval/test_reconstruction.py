"""Depths, the choice of pictures, and rows and files of reconstructions from a stand-in tokenizer."""

import types

import ml_collections
import numpy as np
import PIL.Image
import soundfile

from dina.eval import prompts, reconstruction


class Stub:
    """Codes count what they hold; a picture is decoded with an error that falls with the levels present."""

    rate = 24000

    def image_codes(self, images):
        return [np.tile(np.arange(4), (image.shape[0] * image.shape[1] // 784, 1)) for image in images]

    def decode_images(self, codes, grids, refined, seed):
        kept = [int((code[0] >= 0).sum()) for code in codes]
        return [np.full((28 * h, 28 * w, 3), 100 + (0 if refined else 40 // n), np.uint8) for n, (h, w) in zip(kept, grids, strict=True)]

    def speech_codes(self, waves):
        return [np.tile(np.arange(3), (6, 1)) for _ in waves]

    def decode_speech(self, codes, seed):
        return [types.SimpleNamespace(wave=np.zeros(2400, np.float32), kept=int((c[0] >= 0).sum())) for c in codes]

    def mel_distances(self, sound, original):
        return {False: 1 / sound.kept, True: 0.5 / sound.kept}


def config():
    c = ml_collections.ConfigDict({"eval": prompts.default_config()})
    c.eval.reconstruct_images, c.eval.reconstruct_clips = 6, 5
    c.vision = ml_collections.ConfigDict({"quantizer": {"sizes": (4,) * 4}})
    c.audio = ml_collections.ConfigDict({"quantizer": {"sizes": (4, 3, 3)}})
    return c


IMAGES = {"image": [np.full((28 * h, 28 * w, 3), 100, np.uint8) for h, w in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 1), (4, 4))]}
SPEECH = {"audio16": [np.ones(1600, np.int16)] * 6, "audio24": [np.ones(2400, np.int16)] * 6, "word": list("abcdef")}


def test_first_levels_leaves_the_rest_absent():
    code = np.arange(8).reshape(2, 4)
    kept = reconstruction.first_levels([code], 2)[0]
    np.testing.assert_array_equal(kept, [[0, 1, -1, -1], [4, 5, -1, -1]])
    np.testing.assert_array_equal(reconstruction.first_levels([code], 4)[0], code)


def test_depths_end_with_all_levels_that_there_are():
    assert reconstruction.depths(8) == [1, 2, 4, 8] and reconstruction.depths(5) == [1, 2, 4, 5] and reconstruction.depths(1) == [1]


def test_pictures_improve_with_levels_and_are_kept(tmp_path):
    rows = reconstruction.pictures(config(), Stub(), IMAGES, tmp_path)
    assert len(rows) == 6 * 4  # levels 1, 2, 4 and the refiner
    mean = lambda n, refined: np.mean([r["psnr_db"] for r in rows if r["levels"] == n and r["refined"] == refined])
    assert mean(1, False) < mean(2, False) < mean(4, False) < mean(4, True) == 100
    assert {r["size"] for r in rows} == {"28x28", "28x56", "56x28", "56x56", "112x112"}
    original, made = (np.asarray(PIL.Image.open(tmp_path / "reconstruction" / f"image_05_{k}.png")) for k in ("original", "level_1"))
    assert original.shape == made.shape == (112, 112, 3) and made[0, 0, 0] == 140


def test_shown_pictures_are_of_different_sizes_and_small_ones_first():
    sizes = [(28, 28)] * 5 + [(112, 112), (56, 56)]
    assert [sizes[i] for i in reconstruction._spread(sizes, 3)] == [(28, 28), (56, 56), (112, 112)]


def test_clips_are_measured_at_every_depth_and_kept(tmp_path):
    rows = reconstruction.clips(config(), Stub(), SPEECH, tmp_path)
    assert len(rows) == 5 * 3 * 2
    assert {(r["levels"], r["refined"], r["mel_l1"]) for r in rows} == {(n, f, (0.5 if f else 1) / n) for n in (1, 2, 3) for f in (False, True)}
    assert soundfile.info(tmp_path / "reconstruction" / "clip_03_level_3.wav").samplerate == 24000


def test_codebook_windows_count_cells_and_frames():
    found = reconstruction.codebooks(config(), Stub(), IMAGES, SPEECH)
    assert found["visual"]["window"] == 1 + 2 + 2 + 4 + 1 + 16 and found["audio"]["window"] == 6 * 6
    assert found["visual"]["usage"] == [0.25] * 4 and found["visual"]["perplexity"] == [1.0] * 4
