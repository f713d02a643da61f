"""Images that have no file, or lie elsewhere: what `--missing-images skip` leaves out and says."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers.runner import assert_one_clear_line, read_csv, run, train

from sprc.data import cirr, missing
from sprc.data.fashioniq import load_fashioniq
from sprc.data.images import check_images
from sprc.data.missing import left_out_columns, tell_left_out
from sprc.data.split import LeftOut, Split
from sprc.data.synthetic.fashioniq import FashionIQConfig, make_fashioniq
from sprc.errors import InputError

TYPES = ("dress", "toptee", "shirt")
# As they occur in the authors' files: nothing, a dot, a space, 57 words, accents, fractions, curly quotes.
ODD_CAPTIONS = ("", ".", " ", "dog " * 57, "façade ombré", "¾ sleeves, ½ off", "They’re “red”", "\u200b")


class Incomplete:
    """A made FashionIQ without some files, and a copy whose annotations never had them."""

    def __init__(self, out):
        whole, self.data, self.by_hand = out / "whole", out / "incomplete", out / "by_hand"
        make_fashioniq(whole, FashionIQConfig(train_families=1, val_families=1, test_families=1))
        root = whole / "fashionIQ_dataset"
        self.gone, self.dropped = {}, {}
        for dress_type in TYPES:
            path = root / f"captions/cap.{dress_type}.train.json"
            entries = json.loads(path.read_text())
            for entry, caption in zip(entries, ODD_CAPTIONS, strict=False):
                entry["captions"][0] = caption
            entries[8]["captions"] = [".", ""]
            path.write_text(json.dumps(entries))
        shutil.copytree(whole, self.by_hand)
        for split, dress_type in (("train", "shirt"), ("val", "dress"), ("val", "toptee")):
            names, entries = (
                root / f"{kind}.{dress_type}.{split}.json" for kind in ("image_splits/split", "captions/cap")
            )
            triplets, gallery = json.loads(entries.read_text()), json.loads(names.read_text())
            used = {entry[key] for entry in triplets for key in ("candidate", "target")}
            distractor = next(name for name in gallery if name not in used)
            gone = {triplets[3]["candidate"], triplets[9]["target"]}
            gone |= {distractor} if split == "val" else set()  # training does not look at it
            kept = [t for t in triplets if not gone & {t["candidate"], t["target"]}]
            for path, content in ((names, [n for n in gallery if n not in gone]), (entries, kept)):
                (self.by_hand / path.relative_to(whole)).write_text(json.dumps(content))
            self.gone[f"{split}, {dress_type}"] = [name for name in gallery if name in gone]
            self.dropped[f"{split}, {dress_type}"] = len(triplets) - len(kept)
        shutil.copytree(whole, self.data)
        for names in self.gone.values():
            for name in names:
                for folder in (self.data, self.by_hand):
                    next(folder.glob(f"fashionIQ_dataset/images/{name}.*")).unlink()


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    return Incomplete(tmp_path_factory.mktemp("incomplete"))


def fine_tune(data_path, models, *flags):
    stdout, _ = run(
        "blip_fine_tune_2.py",
        *("--dataset", "FashionIQ", "--backbone", "tiny", "--data-path", data_path, "--models-path", models),
        *("--num-epochs", 1, "--batch-size", 16, "--learning-rate", 1e-3, "--num-workers", 0),
        *("--save-training", "--save-best", "--freeze-vit", *flags),
    )
    (folder,) = models.iterdir()
    return folder, stdout


@pytest.fixture(scope="module")
def skipped(incomplete, tmp_path_factory):
    """A run over the incomplete data, from a feature cache that `extract_features.py` filled."""
    out = tmp_path_factory.mktemp("skipped")
    cache = ("--missing-images", "skip", "--feature-cache", out / "cache", "--cache-dtype", "float32")
    told, _ = run(
        "extract_features.py",
        *("--dataset", "FashionIQ", "--backbone", "tiny", "--freeze-vit", "--data-path", incomplete.data),
        *("--splits", "train", "val", "--num-workers", 0, *cache),
    )
    for title, names in incomplete.gone.items():
        assert f"{title}: {len(names)} of " in told
    folder, stdout = fine_tune(incomplete.data, out / "models", *cache)
    assert "images, 0 of them new" in stdout
    return folder, stdout


def numbers(incomplete, part):
    titles = [title for title in incomplete.gone if title.startswith(part)]
    images = sum(len(incomplete.gone[title]) for title in titles)
    return images, sum(incomplete.dropped[title] for title in titles)


def test_skipping_trains_and_scores_what_annotations_without_the_images_do(incomplete, skipped, tmp_path):
    folder, _ = skipped
    other, _ = fine_tune(incomplete.by_hand, tmp_path)
    for name in ("train_metrics.csv", "step_times.csv"):
        assert (folder / name).exists()
    assert (folder / "train_metrics.csv").read_bytes() == (other / "train_metrics.csv").read_bytes()
    (row,), (expected,) = (read_csv(run_folder / "validation_metrics.csv") for run_folder in (folder, other))
    images, triplets = numbers(incomplete, "val")
    assert list(row)[-3:] == ["protocol", "missing_images", "dropped_triplets"]
    assert row == {**expected, "missing_images": str(images), "dropped_triplets": str(triplets)}
    assert images > 0
    assert triplets > 0


def test_a_run_s_folder_and_output_say_what_was_left_out(incomplete, skipped):
    folder, stdout = skipped
    told = json.loads((folder / "missing_images.json").read_text())
    assert set(told) == {f"{split}, {dress_type}" for split in ("train", "val") for dress_type in TYPES}
    settings = json.loads((folder / "training_hyperparameters.json").read_text())
    assert settings["missing_images"] == "skip"
    for title, found in told.items():
        names, triplets = incomplete.gone.get(title, []), incomplete.dropped.get(title, 0)
        assert found == {"images": names, "triplets": triplets}
        assert settings["left_out"][title] == {"images": len(names), "triplets": triplets}
        lines = [line for line in stdout.splitlines() if line.startswith(f"{title}: ")]
        assert len(lines) == bool(names)
        assert all(f"{len(names)} of " in line and f" {triplets} of " in line for line in lines)
    images, triplets = numbers(incomplete, "val")
    assert f", missing_images {images}, dropped_triplets {triplets}" in stdout


def test_a_score_says_what_it_and_its_training_left_out(incomplete, skipped):
    folder, _ = skipped
    flags = ("--dataset", "FashionIQ", "--data-path", incomplete.data)
    flags += ("--model-path", folder / "saved_models" / "tuned_clip_best.pt")
    stdout, _ = run("blip_validate.py", *flags, "--missing-images", "skip")
    (row,) = read_csv(folder / "validation_metrics.csv")
    for name in list(row)[1:]:
        assert f"{name}: {row[name]}" in stdout.splitlines()
    images, triplets = numbers(incomplete, "train")
    assert (
        f"its training left {images} images without a file and {triplets} triplets of train, shirt" in stdout
    )
    _, stderr = run("blip_validate.py", *flags, code=2)
    assert_one_clear_line(stderr, "--missing-images skip")


def test_the_page_of_gate_maps_and_the_probe_say_what_was_left_out(incomplete, skipped, tmp_path):
    folder, _ = skipped
    flags = ("--dataset", "FashionIQ", "--fiq-type", "toptee", "--data-path", incomplete.data)
    flags += ("--model-path", folder / "saved_models" / "tuned_clip_best.pt", "--out", tmp_path)
    run("visualize_gates.py", *flags, "--missing-images", "skip", "--queries", 1, "--probe")
    images, triplets = len(incomplete.gone["val, toptee"]), incomplete.dropped["val, toptee"]
    for row in read_csv(tmp_path / "probe.csv"):
        assert (row["missing_images"], row["dropped_triplets"]) == (str(images), str(triplets))
    title = f"split val, missing_images {images}, dropped_triplets {triplets}"
    assert title in (tmp_path / "gate_maps.html").read_text()


def test_a_run_goes_on_only_if_the_same_images_are_missing(incomplete, skipped):
    folder, _ = skipped
    back = incomplete.gone["train, shirt"][0]
    place = incomplete.data / f"fashionIQ_dataset/images/{back}.png"
    source = next((incomplete.data / "fashionIQ_dataset/images").glob("*.png"))
    shutil.copy(source, place)
    try:
        _, stderr = run("blip_fine_tune_2.py", "--resume", folder, code=2)
    finally:
        place.unlink()
    assert_one_clear_line(
        stderr, "missing_images.json: the run began without 8 images, and now 7 have no file"
    )
    assert f"first that differs: '{back} (train, shirt)'" in stderr


def test_the_check_counts_what_would_be_left_out(incomplete):
    flags = ("--dataset", "FashionIQ", "--data-path", incomplete.data)
    images = sum(map(len, incomplete.gone.values()))
    stdout, _ = run("check_dataset.py", *flags, code=2)
    assert f"problems: {images}" in stdout.splitlines()
    skipping, _ = run("check_dataset.py", *flags, "--missing-images", "skip")
    assert "problems: 0" in skipping.splitlines()
    for title, names in incomplete.gone.items():
        line = (
            f"note: {title}: {len(names)} of 36 images have no file; --missing-images skip leaves them out, "
        )
        line += f"and {incomplete.dropped[title]} of "
        assert line in stdout
        assert line in skipping


# --- the loaders ---


def test_a_damaged_image_is_an_error_and_a_link_that_leads_nowhere_is_missing(incomplete, tmp_path):
    data_path = tmp_path / "copy"
    shutil.copytree(incomplete.by_hand, data_path)
    images = data_path / "fashionIQ_dataset/images"
    split = load_fashioniq(data_path, "val", "dress", missing_images="skip")
    assert split.left_out == LeftOut()
    assert split == load_fashioniq(data_path, "val", "dress")
    linked, damaged = (split.image_paths[t.reference] for t in split.triplets[:5:4])
    linked.unlink()
    linked.symlink_to(images / "nowhere.png")
    damaged.write_bytes(b"")
    split = load_fashioniq(data_path, "val", "dress", missing_images="skip")
    assert split.left_out.images == (linked.stem,)
    with pytest.raises(InputError, match=f"{damaged.name} is empty"):
        check_images(split.image_paths, split.image_paths)


def test_a_split_of_which_nothing_is_left_is_an_error(incomplete, tmp_path):
    data_path = tmp_path / "copy"
    shutil.copytree(incomplete.by_hand, data_path)
    for path in data_path.glob("fashionIQ_dataset/images/shirt-val-*"):
        path.unlink()
    with pytest.raises(InputError, match=r"val, shirt: 36 images have no file, .* no triplet is left"):
        load_fashioniq(data_path, "val", "shirt", missing_images="skip")


def test_ranks_that_miss_different_images_are_refused(monkeypatch):
    split = Split("val", [], {}, LeftOut(("a",), 2))
    monkeypatch.setattr(missing, "objects_of_all_ranks", lambda own: [own, own, [LeftOut(("b",), 2)]])
    with pytest.raises(InputError, match="rank 2 misses other images than rank 0"):
        tell_left_out([split])
    assert left_out_columns([split, split]) == {"missing_images": 2, "dropped_triplets": 4}
    assert left_out_columns([replace(split, left_out=LeftOut())]) == {}


def test_where_fashioniq_s_images_lie_in_folders_of_their_types(incomplete, tmp_path):
    data_path = tmp_path / "copy"
    shutil.copytree(incomplete.by_hand, data_path)
    images = data_path / "fashionIQ_dataset/images"
    flat = load_fashioniq(data_path, "val", "shirt").image_paths
    for dress_type in TYPES:
        (images / dress_type).mkdir()
    for path in images.glob("*-*-*"):
        path.rename(images / path.name.split("-")[0] / path.name)
    found = load_fashioniq(data_path, "val", "shirt").image_paths
    assert found == {name: images / "shirt" / path.name for name, path in flat.items()}
    first, second, *_ = found.values()
    shutil.copy(first, images / "toptee" / first.name)  # of two types the first
    shutil.copy(second, images / f"{second.stem}.jpeg")  # and images/ itself before either
    again = load_fashioniq(data_path, "val", "shirt").image_paths
    assert again[first.stem] == images / "toptee" / first.name
    assert again[second.stem] == images / f"{second.stem}.jpeg"
    assert list(again) == list(found)


# --- CIRR ---


@pytest.fixture
def cirr_data(data, tmp_path):
    shutil.copytree(data / "cirr_dataset", tmp_path / "data" / "cirr_dataset")
    return tmp_path / "data"


def test_cirr_loses_the_triplets_of_a_set_that_misses_an_image_and_in_training_only_its_own(cirr_data):
    whole = {name: cirr.load_cirr(cirr_data, name) for name in ("train", "val")}
    for name, split in whole.items():
        member = split.triplets[0].members[2]
        split.image_paths[member].unlink()
        rest = cirr.load_cirr(cirr_data, name, missing_images="skip")
        assert list(rest.image_paths) == [image for image in split.image_paths if image != member]
        if name == "val":
            kept = [t for t in split.triplets if member not in t.members]
        else:
            kept = [t for t in split.triplets if member not in (t.reference, t.target)]
            kept = [replace(t, members=tuple(m for m in t.members if m != member)) for t in kept]
        assert rest.triplets == kept
        assert rest.left_out == LeftOut((member,), len(split.triplets) - len(kept))
        assert 0 < len(kept) < len(split.triplets)


@pytest.mark.parametrize("parent", ["images", "some [folder]"])
def test_nlvr2_s_own_folders_are_found_and_two_of_them_are_refused(cirr_data, parent):
    root = cirr_data / "cirr_dataset"
    before = cirr.load_cirr(cirr_data, "train").image_paths
    dev = cirr.load_cirr(cirr_data, "val").image_paths
    (root / parent).mkdir()
    (root / "train").rename(root / parent / "train")
    found = cirr.load_cirr(cirr_data, "train").image_paths
    assert found == {name: root / parent / path.relative_to(root) for name, path in before.items()}
    check_images(found, found)
    assert cirr.load_cirr(cirr_data, "val").image_paths == dev
    (root / "other" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="leave one of them, or move it to"):
        cirr.load_cirr(cirr_data, "train")
    (root / "train").mkdir()
    assert cirr.load_cirr(cirr_data, "train").image_paths == before


@pytest.mark.slow
def test_odd_captions_and_missing_images_go_all_the_way_and_a_submission_refuses_to_skip(cirr_data, tmp_path):
    root = cirr_data / "cirr_dataset"
    for split in ("train", "val", "test1"):
        path = root / f"cirr/captions/cap.rc2.{split}.json"
        entries = json.loads(path.read_text())
        for entry, caption in zip(entries, ODD_CAPTIONS, strict=False):
            entry["caption"] = caption
        path.write_text(json.dumps(entries))
    stdout, _ = run("check_dataset.py", "--dataset", "CIRR", "--data-path", cirr_data)
    assert "problems: 0" in stdout
    val = cirr.load_cirr(cirr_data, "val")
    val.image_paths[val.triplets[-1].target].unlink()
    dropped = sum(val.triplets[-1].target in triplet.members for triplet in val.triplets)
    flags = ("--save-training", "--save-best", "--missing-images", "skip")
    folder, _, _ = train(cirr_data, tmp_path / "models", *flags)
    stdout, _ = run("report_run.py", folder, "--queries", 2, "--device", "cpu")
    assert (
        f"val: 1 of 36 images have no file; --missing-images skip leaves them out, and {dropped} of" in stdout
    )
    for row in read_csv(folder / "recall_table.csv"):
        assert (row["missing_images"], row["dropped_triplets"]) == ("1", str(dropped))
    flags = ("--model-path", folder / "saved_models" / "tuned_clip_arithmetic.pt", "--data-path", cirr_data)
    flags += ("--out", tmp_path / "out")
    _, stderr = run("cirr_test_submission.py", *flags, "--missing-images", "skip", code=2)
    assert_one_clear_line(stderr, "--missing-images skip: the server wants every query of the test split")
    stdout, _ = run("cirr_test_submission.py", *flags, "--name", "x")
    assert (tmp_path / "out" / "recall_submission_x.json").exists()
    assert "https://cirr.cecs.anu.edu.au/test_process/" in stdout.splitlines()[-1]
