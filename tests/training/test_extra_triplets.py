"""Training on triplets beside the training set's own."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.runner import assert_one_clear_line, read_csv, run, train
from helpers.wider import TRIPLETS, batch_of, make_model, make_triplets

from sprc.data.datasets import TripletDataset
from sprc.data.extra import load_extra
from sprc.data.split import Triplet
from sprc.errors import InputError
from sprc.run_folder import RunFolder
from sprc.scoring.benchmarks import benchmark_class
from sprc.training.negatives import Negatives
from sprc.training.settings import TrainingSettings

IMAGES = {name: Path(name) for name in "abcd"}
KEYS = benchmark_class("cirr").extra_keys
# As SPN4CIR's: one pairid for all, no image set, several captions.
PUBLISHED = [
    {
        "target_hard": target,
        "reference": reference,
        "caption": ["red instead of blue", "Unlike blue, I want red"],
        "pairid": 0,
        "img_set": {"members": ["xxx"]},
        "caption1": "blue",
        "caption2": "red",
    }
    for reference, target in ("ab", "bc", "da")
]
PLAIN = {"reference": "a", "target_hard": "b", "caption": "red"}


@pytest.fixture
def file(tmp_path):
    def write(entries):
        path = tmp_path / "extra.json"
        path.write_text(json.dumps(entries))
        return path

    return write


def test_the_published_machine_written_triplets_are_read(file):
    found = load_extra(file([*PUBLISHED, PLAIN]), KEYS, IMAGES)
    assert [(t.pair_id, t.reference, t.target) for t in found[:3]] == [
        (0, "a", "b"),
        (1, "b", "c"),
        (2, "d", "a"),
    ]
    assert found[0].training_captions == ("red instead of blue", "Unlike blue, I want red")
    assert found[3] == Triplet(3, "a", "b", "red")


def test_they_are_read_in_fashioniq_s_format_and_without_images_that_are_missing(file):
    entries = [{"candidate": "a", "target": "b", "captions": ["is red"]}]
    entries.append({"candidate": "a", "target": "e", "captions": ["is red", "is long"]})
    found = load_extra(file(entries), benchmark_class("fashioniq").extra_keys, IMAGES, {"e"})
    assert found == [Triplet(0, "a", "b", "is red")]
    with pytest.raises(InputError, match="each of its 1 entries lacks an image"):
        load_extra(file(entries[1:]), benchmark_class("fashioniq").extra_keys, IMAGES, {"e"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "entry 1: 'reference' is missing; correct the entry, or take it out"),
        (3, "entry 1: is a int, not an object"),
        (PLAIN | {"reference": 3}, "entry 1: 'reference' is a int, not a str"),
        (
            PLAIN | {"reference": "e"},
            "entry 1: 'reference' names 'e', which is no image of the training split",
        ),
        (PLAIN | {"target_hard": "a"}, "entry 1: 'a' is both reference and target"),
        (PLAIN | {"caption": []}, "entry 1: 'caption' is neither a text nor a list of texts"),
        (PLAIN | {"caption": ["red", 3]}, "entry 1: 'caption' holds 3, which is not a string"),
    ],
)
def test_a_wrong_entry_is_one_clear_line(file, entry, message):
    path = file([PLAIN, entry])
    with pytest.raises(InputError, match=f"^--extra-triplets {path}: {message}") as caught:
        load_extra(path, KEYS, IMAGES)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"reference": '])
def test_a_wrong_file_is_one_clear_line(tmp_path, text):
    path = tmp_path / "extra.json"
    with pytest.raises(InputError, match=r"--extra-triplets .* is missing"):
        load_extra(path, KEYS, IMAGES)
    path.write_text(text)
    with pytest.raises(InputError, match=f"{path}"):
        load_extra(path, KEYS, IMAGES)


@pytest.mark.parametrize(("weight", "each_epoch"), [(1.0, 5), (None, 5), (0.4, 2), (0.65, 3)])
def test_an_extra_triplet_is_seen_as_often_as_it_weighs(weight, each_epoch):
    own = [Triplet(number, "a", "b", f"own {number}") for number in range(4)]
    extra = [Triplet(number, "c", "d", f"extra {number}") for number in range(5)]
    items = TripletDataset(own, IMAGES, lambda path: str(path), 3, extra, weight)
    assert len(items) == 4 + each_epoch
    seen, epochs = Counter(), []
    for epoch in range(5):
        items.set_epoch(epoch)
        texts = [items[index]["text_input"] for index in range(len(items))]
        assert texts[:4] == [f"own {number}" for number in range(4)]
        assert len(set(texts)) == len(texts)
        epochs.append(texts[4:])
        seen.update(texts[4:])
    assert seen == {f"extra {number}": each_epoch for number in range(5)}
    assert epochs[0] != sorted(epochs[0]) or each_epoch < 5  # in a drawn order
    items.set_epoch(1)
    assert [items.text(index) for index in range(4, len(items))] == epochs[1]  # whatever was read before
    assert (items[4]["image"], items[4]["target"]) == ("c", "d")


def test_a_bank_and_mined_images_know_them(tmp_path):
    model, folder = make_model(), RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    made = make_triplets(tmp_path, model.config)
    items = TripletDataset(TRIPLETS[:12], made.image_paths, made.load, 0, TRIPLETS[12:], 0.5)
    settings = TrainingSettings(dataset="cirr", num_workers=0, batch_size=4, negatives="both")
    settings = replace(settings, **settings.where_unset())
    negatives = Negatives(settings, model, items, folder, ranks_reference=False)
    seen = set()
    for epoch in range(2):
        negatives.before_epoch(epoch, 0, lambda: None)
        negatives.items.set_epoch(epoch)
        batch = batch_of(negatives, [0, 11, 12, 13])
        numbers = batch["triplet"].tolist()
        assert numbers[:2] == [0, 11]
        seen.update(numbers[2:])
        for number, target in zip(numbers, batch["target"], strict=True):
            name = items.triplets[number].target
            assert torch.equal(target, items.load(items.image_paths[name]))
            assert negatives.items.paths[negatives.bank.targets.own[number]].name == name
        assert all(torch.isfinite(loss) for loss in negatives.objective(batch).values())
    assert seen == {12, 13, 14, 15}


def test_a_run_trains_on_them_too_and_goes_on_with_their_file_elsewhere(data, tmp_path):
    captions = data / "cirr_dataset/cirr/captions/cap.rc2.train.json"
    entries = json.loads(captions.read_text())[:40]
    path = tmp_path / "extra.json"
    path.write_text(json.dumps([entry | {"pairid": 0, "img_set": {"members": ["xxx"]}} for entry in entries]))
    flags = ("--no-use-gated-fusion", "--batch-size", 80, "--extra-triplets", path, "--extra-weight", 0.4)
    whole, stdout, _ = train(data, tmp_path / "whole", *flags, "--num-epochs", 2)
    assert "extra triplets: 40, 16 of them each epoch" in stdout  # 144 + 16: two batches
    part, _, _ = train(data, tmp_path / "part", *flags)
    moved = shutil.move(path, tmp_path / "moved.json")
    again = ("--resume", part, "--num-epochs", 2, "--extra-triplets", moved)
    run("blip_fine_tune_2.py", *again)
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert len(read_csv(whole / "train_metrics.csv")) == 2
    Path(moved).write_text(json.dumps(entries[:20]))
    _, stderr = run("blip_fine_tune_2.py", *again[:3], 3, *again[4:], code=2)
    assert_one_clear_line(stderr, f"--extra-triplets {moved} holds something else than when")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--extra-weight", 0.5), "--extra-weight 0.5 weighs nothing; give --extra-triplets"),
        (
            ("--extra-triplets", "x.json", "--extra-weight", 2),
            "--extra-weight 2.0 must be more than 0 and at",
        ),
        (("--extra-triplets", "x.json"), "x.json is missing; give a JSON file of triplets"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(data, tmp_path, flags, message):
    folder, _, stderr = train(data, tmp_path, *flags, code=2)
    assert_one_clear_line(stderr, message)
    assert folder is None
