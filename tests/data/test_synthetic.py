"""The made benchmark, read back from its files: scenes from the pixels, edits from the captions."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sprc.data.edits import KINDS
from sprc.data.synthetic import scenes as scene_module
from sprc.data.synthetic import splits as synthetic
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.descriptions import words
from sprc.data.synthetic.scenes import Scene, SceneObject, edit_between, render
from sprc.data.synthetic.splits import GENERATOR_VERSION, SyntheticConfig
from sprc.errors import InputError

SCRIPT = Path(__file__).parents[2] / "src" / "make_demo_data.py"
SPLITS = ("train", "val", "test1")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = ("small", "medium", "large")
CELLS = {
    name: (row, column)
    for row, names in enumerate(
        (
            ("top left", "top center", "top right"),
            ("middle left", "center", "middle right"),
            ("bottom left", "bottom center", "bottom right"),
        )
    )
    for column, name in enumerate(names)
}
SMALL = SyntheticConfig(image_size=24, train_families=2, val_families=1, test_families=1)


class Thing(NamedTuple):
    color: str
    shape: str
    size: str


def read_scene(image: Image.Image) -> dict[tuple[int, int], Thing]:
    """The objects by cell, from the pixels: color by hue, size and shape by the outline."""
    pixels = np.asarray(image).astype(float)
    side = len(pixels) // 3
    background = np.median(pixels.reshape(-1, 3), axis=0)
    found = {}
    for row, column in CELLS.values():
        crop = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
        center = crop[side // 2, side // 2]
        if np.abs(crop - background).max() < 20:
            continue
        mask = np.abs(crop - background).sum(2) > 0.5 * np.abs(center - background).sum()
        ys, xs = np.where(mask)
        height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
        size = SIZES[np.digitize(height / side, (0.47, 0.75))]
        outline = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        if width < 0.75 * height:
            shape = "diamond"
        elif outline[1, 1] and outline[-2, -2]:  # the very corners are lost in a JPEG
            shape = "square"
        elif outline[-1, 0] or outline[-2, 1]:
            shape = "triangle"
        elif outline[: height // 2].mean() > 0.65:
            shape = "circle"
        else:  # of the two with arms only the cross is the same upside down
            shape = "cross" if (outline == outline[::-1]).mean() > 0.95 else "star"
        hues = {
            "red": center[0] > 150 and center[1] < 100,
            "yellow": center[0] > 150 and center[1] > 150,
            "purple": 100 < center[0] < 150,
            "green": center[0] < 100 and center[1] > 100 and center[2] < 100,
            "blue": center[0] < 100 and center[1] < 100,
            "cyan": center[0] < 100 and center[1] > 150 and center[2] > 150,
        }
        (color,) = (name for name, holds in hues.items() if holds)
        found[(row, column)] = Thing(color, shape, size)
    return found


CELL = "|".join(sorted(CELLS, key=len, reverse=True))
LOOKS = rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|object)"
PHRASE = rf"the {LOOKS}(?: in the ({CELL}))?"
RELATIONS = {"below": (1, 0), "above": (-1, 0), "to the right of": (0, 1), "to the left of": (0, -1)}


def named_cell(match: re.Match, scene: dict[tuple[int, int], Thing]) -> tuple[int, int]:
    """The cell of the one object that a phrase fits."""
    size, color, shape, cell = match.groups()
    fits = [
        place
        for place, thing in scene.items()
        if size in (None, thing.size)
        and color in (None, thing.color)
        and shape in ("object", thing.shape)
        and (cell is None or CELLS[cell] == place)
    ]
    assert len(fits) == 1, f"{match.group()!r} names {len(fits)} objects"
    return fits[0]


def stated_cell(caption: str, scene: dict[tuple[int, int], Thing]) -> tuple[str, tuple[int, int]]:
    """Split off a caption's last part, a place: the rest, and the one cell that the place can be."""
    for relation, (down, right) in RELATIONS.items():
        if match := re.fullmatch(rf"(.*?) (directly )?{relation} ({PHRASE})", caption):
            row, column = named_cell(re.fullmatch(PHRASE, match[3]), scene)
            reach = (1,) if match[2] else (1, 2)
            cells = [(row + n * down, column + n * right) for n in reach]
            (cell,) = (cell for cell in cells if cell in CELLS.values())
            return match[1], cell
    match = re.fullmatch(rf"(.*) (?:in|to) the ({CELL})", caption)
    return match[1], CELLS[match[2]]


def apply_caption(
    caption: str, kind: str, reference: dict[tuple[int, int], Thing]
) -> dict[tuple[int, int], Thing]:
    """The scene that a caption asks for, given what kind of edit it is."""
    target = dict(reference)
    if kind == "add":
        rest, cell = stated_cell(caption, reference)
        size, color, shape = rest.split()[-3:]
        assert cell not in reference
        target[cell] = Thing(color, shape, size)
        return target
    if kind == "move":
        rest, cell = stated_cell(caption, reference)
        place = named_cell(re.search(PHRASE, rest), reference)
        beside = re.search(rf"(?:{'|'.join(RELATIONS)}) ({PHRASE})$", caption)
        # No object moves to a place beside itself.
        assert not beside or named_cell(re.fullmatch(PHRASE, beside[1]), reference) != place
        assert cell not in reference
        target[cell] = target.pop(place)
        return target
    match = re.search(PHRASE, caption)
    place = named_cell(match, reference)
    thing = target.pop(place)
    rest = (caption[: match.start()] + caption[match.end() :]).split()
    if kind == "remove":
        assert re.match("remove|take away|delete|get rid of|same scene without", caption)
        return target
    names = {"color": COLORS, "shape": SHAPES, "size": SIZES}[kind]
    stated = [word for word in rest if word in names]
    if not stated:
        assert thing.size == "medium"
        (stated,) = (
            [size]
            for size, words in {
                "small": {"smaller", "shrink"},
                "large": {"larger", "bigger", "enlarge"},
            }.items()
            if words & set(rest)
        )
    target[place] = thing._replace(**{kind: stated[0]})
    return target


class Split(NamedTuple):
    captions: list[dict]
    paths: dict[str, str]
    edits: dict[str, dict]
    scenes: dict[str, dict[tuple[int, int], Thing]]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    out = tmp_path_factory.mktemp("made")
    families = {"train_families": 12, "val_families": 4, "test_families": 4}
    make_cirr(out, SyntheticConfig(seed=5, image_size=144, train_queries_per_set=12, **families))
    root = out / "cirr_dataset"
    splits = {}
    for split in SPLITS:
        captions = json.loads((root / "cirr" / "captions" / f"cap.rc2.{split}.json").read_text())
        paths = json.loads((root / "cirr" / "image_splits" / f"split.rc2.{split}.json").read_text())
        edits = json.loads((root / f"edits.{split}.json").read_text())
        scenes = {}
        for name, path in paths.items():
            with Image.open(root / path) as image:
                assert (image.size, image.mode, image.format) == ((144, 144), "RGB", "PNG")
                scenes[name] = read_scene(image)
        splits[split] = Split(captions, paths, edits, scenes)
    return splits


def changed_cells(one: dict, other: dict) -> list[tuple[int, int]]:
    return [cell for cell in CELLS.values() if one.get(cell) != other.get(cell)]


def edit_kind(one: dict, other: dict) -> str | None:
    """The kind of the one edit between two scenes as read from pixels; None if there is no such edit."""
    cells = changed_cells(one, other)
    before = [one[cell] for cell in cells if cell in one]
    after = [other[cell] for cell in cells if cell in other]
    if len(cells) == 2 and len(before) == 1 and before == after:
        return "move"
    if len(cells) != 1:
        return None
    if not before or not after:
        return "remove" if before else "add"
    differing = [name for name in Thing._fields if getattr(before[0], name) != getattr(after[0], name)]
    return differing[0] if len(differing) == 1 else None


def queries(benchmark: dict[str, Split]):
    for split in SPLITS:
        for entry in benchmark[split].captions:
            edit = benchmark[split].edits[str(entry["pairid"])]
            yield entry, edit, benchmark[split].scenes


def single_edits(benchmark: dict[str, Split]):
    return ((entry, edit, scenes) for entry, edit, scenes in queries(benchmark) if edit["kind"] != "two")


@pytest.mark.parametrize("image_size", [96, 144])
def test_every_color_shape_and_size_can_be_told_apart_in_the_image(image_size):
    for color, shape, size in product(COLORS, SHAPES, SIZES):
        for cell in ((0, 0), (1, 2)):
            image = render(Scene((SceneObject(cell, color, shape, size),), shade=230), image_size)
            assert read_scene(image) == {cell: Thing(color, shape, size)}


@pytest.mark.parametrize("image_size", [24, 96, 97, 144])
def test_pasted_shapes_are_those_drawn_together(image_size):
    rng = random.Random(0)
    for _ in range(20):
        cells = rng.sample(list(product(range(3), range(3))), 5)
        objects = [
            SceneObject(cell, rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(SIZES)))
            for cell in cells
        ]
        shade = rng.randint(200, 255)
        large = Image.new("RGB", (4 * image_size, 4 * image_size), (shade,) * 3)
        side = 4 * image_size / 3
        for thing in objects:
            y, x = (side * (place + 0.5) for place in thing.cell)
            radius = side * {"small": 0.19, "medium": 0.32, "large": 0.46}[thing.size]
            fill, draw = scene_module.COLORS[thing.color], ImageDraw.Draw(large)
            if thing.shape == "circle":
                r = 0.95 * radius
                draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            else:
                draw.polygon(scene_module.outline(thing.shape, x, y, radius), fill=fill)
        drawn = render(Scene(tuple(objects), shade), image_size)
        assert np.array_equal(np.asarray(drawn), np.asarray(large.reduce(4)))


def test_files_are_in_cirrs_format(benchmark):
    for split, folder in (("train", r"train/\d\d?"), ("val", "dev"), ("test1", "test1")):
        captions, paths, *_ = benchmark[split]
        for name, path in paths.items():
            assert re.fullmatch(rf"\./{folder}/{name}\.png", path)
        for entry in captions:
            hidden = split == "test1"
            target_keys = set() if hidden else {"target_hard", "target_soft"}
            assert entry.keys() == {"pairid", "reference", "caption", "img_set"} | target_keys
            rank_keys = {"reference_rank"} if hidden else {"reference_rank", "target_rank"}
            assert entry["img_set"].keys() == {"id", "members"} | rank_keys
            members = entry["img_set"]["members"]
            assert len(set(members)) == 6
            assert set(members) <= paths.keys()
            assert members[entry["img_set"]["reference_rank"]] == entry["reference"]
            if not hidden:
                assert members[entry["img_set"]["target_rank"]] == entry["target_hard"]
                assert entry["target_soft"] == {entry["target_hard"]: 1.0}


def test_pair_ids_and_the_targets_in_edits_agree_over_all_splits(benchmark):
    ids = [entry["pairid"] for split in SPLITS for entry in benchmark[split].captions]
    assert len(set(ids)) == len(ids)
    for split in SPLITS:
        assert [str(entry["pairid"]) for entry in benchmark[split].captions] == list(benchmark[split].edits)
    for entry, edit, _ in queries(benchmark):
        assert edit["target"] in entry["img_set"]["members"]
        assert entry.get("target_hard", edit["target"]) == edit["target"] != entry["reference"]


def test_no_scene_occurs_twice_in_a_split_or_in_two_splits(benchmark):
    counts = Counter(
        frozenset(scene.items()) for split in SPLITS for scene in benchmark[split].scenes.values()
    )
    assert sum(counts.values()) == (12 + 4 + 4) * 36
    assert max(counts.values()) == 1


def test_a_family_shares_no_scene_with_those_drawn_before():
    used: set[Scene] = set()
    # The same random state would draw the same family again.
    sets = [s for _ in range(3) for s in synthetic.draw_family(("size", "move"), random.Random(1), used)]
    assert len({scene for image_set in sets for row in image_set for scene in row}) == len(used) == 3 * 36


def test_scenes_hold_two_to_five_objects_and_no_twins_in_color_and_shape(benchmark):
    for split in SPLITS:
        for scene in benchmark[split].scenes.values():
            assert 2 <= len(scene) <= 5
            assert len({(thing.color, thing.shape) for thing in scene.values()}) == len(scene)


def test_a_query_is_one_edit_and_the_edits_file_tells_which_and_where(benchmark):
    for entry, edit, scenes in queries(benchmark):
        reference, target = scenes[entry["reference"]], scenes[edit["target"]]
        own = None if edit["kind"] == "two" else edit_kind(reference, target)
        assert own == edit["kind"] or edit["kind"] in ("negation", "counting", "two")
        assert own or edit["kind"] == "two"
        assert sorted(map(tuple, edit["cells"])) == changed_cells(reference, target)
        if edit["kind"] == "two":
            assert edit_kind(reference, target) is None
            members = [scenes[name] for name in entry["img_set"]["members"]]
            # Each of the two edits by itself is in the set as well.
            assert sum(bool(edit_kind(reference, one) and edit_kind(one, target)) for one in members) == 2


def test_an_image_set_is_three_states_of_one_axis_by_two_of_another(benchmark):
    for split in SPLITS:
        sets = {entry["img_set"]["id"]: entry["img_set"]["members"] for entry in benchmark[split].captions}
        assert sorted(name for members in sets.values() for name in members) == sorted(benchmark[split].paths)
        for members in sets.values():
            scenes = [benchmark[split].scenes[name] for name in members]
            near = [{j for j in range(6) if edit_kind(scenes[i], scenes[j])} for i in range(6)]
            # The 3 x 2 rook's graph: all have three neighbors, and two triangles hold all six.
            assert [len(others) for others in near] == [3] * 6
            triangles = {frozenset((i, j, k)) for i in range(6) for j in near[i] for k in near[i] & near[j]}
            assert len(triangles) == 2
            assert frozenset.union(*triangles) == set(range(6))


def test_every_query_has_distractors_for_text_and_for_image_in_its_set(benchmark):
    for entry, edit, scenes in single_edits(benchmark):
        reference, target = scenes[entry["reference"]], scenes[edit["target"]]
        cells = changed_cells(reference, target)
        others = [
            scenes[name]
            for name in entry["img_set"]["members"]
            if name not in (entry["reference"], edit["target"])
        ]
        assert any(all(other.get(cell) == target.get(cell) for cell in cells) for other in others)
        assert any(edit_kind(reference, other) for other in others)


def test_queries_of_a_set_differ_and_take_half_from_each_axis(benchmark):
    for split, count in (("train", 12), ("val", 6), ("test1", 6)):
        by_set: dict[int, list[tuple[str, str]]] = {}
        double = set()
        for entry in benchmark[split].captions:
            edit = benchmark[split].edits[str(entry["pairid"])]
            pair = entry["reference"], edit["target"]
            by_set.setdefault(entry["img_set"]["id"], []).append(pair)
            if edit["kind"] == "two":
                double.add(pair)
        for set_id, pairs in by_set.items():
            (members,) = {
                tuple(entry["img_set"]["members"])
                for entry in benchmark[split].captions
                if entry["img_set"]["id"] == set_id
            }
            scenes = {name: benchmark[split].scenes[name] for name in members}
            assert len(set(pairs)) == len(pairs) == count
            # A pair of the three-state axis has a third image that is one edit from both.
            in_triangle = [
                any(edit_kind(scenes[a], scenes[c]) and edit_kind(scenes[b], scenes[c]) for c in members)
                for a, b in pairs
                if (a, b) not in double
            ]
            assert count - len(in_triangle) in ((1, 2) if split == "train" else (0, 1))
            assert sum(in_triangle) == len(in_triangle) - len(in_triangle) // 2


def test_all_kinds_of_edit_occur_about_equally_often(benchmark):
    counts = Counter(edit["kind"] for edit in benchmark["train"].edits.values())
    assert counts.keys() == set(KINDS)
    assert max(counts.values()) <= 1.6 * min(counts.values())


def test_the_caption_applied_to_the_reference_gives_the_target_and_nothing_else(benchmark):
    for entry, edit, scenes in queries(benchmark):
        if edit["kind"] in ("negation", "counting", "two"):  # test_statements.py reads these
            continue
        asked = apply_caption(entry["caption"], edit["kind"], scenes[entry["reference"]])
        assert asked == scenes[edit["target"]], entry["caption"]


def test_captions_are_short_varied_and_of_the_listed_words(benchmark):
    captions = [entry["caption"] for entry, *_ in queries(benchmark)]
    # That no word is listed in vain, test_descriptions.py holds against more captions.
    assert {word for caption in captions for word in caption.split()} <= set(words())
    plain = [
        entry["caption"]
        for entry, edit, _ in queries(benchmark)
        if edit["kind"] not in ("negation", "counting", "two")
    ]
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", caption) for caption in captions)
    assert max(len(caption.split()) for caption in plain) <= 18
    assert max(len(caption.split()) for caption in captions) <= 30
    for kind in KINDS:
        heads = {
            re.sub(
                PHRASE,
                "X",
                re.sub("|".join((*COLORS, *SHAPES, *SIZES)), "", re.sub(PHRASE, "X", entry["caption"])),
            )
            for entry, edit, _ in queries(benchmark)
            if edit["kind"] == kind
        }
        assert len(heads) >= 5


def run_script(out: Path, *flags: str, hash_seed: str = "0") -> subprocess.CompletedProcess:
    small = ["--image-size", "24", "--train-families", "2", "--val-families", "1", "--test-families", "1"]
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *small, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_one_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed, hash_seed in (("a", "3", "1"), ("b", "3", "2"), ("c", "4", "1")):
        result = run_script(tmp_path / name, "--seed", seed, hash_seed=hash_seed)
        assert result.returncode == 0, result.stderr
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == 4 * 36 + 3 * 3 + 1
    captions = "cirr_dataset/cirr/captions/cap.rc2.val.json"
    assert a[captions] != c[captions]


def test_more_train_families_leave_val_and_test1_as_they_are(tmp_path):
    make_cirr(tmp_path / "a", SMALL)
    make_cirr(tmp_path / "b", SyntheticConfig(**{**vars(SMALL), "train_families": 3}))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    same = [path for path in a if "train" not in path and "made_by" not in path]
    assert len(same) == 2 * 36 + 2 * 3
    assert all(a[path] == b[path] for path in same)


def test_a_second_call_does_nothing_and_other_arguments_are_refused(tmp_path, capsys):
    make_cirr(tmp_path, SMALL)
    # The name that data made by any version bear: another would refuse them all.
    made_by = json.loads((tmp_path / "cirr_dataset" / "made_by.json").read_text())
    assert (made_by["generator"], made_by["version"]) == ("sprc.data.synthetic", GENERATOR_VERSION)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    make_cirr(tmp_path, SMALL)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    result = run_script(tmp_path, "--seed", "1")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "delete it or choose another --out" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_that_we_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "cirr_dataset").mkdir()
    with pytest.raises(InputError, match="cirr_dataset"):
        make_cirr(tmp_path, SMALL)
    assert list(tmp_path.rglob("*")) == [tmp_path / "cirr_dataset"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    drawn = []

    def fail_late(scene, image_size):
        drawn.append(scene)
        if len(drawn) > 20:  # of one process
            raise OSError("disk full")
        return render(scene, image_size)

    monkeypatch.setattr(synthetic, "render", fail_late)
    with pytest.raises(InputError, match="disk full"):
        make_cirr(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_one_clear_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "render", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="was killed; see that memory is free"):
        make_cirr(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_saved_leaves_nothing_behind(tmp_path, monkeypatch):
    own = Image.Image.save

    def fail(self, path, **options):
        if Path(path).name == "dev-0-5-img5.png":
            raise OSError("disk full")
        own(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match="disk full"):
        make_cirr(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken"):
        make_cirr(tmp_path / "taken", SMALL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 8),
        ("train_families", 0),
        ("val_families", 0),
        ("eval_queries_per_set", 19),
        ("seed", -1),
    ],
)
def test_a_size_out_of_range_names_its_flag(name, value):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value}: "):
        SyntheticConfig(**{name: value})


def test_two_edits_apart_is_no_query():
    one = Scene((SceneObject((0, 0), "red", "circle", "small"), SceneObject((1, 1), "blue", "star", "large")))
    two = Scene(
        (SceneObject((0, 0), "green", "square", "small"), SceneObject((1, 1), "blue", "star", "large"))
    )
    for other in (one, two):
        with pytest.raises(ValueError, match="not one edit apart"):
            edit_between(one, other)


def test_set_queries_cover_all_pairs_when_all_are_asked_for():
    image_set = synthetic.draw_family(("color", "move"), random.Random(0), set())[0]
    pairs = synthetic.draw_queries(image_set, 18, random.Random(0))
    assert len(set(pairs)) == 18
