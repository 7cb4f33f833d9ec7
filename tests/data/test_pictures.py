"""Captions: which are the same, which are none; and the photographs of the installed packages."""

import PIL.Image
import pytest

from dina.data import pictures


@pytest.mark.parametrize("one, other", [
    ("A frog.", "frog"), ("The Owl", "an owl 2"), ("pink_cake", "Pink cake"), ("“Fuji” apple!", "fuji apple"), ("7", "7")])
def test_captions_that_say_the_same(one, other):
    assert pictures.normal_caption(one) == pictures.normal_caption(other) != ""


@pytest.mark.parametrize("one, other", [("The letter A", "The letter B"), ("10", "11"), ("A", "The"), ("Tiger", "Tigers")])
def test_captions_that_do_not(one, other):
    assert pictures.normal_caption(one) != pictures.normal_caption(other)


@pytest.mark.parametrize("title, good", [
    ("Baby owl", True), ("Bottled Drink (B and W)", True), ("me@mail.org", False), ("Clipart by Nicu Buculei", False),
    ("Part of the Flat Icon Collection", False), ("12345a", False), ("", False), ("ab", False), ("see www.here", False),
    ("word " * 20, False)])
def test_titles_that_describe_nothing(title, good):
    assert pictures._good_title(title) == good


def test_all_photographs_are_installed_and_large_enough_to_be_read():
    found = pictures.photographs()
    assert len(found) == sum(len(files) for *_, files in pictures.PHOTOS.values()) == len({photo.source for photo in found})
    for photo in found:
        with PIL.Image.open(photo.path) as image:
            assert min(image.size) >= 224 and photo.caption
