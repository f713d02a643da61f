"""The made benchmark in CIRCO's format, read back: targets from the pixels."""

import json
import re
from collections import Counter

import pytest
from helpers.runner import assert_one_clear_line, run
from PIL import Image
from test_synthetic import (
    CELLS,
    COLORS,
    PHRASE,
    SHAPES,
    SIZES,
    Thing,
    contents,
    named_cell,
    read_scene,
)

from sprc.data.check import check_dataset
from sprc.data.circo import ASPECTS, SPLITS, load_circo
from sprc.data.edits import read_edits
from sprc.data.synthetic.circo import CIRCOConfig, make_circo
from sprc.scoring.benchmarks import CIRCO

CONCEPT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) in the ({'|'.join(CELLS)})"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, the entries of val, and every image's scene by its id."""
    out = tmp_path_factory.mktemp("made")
    make_circo(out, CIRCOConfig(seed=2, image_size=144, val_families=2, test_families=1))
    scenes = {}
    for name, path in load_circo(out, "val").image_paths.items():
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (144, 144))
            scenes[int(name)] = read_scene(image)
    return out, json.loads((out / "circo_dataset/annotations/val.json").read_text()), scenes


def test_the_data_are_what_the_check_takes(made):
    out, entries, scenes = made
    findings = check_dataset("circo", out, decode=True)
    assert findings.problems == []
    assert findings.counts[-1] == "in all: 108 images"
    assert len(entries) == 2 * 6 * 3
    assert len(scenes) == 108


def test_the_targets_are_all_images_that_show_the_concept_and_the_edit(made):
    _, entries, scenes = made
    for entry in entries:
        reference, target = scenes[entry["reference_img_id"]], scenes[entry["target_img_id"]]
        size, color, shape, cell = re.fullmatch(CONCEPT, entry["shared_concept"]).groups()
        shared = CELLS[cell], Thing(color, shape, size)
        new, gone = set(target.items()) - set(reference.items()), set(reference.items()) - set(target.items())
        assert len(new) <= 1 >= len(gone)
        assert shared in reference.items()
        assert shared in target.items()
        looks = {(thing.color, thing.shape) for _, thing in gone}
        expected = {
            number
            for number, scene in scenes.items()
            if shared in scene.items()
            and (
                new <= set(scene.items()) if new else not looks & {(t.color, t.shape) for t in scene.values()}
            )
        }
        assert set(entry["gt_img_ids"]) == expected
        assert entry["gt_img_ids"][0] == entry["target_img_id"]
        assert entry["reference_img_id"] not in expected


def test_most_queries_have_several_targets_and_no_query_more_than_circo_s_most(made):
    _, entries, _ = made
    counts = [len(entry["gt_img_ids"]) for entry in entries]
    assert sum(count > 1 for count in counts) > 0.7 * len(counts)
    assert max(counts) <= 23


def test_a_caption_says_what_changes_and_nothing_of_the_rest(made):
    _, entries, scenes = made
    for entry in entries:
        caption = entry["relative_caption"]
        assert "same" not in caption
        assert re.fullmatch(r"[a-z]+( [a-z]+)*", caption)
        # With the words of "concept", [CLS] and [SEP] it stays within the text encoder's 32 tokens.
        assert len(f"find {entry['shared_concept']} but {caption}".split()) <= 30
        reference, target = scenes[entry["reference_img_id"]], scenes[entry["target_img_id"]]
        moved = reference.keys() != target.keys() and len(reference) == len(target)
        if (match := re.search(PHRASE, caption)) and not moved:  # else the place may be the new one
            named_cell(match, reference)


def test_aspects_are_circo_s_and_differ(made):
    _, entries, _ = made
    found = Counter(aspect for entry in entries for aspect in entry["semantic_aspects"])
    assert set(found) <= set(ASPECTS)
    assert len(found) >= 4


def test_the_test_split_tells_its_targets_in_the_file_of_edits_alone(made):
    out, _, _ = made
    entries = json.loads((out / "circo_dataset/annotations/test.json").read_text())
    assert {tuple(entry) for entry in entries} == {
        ("reference_img_id", "relative_caption", "shared_concept", "id")
    }
    for name in SPLITS:
        split = load_circo(out, name)
        edits = read_edits(CIRCO.edits_file(out, name, ""), split)
        assert len(edits) == len(split.triplets)
        assert all(edit.target != t.reference for edit, t in zip(edits, split.triplets, strict=True))


def test_one_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    small = {"val_families": 1, "test_families": 1, "image_size": 24}
    for name, seed in (("a", 3), ("c", 4)):
        make_circo(tmp_path / name, CIRCOConfig(seed=seed, **small))
    # Another process, whose sets are in another order.
    flags = [word for key, value in small.items() for word in ("--" + key.replace("_", "-"), value)]
    run("make_demo_data.py", "--dataset", "circo", "--out", tmp_path / "b", *flags, "--seed", 3)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == 72 + 1 + 2 + 2 + 1
    assert a["circo_dataset/annotations/val.json"] != c["circo_dataset/annotations/val.json"]


def test_sizes_of_a_training_split_are_refused(tmp_path):
    flags = ("--dataset", "CIRCO", "--out", tmp_path / "x", "--train-families", 3)
    _, stderr = run("make_demo_data.py", *flags, code=2)
    assert_one_clear_line(stderr, "--train-families: CIRCO has no training split; leave the flag out")
    assert not (tmp_path / "x").exists()
