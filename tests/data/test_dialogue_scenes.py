"""What is said in the later rounds of a dialogue about made pictures."""

import json
import random
import shutil
from itertools import pairwise, permutations

import numpy as np
import pytest
from PIL import Image

from sprc.data.cirr import load_cirr
from sprc.data.synthetic.dialogue import edited, edits_toward, say, scenes_of
from sprc.data.synthetic.scenes import Scene, SceneObject, edit_between, render
from sprc.errors import InputError


@pytest.fixture(scope="module")
def scenes(data):
    return scenes_of(data, "test1")


@pytest.mark.parametrize("split", ["val", "test1"])
def test_the_scenes_drawn_again_are_those_of_the_pictures(data, split):
    paths = load_cirr(data, split).image_paths
    scenes = scenes_of(data, split)
    assert scenes.keys() == paths.keys()
    for name in random.Random(0).sample(list(paths), 8):
        with Image.open(paths[name]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(render(scenes[name], 96)))


def test_where_one_edit_is_missing_it_is_the_one(scenes):
    found = 0
    for seen, wanted in permutations(scenes.values(), 2):
        try:
            edit = edit_between(seen, wanted)
        except ValueError:
            continue
        assert edits_toward(seen, wanted) == [edit]
        found += 1
    assert found > 100


def test_edit_after_edit_leads_to_what_is_wanted(scenes):
    rng = random.Random(0)
    for seen, wanted in [rng.sample(list(scenes.values()), 2) for _ in range(50)]:
        path = [seen]
        while path[-1] != wanted:
            edit = rng.choice(edits_toward(path[-1], wanted))
            path.append(edited(path[-1], edit))
            assert edit_between(*path[-2:]) == edit  # one, and of a kind that has words
        assert len(path) - 1 <= 4 * max(len(seen.objects), len(wanted.objects))
        assert all(before != after for before, after in pairwise(path))


def test_objects_that_differ_least_are_taken_for_the_same():
    star, circle = SceneObject((0, 0), "red", "star", "small"), SceneObject((1, 1), "blue", "circle", "large")
    moved = SceneObject((2, 2), "blue", "circle", "small")
    other, same = SceneObject((0, 1), "green", "cross", "large"), SceneObject((1, 0), "red", "cross", "large")
    kinds = {edit.kind for edit in edits_toward(Scene((star, same, circle)), Scene((other, same, moved)))}
    assert kinds == {"move", "size", "remove", "add"}
    alone = {edit.kind for edit in edits_toward(Scene((star, circle)), Scene((circle, other)))}
    assert alone == {"add"}  # if the star went first, one object would be left: there is no such scene


def test_a_sentence_names_one_of_the_edits(scenes):
    seen, wanted = Scene((SceneObject((0, 0), "red", "star", "small"),)), None
    wanted = Scene((*seen.objects, SceneObject((1, 1), "blue", "circle", "large")))
    said = {say(seen, wanted, random.Random(number)) for number in range(40)}
    assert len(said) > 3
    assert all("large blue circle" in text for text in said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.unlink(), "is missing: a dialogue needs the built-in data in CIRR's format"),
        (lambda file: rewrite(file, version=1), "'version' is 1, not"),
        (lambda file: rewrite(file, seed="0"), "'seed'"),
        (lambda file: rewrite(file, image_size=2), "--image-size 2"),
    ],
)
def test_other_data_are_refused(data, tmp_path, change, said):
    (tmp_path / "cirr_dataset").mkdir()
    file = tmp_path / "cirr_dataset" / "made_by.json"
    shutil.copy(data / "cirr_dataset" / "made_by.json", file)
    change(file)
    with pytest.raises(InputError, match=said) as caught:
        scenes_of(tmp_path, "val")
    assert "made_by.json" in str(caught.value)
    assert "make_demo_data.py" in str(caught.value)


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
