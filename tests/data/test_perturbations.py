"""What perturbations do to a caption and to a picture, against plain restatements."""

import io
import math
import random

import numpy as np
import pytest
from PIL import Image, ImageChops

from sprc.data import PICTURE_PERTURBATIONS, TEXT_PERTURBATIONS
from sprc.data.captions import process_caption
from sprc.data.perturbations import (
    GREY,
    OF_PICTURES,
    OF_TEXT,
    ChangedPicture,
    generator_of,
)

CAPTIONS = [
    "make the small red circle blue and remove the star",
    "Is Longer, with a V-neck; doesn't have sleeves!",
    "add a green triangle",
    "two dogs  instead of one dog",
    "blue",
]


def change(name, caption, level=None, query=7, seed=0):
    one = OF_TEXT[name]
    level = one.levels[0] if level is None else level
    return one.change(caption, generator_of(seed, name, level, query), level)


def picture(width=90, height=60):
    """A smooth picture with an edge, the same each time."""
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([255 * columns / width, 255 * rows / height, 255 * (columns > width // 3)], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def changed(name, level, image=None, query=7, seed=0):
    image = picture() if image is None else image
    return OF_PICTURES[name].change(image, generator_of(seed, name, level, query), level)


def distance(one, other):
    """Damerau's and Levenshtein's: letters added, missing, replaced, and neighbours changed over."""
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            ways = [table[i - 1][j] + 1, table[i][j - 1] + 1]
            ways.append(table[i - 1][j - 1] + (one[i - 1] != other[j - 1]))
            if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
                ways.append(table[i - 2][j - 2] + 1)
            table[i][j] = min(ways)
    return table[-1][-1]


def test_the_names_of_the_flag_are_those_of_the_perturbations():
    assert tuple(OF_TEXT) == TEXT_PERTURBATIONS
    assert tuple(OF_PICTURES) == PICTURE_PERTURBATIONS


def test_a_query_s_change_depends_on_seed_name_level_and_query_alone():
    draws = {
        generator_of(*words).random()
        for words in ((0, "typos", 1, 7), (1, "typos", 1, 7), (0, "noise", 1, 7), (0, "typos", 2, 7))
    }
    draws.add(generator_of(0, "typos", 1, 8).random())
    assert len(draws) == 5
    random.seed(5)
    assert [change("typos", CAPTIONS[0], query=n) for n in (1, 2, 3)] == [
        change("typos", CAPTIONS[0], query=n) for n in (3, 2, 1)
    ][::-1]
    one, again, other = (np.asarray(changed("noise", 25, query=n)) for n in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


@pytest.mark.parametrize("count", OF_TEXT["typos"].levels)
def test_typos_are_that_many_slips_of_a_finger_and_leave_the_spaces(count):
    found = {change("typos", CAPTIONS[0], count, query) for query in range(40)}
    assert len(found) > 30
    assert {distance(CAPTIONS[0], text) for text in found} == {count}
    assert {text.count(" ") for text in found} == {CAPTIONS[0].count(" ")}
    assert distance("blue", change("typos", "blue", 4)) <= 2  # no more find room


def test_a_typo_is_of_four_kinds_and_a_wrong_key_lies_beside_the_right_one():
    lengths, keys = set(), set()
    for query in range(200):
        text = change("typos", "remove", 1, query)
        lengths.add(len(text))
        if len(text) == 6 and sorted(text) != sorted("remove"):
            ((right, wrong),) = [pair for pair in zip("remove", text, strict=True) if pair[0] != pair[1]]
            keys.add(right + wrong)
    assert lengths == {5, 6, 7}
    assert any(sorted(change("typos", "remove", 1, q)) == sorted("remove") for q in range(200))
    assert keys <= {"re", "rt", "ew", "er", "mn", "oi", "op", "vc", "vb"}
    assert len(keys) > 5
    assert change("typos", "42 & 7") == "42 & 7"


def test_one_swap_changes_two_neighbours_that_differ():
    for caption in CAPTIONS[:4]:
        words = caption.split()
        for query in range(20):
            found = change("swapped-words", caption, 1, query).split()
            places = [i for i in range(len(words)) if words[i] != found[i]]
            assert places == [places[0], places[0] + 1]
            assert [found[i] for i in places] == [words[i] for i in places[::-1]]
            assert sorted(change("swapped-words", caption, 3, query).split()) == sorted(words)
    assert change("swapped-words", "blue Blue") == "blue Blue"


@pytest.mark.parametrize("count", OF_TEXT["dropped-words"].levels)
def test_so_many_words_are_dropped_and_the_others_stay_in_their_order(count):
    for caption in CAPTIONS:
        words = caption.split()
        found = change("dropped-words", caption, count).split()
        assert len(found) == max(len(words) - count, 1)
        left = iter(words)
        assert all(word in left for word in found)
    assert change("dropped-words", "") == ""


@pytest.mark.parametrize("name", ["lower-case", "upper-case", "stops"])
def test_what_the_cleaning_takes_away_is_changed_and_read_the_same(name):
    for caption in CAPTIONS:
        found = change(name, caption)
        assert name != "stops" or found != caption
        assert process_caption(found) == process_caption(caption)
    assert change("lower-case", "A b") == "a b"
    assert change("upper-case", "A b") == "A B"
    assert sum(change("stops", CAPTIONS[0]).count(mark) for mark in ".!:;") == 2


def test_other_marks_are_read():
    assert change("no-punctuation", CAPTIONS[1]) == "Is Longer with a V neck doesnt have sleeves"
    for query in range(5):
        found = change("commas", CAPTIONS[0], query=query)
        assert found.count(",") == 1
        assert found.replace(",", "") == f"{CAPTIONS[0]}."
    assert process_caption(change("commas", "blue")) == "blue,"


@pytest.mark.parametrize("name", OF_PICTURES)
def test_a_picture_keeps_its_size_and_stays_as_it_was(name):
    before, image = picture(), picture()
    differences = []
    for level in OF_PICTURES[name].levels:
        found = changed(name, level, image)
        assert (found.size, found.mode) == (image.size, "RGB")
        assert ImageChops.difference(image, before).getbbox() is None
        differences.append(np.abs(np.asarray(found, float) - np.asarray(image, float)).mean())
    assert 0 < differences[0] < differences[1] < differences[2]


def test_a_cut_out_is_one_grey_rectangle_of_that_share_anywhere():
    for percent in (10, 25, 50):
        boxes = set()
        for query in range(10):
            image = Image.new("RGB", (200, 100), (255, 0, 0))
            grey = (np.asarray(changed("cut-out", percent, image, query)) == GREY).all(axis=-1)
            assert grey.mean() == pytest.approx(percent / 100, abs=0.01)
            rows, columns = np.flatnonzero(grey.any(axis=1)), np.flatnonzero(grey.any(axis=0))
            box = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.all()
            assert box.shape[1] / box.shape[0] == pytest.approx(2, abs=0.1)
            boxes.add((rows[0], columns[0]))
        assert len(boxes) > 5


def test_noise_has_its_deviation_and_no_bias():
    image = Image.new("RGB", (200, 150), (128, 128, 128))
    for deviation in (10, 25):
        values = np.asarray(changed("noise", deviation, image), float) - 128
        assert values.mean() == pytest.approx(0, abs=0.3)
        assert values.std() == pytest.approx(deviation, rel=0.02)
    assert np.asarray(changed("noise", 50, Image.new("RGB", (40, 40)))).max() < 255  # not wrapped round


def test_blur_spreads_a_point_by_its_radius_of_the_shorter_side():
    image = Image.new("RGB", (300, 200))
    image.paste((255, 255, 255), (140, 90, 160, 110))
    values = np.asarray(changed("blur", 4, image), float)[..., 0]  # a deviation of 8 pixels
    columns = np.arange(300)
    weights = values.sum(axis=0) / values.sum()
    spread = math.sqrt((weights * (columns - (weights * columns).sum()) ** 2).sum())
    assert spread == pytest.approx(math.sqrt(8**2 + 20**2 / 12), rel=0.05)


def test_jpeg_is_what_a_file_of_that_quality_holds():
    for quality in (50, 5):
        file = io.BytesIO()
        picture().save(file, "JPEG", quality=quality)
        with Image.open(file) as expected:
            assert ImageChops.difference(changed("jpeg", quality), expected.convert("RGB")).getbbox() is None


def test_a_small_picture_has_lost_what_is_finer_than_its_pixels():
    fine = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.asarray(changed("small", 8, fine), float).std() < 3
    halves = Image.new("RGB", (64, 64))
    halves.paste((255, 255, 255), (32, 0, 64, 64))
    assert np.asarray(changed("small", 8, halves), float).std() > 110


def test_a_rotation_turns_to_either_side_about_the_middle():
    image = Image.new("RGB", (41, 41))
    image.paste((255, 0, 0), (18, 2, 23, 7))  # above the middle
    places = set()
    for query in range(10):
        values = np.asarray(changed("rotated", 90, image, query))[..., 0]
        rows, columns = np.nonzero(values > 200)
        places.add((round(rows.mean()), round(columns.mean())))
    assert places == {(20, 4), (20, 36)}
    assert np.asarray(changed("rotated", 20, image))[0, 0].tolist() == list(GREY)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_a_picture_of_any_mode_is_changed_and_then_prepared(mode):
    image = Image.new("I;16", (20, 10)) if mode == "I;16" else picture(20, 10).convert(mode)
    prepared = []
    one = ChangedPicture(prepared.append, OF_PICTURES["noise"], 25)
    one(image, generator_of(0, "noise", 25, 1))
    assert [(found.mode, found.size) for found in prepared] == [("RGB", (20, 10))]
    expected = OF_PICTURES["noise"].change
    if mode == "L":
        again = expected(image.convert("RGB"), generator_of(0, "noise", 25, 1), 25)
        assert ImageChops.difference(prepared[0], again).getbbox() is None
