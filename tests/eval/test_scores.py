"""Reading answers, and the flat keys of report.json."""

import math

import pytest

from dina.data import phrases
from dina.eval import scores


@pytest.mark.parametrize(("text", "digit"), [
    ("seven", 7), ("a small seven at the top left", 7), ("one small seven", 7), ("one large one", 1), ("one", 1), ("Zero.", 0),
    ("draw one large five", 5), ("the digit one small", 1), ("one small", 1),
    ("seven or nine", None), ("eleven", None), ("", None), ("garden", None), ("one seven", None), ("seven seven", 7),
])
def test_the_one_digit_that_a_text_names(text, digit):
    assert scores.digit_named(text) == digit


def test_every_caption_of_the_grammar_is_read_as_meant():
    for canvas in phrases.CANVASES:
        for size, top, left in phrases.placements(canvas):
            for digit in range(10):
                texts = [phrases.caption(canvas, digit, size, top, left, variant) for variant in range(4)]
                assert [scores.digit_named(text) for text in texts] == [digit] * 4
                meaning = {scores.caption_meaning(text) for text in texts}
                assert len(meaning) == 1, texts


def answer(group, truth, predicted, **extra):
    return {"group": group, "truth": truth, "predicted": predicted, "extra": extra}


def test_groups_give_their_own_keys_and_empty_groups_none():
    records = [answer("main", 1, 1, pocketsphinx=2), answer("main", 2, None, pocketsphinx=2), answer("any_offset", 3, 3),
               answer("words", -1, None, right=True, transcript_right=False)]
    found = scores.task_scores("text_to_speech", records)
    assert {key: (s["value"], s["n"]) for key, s in found.items()} == {
        "text_to_speech_accuracy": (0.5, 2), "text_to_speech_pocketsphinx_accuracy": (0.5, 2),
        "text_to_speech_accuracy_any_offset": (1.0, 1), "text_to_speech_words_accuracy": (1.0, 1),
        "text_to_speech_transcript_accuracy": (0.0, 1)}


def test_no_answer_is_wrong_even_for_words_that_are_no_digit():
    assert scores.accuracy([answer("main", 3, None)])["value"] == 0.0


def test_reconstruction_keys_use_the_plain_decoder_for_the_main_number():
    rows = [{"levels": n, "refined": r, "size": s, "psnr_db": 10.0 * n + 5 * r, "ssim": n / 10, "mel_l1": 1 / n - 0.1 * r}
            for n, r in ((1, False), (8, False), (8, True)) for s in ("28x28", "112x28")]
    pictures = scores.image_reconstruction_scores(rows, 0)
    assert pictures["image_psnr_db"]["value"] == pictures["image_psnr_db_level_8"]["value"] == 80
    assert pictures["image_psnr_db_level_1"]["value"] == 10 and pictures["image_psnr_db_refined"]["value"] == 85
    assert pictures["image_psnr_db_canvas_28x28"]["n"] == 1 and "image_ssim_canvas_112x28" in pictures
    clips = scores.audio_reconstruction_scores(rows, 0)
    assert clips["mel_l1"]["value"] == clips["mel_l1_level_8"]["value"] == pytest.approx(0.125)
    assert clips["mel_l1_refined"]["value"] == pytest.approx(0.025)
    assert scores.image_reconstruction_scores([], 0) == scores.audio_reconstruction_scores([], 0) == {}


def test_codebook_usage_is_the_lowest_of_all_levels():
    statistics = {"visual": {"usage": [1.0, 0.97], "perplexity": [200.0, 190.0], "window": 900},
                  "audio": {"usage": [0.93], "perplexity": [80.0], "window": 300}}
    found = scores.codebook_scores(statistics)
    assert found["codebook_usage"] == 0.93 and found["codebook_usage_visual_level_2"] == 0.97
    assert found["codebook_perplexity_audio_level_1"] == 80.0 and found["codebook_window_visual"] == 900


def test_all_scores_are_numbers_or_intervals():
    found = scores.all_scores({"image_to_text": [answer("main", 1, 1)]}, [], [], {}, {"digit_judge_accuracy": {"value": 0.98}}, 0)
    assert set(found) == {"image_to_text_accuracy", "digit_judge_accuracy"}
    assert math.isclose(found["image_to_text_accuracy"]["value"], 1.0)
