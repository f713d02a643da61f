import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from sprc.data.cirr import load_cirr
from sprc.data.datasets import ImageDataset, TripletDataset
from sprc.data.images import check_images, image_loader, load_image
from sprc.data.split import Triplet
from sprc.data.transforms import make_transform
from sprc.errors import InputError

FOLDERS = {"train": "train/7", "val": "dev", "test1": "test1"}
TRANSFORM = make_transform("targetpad", 28)


class CirrTree:
    """A tiny CIRR: two sets of 6 images and two triplets a split, written by `write`."""

    def __init__(self, data_path):
        self.data_path = data_path
        self.root = data_path / "cirr_dataset"
        self.captions = {}
        self.images = {}
        for split, folder in FOLDERS.items():
            names = [f"{split}-{set_id}-img{place}" for set_id in (9, 1) for place in range(6)]
            self.images[split] = {name: f"./{folder}/{name}.png" for name in names}
            self.captions[split] = []
            for pair_id, members in ((40, names[:6]), (12, names[6:])):
                entry = {
                    "pairid": pair_id,
                    "reference": members[2],
                    "caption": "Make it RED.",
                    "img_set": {"id": 1, "members": list(members), "reference_rank": 3},
                }
                if split != "test1":
                    entry |= {"target_hard": members[4], "target_soft": {members[4]: 1.0}}
                self.captions[split].append(entry)
        self.write()

    def captions_file(self, split):
        return self.root / "cirr" / "captions" / f"cap.rc2.{split}.json"

    def split_file(self, split):
        return self.root / "cirr" / "image_splits" / f"split.rc2.{split}.json"

    def write(self):
        for split in FOLDERS:
            for path, content in (
                (self.captions_file(split), self.captions[split]),
                (self.split_file(split), self.images[split]),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content))

    def draw_images(self, split):
        for shade, location in enumerate(self.images[split].values()):
            path = self.root / location
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (20 * shade, 100, 50)).save(path)


@pytest.fixture
def tree(tmp_path):
    return CirrTree(tmp_path)


def message_of(call, *arguments):
    """The message of the InputError that the call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --- annotations ---


@pytest.mark.parametrize("split", ["train", "val"])
def test_load_cirr_reads_triplets_in_file_order(tree, split):
    loaded = load_cirr(tree.data_path, split)
    first, second = list(tree.images[split])[:6], list(tree.images[split])[6:]
    assert loaded.name == split
    assert loaded.triplets == [
        Triplet(40, first[2], first[4], "Make it RED.", tuple(first)),
        Triplet(12, second[2], second[4], "Make it RED.", tuple(second)),
    ]


def test_load_cirr_knows_the_other_targets_of_a_query(tree):
    """Those that `target_soft` gives more than 0; a file without it, or one of numbers alone, is fine."""
    names = list(tree.images["train"])
    first, second = tree.captions["train"]
    first["target_soft"] |= {names[7]: 0.5, names[8]: -1.0, names[9]: 1, "elsewhere": 0}
    del second["target_soft"]
    tree.write()
    triplets = load_cirr(tree.data_path, "train").triplets
    assert [triplet.also_targets for triplet in triplets] == [(names[7], names[9]), ()]
    first["target_soft"] = {names[7]: "half"}
    tree.write()
    message = message_of(load_cirr, tree.data_path, "train")
    assert "entry 0 (pairid 40): 'target_soft' gives " in message
    assert "'half', which is not a number; correct the entry" in message


def test_load_cirr_leaves_the_secret_targets_of_test1_out(tree):
    tree.captions["test1"][0]["target_hard"] = tree.captions["test1"][0]["img_set"]["members"][0]
    tree.write()
    assert [triplet.target for triplet in load_cirr(tree.data_path, "test1").triplets] == [None, None]


def test_gallery_keeps_the_order_of_the_split_file(tree):
    names = list(tree.images["val"])
    shuffled = names[5:] + names[:5]
    tree.images["val"] = {name: tree.images["val"][name] for name in shuffled}
    tree.write()
    image_paths = load_cirr(tree.data_path, "val").image_paths
    assert list(image_paths) == shuffled
    assert image_paths[shuffled[0]] == tree.root / "dev" / f"{shuffled[0]}.png"


def test_load_cirr_accepts_empty_captions_extra_keys_and_stray_files(tree):
    tree.captions["val"][0] |= {"caption": "", "comment": 3}
    tree.write()
    (tree.captions_file("val").parent / ".DS_Store").write_bytes(b"\x00")
    assert load_cirr(tree.data_path, "val").triplets[0].caption == ""


def test_missing_folder_says_where_the_data_go(tmp_path):
    message = message_of(load_cirr, tmp_path / "nowhere", "val")
    assert message.startswith(f"{tmp_path / 'nowhere' / 'cirr_dataset'} is missing")
    assert "cirr_dataset/README.md" in message
    assert "--data-path" in message


@pytest.mark.parametrize("kind", ["captions_file", "split_file"])
def test_missing_annotation_file_is_named(tree, kind):
    path = getattr(tree, kind)("val")
    path.unlink()
    message = message_of(load_cirr, tree.data_path, "val")
    assert f"{path} is missing" in message
    assert "cirr_dataset/README.md" in message


@pytest.mark.parametrize("kind", ["captions_file", "split_file"])
def test_broken_json_is_named_with_line_and_column(tree, kind):
    path = getattr(tree, kind)("train")
    path.write_text('[\n  {"pairid": 1,,}\n]')
    message = message_of(load_cirr, tree.data_path, "train")
    assert f"{path}: broken JSON at line 2 column 16" in message


@pytest.mark.parametrize("kind", ["captions_file", "split_file"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 10_000])
def test_a_file_that_is_no_json_is_named(tree, kind, content):
    path = getattr(tree, kind)("train")
    path.write_bytes(content)
    assert str(path) in message_of(load_cirr, tree.data_path, "train")


@pytest.mark.parametrize("kind", ["captions_file", "split_file"])
@pytest.mark.parametrize("content", ["[]", "{}", "null", "3", '"text"'])
def test_a_file_of_the_wrong_shape_or_empty_is_named(tree, kind, content):
    path = getattr(tree, kind)("val")
    path.write_text(content)
    assert f"{path} is not " in message_of(load_cirr, tree.data_path, "val")


def change(path, value):
    """A defect: set the entry's field at `path`, or delete it where the value is `...`."""

    def apply(entry):
        *parents, key = path
        for parent in parents:
            entry = entry[parent]
        if value is ...:
            del entry[key]
        else:
            entry[key] = value

    return apply


def set_members(choose):
    def apply(entry):
        entry["img_set"]["members"] = choose(entry)

    return apply


DEFECTS = {
    "no pairid": (change(["pairid"], ...), "'pairid' is missing"),
    "no reference": (change(["reference"], ...), "'reference' is missing"),
    "no target": (change(["target_hard"], ...), "'target_hard' is missing"),
    "no caption": (change(["caption"], ...), "'caption' is missing"),
    "no img_set": (change(["img_set"], ...), "'img_set' is missing"),
    "no members": (change(["img_set", "members"], ...), "'members' is missing"),
    "pairid is text": (change(["pairid"], "12"), "'pairid' is a str, not a int"),
    "pairid is a bool": (change(["pairid"], True), "'pairid' is a bool, not a int"),
    "reference is null": (change(["reference"], None), "'reference' is a NoneType, not a str"),
    "target is a list": (change(["target_hard"], ["a"]), "'target_hard' is a list, not a str"),
    "caption is null": (change(["caption"], None), "'caption' is a NoneType, not a str"),
    "img_set is a list": (change(["img_set"], []), "'img_set' is a list, not a dict"),
    "members is text": (change(["img_set", "members"], "abc"), "'members' is a str, not a list"),
    "a member is a number": (
        change(["img_set", "members", 3], 5),
        "'members' holds 5, which is not a string",
    ),
    "a member is a list": (
        change(["img_set", "members", 3], []),
        "'members' holds [], which is not a string",
    ),
    "unknown reference": (change(["reference"], "x-1"), "'reference' names 'x-1', which is not in the split"),
    "unknown target": (
        change(["target_hard"], "x\n1"),
        r"'target_hard' names 'x\n1', which is not in the split",
    ),
    "unknown member": (
        change(["img_set", "members", 5], "x-3"),
        "'members' names 'x-3', which is not in the split",
    ),
    "one member": (set_members(lambda entry: [entry["reference"]] * 3), "fewer than 2 images"),
    "no member": (set_members(lambda entry: []), "fewer than 2 images"),
    "reference outside": (
        set_members(
            lambda entry: [name for name in entry["img_set"]["members"] if name != entry["reference"]]
        ),
        "the reference 'val-1-img2' is not among the set's members",
    ),
    "target outside": (
        set_members(
            lambda entry: [name for name in entry["img_set"]["members"] if name != entry["target_hard"]]
        ),
        "the target 'val-1-img4' is not among the set's members",
    ),
    "target is reference": (
        change(["target_hard"], "val-1-img2"),
        "'val-1-img2' is both reference and target",
    ),
    "pairid again": (change(["pairid"], 40), "an earlier entry has the same pairid"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_bad_entry_is_refused_by_file_index_and_pairid(tree, defect):
    apply, complaint = DEFECTS[defect]
    entry = tree.captions["val"][1]
    apply(entry)
    tree.write()
    message = message_of(load_cirr, tree.data_path, "val")
    assert message.startswith(f"{tree.captions_file('val')}: entry 1 (pairid {entry.get('pairid')!r}): ")
    assert complaint in message
    assert "download the file again" in message


@pytest.mark.parametrize("entry", [None, 3, "text", []])
def test_entry_that_is_no_object_is_refused(tree, entry):
    tree.captions["train"][0] = entry
    tree.write()
    message = message_of(load_cirr, tree.data_path, "train")
    assert message.startswith(f"{tree.captions_file('train')}: entry 0 ")
    assert "not an object" in message


@pytest.mark.parametrize("split", ["train", "val", "test1"])
def test_unknown_reference_is_refused_in_every_split(tree, split):
    tree.captions[split][0]["reference"] = "absent"
    tree.write()
    assert "'reference' names 'absent'" in message_of(load_cirr, tree.data_path, split)


@pytest.mark.parametrize("split", ["train", "val"])
def test_target_outside_its_set_is_refused_where_targets_are_known(tree, split):
    tree.captions[split][0]["target_hard"] = tree.captions[split][1]["target_hard"]
    tree.write()
    assert "is not among the set's members" in message_of(load_cirr, tree.data_path, split)


@pytest.mark.parametrize(
    "location",
    ["../other.png", "./dev/../../other.png", "/etc/other.png", "..", ".", "", "dev/..", "a\0", 3, None],
)
def test_image_path_that_leaves_the_dataset_is_refused(tree, location):
    name = list(tree.images["val"])[4]
    tree.images["val"][name] = location
    tree.write()
    message = message_of(load_cirr, tree.data_path, "val")
    assert message.startswith(f"{tree.split_file('val')}: entry 4 ('{name}'): ")
    assert repr(location) in message


def test_image_path_may_wander_inside_the_dataset(tree):
    name = next(iter(tree.images["val"]))
    tree.images["val"][name] = "dev/../..a/x..png"
    tree.write()
    assert load_cirr(tree.data_path, "val").image_paths[name] == tree.root / "..a" / "x..png"


def test_unknown_split_is_refused(tree):
    assert "'dev'" in message_of(load_cirr, tree.data_path, "dev")


def test_both_names_of_the_third_split_give_the_same_one(tree):
    assert load_cirr(tree.data_path, "test") == load_cirr(tree.data_path, "test1")
    assert load_cirr(tree.data_path, "test").name == "test1"


# --- images ---


def test_triplets_collate_into_the_models_batch(tree):
    tree.draw_images("val")
    tree.captions["val"][1]["caption"] = "Add (two) dogs!"
    tree.write()
    val = load_cirr(tree.data_path, "val")
    batch = next(
        iter(DataLoader(TripletDataset(val.triplets, val.image_paths, image_loader(TRANSFORM)), batch_size=2))
    )
    assert set(batch) == {"image", "target", "text_input"}
    assert batch["text_input"] == ["make it red", "add two dogs"]
    for row, triplet in enumerate(val.triplets):
        for key, name in (("image", triplet.reference), ("target", triplet.target)):
            assert torch.equal(batch[key][row], TRANSFORM(Image.open(val.image_paths[name])))


def test_triplets_without_targets_make_no_training_set(tree):
    test1 = load_cirr(tree.data_path, "test1")
    with pytest.raises(ValueError, match="without a target"):
        TripletDataset(test1.triplets, test1.image_paths, image_loader(TRANSFORM))


def test_image_dataset_keeps_the_order_of_names(tree):
    tree.draw_images("val")
    image_paths = load_cirr(tree.data_path, "val").image_paths
    names = list(image_paths)[::-1]
    batches = list(DataLoader(ImageDataset(names, image_paths, image_loader(TRANSFORM)), batch_size=5))
    assert torch.cat([indices for indices, _ in batches]).tolist() == list(range(12))
    images = torch.cat([images for _, images in batches])
    assert images.shape == (12, 3, 28, 28)
    for name, image in zip(names, images, strict=True):
        assert torch.equal(image, TRANSFORM(Image.open(image_paths[name])))


def test_input_error_leaves_a_dataloader_worker_as_its_plain_line(tree):
    tree.draw_images("val")
    image_paths = load_cirr(tree.data_path, "val").image_paths
    dataset = ImageDataset(list(image_paths), image_paths, image_loader(TRANSFORM))
    path = image_paths["val-1-img0"]
    path.write_bytes(path.read_bytes()[:60])
    expected = message_of(load_image, path, TRANSFORM)
    assert message_of(list, DataLoader(dataset, num_workers=1)) == expected
    assert expected.startswith(str(path))


def png_of_size(width, height):
    """The head of a PNG that claims to be that large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + struct.pack(">I", 99) + b"IDAT"


def encode(image_format):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


BAD_IMAGES = {
    "missing": (None, "is missing"),
    "empty": (b"", "is empty"),
    "a web page": (b"<html>404</html>" * 9, "is not an image"),
    "png cut in half": (encode("PNG")[:-15_000], "cannot be read"),
    "png cut near its end": (encode("PNG")[:-40], "cannot be read"),
    "png cut in its header": (encode("PNG")[:20], "cannot be read|is not an image"),
    "jpeg cut in half": (encode("JPEG")[:-6_000], "cannot be read"),
    "jpeg cut near its end": (encode("JPEG")[:-40], "cannot be read"),
    "bomb that Pillow warns of": (png_of_size(10_000, 10_000), "has more than"),
    "bomb that Pillow refuses": (png_of_size(60_000, 60_000), "has more than"),
}


@pytest.mark.parametrize(
    "truncated_allowed", [False, True], ids=["", "after LAVIS let truncated images pass"]
)
@pytest.mark.parametrize("defect", BAD_IMAGES)
def test_bad_image_is_refused_before_and_during_a_run(
    tmp_path, monkeypatch, recwarn, defect, truncated_allowed
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated_allowed)
    content, complaint = BAD_IMAGES[defect]
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    loading = message_of(load_image, path, TRANSFORM)
    checking = message_of(check_images, {"bad": path}, ["bad"])
    for message in (loading, checking):
        assert any(f"{path} {part}" in message for part in complaint.split("|"))
        assert "; " in message  # what to do
    assert not list(recwarn)
    assert truncated_allowed == ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_folder_in_an_images_place_is_refused(tmp_path):
    path = tmp_path / "bad.png"
    path.mkdir()
    assert f"{path} is a folder" in message_of(load_image, path, TRANSFORM)
    assert f"{path} is a folder" in message_of(check_images, {"bad": path}, ["bad"])


def test_check_images_counts_each_bad_image_once_and_names_the_first(tree):
    tree.draw_images("val")
    image_paths = load_cirr(tree.data_path, "val").image_paths
    names = list(image_paths)
    check_images(image_paths, names)
    image_paths[names[3]].unlink()
    image_paths[names[7]].write_bytes(b"")
    message = message_of(check_images, image_paths, names + names)
    first = image_paths[names[3]]
    assert message.startswith(
        f"{tree.root / 'dev'}: 2 of 12 images cannot be used; first: {first} is missing; "
    )
    check_images(image_paths, [name for name in names if name not in (names[3], names[7])])


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("garbage", [0, 10, 100_000])
def test_good_images_pass_with_garbage_after_their_end(tmp_path, image_format, garbage):
    path = tmp_path / "named.png"
    path.write_bytes(encode(image_format) + b"\x00" * garbage)
    check_images({"image": path}, ["image"])
    with Image.open(path) as image:
        assert torch.equal(load_image(path, TRANSFORM), TRANSFORM(image))


def test_check_images_takes_no_names():
    check_images({}, [])
