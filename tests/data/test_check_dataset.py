"""The data check as users run it: it lists everything at which the loaders would stop one by one."""

import json
import shutil
import sys
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper

import numpy as np
import pytest
from helpers.runner import run
from PIL import Image

import check_dataset
from sprc.data import check as check_module
from sprc.data.cirr import load_cirr
from sprc.data.fashioniq import load_fashioniq
from sprc.data.images import load_image
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.fashioniq import FashionIQConfig, make_fashioniq
from sprc.data.synthetic.splits import SyntheticConfig
from sprc.data.transforms import make_transform
from sprc.errors import InputError

ONE_FAMILY = {"image_size": 24, "train_families": 1, "val_families": 1, "test_families": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """36 images a CIRR split, 36 a FashionIQ split and type."""
    out = tmp_path_factory.mktemp("made")
    make_cirr(out, SyntheticConfig(**ONE_FAMILY))
    make_fashioniq(out, FashionIQConfig(**ONE_FAMILY))
    return out


class Spoiled:
    """A copy of the made data, to be spoiled."""

    def __init__(self, made, out, folder):
        shutil.copytree(made / folder, out / folder)
        self.data_path = out
        self.root = out / folder

    def edit(self, file, change):
        path = self.root / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return path


@pytest.fixture
def cirr(made, tmp_path):
    return Spoiled(made, tmp_path, "cirr_dataset")


@pytest.fixture
def fashioniq(made, tmp_path):
    return Spoiled(made, tmp_path, "fashionIQ_dataset")


def check(dataset, data_path, *flags, code, subprocess=False):
    """What the script printed, as {kind of line: lines}.

    In this process unless told otherwise, because starting one takes seconds.
    """
    arguments = ["--dataset", dataset, "--data-path", str(data_path), *flags]
    if subprocess:
        stdout, stderr = run("check_dataset.py", *arguments, code=code)
        assert "Traceback" not in stderr
    else:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(TextIOWrapper(BytesIO())) as printed:
            patch.setattr(sys, "argv", ["check_dataset.py", *arguments])
            returned = 0
            try:
                check_dataset.main()
            except SystemExit as error:
                returned = error.code
        assert returned == code
        printed.flush()
        stdout = printed.buffer.getvalue().decode()
    lines = {"problem": [], "note": [], "other": []}
    for line in stdout.splitlines():
        kind, _, rest = line.partition(": ")
        lines[kind if kind in ("problem", "note") else "other"].append(
            rest if kind in ("problem", "note") else line
        )
    return lines


def assert_each_is_listed_once(problems, expected):
    assert len(problems) == len(expected)
    for start in expected:
        assert sum(line.startswith(start) for line in problems) == 1, (start, problems)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--decode",)])
@pytest.mark.parametrize("dataset", ["CIRR", "fashioniq"])
def test_good_data_have_no_problem_and_their_sizes_are_notes(made, dataset, flags):
    lines = check(dataset, made, *flags, code=0, subprocess=not flags)
    assert lines["problem"] == []
    assert lines["other"][-1] == "problems: 0"
    if dataset == "CIRR":
        assert lines["other"][:4] == [
            "train: 60 triplets, 36 images",
            "val: 36 triplets, 36 images",
            "test1: 36 triplets, 36 images",
            "in all: 108 images",
        ]
        assert lines["note"] == [
            "train: 60 triplets; published are 28,225",
            "val: 36 triplets; published are 4,181",
            "test1: 36 triplets; published are 4,148",
            "108 images; published are 21,551",
        ]
    else:
        assert lines["other"][4] == "val, toptee: 24 triplets, 36 images"
        assert lines["other"][9] == "in all: 324 entries in split files, of 324 different images"
        assert lines["note"] == [
            "324 entries in split files, of 324 different images; "
            "published are 77,683 entries of 74,381 images"
        ]


def test_complete_data_have_no_note(fashioniq, cirr, monkeypatch):
    for name, value in (("CIRR_TRIPLETS", {"train": 60, "val": 36, "test1": 36}), ("CIRR_IMAGES", 108)):
        monkeypatch.setattr(check_module, name, value)
    assert check("CIRR", cirr.data_path, code=0)["note"] == []
    # An image of two types, as FashionIQ has three thousand: one entry more, and no image.
    shared = json.loads((fashioniq.root / "image_splits/split.dress.val.json").read_text())[0]
    fashioniq.edit("image_splits/split.shirt.val.json", lambda names: names.append(shared))
    for name, value in (("FASHIONIQ_ENTRIES", 325), ("FASHIONIQ_IMAGES", 324)):
        monkeypatch.setattr(check_module, name, value)
    lines = check("FashionIQ", fashioniq.data_path, code=0)
    assert lines["note"] == []
    assert "in all: 325 entries in split files, of 324 different images" in lines["other"]


def test_everything_that_is_wrong_with_cirr_is_listed(cirr):
    captions = cirr.root / "cirr/captions/cap.rc2.val.json"
    entries = json.loads(captions.read_text())
    reference, target = entries[5]["reference"], entries[5]["target_hard"]

    def spoil_captions(entries):
        del entries[0]["caption"]
        entries[1]["reference"] = "absent"
        entries[2] = None
        entries[3]["pairid"] = entries[4]["pairid"]
        entries[5]["img_set"]["members"].remove(target)
        members = entries[6]["img_set"]["members"]
        outsiders = [
            name for name in members if name not in (entries[6]["reference"], entries[6]["target_hard"])
        ]
        members.remove(outsiders[0])
        entries[7]["img_set"]["members"] = "none"

    cirr.edit("cirr/captions/cap.rc2.val.json", spoil_captions)
    pair_ids = [entry["pairid"] for entry in entries]
    # The name stays known: the entries that use it are not wrong as well.
    split_file = cirr.edit(
        "cirr/image_splits/split.rc2.val.json", lambda images: images.update({reference: 3})
    )
    index = list(json.loads(split_file.read_text())).index(reference)
    (cirr.root / "cirr/captions/cap.rc2.train.json").write_text("[{")
    (cirr.root / "cirr/image_splits/split.rc2.test1.json").unlink()
    images = sorted((cirr.root / "dev").iterdir())
    images = [path for path in images if path.stem != reference]
    images[0].unlink()
    images[1].write_bytes(b"")
    images[2].write_bytes(images[2].read_bytes()[:-30])
    lines = check("CIRR", cirr.data_path, code=2, subprocess=True)
    assert_each_is_listed_once(
        lines["problem"],
        [
            f"{cirr.root / 'cirr/captions/cap.rc2.train.json'}: broken JSON at line 1 column 3",
            f"{split_file}: entry {index} ('{reference}'): the image's path holds 3, which is not a string",
            f"{captions}: entry 0 (pairid {pair_ids[0]}): 'caption' is missing",
            f"{captions}: entry 1 (pairid {pair_ids[1]}): 'reference' names 'absent'",
            f"{captions}: entry 2 (pairid None): is a NoneType",
            f"{captions}: entry 4 (pairid {pair_ids[4]}): an earlier entry has the same pairid",
            f"{captions}: entry 5 (pairid {pair_ids[5]}): the target '{target}' is not among the set's",
            f"{captions.name}: pairid {pair_ids[6]}: the set holds 5 different images, not 6",
            f"{captions}: entry 7 (pairid {pair_ids[7]}): 'members' is a str",
            f"{cirr.root / 'cirr/image_splits/split.rc2.test1.json'} is missing",
            f"{images[0]} is missing",
            f"{images[1]} is empty",
            f"{images[2]} cannot be read",
        ],
    )
    assert lines["other"][-1] == "problems: 13"
    assert lines["other"][1] == "val: 30 triplets, 35 images"


def test_everything_that_is_wrong_with_fashioniq_is_listed(fashioniq):
    captions = fashioniq.root / "captions/cap.shirt.val.json"

    def spoil_captions(entries):
        entries[0]["captions"] = ["one"]
        entries[1]["target"] = "absent"
        entries[2]["captions"][1] = None
        del entries[3]["candidate"]

    def spoil_names(names):
        names[-1] = 3
        names.append(names[0])

    fashioniq.edit("captions/cap.shirt.val.json", spoil_captions)
    split_file = fashioniq.edit("image_splits/split.dress.test.json", spoil_names)
    test_captions = fashioniq.edit("captions/cap.dress.test.json", lambda entries: entries.clear())
    (fashioniq.root / "image_splits/split.toptee.train.json").write_bytes(b"\xff\xfe")
    names = json.loads((fashioniq.root / "image_splits/split.dress.train.json").read_text())
    for name in (names[4], names[7]):
        next(fashioniq.root.glob(f"images/{name}.*")).unlink()
    broken = next(fashioniq.root.glob(f"images/{names[9]}.*"))
    broken.write_bytes(b"<html>")
    lines = check("FashionIQ", fashioniq.data_path, code=2)
    dress = fashioniq.root / "image_splits/split.dress.train.json"
    assert_each_is_listed_once(
        lines["problem"],
        [
            f"{captions}: entry 0: 'captions' holds 1 texts, not 2",
            f"{captions}: entry 1: 'target' names 'absent'",
            f"{captions}: entry 2: 'captions' holds None, which is not a string",
            f"{captions}: entry 3: 'candidate' is missing",
            f"{split_file}: entry 35: is a int, not a str",
            f"{split_file}: entry 36: '",
            f"{test_captions} is not a list of at least one entry",
            f"{fashioniq.root / 'image_splits/split.toptee.train.json'} cannot be read",
            f"{dress}: entry 4: '{names[4]}' has no .png, .jpg or .jpeg file",
            f"{dress}: entry 7: '{names[7]}' has no .png, .jpg or .jpeg file",
            f"{broken} is not an image",
        ],
    )
    assert lines["other"][-1] == "problems: 11"


def test_of_more_than_20_problems_the_first_20_are_shown_and_all_are_counted(cirr):
    def spoil(entries):
        for entry in entries[:23]:
            entry["caption"] = None

    cirr.edit("cirr/captions/cap.rc2.train.json", spoil)
    next((cirr.root / "test1").iterdir()).unlink()
    lines = check("CIRR", cirr.data_path, code=2)
    assert [line.split(": entry ")[1].split(" ")[0] for line in lines["problem"]] == [
        str(i) for i in range(20)
    ]
    assert lines["other"][-1] == "problems: 24 (the first 20 are above)"


@pytest.mark.parametrize(
    ("dataset", "folder"), [("CIRR", "cirr_dataset"), ("FashionIQ", "fashionIQ_dataset")]
)
def test_a_missing_data_set_is_one_problem(tmp_path, dataset, folder):
    (problem,) = check(dataset, tmp_path, code=2)["problem"]
    assert problem.startswith(f"{tmp_path / folder} is missing")


def test_fashioniqs_test_split_may_be_absent_and_its_other_splits_may_not(fashioniq):
    for path in [*fashioniq.root.glob("*/*.test.json"), *fashioniq.root.glob("images/*-test-*")]:
        path.unlink()
    lines = check("FashionIQ", fashioniq.data_path, code=0)
    assert len(lines["note"]) == 4
    assert sum("neither training nor validation needs the test split" in line for line in lines["note"]) == 3
    (fashioniq.root / "captions/cap.dress.val.json").unlink()
    (problem,) = check("FashionIQ", fashioniq.data_path, code=2)["problem"]
    assert problem.startswith(f"{fashioniq.root / 'captions/cap.dress.val.json'} is missing")


def test_a_missing_images_folder_is_one_problem(fashioniq):
    shutil.rmtree(fashioniq.root / "images")
    (problem,) = check("FashionIQ", fashioniq.data_path, code=2)["problem"]
    assert problem.startswith(f"{fashioniq.root / 'images'} is missing")


def odd_images():
    """One image of each kind that the wild holds, and how it is saved."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels[..., :3])
    alpha = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "alpha": (alpha, "PNG", {}),
        "grey with alpha": (alpha.convert("LA"), "PNG", {}),
        "palette": (image.quantize(8), "PNG", {}),
        "palette with transparency": (image.quantize(8), "PNG", {"transparency": 3}),
        "grey": (image.convert("L"), "PNG", {}),
        "grey of 16 bits": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        "black and white": (image.convert("1"), "PNG", {}),
        "CMYK": (image.convert("CMYK"), "JPEG", {}),
        "rotated by EXIF": (image, "JPEG", {"exif": exif}),
        "one pixel wide": (image.resize((1, 40)), "PNG", {}),
        "one pixel high": (image.resize((40, 1)), "JPEG", {}),
        "one pixel": (image.resize((1, 1)), "PNG", {}),
    }


@pytest.mark.parametrize("transform", ["targetpad", "squarepad"])
@pytest.mark.parametrize("kind", odd_images())
def test_an_odd_image_loads(tmp_path, kind, transform):
    image, image_format, options = odd_images()[kind]
    image.save(tmp_path / "odd", image_format, **options)
    tensor = load_image(tmp_path / "odd", make_transform(transform, 14))
    assert tensor.shape == (3, 14, 14)
    assert tensor.isfinite().all()


def test_rotation_by_exif_is_ignored(tmp_path):
    image, image_format, options = odd_images()["rotated by EXIF"]
    image.save(tmp_path / "rotated", image_format, **options)
    image.save(tmp_path / "plain", image_format)
    transform = make_transform("targetpad", 14)
    rotated, plain = (load_image(tmp_path / name, transform) for name in ("rotated", "plain"))
    assert (rotated == plain).all()


def test_what_the_wild_holds_is_no_problem_and_only_rotation_is_named(cirr, fashioniq):
    odd = odd_images().values()
    for root, folder in ((cirr.root, "dev"), (fashioniq.root, "images")):
        for (image, image_format, options), path in zip(odd, sorted((root / folder).iterdir()), strict=False):
            image.save(path, image_format, **options)
        for place in (root, root / folder):
            (place / ".DS_Store").write_bytes(b"\x00\x01")
    for path in (cirr.root / "cirr/captions", fashioniq.root / "captions"):
        (path / ".DS_Store").write_bytes(b"\x00\x01")
    for path in list((fashioniq.root / "images").glob("*-val-*")):
        path.rename(path.with_suffix(path.suffix.upper()))
    for dataset in ("CIRR", "FashionIQ"):
        lines = check(dataset, cirr.data_path, "--decode", code=0)
        assert not any("DS_Store" in line for kind in lines.values() for line in kind)
        (rotation,) = (line for line in lines["note"] if "published are" not in line)
        assert rotation.startswith(
            "1 images have EXIF data that ask for a rotation; they are taken as they are"
        )
        assert not any("EXIF" in line for line in check(dataset, cirr.data_path, code=0)["note"])


def test_only_decoding_finds_a_broken_middle(cirr):
    path = next((cirr.root / "dev").iterdir())
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 20
    content[middle] ^= 0xFF
    path.write_bytes(content)
    check("CIRR", cirr.data_path, code=0)
    (problem,) = check("CIRR", cirr.data_path, "--decode", code=2)["problem"]
    assert problem.startswith(f"{path} cannot be read")


def test_an_image_so_long_that_padding_takes_gigabytes_is_refused(cirr):
    path = next((cirr.root / "dev").iterdir())
    Image.new("L", (1, 20_000)).save(path)
    (problem,) = check("CIRR", cirr.data_path, code=2)["problem"]
    assert problem.startswith(f"{path} has more than ")
    with pytest.raises(InputError, match="16384 on a side"):
        load_image(path, make_transform("targetpad", 14))


# --- what the loaders refuse since the check exists; the rest is in their own tests ---


def test_a_name_that_an_object_holds_twice_is_refused(cirr):
    path = cirr.root / "cirr/image_splits/split.rc2.val.json"
    name = next(iter(json.loads(path.read_text())))
    path.write_text(path.read_text().replace("{", f'{{"{name}": "./dev/other.png",', 1))
    with pytest.raises(InputError, match=f"an object holds the key '{name}' twice"):
        load_cirr(cirr.data_path, "val")


def test_a_member_that_is_there_twice_counts_once(cirr):
    cirr.edit(
        "cirr/captions/cap.rc2.val.json",
        lambda entries: entries[0]["img_set"]["members"].append("dev-0-0-img1"),
    )
    assert len(load_cirr(cirr.data_path, "val").triplets[0].members) == 6


def test_half_a_character_in_a_caption_or_name_is_refused(cirr, fashioniq):
    cirr.edit("cirr/captions/cap.rc2.val.json", lambda entries: entries[1].update(caption="a \ud83d b"))
    with pytest.raises(InputError, match=r"entry 1 .*'caption' holds half of a surrogate pair"):
        load_cirr(cirr.data_path, "val")
    fashioniq.edit("image_splits/split.dress.val.json", lambda names: names.append("\ud83d"))
    with pytest.raises(InputError, match="entry 36: the name holds half of a surrogate pair"):
        load_fashioniq(fashioniq.data_path, "val", "dress")


def test_the_message_on_a_huge_or_deep_value_stays_short(cirr):
    deep = []
    for _ in range(900):
        deep = [deep]
    for value in ("x" * 1_000_000, deep, {"a": ["b" * 9999] * 9999}):
        cirr.edit(
            "cirr/captions/cap.rc2.val.json", lambda entries, value=value: entries[0].update(pairid=value)
        )
        with pytest.raises(InputError) as caught:
            load_cirr(cirr.data_path, "val")
        assert len(str(caught.value)) < 1500
        assert "'pairid' is a " in str(caught.value)
