"""Descriptions of scenes, held against the scenes by a parser of its own; and the scenes left out."""

import random
import re
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
from test_synthetic import CELL, CELLS, COLORS, RELATIONS, SHAPES, SIZES

from sprc.data.synthetic import splits
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.descriptions import describe, held_out_scenes, random_scene, words
from sprc.data.synthetic.fashioniq import FashionIQConfig, make_fashioniq
from sprc.data.synthetic.scenes import Scene, SceneObject
from sprc.data.synthetic.splits import SyntheticConfig

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
LOOK = rf"(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(SHAPES)}|object)"
MENTION = rf"(a|an|one|the) ({LOOK})"
RELATION = rf"(directly )?({'|'.join(RELATIONS)})|next to"


def fits(thing: SceneObject, look: str) -> bool:
    return all(word in (thing.color, thing.shape, thing.size, "object") for word in look.split())


def mentioned(phrase: str, scene: Scene) -> list[SceneObject]:
    """The objects of which "a red circle" can be said; "one" and "the" are of exactly one."""
    article, look = re.fullmatch(MENTION, phrase).groups()
    found = [thing for thing in scene.objects if fits(thing, look)]
    return found if article in ("a", "an") or len(found) == 1 else []


def holds(relation: str, one: SceneObject, other: SceneObject) -> bool:
    down, right = one.cell[0] - other.cell[0], one.cell[1] - other.cell[1]
    if relation == "next to":
        return abs(down) + abs(right) == 1
    step = RELATIONS[relation.removeprefix("directly ")]
    reach = (1,) if relation.startswith("directly") else (1, 2)
    return any((down, right) == (n * step[0], n * step[1]) for n in reach)


def is_true(text: str, scene: Scene) -> bool:
    """Whether different objects can be found for all that is told, except "the", which is one told of."""
    text = re.sub("^there (is|are) |^a picture of ", "", text)
    if match := re.match("([a-z]+) objects including ", text):
        if NUMBERS[match[1]] != len(scene.objects):
            return False
        text = text[match.end() :]
    parts = re.split(" and there is | and also | and | with ", text)
    counted = []
    if match := re.fullmatch(rf"({'|'.join(NUMBERS)}) (.*)s", parts[0]):
        look = match[2].replace("crosse", "cross")
        assert re.fullmatch(LOOK, look)
        counted = [thing for thing in scene.objects if fits(thing, look)]
        if len(counted) != NUMBERS[match[1]]:
            return False
        parts = parts[1:]
    found = [frozenset(counted)]  # the sets of objects that what is read may have told of
    for part in parts:
        match = re.fullmatch(rf"({MENTION})(?: in the ({CELL})| ({RELATION}) ({MENTION}))?", part)
        assert match, part
        first, cell, relation, anchor = match[1], match[4], match[5], match[8]
        assert not first.startswith("the ")
        ones = [thing for thing in mentioned(first, scene) if cell is None or thing.cell == CELLS[cell]]
        others = mentioned(anchor, scene) if relation else []
        steps = [{one, other} for one in ones for other in others if holds(relation, one, other)]
        known = set(others) if relation and anchor.startswith("the ") else set()
        found = [
            told | step
            for told in found
            for step in (steps if relation else [{one} for one in ones])
            if known <= told and not (step - known) & told
        ]
    return bool(found)


@pytest.fixture(scope="module")
def described() -> list[tuple[Scene, str]]:
    rng = random.Random(1)
    scenes = [random_scene(rng) for _ in range(4000)]
    return [(scene, describe(scene, rng)) for scene in scenes]


def test_random_scenes_are_valid_and_of_every_size_and_background():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(2000)]
    assert all(scene.is_valid() for scene in scenes)
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4, 5, 6}
    shades = [scene.shade for scene in scenes]
    assert (min(shades), max(shades)) == (30, 250)
    assert 0.6 < sum(shade >= 225 for shade in shades) / len(shades) < 0.9
    assert {thing.cell for scene in scenes for thing in scene.objects} == set(CELLS.values())


def test_every_description_is_true_of_its_scene(described):
    for scene, text in described:
        assert is_true(text, scene), (text, scene)


def test_hardly_a_description_is_true_of_another_scene(described):
    shifted = described[1:] + described[:1]
    assert sum(is_true(text, scene) for (_, text), (scene, _) in zip(described, shifted, strict=True)) < 80


def test_descriptions_tell_of_two_objects_or_more_and_mostly_where(described):
    numbers = "|".join(NUMBERS)
    told = [len(re.findall(rf"\b(?:a|an|one|the) {LOOK}", text)) for _, text in described]
    grouped = [bool(re.search(rf"\b(?:{numbers}) .*s\b", text)) for _, text in described]
    assert all(count + 2 * group >= 2 for count, group in zip(told, grouped, strict=True))
    placed = sum(" in the " in text or bool(re.search(RELATION, text)) for _, text in described)
    assert placed > 0.8 * len(described)


def test_descriptions_vary_and_are_lower_case_words_of_the_list(described):
    texts = [text for _, text in described]
    assert len(set(texts)) > 0.97 * len(texts)
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", text) for text in texts)
    used = Counter(word for text in texts for word in text.split())
    assert used.keys() <= set(words())
    for word in (
        *COLORS,
        *SHAPES,
        *SIZES,
        "one",
        "two",
        "next",
        "directly",
        "the",
        "including",
        "with",
        "also",
    ):
        assert used[word] > 10, word


def test_one_seed_gives_one_description():
    scene = random_scene(random.Random(3))
    assert describe(scene, random.Random(4)) == describe(scene, random.Random(4))


@contextmanager
def picture_rememberer(saved: dict[str, Scene], _image_size: int):
    """Takes the place of what draws pictures: remembers by which name each scene would be saved."""
    yield lambda scene, path, **_options: saved.update({path.name: scene})


def make_without_drawing(folder, monkeypatch, *, train_families):
    """Both benchmarks, CIRR's with so many families of train; returns the scenes by their images' names."""
    saved: dict[str, Scene] = {}
    monkeypatch.setattr(splits, "picture_maker", partial(picture_rememberer, saved))
    make_cirr(folder, SyntheticConfig(train_families=train_families))
    make_fashioniq(folder, FashionIQConfig(train_families=2))
    return saved


def test_no_scene_of_val_and_test_is_missing_from_those_left_out(tmp_path, monkeypatch):
    saved = make_without_drawing(tmp_path, monkeypatch, train_families=2)
    held_out = {scene for name, scene in saved.items() if "train" not in name}
    assert len(saved) == 36 * (14 + 28 + 2) + 3 * 36 * (6 + 2 + 2)
    assert held_out == held_out_scenes()


def test_the_words_are_those_of_the_captions_too(tmp_path, monkeypatch):
    make_without_drawing(tmp_path, monkeypatch, train_families=40)
    rng = random.Random(0)
    texts = [describe(random_scene(rng), rng) for _ in range(2000)]
    for file in tmp_path.rglob("cap.*.json"):
        texts += re.findall(r'^ +"(?:caption": ")?([a-z ]+)\.?",?$', file.read_text(), re.M)
    assert {word for text in texts for word in text.split()} == set(words())
    assert words() == sorted(words())
