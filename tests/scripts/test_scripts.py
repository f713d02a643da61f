"""The scripts as users run them: in a subprocess, on a made data set; their files and messages are read."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, assert_one_clear_line, read_csv, run, train
from PIL import Image


def test_a_run_leaves_the_published_folder(trained):
    folder, stdout, stderr = trained
    assert str(folder) in stdout
    assert "epoch 1: 100%" in stderr  # the progress bar
    rows = read_csv(folder / "train_metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    losses = ["train_loss", "loss_itc", "loss_rtc", "loss_align"]
    assert list(rows[0]) == ["epoch", *losses, "gate_mean", "gate_std", "alpha", "mean_change"]
    for row in rows:
        total = sum(w * float(row[n]) for w, n in zip((1, 0.4, 0.4), losses[1:], strict=True))
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)
        assert 0 < float(row["gate_mean"]) < 1
        assert float(row["mean_change"]) > 0
    scores = read_csv(folder / "validation_metrics.csv")
    assert [row["epoch"] for row in scores] == ["0", "1"]
    assert list(scores[0]) == [  # SPRC's own header, to the column
        "epoch",
        *(f"group_recall_at{k}" for k in (1, 2, 3)),
        *(f"recall_at{k}" for k in (1, 5, 10, 50)),
        "mean(R@5+R_s@1)",
        *("arithmetic_mean", "harmonic_mean", "geometric_mean"),
    ]
    best = max(scores, key=lambda row: float(row["arithmetic_mean"]))
    checkpoint = torch.load(folder / "saved_models" / "tuned_clip_arithmetic.pt", weights_only=True)
    assert checkpoint["epoch"] == int(best["epoch"])
    assert (
        "Qformer.bert.encoder.layer.0.attention.self.query.weight" in checkpoint["Blip2QformerCirAlignPrompt"]
    )


def test_the_report_draws_and_scores_the_best_checkpoint_as_training_did(trained):
    folder, _, _ = trained
    stdout, _ = run("report_run.py", folder, "--queries", 3, "--device", "cpu")
    table = {row["query"]: row for row in read_csv(folder / "recall_table.csv")}
    assert list(table) == ["reference and text", "text only", "image only"]
    scores = read_csv(folder / "validation_metrics.csv")
    best = max(scores, key=lambda row: float(row["arithmetic_mean"]))
    for name in list(best)[1:]:
        assert table["reference and text"][name] == best[name], name
    assert "text only" in stdout
    for picture in ("curves.png", "gate_maps.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 300


def test_the_report_finds_data_that_have_moved(data, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    path = folder / "training_hyperparameters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_path": str(tmp_path / "gone")}))
    _, stderr = run("report_run.py", folder, code=2)
    assert_one_clear_line(stderr, "gone/cirr_dataset is missing")
    path.unlink()
    _, stderr = run("report_run.py", folder, code=2)
    assert_one_clear_line(stderr, "hyperparameters.json does not say where the data are; give --data-path")
    run("report_run.py", folder, "--queries", 1, "--data-path", data)
    assert (folder / "recall_table.csv").read_bytes() == (trained[0] / "recall_table.csv").read_bytes()


def test_one_seed_gives_one_csv_and_another_seed_another(data, trained, tmp_path):
    folder, _, _ = trained
    flags = ("--num-epochs", 2, "--num-workers", 2)  # the number of workers must not matter
    again, _, _ = train(data, tmp_path / "same", *flags)
    other, _, _ = train(data, tmp_path / "other", *flags, "--seed", 1)
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert (other / "train_metrics.csv").read_bytes() != (folder / "train_metrics.csv").read_bytes()


def test_fusion_off_trains_plain_sprc(data, tmp_path):
    folder, _, _ = train(data, tmp_path, "--no-use-gated-fusion", "--save-training", "--save-best")
    (row,) = read_csv(folder / "train_metrics.csv")
    assert list(row) == ["epoch", "train_loss", "loss_itc", "loss_rtc", "loss_align"]
    contents = torch.load(folder / "saved_models" / "tuned_clip_arithmetic.pt", weights_only=True)
    assert not [key for key in contents["Blip2QformerCirAlignPrompt"] if "fusion" in key]
    run("report_run.py", folder, "--queries", 2, "--report-to", "tensorboard")  # a sheet without maps
    assert (folder / "gate_maps.png").exists()
    (events,) = (folder / "tensorboard").iterdir()
    for name in ("curves", "gate_maps", "recall_table", "recall_by_kind"):
        assert f"report/{name}".encode() in events.read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        {"--fusion-strategy": "additive", "--alpha-init": "0.1", "--fusion-start": "identity"},
        {"--fusion-strategy": "weighted", "--pool": "all", "--fusion-dropout": "0.3"},
        {"--fusion-strategy": "select", "--fusion-width": "16", "--fusion-top-k": "2"},
        {"--fusion-strategy": "gated", "--alpha-init": "1.0", "--image-size": "64", "--device": "cpu"},
        {"--transform": "squarepad", "--target-ratio": "1.5", "--loss-itm": "0.5", "--save-memory": None},
    ],
)
def test_every_switch_reaches_the_json_and_the_checkpoint(data, tmp_path, flags):
    given = [item for flag, value in flags.items() for item in (flag, value) if item is not None]
    folder, _, _ = train(data, tmp_path, *given, "--save-training", "--seed", 5, "--dataset", "cirr")
    written = json.loads((folder / "training_hyperparameters.json").read_text())
    contents = torch.load(folder / "saved_models" / "tuned_clip_0.pt", weights_only=True)
    assert written.pop("model_config") == contents["model_config"]
    # A checkpoint says what its training was, and not where.
    of_the_machine = ("data_path", "models_path", "model_path", "feature_cache", "vocab", "num_workers")
    of_the_machine += ("extra_triplets", "command")
    told = {name: value for name, value in written.items() if name not in of_the_machine}
    assert contents["hyperparameters"] == told
    assert written["seed"] == 5
    for flag, value in flags.items():
        name = flag.removeprefix("--").replace("-", "_")
        expected = True if value is None else type(written[name])(value)
        assert written[name] == expected, name
        if name in contents["model_config"]:
            assert contents["model_config"][name] == expected, name
    row = read_csv(folder / "train_metrics.csv")[0]
    assert ("gate_mean" in row) == (written["fusion_strategy"] != "additive")
    if written["fusion_start"] == "identity":  # it starts as plain SPRC and has hardly moved
        assert float(row["mean_change"]) < 0.02


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "src").glob("*.py")))
def test_help_imports_nothing_slow(script):
    """A fact that does not depend on the machine's speed, unlike the seconds it saves."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'src' / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib', 'lavis'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:")
    assert result.stdout.splitlines()[-1] == "[]"


def spoil_json(data, change):
    path = data / "cirr_dataset" / "cirr" / "captions" / "cap.rc2.train.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def first_training_image(data):
    entry = json.loads((data / "cirr_dataset/cirr/captions/cap.rc2.train.json").read_text())[0]
    location = json.loads((data / "cirr_dataset/cirr/image_splits/split.rc2.train.json").read_text())
    return data / "cirr_dataset" / location[entry["reference"]]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


BAD_DATA = {
    "no folder": (lambda d: shutil.rmtree(d / "cirr_dataset"), "cirr_dataset is missing"),
    "missing image": (lambda d: first_training_image(d).unlink(), "is missing"),
    "cut image": (lambda d: truncate(first_training_image(d)), "cannot be read"),
    "no image": (lambda d: first_training_image(d).write_text("hello"), "is not an image"),
    "broken JSON": (
        lambda d: truncate(d / "cirr_dataset/cirr/captions/cap.rc2.val.json"),
        "cap.rc2.val.json: broken JSON",
    ),
    "missing key": (lambda d: spoil_json(d, lambda e: e[3].pop("caption")), "entry 3"),
    "unknown name": (lambda d: spoil_json(d, lambda e: e[4].update(target_hard="x")), "entry 4"),
}

BAD_FLAGS = {
    "unknown backbone": (("--backbone", "huge"), "--backbone='huge' is unknown; choose from pretrain"),
    "unknown model": (("--blip-model-name", "blip3"), "--blip-model-name 'blip3' is unknown"),
    "unknown strategy": (
        ("--fusion-strategy", "glue"),
        "fusion_strategy='glue' is unknown; choose from gated",
    ),
    "batch too large": (("--batch-size", 1000), "--batch-size 1000 is larger than the training set of 144"),
    "image size": (("--image-size", 100), "image_size=100 is not a multiple of patch_size=32"),
    "dropout": (("--fusion-dropout", 1.5), "fusion_dropout=1.5 must lie in [0, 1)"),
    "alpha": (("--alpha-init", "nan"), "alpha_init=nan must be a finite number"),
    "device": (("--device", "abacus"), "--device 'abacus' cannot be used"),
    "ratio": (("--target-ratio", 0.5), "--target-ratio 0.5"),
    "epochs": (("--num-epochs", 0), "--num-epochs 0 is too small"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_the_run_before_it_starts_with_one_line(data, tmp_path, case):
    spoil, message = BAD_DATA[case]
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data")
    folder, _, stderr = train(tmp_path / "data", tmp_path / "models", code=2)
    assert folder is None
    assert_one_clear_line(stderr, message)


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_ends_the_run_before_it_starts_with_one_line(data, tmp_path, case):
    flags, message = BAD_FLAGS[case]
    folder, _, stderr = train(data, tmp_path / "models", *flags, code=2)
    assert folder is None
    assert_one_clear_line(stderr, message)


def test_a_loss_that_blows_up_stops_the_run_in_one_line_and_keeps_what_it_has(data, tmp_path):
    folder, _, stderr = train(
        data, tmp_path, "--learning-rate", 1e20, "--num-epochs", 3, "--save-training", "--save-best", code=1
    )
    assert "the loss is not finite at epoch 0, step" in stderr
    assert "Traceback" not in stderr
    assert (folder / "training_hyperparameters.json").exists()


def test_the_report_refuses_what_is_no_finished_run(trained, tmp_path):
    folder, _, _ = trained
    _, stderr = run("report_run.py", tmp_path, code=2)
    assert_one_clear_line(stderr, "train_metrics.csv is missing")
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    truncate(copy / "saved_models" / "tuned_clip_arithmetic.pt")
    _, stderr = run("report_run.py", copy, code=2)
    assert_one_clear_line(stderr, "tuned_clip_arithmetic.pt cannot be loaded safely")


@pytest.mark.slow
def test_the_sanity_check_says_what_it_checked():
    command = [sys.executable, str(ROOT / "test_gated_fusion.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "2,955,265 parameters" in result.stdout
    assert "7 passed, 0 failed" in result.stdout


@pytest.mark.parametrize("queries", [0, -2])
def test_a_report_of_no_queries_is_refused(trained, queries):
    _, stderr = run("report_run.py", trained[0], "--queries", queries, code=2)
    assert_one_clear_line(stderr, f"--queries {queries}: give a whole number of at least 1")
