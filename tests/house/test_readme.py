"""The README's commands and Python lines run, on a small model and small data."""

import shutil

import pytest
import torch
from helpers.documents import commands, read, sections, split_code
from helpers.runner import ROOT, run
from PIL import Image

import sprc

PARTS = sections(read("README.md"))
SMALL_DATA = ("--train-families", 1, "--val-families", 1, "--test-families", 1)


@pytest.fixture
def workplace(trained, pictures, picture_index, tmp_path, monkeypatch):
    """A folder with a run, a picture and an index under the README's names; the pictures of a gallery."""
    shutil.copytree(trained[0], tmp_path / "models" / "clip_finetuned_on_...")
    shutil.copytree(picture_index, tmp_path / "picture_index")
    paths = sorted(pictures.glob("*/*.png"))
    Image.open(paths[0]).convert("RGB").save(tmp_path / "shoe.jpg")
    monkeypatch.chdir(tmp_path)
    return paths


@pytest.mark.skipif(not hasattr(sprc, "load"), reason="sprc.load is not there yet")
def test_the_python_lines_run(workplace):
    encode, search = split_code(PARTS["From Python"])[0]
    names = {"paths": workplace}
    exec(encode, names)
    query, gallery, scores = (names[name] for name in ("query", "gallery", "scores"))
    assert query.shape == (1, gallery.shape[2])
    assert gallery.shape[0] == len(workplace)
    torch.testing.assert_close(scores, (gallery @ query[0]).amax(dim=1)[None])
    exec(search, names)
    assert len(names["results"]) == 10


def run_smaller(text, data, folder):
    """Run the commands of a text in their order with their own flags, but for sizes and places."""
    sizes = {
        "src/make_demo_data.py": ("--out", data, *SMALL_DATA),
        "src/blip_fine_tune_2.py": (
            *("--backbone", "tiny", "--num-epochs", 1, "--batch-size", 16, "--num-workers", 0),
            *("--data-path", data, "--models-path", folder),
        ),
        "src/report_run.py": ("--queries", 2),
        "src/blip_validate.py": ("--data-path", data),
        "src/cirr_test_submission.py": ("--data-path", data, "--out", folder),
    }
    ran = []
    for script, arguments in commands(text):
        if script not in sizes:
            continue
        runs = sorted(folder.glob("clip_finetuned_on_*"))
        files = {"FILE": next(folder.glob("*/saved_models/tuned_clip_*.pt"), None)}
        files |= {"rankings.json": folder / "rankings.json"}
        place = runs[-1:] if script == "src/report_run.py" else []  # by default it looks in models/
        run(script.removeprefix("src/"), *place, *(files.get(a, a) for a in arguments), *sizes[script])
        ran.append(script.removeprefix("src/").removesuffix(".py"))
    return ran


def test_the_commands_for_cirr_run(data, tmp_path):
    ran = run_smaller(PARTS["CIRR"], data, tmp_path)
    assert sorted(ran) == ["blip_fine_tune_2", "blip_validate", "cirr_test_submission", "report_run"]
    assert (tmp_path / "rankings.json").stat().st_size
    assert len(list(tmp_path.glob("*_submission_*.json"))) == 2


def test_the_commands_for_fashioniq_run(tmp_path):
    run("make_demo_data.py", "--dataset", "FashionIQ", "--out", tmp_path, *SMALL_DATA)
    next((tmp_path / "fashionIQ_dataset/images").iterdir()).unlink()  # as most copies lack some
    assert run_smaller(PARTS["FashionIQ"], tmp_path, tmp_path) == ["blip_fine_tune_2", "blip_validate"]


def test_the_commands_for_circo_run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / trained[0].name)
    sizes = ("--image-size", 24, "--val-families", 1, "--test-families", 1)
    run("make_demo_data.py", "--dataset", "CIRCO", "--out", tmp_path, *sizes)
    assert run_smaller(PARTS["CIRCO"], tmp_path, tmp_path) == ["blip_validate", "cirr_test_submission"]
    assert len(list(tmp_path.glob("circo_submission_*.json"))) == 2


def test_the_demo_of_the_makefile_runs(tmp_path):
    recipe = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    ran = run_smaller("\n\n    " + recipe.replace("\t", "    "), tmp_path, tmp_path)
    assert ran == ["make_demo_data", "blip_fine_tune_2", "report_run"]
    (folder,) = tmp_path.glob("clip_finetuned_on_cirr_*")
    assert {"curves.png", "gate_maps.png", "recall_table.csv"} <= {path.name for path in folder.iterdir()}
