import json
import os
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sprc.data.datasets import TripletDataset
from sprc.data.fashioniq import load_fashioniq
from sprc.data.images import check_images, image_loader
from sprc.data.split import Triplet
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.scoring.benchmarks import FashionIQ
from sprc.scoring.ranking import Ranking, target_ranks

TYPES = ("dress", "toptee", "shirt")
SPLITS = ("train", "val", "test")
TRANSFORM = make_transform("targetpad", 8)


class FashionIQTree:
    """A tiny FashionIQ, written by `write`: 8 images and 4 triplets, of images 1 to 5, a type and split."""

    def __init__(self, data_path):
        self.data_path = data_path
        self.root = data_path / "fashionIQ_dataset"
        self.images = self.root / "images"
        self.captions, self.names, self.files = {}, {}, {}
        for number, (dress_type, split) in enumerate(product(TYPES, SPLITS)):
            names = [f"B0{number}{letter}" for letter in "HABCDEFG"]
            self.names[dress_type, split] = names
            self.files |= {name: f"{name}.png" for name in names}
            self.captions[dress_type, split] = []
            for reference, target in ((5, 2), (2, 3), (2, 4), (4, 1)):
                entry = {"candidate": names[reference], "captions": ["Is blue.", "has no, sleeves ?"]}
                if split != "test":
                    entry = {"target": names[target], **entry}
                self.captions[dress_type, split].append(entry)
        self.write()
        self.images.mkdir()
        for file in self.files.values():
            Image.new("RGB", (9, 9), (100, 50, 0)).save(self.images / file)

    def captions_file(self, dress_type, split):
        return self.root / "captions" / f"cap.{dress_type}.{split}.json"

    def split_file(self, dress_type, split):
        return self.root / "image_splits" / f"split.{dress_type}.{split}.json"

    def write(self):
        for key in self.captions:
            for path, content in (
                (self.captions_file(*key), self.captions[key]),
                (self.split_file(*key), self.names[key]),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content))

    def rename(self, name, file):
        (self.images / self.files[name]).rename(self.images / file)
        self.files[name] = file


@pytest.fixture
def tree(tmp_path):
    return FashionIQTree(tmp_path)


def message_of(call, *arguments):
    """The message of the InputError that the call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --- annotations ---


@pytest.mark.parametrize("dress_type", TYPES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_triplets_come_in_file_order_with_the_texts_of_validation_and_training(tree, split, dress_type):
    loaded = load_fashioniq(tree.data_path, split, dress_type)
    names = tree.names[dress_type, split]
    texts = (
        "Is blue and has no, sleeves",
        "Has no, sleeves and Is blue",
        "Is blue",
        "Has no, sleeves",
    )
    assert (loaded.name, loaded.dress_type) == (split, dress_type)
    assert loaded.triplets == [
        Triplet(0, names[5], names[2], texts[0], (), texts),
        Triplet(1, names[2], names[3], texts[0], (), texts),
        Triplet(2, names[2], names[4], texts[0], (), texts),
        Triplet(3, names[4], names[1], texts[0], (), texts),
    ]


@pytest.mark.parametrize(
    ("captions", "texts"),
    [
        (["is BLUE", "Is red"], ("Is BLUE and Is red", "Is red and is BLUE", "Is BLUE", "Is red")),
        ([" ..a?, ", ",b.c."], ("A and b.c", "B.c and a", "A", "B.c")),
        (["", "?"], (" and ", " and ", "", "")),
        (["\U0001f457 dress", "éa"], ("\U0001f457 dress and éa", "Éa and \U0001f457 dress")),
    ],
)
def test_texts_of_odd_captions(tree, captions, texts):
    tree.captions["shirt", "train"][0]["captions"] = captions
    tree.write()
    triplet = load_fashioniq(tree.data_path, "train", "shirt").triplets[0]
    assert triplet.caption == texts[0]
    assert triplet.training_captions[: len(texts)] == texts


def test_test_split_has_no_targets_even_where_the_file_tells_them(tree):
    tree.captions["dress", "test"][0]["target"] = tree.names["dress", "test"][6]
    tree.write()
    assert [t.target for t in load_fashioniq(tree.data_path, "test", "dress").triplets] == [None] * 4
    gallery = load_fashioniq(tree.data_path, "test", "dress", "val-split").image_paths
    assert list(gallery) == [tree.names["dress", "test"][i] for i in (2, 4, 5)]


def test_original_gallery_is_the_whole_split_file_in_its_order(tree):
    names = tree.names["toptee", "val"]
    names.reverse()
    tree.write()
    for loaded in (
        load_fashioniq(tree.data_path, "val", "toptee"),
        load_fashioniq(tree.data_path, "val", "toptee", "original"),
    ):
        assert list(loaded.image_paths.items()) == [(name, tree.images / f"{name}.png") for name in names]


def test_val_split_gallery_is_the_triplets_images_in_the_split_files_order(tree):
    names = tree.names["toptee", "val"]
    names.reverse()  # and with it the places: the triplets' images keep their names
    tree.write()
    original = load_fashioniq(tree.data_path, "val", "toptee", "original")
    smaller = load_fashioniq(tree.data_path, "val", "toptee", "val-split")
    in_triplets = {name for t in original.triplets for name in (t.reference, t.target)}
    assert smaller.triplets == original.triplets
    assert list(smaller.image_paths) == [name for name in names if name in in_triplets]
    assert len(smaller.image_paths) == 5 < len(original.image_paths) == 8


def test_a_target_may_be_its_reference_and_a_triplet_may_come_twice(tree):
    entries = tree.captions["dress", "val"]
    entries[0]["target"] = entries[0]["candidate"]
    entries.append(dict(entries[0]))
    tree.write()
    triplets = load_fashioniq(tree.data_path, "val", "dress").triplets
    assert triplets[0].reference == triplets[0].target == triplets[4].target


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (("test1", "dress"), "split 'test1'"),
        (("val", "Dress"), "type 'Dress'"),
        (("val", "dress", "VAL"), "--fiq-protocol) 'VAL'"),
    ],
)
def test_unknown_split_type_or_protocol_is_refused(tree, arguments, bad):
    assert bad in message_of(load_fashioniq, tree.data_path, *arguments)


def test_missing_folder_says_where_the_data_go(tmp_path):
    message = message_of(load_fashioniq, tmp_path / "nowhere", "val", "dress")
    assert message.startswith(f"{tmp_path / 'nowhere' / 'fashionIQ_dataset'} is missing; put FashionIQ there")
    assert "fashionIQ_dataset/README.md" in message
    assert "--data-path" in message


@pytest.mark.parametrize("kind", ["captions_file", "split_file"])
def test_missing_or_broken_annotation_file_is_named(tree, kind):
    path = getattr(tree, kind)("shirt", "val")
    for content in (b"", b'["a",,]', b"{}", b"[]", b"null", b"3", b'"text"', b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        assert str(path) in message_of(load_fashioniq, tree.data_path, "val", "shirt")
    path.unlink()
    message = message_of(load_fashioniq, tree.data_path, "val", "shirt")
    assert f"{path} is missing; put FashionIQ there" in message
    load_fashioniq(tree.data_path, "val", "dress")  # the other types do not need it


DEFECTS = {
    "no candidate": ("candidate", ..., "'candidate' is missing"),
    "no target": ("target", ..., "'target' is missing"),
    "no captions": ("captions", ..., "'captions' is missing"),
    "candidate is null": ("candidate", None, "'candidate' is a NoneType, not a str"),
    "target is a list": ("target", ["a"], "'target' is a list, not a str"),
    "captions is text": ("captions", "ab", "'captions' is a str, not a list"),
    "one caption": ("captions", ["a"], "'captions' holds 1 texts, not 2"),
    "three captions": ("captions", ["a", "b", "c"], "'captions' holds 3 texts, not 2"),
    "a caption is null": ("captions", ["a", None], "'captions' holds None, which is not a string"),
    "unknown candidate": ("candidate", "B\n9", r"'candidate' names 'B\n9', which is not in the split"),
    "unknown target": ("target", "B9", "'target' names 'B9', which is not in the split"),
}


@pytest.mark.parametrize("protocol", ["original", "val-split"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_bad_entry_is_refused_by_file_and_index(tree, defect, protocol):
    key, value, complaint = DEFECTS[defect]
    entry = tree.captions["dress", "val"][2]
    entry[key] = value
    if value is ...:
        del entry[key]
    tree.write()
    message = message_of(load_fashioniq, tree.data_path, "val", "dress", protocol)
    assert message.startswith(f"{tree.captions_file('dress', 'val')}: entry 2: {complaint}")
    assert "download the file again" in message


@pytest.mark.parametrize("entry", [None, 3, "text", []])
def test_entry_that_is_no_object_is_refused(tree, entry):
    tree.captions["dress", "train"][1] = entry
    tree.write()
    message = message_of(load_fashioniq, tree.data_path, "train", "dress")
    assert f"{tree.captions_file('dress', 'train')}: entry 1: is a " in message


@pytest.mark.parametrize("name", [None, 3, ["B"], {}])
def test_split_file_entry_that_is_no_text_is_refused(tree, name):
    tree.names["dress", "val"][6] = name
    tree.write()
    message = message_of(load_fashioniq, tree.data_path, "val", "dress")
    assert message.startswith(f"{tree.split_file('dress', 'val')}: entry 6: is a ")


def test_a_name_that_the_split_file_holds_twice_is_refused(tree):
    names = tree.names["dress", "val"]
    names.append(names[3])
    tree.write()
    message = message_of(load_fashioniq, tree.data_path, "val", "dress")
    assert message.startswith(f"{tree.split_file('dress', 'val')}: entry 8: '{names[3]}' is entry 3 already")


# --- image files ---


def test_images_are_found_as_png_jpg_or_jpeg_in_any_case_among_stray_files(tree):
    names = tree.names["dress", "val"]
    endings = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".Jpeg", ".png", ".jpg")
    for name, ending in zip(names, endings, strict=True):
        tree.rename(name, name + ending)
    for stray in (".DS_Store", "Thumbs.db", "._" + names[0] + ".png", names[1] + ".txt", names[2], ".png"):
        (tree.images / stray).write_bytes(b"\x00")
    image_paths = load_fashioniq(tree.data_path, "val", "dress").image_paths
    assert list(image_paths.items()) == [
        (name, tree.images / (name + ending)) for name, ending in zip(names, endings, strict=True)
    ]
    check_images(image_paths, image_paths)


@pytest.mark.parametrize("listing", [sorted, lambda files: sorted(files, reverse=True)])
def test_an_image_that_is_there_twice_is_the_png_whatever_the_listings_order(tree, monkeypatch, listing):
    names = tree.names["dress", "val"]
    (tree.images / f"{names[0]}.jpg").write_bytes(b"")
    tree.rename(names[1], f"{names[1]}.jpeg")
    (tree.images / f"{names[1]}.jpg").write_bytes(b"")
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listing(listdir(folder)))
    image_paths = load_fashioniq(tree.data_path, "val", "dress").image_paths
    assert [image_paths[name].name for name in names[:2]] == [f"{names[0]}.png", f"{names[1]}.jpg"]


def test_missing_images_are_counted_and_the_first_of_a_triplet_is_named_with_its_entry(tree):
    names = tree.names["shirt", "val"]
    for i in (0, 3, 4):  # the first is in no triplet, the others in entries 1 and 2
        (tree.images / f"{names[i]}.png").unlink()
    message = message_of(load_fashioniq, tree.data_path, "val", "shirt")
    assert message.startswith(f"{tree.images}: 3 of 8 images have no .png, .jpg or .jpeg file, 2 of them in ")
    assert f"first: '{names[3]}' ({tree.captions_file('shirt', 'val')}: entry 1); " in message
    assert "--data-path" in message
    message = message_of(load_fashioniq, tree.data_path, "val", "shirt", "val-split")
    assert message.startswith(f"{tree.images}: 2 of 5 images")


def test_a_missing_image_of_the_gallery_alone_matters_to_the_original_protocol_only(tree):
    names = tree.names["shirt", "train"]
    for i in (6, 7):
        (tree.images / f"{names[i]}.png").unlink()
    message = message_of(load_fashioniq, tree.data_path, "train", "shirt")
    assert message.startswith(f"{tree.images}: 2 of 8 images have no .png, .jpg or .jpeg file, 0 of them in ")
    assert f"first: '{names[6]}' ({tree.split_file('shirt', 'train')}: entry 6); " in message
    assert len(load_fashioniq(tree.data_path, "train", "shirt", "val-split").image_paths) == 5


def test_missing_images_folder_or_a_file_in_its_place_is_named(tree):
    tree.images.rename(tree.root / "pictures")
    assert f"{tree.images} is missing" in message_of(load_fashioniq, tree.data_path, "val", "dress")
    tree.images.write_text("")
    assert f"{tree.images} cannot be read" in message_of(load_fashioniq, tree.data_path, "val", "dress")


# --- training texts ---


def numbered_dataset(tree, count, seed=0):
    """``count`` triplets whose four texts tell the triplet and which of the four it is."""
    name = tree.names["dress", "train"][1]
    path = tree.images / tree.files[name]
    triplets = [
        Triplet(i, name, name, "validation", (), tuple(f"triplet {i} text {k}" for k in range(4)))
        for i in range(count)
    ]
    return TripletDataset(triplets, {name: path}, image_loader(TRANSFORM), seed=seed)


def texts_of(dataset, epoch):
    dataset.set_epoch(epoch)
    return [dataset.text(i) for i in range(len(dataset))]


def test_an_item_has_one_of_its_triplets_four_texts_as_the_tokenizer_takes_it(tree):
    loaded = load_fashioniq(tree.data_path, "train", "dress")
    dataset = TripletDataset(loaded.triplets, loaded.image_paths, image_loader(TRANSFORM))
    seen = set()
    for epoch in range(10):
        dataset.set_epoch(epoch)
        seen |= {dataset[i]["text_input"] for i in range(4)}
    assert seen == {
        "is blue and has no, sleeves",
        "has no, sleeves and is blue",
        "is blue",
        "has no, sleeves",
    }


def test_a_triplet_without_training_texts_keeps_its_caption(tree):
    name = tree.names["dress", "train"][1]
    dataset = TripletDataset(
        [Triplet(0, name, name, "Is RED.")], {name: tree.images / f"{name}.png"}, image_loader(TRANSFORM)
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert dataset[0]["text_input"] == "is red"


def chi_square(counts, cells):
    expected = sum(counts.values()) / cells
    return sum((counts[cell] - expected) ** 2 / expected for cell in counts) + expected * (
        cells - len(counts)
    )


def test_the_four_texts_are_equally_likely_and_independent_of_epoch_and_neighbor(tree):
    dataset = numbered_dataset(tree, 2000)
    drawn = [[int(text[-1]) for text in texts_of(dataset, epoch)] for epoch in range(4)]
    # Thresholds that chance passes in 999 of 1000: 3 and 15 degrees of freedom.
    for epoch in drawn:
        assert chi_square(Counter(epoch), 4) < 16.27
        assert chi_square(Counter(zip(epoch[::2], epoch[1::2], strict=True)), 16) < 37.7
    for one, next_one in pairwise(drawn):
        assert chi_square(Counter(zip(one, next_one, strict=True)), 16) < 37.7


def test_texts_depend_on_seed_and_epoch_and_on_nothing_else(tree):
    dataset = numbered_dataset(tree, 60)
    first = texts_of(dataset, 0)
    assert all(text.startswith(f"triplet {i} text ") for i, text in enumerate(first))
    assert texts_of(dataset, 1) != first
    assert texts_of(dataset, 0) == first
    assert [dataset.text(i) for i in reversed(range(60))] == first[::-1]
    assert texts_of(numbered_dataset(tree, 60), 0) == first
    assert texts_of(numbered_dataset(tree, 60, seed=1), 0) != first


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loaders_texts_are_the_same_with_any_number_of_workers_that_live_over_epochs(tree, workers):
    dataset = numbered_dataset(tree, 20)
    expected = [texts_of(numbered_dataset(tree, 20), epoch) for epoch in range(3)]
    assert expected[0] != expected[1] != expected[2]
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 1, 2, 0):
        dataset.set_epoch(epoch)
        assert [text for batch in loader for text in batch["text_input"]] == expected[epoch]


# --- metrics ---


def test_metrics_are_the_recalls_of_each_type_and_their_means():
    generator = torch.Generator().manual_seed(0)
    expected, ranks = {}, {}
    hits = {10: [], 50: []}
    for dress_type, queries, gallery in (("dress", 37, 120), ("toptee", 50, 90), ("shirt", 23, 200)):
        scores = torch.randn(queries, gallery, generator=generator)
        targets = torch.randint(gallery, (queries,), generator=generator)
        ranks[dress_type] = target_ranks(scores, targets)
        for k in (10, 50):
            found = 0
            for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
                found += target in sorted(range(gallery), key=lambda i, row=row: -row[i])[:k]
            expected[f"{dress_type}_recall_at{k}"] = 100 * found / queries
            hits[k].append(100 * found / queries)
    expected["average_recall_at10"] = sum(hits[10]) / 3
    expected["average_recall_at50"] = sum(hits[50]) / 3
    expected["average_recall"] = (sum(hits[10]) + sum(hits[50])) / 6
    metrics = FashionIQ.metrics_of({name: Ranking(one) for name, one in ranks.items()})
    assert list(metrics) == [
        *(f"{dress_type}_recall_at{k}" for dress_type in TYPES for k in (10, 50)),
        "average_recall_at10",
        "average_recall_at50",
        "average_recall",
    ]
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert len(set(metrics.values())) == 9  # so that no two could be mixed up unseen


def test_metrics_count_a_rank_of_9_and_49_as_found_and_10_and_50_as_not():
    metrics = FashionIQ.metrics_of({"dress": Ranking(torch.tensor([0, 9, 10, 49, 50]))})
    assert metrics == pytest.approx(
        {
            "dress_recall_at10": 40.0,
            "dress_recall_at50": 80.0,
            "average_recall_at10": 40.0,
            "average_recall_at50": 80.0,
            "average_recall": 60.0,
        }
    )
