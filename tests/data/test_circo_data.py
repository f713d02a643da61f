"""CIRCO's files as its authors publish them: what is read, and what is refused in one line."""

import json

import pytest
from helpers.runner import assert_one_clear_line, run
from PIL import Image

from sprc.data.check import Findings, check_dataset, examine_circo
from sprc.data.circo import ASPECTS, load_circo
from sprc.data.missing import left_out_columns
from sprc.errors import InputError
from sprc.scoring.benchmarks import CIRCO

# In COCO's order, which is none of the numbers'.
IMAGES = (355099, 85932, 9761, 489535, 57541)
QUERIES = [
    {
        "reference_img_id": 85932,
        "target_img_id": 9761,
        "relative_caption": "is held by a little girl, on a chair",
        "shared_concept": "a teddy bear",
        "gt_img_ids": [9761, 489535, 57541],
        "id": 0,
        "semantic_aspects": ["addition", "direct_addressing"],
    },
    {
        "reference_img_id": 9761,
        "target_img_id": 355099,
        "relative_caption": "is empty",
        "shared_concept": "a chair",
        "gt_img_ids": [355099],
        "id": 1,
        "semantic_aspects": ["negation"],
    },
]
SECRET = ("target_img_id", "gt_img_ids", "semantic_aspects")


class Files:
    """The data set on disk, to be spoiled."""

    def __init__(self, data_path):
        self.data_path, self.root = data_path, data_path / "circo_dataset"
        self.images = self.root / "COCO2017_unlabeled" / "unlabeled2017"
        self.listing = self.root / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json"
        self.val, self.test = (self.root / "annotations" / f"{split}.json" for split in ("val", "test"))
        for folder in (self.images, self.listing.parent, self.val.parent):
            folder.mkdir(parents=True)
        for number in IMAGES:
            Image.new("RGB", (8, 8)).save(self.images / f"{number:012d}.jpg")
        entries = [{"license": 1, "file_name": f"{n:012d}.jpg", "height": 8, "id": n} for n in IMAGES]
        self.listing.write_text(json.dumps({"info": {}, "images": entries, "licenses": []}))
        self.val.write_text(json.dumps(QUERIES))
        secret = [{k: v for k, v in entry.items() if k not in SECRET} for entry in QUERIES]
        self.test.write_text(json.dumps(secret))

    def edit(self, path, change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_the_gallery_is_coco_s_list_and_a_query_has_all_its_targets(files):
    split = load_circo(files.data_path, "val")
    assert {name: path.name for name, path in split.image_paths.items()} == {
        str(number): f"{number:012d}.jpg" for number in IMAGES
    }
    assert list(split.image_paths) == [str(number) for number in IMAGES]
    assert all(path.is_file() for path in split.image_paths.values())
    assert (split.name, split.ranks_reference, split.several_targets) == ("val", True, True)
    first, second = split.triplets
    assert (first.pair_id, first.reference, first.target) == (0, "85932", "9761")
    assert first.also_targets == ("489535", "57541")
    assert first.aspects == ("addition", "direct_addressing")
    assert (first.caption, first.members) == ("is held by a little girl, on a chair", ())
    assert (second.target, second.also_targets) == ("355099", ())


def test_the_test_split_has_the_same_gallery_and_no_targets(files):
    val, test = (load_circo(files.data_path, split) for split in ("val", "test"))
    assert test.image_paths == val.image_paths
    assert [(t.reference, t.target, t.also_targets, t.aspects) for t in test.triplets] == [
        ("85932", None, (), ()),
        ("9761", None, (), ()),
    ]


def test_the_shared_concept_goes_before_the_caption_where_it_is_asked_for(files):
    split = load_circo(files.data_path, "val", "concept")
    assert [triplet.caption for triplet in split.triplets] == [
        "find a teddy bear but is held by a little girl, on a chair",
        "find a chair but is empty",
    ]
    with pytest.raises(InputError, match=r"--circo-query.* 'both'; choose from caption, concept"):
        load_circo(files.data_path, "val", "both")


def test_annotations_of_the_first_release_have_no_aspects(files):
    files.edit(files.val, lambda entries: [entry.pop("semantic_aspects") for entry in entries])
    assert [triplet.aspects for triplet in load_circo(files.data_path, "val").triplets] == [(), ()]


def test_the_aspects_are_the_nine_of_the_authors_evaluation():
    assert len(set(ASPECTS)) == 9
    assert {"cardinality", "viewpoint", "negation", "statement_with_conjunction"} < set(ASPECTS)


def first(**changes):
    return lambda entries: entries[0].update(changes)


BROKEN = {
    "no list of images": ("listing", lambda c: c.pop("images"), r"holds no list of 'images'"),
    "an image twice": ("listing", lambda c: c["images"].append(c["images"][0]), "355099 is an earlier"),
    "a path out": (
        "listing",
        lambda c: c["images"][1].update(file_name="../x.jpg"),
        r"entry 1: .*no file in",
    ),
    "an id as text": ("listing", lambda c: c["images"][1].update(id="85932"), "'id' is a str, not a int"),
    "an unknown image": ("val", first(reference_img_id=1), r"\(id 0\): .*names 1, which is not in COCO's"),
    "an unknown target": ("val", first(gt_img_ids=[9761, 2]), "'gt_img_ids' names 2, which is not in COCO's"),
    "a target as text": ("val", first(gt_img_ids=["9761"]), "holds '9761', which is not an int"),
    "a target that is none": ("val", first(gt_img_ids=[57541]), "the target 9761 is not among 'gt_img_ids'"),
    "a target twice": ("val", first(gt_img_ids=[9761, 9761]), "names an image twice"),
    "a reference as target": ("val", first(gt_img_ids=[9761, 85932]), "85932 is both reference and target"),
    "an id twice": ("val", first(id=1), r"entry 1 \(id 1\): an earlier entry has the same id"),
    "an unknown aspect": ("val", first(semantic_aspects=["humour"]), "'humour', not one of cardinality"),
    "no concept": ("val", lambda entries: entries[0].pop("shared_concept"), "'shared_concept' is missing"),
    "no object": ("val", lambda entries: entries.append([]), "entry 2 .*is a list, not an object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_with_its_file_and_entry(files, case):
    name, change, told = BROKEN[case]
    files.edit(getattr(files, name), change)
    with pytest.raises(InputError, match=told) as caught:
        load_circo(files.data_path, "val")
    assert str(getattr(files, name)) in str(caught.value)
    # The check goes on, and lists it once although both splits have the gallery.
    problems = check_dataset("circo", files.data_path).problems
    assert sum(str(caught.value) == problem for problem in problems) == 1


@pytest.mark.parametrize("gone", ["listing", "val"])
def test_a_missing_file_says_where_it_is_looked_for(files, gone):
    getattr(files, gone).unlink()
    with pytest.raises(InputError, match=r"is missing; put CIRCO there as circo_dataset/README.md says"):
        load_circo(files.data_path, "val")


def test_a_query_is_left_out_with_its_reference_or_any_of_its_targets(files):
    (files.images / f"{57541:012d}.jpg").unlink()
    split = load_circo(files.data_path, "val", missing_images="skip")
    assert [triplet.pair_id for triplet in split.triplets] == [1]
    assert "57541" not in split.image_paths
    assert left_out_columns([split]) == {"missing_images": 1, "dropped_triplets": 1}
    (files.images / f"{355099:012d}.jpg").unlink()
    with pytest.raises(InputError, match="val: 2 images have no file, first '355099', and so no triplet"):
        load_circo(files.data_path, "val", missing_images="skip")


def test_the_check_counts_and_says_what_skipping_would_leave_out(files):
    findings = check_dataset("circo", files.data_path)
    assert findings.problems == []
    assert findings.counts == [
        "val: 2 queries, 4 targets",
        "test: 2 queries, secret targets",
        "in all: 5 images",
    ]
    assert findings.notes == [
        "val: 2 queries; published are 220",
        "test: 2 queries; published are 800",
        "5 images; published are 123,403",
    ]
    assert len(findings.image_paths) == 5
    (files.images / f"{57541:012d}.jpg").unlink()
    missed = check_dataset("circo", files.data_path)
    assert any("57541.jpg is missing" in problem for problem in missed.problems)
    assert "val: 1 of 5 images have no file; --missing-images skip leaves them out, and 1 of 2 triplets" in (
        missed.notes
    )
    assert check_dataset("circo", files.data_path, missing_images="skip").problems == []


def test_the_published_sizes_are_no_notes(files, monkeypatch):
    monkeypatch.setattr("sprc.data.check.CIRCO_QUERIES", {"val": 2, "test": 2})
    monkeypatch.setattr("sprc.data.check.CIRCO_IMAGES", 5)
    findings = Findings()
    examine_circo(files.data_path, findings, "error")
    assert findings.notes == []


def test_training_on_it_is_refused_with_what_to_do(tmp_path):
    flags = ("--dataset", "CIRCO", "--backbone", "tiny", "--data-path", tmp_path, "--models-path", tmp_path)
    _, stderr = run("blip_fine_tune_2.py", *flags, code=2)
    assert_one_clear_line(stderr, "CIRCO has no training split; train on CIRR, then score the checkpoint")
    assert not list(tmp_path.iterdir())


def test_features_of_a_training_split_that_it_has_not_are_refused(tmp_path):
    with pytest.raises(InputError, match="CIRCO has no split train; give val or test"):
        CIRCO.read_parts(tmp_path, ["train"], None)
