"""The made benchmark in FashionIQ's format, read back: scenes from pixels, edits from captions."""

import json
import re
from collections import Counter
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from test_synthetic import (
    CELL,
    CELLS,
    COLORS,
    PHRASE,
    SHAPES,
    SIZES,
    Thing,
    changed_cells,
    contents,
    edit_kind,
    named_cell,
    read_scene,
    run_script,
)

from sprc.data.fashioniq import load_fashioniq
from sprc.data.images import check_images
from sprc.data.split import Triplet
from sprc.data.synthetic import splits as synthetic
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.fashioniq import FashionIQConfig, make_fashioniq
from sprc.data.synthetic.splits import SyntheticConfig
from sprc.errors import InputError

TYPES = ("dress", "shirt", "toptee")
SPLITS = ("train", "val", "test")
ATTRIBUTES = {"color": COLORS, "shape": SHAPES, "size": SIZES}
FAMILIES = {"train": 4, "val": 2, "test": 1}
SMALL = FashionIQConfig(image_size=24, train_families=1, val_families=1, test_families=1)

Scene = dict[tuple[int, int], Thing]


class Part(NamedTuple):
    """One type's part of one split."""

    entries: list[dict]
    triplets: list[Triplet]
    edits: list[dict]
    gallery: list[str]
    scenes: dict[str, Scene]
    background: dict[str, float]
    formats: Counter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Part]:
    out = tmp_path_factory.mktemp("made")
    families = {f"{split}_families": count for split, count in FAMILIES.items()}
    make_fashioniq(out, FashionIQConfig(seed=5, image_size=144, train_queries_per_set=12, **families))
    root = out / "fashionIQ_dataset"
    parts = {}
    for dress_type, split in product(TYPES, SPLITS):
        loaded = load_fashioniq(out, split, dress_type)
        check_images(loaded.image_paths, loaded.image_paths)
        entries = json.loads((root / "captions" / f"cap.{dress_type}.{split}.json").read_text())
        edits = json.loads((root / f"edits.{dress_type}.{split}.json").read_text())
        scenes, background, formats = {}, {}, Counter()
        for name, path in loaded.image_paths.items():
            with Image.open(path) as image:
                assert (image.size, image.mode) == ((144, 144), "RGB")
                formats[image.format, path.suffix] += 1
                scenes[name] = read_scene(image)
                background[name] = float(np.median(np.asarray(image)))
        parts[dress_type, split] = Part(
            entries, loaded.triplets, edits, list(loaded.image_paths), scenes, background, formats
        )
    assert len(list((root / "images").iterdir())) == 3 * 36 * sum(FAMILIES.values())
    return parts


def readings(caption: str, kind: str, reference: Scene) -> list[Scene]:
    """Every scene that one edit of this kind makes of ``reference`` and that the caption allows.

    The words for attributes are those of the edited object: after the edit, or before it where the caption
    says "instead of" or the object is removed. What "the" begins is the object as the reference shows it.
    """
    text = re.sub("^is the same (but|with) ", "", caption.removesuffix("."))
    place = None
    if kind in ("add", "move") and (match := re.fullmatch(rf"(.*) in the ({CELL})(?: instead)?", text)):
        text, place = match[1], CELLS[match[2]]
    named = None
    if match := re.search(PHRASE, text):
        named = named_cell(match, reference)
        text = text[: match.start()] + text[match.end() :]
    after_words, _, before_words = text.partition("instead of")
    if kind == "remove":
        before_words = after_words

    empty = [cell for cell in CELLS.values() if cell not in reference]
    edits = {
        "add": [
            (None, None, cell, Thing(*looks)) for cell in empty for looks in product(COLORS, SHAPES, SIZES)
        ],
        "remove": [(cell, thing, None, None) for cell, thing in reference.items()],
        "move": [(cell, thing, goal, thing) for cell, thing in reference.items() for goal in empty],
    }.get(kind) or [
        (cell, thing, cell, thing._replace(**{kind: value}))
        for cell, thing in reference.items()
        for value in ATTRIBUTES[kind]
        if value != getattr(thing, kind)
    ]
    attributes = {value for values in ATTRIBUTES.values() for value in values}
    found = []
    for cell, before, goal, after in edits:
        target = {place: thing for place, thing in reference.items() if place != cell}
        if after:
            target[goal] = after
        if (
            named in (None, cell)
            and place in (None, goal)
            and attributes.intersection(before_words.split()) <= set(before or ())
            and (not after or attributes.intersection(after_words.split()) <= set(after))
            and len({(thing.color, thing.shape) for thing in target.values()}) == len(target)
        ):
            found.append(target)
    return found


def queries(made):
    for part in made.values():
        for entry, edit in zip(part.entries, part.edits, strict=True):
            yield entry, edit, part.scenes[entry["candidate"]], part.scenes[edit["target"]]


def test_files_are_in_fashioniqs_format(made):
    for (_, split), part in made.items():
        assert len(part.gallery) == 36 * FAMILIES[split]
        assert len(part.entries) == FAMILIES[split] * 6 * (12 if split == "train" else 4)
        for entry, edit in zip(part.entries, part.edits, strict=True):
            assert entry.keys() == {"candidate", "captions"} | (set() if split == "test" else {"target"})
            assert entry.get("target", edit["target"]) == edit["target"] != entry["candidate"]
            assert len(set(entry["captions"])) == 2


def test_half_of_the_images_are_png_and_half_jpeg(made):
    for part in made.values():
        half = len(part.gallery) // 2
        assert part.formats == {("PNG", ".png"): half, ("JPEG", ".jpg"): half}


def test_with_png_all_images_are_and_nothing_else_differs(tmp_path):
    result = run_script(tmp_path, "--dataset", "FashionIQ", "--png", "--train-families", "1")
    assert result.returncode == 0, result.stderr
    make_fashioniq(tmp_path / "jpeg", SMALL)
    png, jpeg = tmp_path / "fashionIQ_dataset", tmp_path / "jpeg" / "fashionIQ_dataset"
    assert {path.name for path in (png / "images").iterdir()} == {
        f"{path.stem}.png" for path in (jpeg / "images").iterdir()
    }
    assert {Image.open(path).format for path in (png / "images").iterdir()} == {"PNG"}
    for path in [*jpeg.glob("*/*.json"), *jpeg.glob("edits.*.json")]:
        assert (png / path.relative_to(jpeg)).read_bytes() == path.read_bytes()
    for path in (jpeg / "images").glob("*.png"):
        assert (png / "images" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="was not made with these arguments"):
        make_fashioniq(tmp_path, SMALL)


def test_one_image_in_six_at_least_is_in_no_triplet(made):
    for part in made.values():
        used = {entry["candidate"] for entry in part.entries} | {edit["target"] for edit in part.edits}
        assert used < set(part.gallery)
        assert len(used) <= len(part.gallery) * 5 / 6


def test_types_differ_in_their_background(made):
    ranges = {}
    for dress_type in TYPES:
        shades = [
            value for (t, _), part in made.items() if t == dress_type for value in part.background.values()
        ]
        ranges[dress_type] = (min(shades), max(shades))
    (_, dark), (middle, bright), (light, _) = (ranges[name] for name in ("toptee", "shirt", "dress"))
    assert dark + 30 < middle <= bright < light - 30


def test_no_scene_occurs_twice_in_any_type_or_split(made):
    scenes = [frozenset(scene.items()) for part in made.values() for scene in part.scenes.values()]
    assert len(set(scenes)) == len(scenes) == 3 * 36 * sum(FAMILIES.values())


def test_a_family_is_kept_apart_from_those_of_all_types_and_splits(tmp_path, monkeypatch):
    drawn, draw = set(), synthetic.draw_family

    def draw_family(pair, rng, used, shades):
        assert used >= drawn  # or a scene could come again, though it would hardly ever
        image_sets = draw(pair, rng, used, shades)
        drawn.update(scene for image_set in image_sets for row in image_set for scene in row)
        return image_sets

    monkeypatch.setattr(synthetic, "draw_family", draw_family)
    make_fashioniq(tmp_path, SMALL)
    assert len(drawn) == 9 * 36


def test_a_query_is_one_edit_and_the_edits_file_tells_which_and_where(made):
    for _, edit, reference, target in queries(made):
        assert edit_kind(reference, target) == edit["kind"]
        assert sorted(map(tuple, edit["cells"])) == changed_cells(reference, target)
    kinds = Counter(edit["kind"] for _, edit, *_ in queries(made))
    assert kinds.keys() == {"color", "shape", "size", "add", "remove", "move"}
    assert max(kinds.values()) <= 3 * min(kinds.values())


def test_both_captions_fit_the_target_and_at_least_one_fits_nothing_else(made):
    alone = []
    for entry, edit, reference, target in queries(made):
        found = [readings(caption, edit["kind"], reference) for caption in entry["captions"]]
        assert all(target in scenes for scenes in found), entry["captions"]
        assert min(len(scenes) for scenes in found) == 1, entry["captions"]
        alone += [len(scenes) == 1 for scenes in found]
    assert 0.85 < sum(alone) / len(alone) < 0.97


def test_captions_are_short_and_lower_case_and_some_end_in_a_full_stop(made):
    captions = [caption for entry, *_ in queries(made) for caption in entry["captions"]]
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*\.?", caption) for caption in captions)
    assert 0.2 < sum(caption.endswith(".") for caption in captions) / len(captions) < 0.45
    # Both together stay within the 32 tokens of the text encoder, "and", [CLS] and [SEP] among them.
    assert max(len(" ".join(entry["captions"]).split()) for entry, *_ in queries(made)) <= 29


def test_one_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, dataset, seed, hash_seed in (
        ("a", "FashionIQ", "3", "1"),
        ("b", "fashioniq", "3", "2"),
        ("c", "FashionIQ", "4", "1"),
    ):
        result = run_script(
            tmp_path / name,
            "--dataset",
            dataset,
            "--seed",
            seed,
            "--train-families",
            "1",
            hash_seed=hash_seed,
        )
        assert result.returncode == 0, result.stderr
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == 3 * (3 * 36 + 3 * 3) + 1
    captions = "fashionIQ_dataset/captions/cap.shirt.val.json"
    assert a[captions] != c[captions]


def test_more_train_families_leave_val_and_test_as_they_are(tmp_path):
    make_fashioniq(tmp_path / "a", SMALL)
    make_fashioniq(tmp_path / "b", FashionIQConfig(**{**vars(SMALL), "train_families": 2}))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    same = [path for path in a if "train" not in path and "made_by" not in path]
    assert len(same) == 3 * (2 * 36 + 2 * 3)
    assert all(a[path] == b[path] for path in same)


def test_a_second_call_does_nothing_and_other_arguments_are_refused(tmp_path, capsys):
    make_fashioniq(tmp_path, SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make_fashioniq(tmp_path, SMALL)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="delete it or choose another --out"):
        make_fashioniq(tmp_path, FashionIQConfig(**{**vars(SMALL), "seed": 1}))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_both_benchmarks_live_side_by_side(tmp_path):
    make_cirr(tmp_path, SyntheticConfig(image_size=24, train_families=1, val_families=1, test_families=1))
    make_fashioniq(tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cirr_dataset", "fashionIQ_dataset"]


def test_more_queries_than_a_set_has_without_its_distractor_are_refused():
    with pytest.raises(InputError, match="--train-queries-per-set 13: "):
        FashionIQConfig(train_queries_per_set=13)
    SyntheticConfig(train_queries_per_set=13)
