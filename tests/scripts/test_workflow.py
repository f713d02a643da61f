"""What a user does after training, or instead of it: score, submit, resume, patch SPRC."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, assert_one_clear_line, read_csv, run, train


@pytest.fixture(scope="module")
def fashioniq(tmp_path_factory):
    out = tmp_path_factory.mktemp("fashioniq")
    sizes = ("--train-families", 1, "--val-families", 1, "--test-families", 1)
    run("make_demo_data.py", "--dataset", "FashionIQ", "--out", out, *sizes)
    return out


@pytest.fixture(scope="module")
def trained_on_fashioniq(fashioniq, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    run(
        "blip_fine_tune_2.py",
        *("--dataset", "FashionIQ", "--backbone", "tiny", "--data-path", fashioniq, "--models-path", models),
        *("--num-epochs", 2, "--batch-size", 16, "--learning-rate", 1e-3, "--num-workers", 0),
        *("--save-training", "--save-best", "--fiq-protocol", "val-split"),
    )
    (folder,) = models.iterdir()
    return folder


def printed_metrics(stdout):
    pairs = [line.split(": ") for line in stdout.splitlines() if line.count(": ") == 1 and "/" not in line]
    return {name: value for name, value in pairs if name != "device"}


def test_validation_gives_training_s_figures_to_the_last_digit(data, trained):
    folder, _, _ = trained
    best = max(read_csv(folder / "validation_metrics.csv"), key=lambda row: float(row["arithmetic_mean"]))
    checkpoint = folder / "saved_models" / "tuned_clip_arithmetic.pt"
    flags = ("--blip-model-name", "blip2_cir_align_prompt", "--backbone", "tiny", "--data-path", data)
    stdout, _ = run("blip_validate.py", "--dataset", "CIRR", "--model-path", checkpoint, *flags)
    metrics = printed_metrics(stdout)
    assert {"epoch": best["epoch"], **metrics} == best
    assert f"SPRC with gated fusion, epoch {best['epoch']}" in stdout


def test_fashioniq_trains_its_own_way_and_validates_to_the_last_digit(
    fashioniq, trained_on_fashioniq, tmp_path
):
    folder = trained_on_fashioniq
    assert folder.name.startswith("clip_finetuned_on_fiq_blip2_cir_align_prompt_")
    rows = read_csv(folder / "validation_metrics.csv")
    types = [f"{kind}_recall_at{k}" for kind in ("dress", "toptee", "shirt") for k in (10, 50)]
    means = ["average_recall_at10", "average_recall_at50", "average_recall"]
    assert list(rows[0]) == ["epoch", *types, *means, "protocol"]  # SPRC's columns, then ours
    assert {row["protocol"] for row in rows} == {"val-split"}
    for row in read_csv(folder / "train_metrics.csv"):  # the unweighted sum
        total = sum(float(row[name]) for name in ("loss_itc", "loss_rtc", "loss_align"))
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)
    best = max(rows, key=lambda row: float(row["average_recall"]))
    flags = ("--data-path", fashioniq, "--fiq-protocol", "val-split")
    checkpoint = folder / "saved_models" / "tuned_clip_best.pt"
    given = ("--dataset", "fashioniq", "--model-path", checkpoint, "--save-ranks", tmp_path / "ranks.csv")
    stdout, _ = run("blip_validate.py", *given, *flags)
    assert {"epoch": best["epoch"], **printed_metrics(stdout)} == best
    ranks = read_csv(tmp_path / "ranks.csv")
    for kind in ("dress", "shirt", "toptee"):
        captions = json.loads((fashioniq / f"fashionIQ_dataset/captions/cap.{kind}.val.json").read_text())
        of_kind = [row for row in ranks if row["type"] == kind]
        assert [int(row["number"]) for row in of_kind] == list(range(len(captions)))
        for k in (10, 50):
            share = sum(int(row["rank"]) < k for row in of_kind) / len(of_kind)
            assert float(best[f"{kind}_recall_at{k}"]) == pytest.approx(100 * share)
    stdout, _ = run("blip_validate.py", "--dataset", "fashioniq", "--model-path", checkpoint, *flags[:2])
    assert printed_metrics(stdout)["protocol"] == "original"


def test_a_checkpoint_of_one_data_set_validates_on_the_other(data, trained_on_fashioniq, tmp_path):
    checkpoint = trained_on_fashioniq / "saved_models" / "tuned_clip_best.pt"
    rankings = tmp_path / "rankings.json"
    flags = ("--data-path", data, "--save-rankings", rankings, "--batch-size", 7, "--num-workers", 1)
    stdout, _ = run("blip_validate.py", "--dataset", "CIRR", "--model-path", checkpoint, *flags)
    metrics = printed_metrics(stdout)
    entries = json.loads(rankings.read_text())
    captions = json.loads((data / "cirr_dataset/cirr/captions/cap.rc2.val.json").read_text())
    assert [entry["pairid"] for entry in entries] == [entry["pairid"] for entry in captions]
    places = []
    for entry in entries:
        assert entry["reference"] not in entry["ranking"]
        assert len(entry["ranking"]) == 35  # of 36 images, so every target is there
        places.append(entry["ranking"].index(entry["target"]))
    for k in (1, 5, 10):
        assert float(metrics[f"recall_at{k}"]) == pytest.approx(
            100 * sum(p < k for p in places) / len(places)
        )


def test_the_submission_is_what_the_server_takes(data, trained, tmp_path):
    folder, _, _ = trained
    checkpoint = folder / "saved_models" / "tuned_clip_arithmetic.pt"
    flags = ("--model-path", checkpoint, "--data-path", data, "--out", tmp_path, "--name", "test")
    # 36 queries in batches of 35: the last one holds a single query.
    stdout, _ = run("cirr_test_submission.py", *flags, "--batch-size", 35)
    assert stdout.splitlines()[-1] == (
        "send both to CIRR's evaluation server, https://cirr.cecs.anu.edu.au/test_process/"
    )
    for metric in ("recall", "recall_subset"):
        text = (tmp_path / f"{metric}_submission_test.json").read_text()
        assert text.startswith(f'{{"version":"rc2","metric":"{metric}","')
        assert not any(space in text.rstrip("\n") for space in (" ", "\n"))  # no made name has one
        assert f"{metric}_submission_test.json ({len(text):,} bytes)" in stdout
    captions = json.loads((data / "cirr_dataset/cirr/captions/cap.rc2.test1.json").read_text())
    names = set(json.loads((data / "cirr_dataset/cirr/image_splits/split.rc2.test1.json").read_text()))
    recall = json.loads((tmp_path / "recall_submission_test.json").read_text())
    subset = json.loads((tmp_path / "recall_subset_submission_test.json").read_text())
    assert (recall.pop("version"), recall.pop("metric")) == ("rc2", "recall")
    assert (subset.pop("version"), subset.pop("metric")) == ("rc2", "recall_subset")
    assert set(recall) == set(subset) == {str(entry["pairid"]) for entry in captions}
    for entry in captions:
        ranked, in_set = recall[str(entry["pairid"])], subset[str(entry["pairid"])]
        members = set(entry["img_set"]["members"]) - {entry["reference"]}
        assert set(ranked) == names - {entry["reference"]}  # 36 images: all but one are among 50
        assert len(ranked) == 35
        assert in_set == [name for name in ranked if name in members][:3]


def test_flags_that_contradict_the_checkpoint_are_refused(data, trained, trained_on_fashioniq):
    folder, _, _ = trained
    checkpoint = folder / "saved_models" / "tuned_clip_arithmetic.pt"
    cases = {
        "--backbone 'pretrain', but": ("--backbone", "pretrain"),
        "--transform": ("--transform", "round"),
        "cirr_dataset is missing": ("--data-path", folder),
        "--split test1: FashionIQ's runs are scored on its validation split": (
            *("--dataset", "fashioniq", "--split", "test1"),
        ),
        "x.pt does not exist": ("--model-path", folder / "x.pt"),
    }
    for message, flags in cases.items():
        given = ("--dataset", "CIRR", "--model-path", checkpoint, "--data-path", data, *flags)
        _, stderr = run("blip_validate.py", *given, code=2)
        assert message in stderr.splitlines()[-1]
        assert "Traceback" not in stderr


def test_without_save_best_every_validated_epoch_is_kept_and_one_can_start_a_training(data, tmp_path):
    folder, _, _ = train(data, tmp_path / "a", "--num-epochs", 2, "--save-training", "--no-use-gated-fusion")
    saved = sorted(path.name for path in (folder / "saved_models").glob("tuned*"))
    assert saved == ["tuned_clip_0.pt", "tuned_clip_1.pt"]
    start = folder / "saved_models" / "tuned_clip_1.pt"
    _, stdout, _ = train(data, tmp_path / "b", "--model-path", start, "--fusion-start", "identity")
    assert "plain SPRC, epoch 1; gated fusion is newly started" in stdout


# A run to kill: 2 epochs of 9 steps, a state every 2 steps.
RUN = ("--num-epochs", 2, "--checkpoint-every", 2, "--save-training", "--save-best")


@pytest.fixture(scope="module")
def never_killed(data, tmp_path_factory):
    folder, _, _ = train(data, tmp_path_factory.mktemp("whole"), *RUN)
    return folder


def assert_same_end(folder, never_killed):
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (folder / name).read_bytes() == (never_killed / name).read_bytes(), name
    name = "saved_models/tuned_clip_arithmetic.pt"
    ours, theirs = (torch.load(f / name, weights_only=True) for f in (folder, never_killed))
    assert ours["epoch"] == theirs["epoch"]
    for key, value in theirs["Blip2QformerCirAlignPrompt"].items():
        assert torch.equal(ours["Blip2QformerCirAlignPrompt"][key], value), key


def start(data, models, **options):
    flags = ("--dataset", "CIRR", "--backbone", "tiny", "--data-path", data, "--models-path", models)
    rest = ("--batch-size", 16, "--learning-rate", 1e-3, "--num-workers", 0, *RUN)
    command = [sys.executable, str(ROOT / "src" / "blip_fine_tune_2.py"), *map(str, (*flags, *rest))]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def wait_until(process, happened, seconds=120):
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def moments(models):
    """When to kill: each a name and a test of the run's folder."""

    def exists(pattern):
        return lambda: any(models.glob(pattern))

    rng = random.Random(0)
    state, rows = "*/saved_models/training_state.pt", "*/train_metrics.csv"
    return {
        "before the first state": (exists("*/training_hyperparameters.json"), 0.3),
        "during a save": (exists("*/saved_models/.training_state.pt.*"), 0.0),
        "during validation": (exists(rows), 0.02),
        "at a random step": (exists(state), rng.uniform(0.1, 1.0)),
        "while keeping": (exists("*/saved_models/.tuned_clip_arithmetic.pt.*"), 0.0),
        "after an epoch": (exists("*/saved_models/tuned*"), rng.uniform(0.0, 0.5)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(moments(ROOT)))
def test_a_killed_run_resumes_to_the_end_of_one_never_killed(data, never_killed, tmp_path, moment):
    process = start(data, tmp_path)
    happened, delay = moments(tmp_path)[moment]
    wait_until(process, happened)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = tmp_path.iterdir()
    stdout, _ = run("blip_fine_tune_2.py", "--resume", folder)
    assert f"resuming {folder} at epoch" in stdout
    assert_same_end(folder, never_killed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "file"),
    [
        (signal.SIGTERM, "saved_models/training_state.pt"),
        (signal.SIGINT, "saved_models/training_state.pt"),
        (signal.SIGHUP, "train_metrics.csv"),  # which is written before the validation
    ],
)
def test_a_signal_saves_the_state_and_says_how_to_go_on(data, never_killed, tmp_path, signum, file):
    process = start(data, tmp_path)
    wait_until(process, lambda: any(tmp_path.glob(f"*/{file}")))
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    (folder,) = tmp_path.iterdir()
    if process.returncode:  # it may have been at its very end already
        assert process.returncode == 128 + signum
        assert (
            f"stopped by {signum.name}; go on with: python src/blip_fine_tune_2.py --resume {folder}"
            in output
        )
        assert "Traceback" not in output
    run("blip_fine_tune_2.py", "--resume", folder)
    assert_same_end(folder, never_killed)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_leaves_whole_files(data, tmp_path):
    def small_files():  # stands in for a full disk: the state does not fit, the CSV files do
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    process = start(data, tmp_path, preexec_fn=small_files)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    last = output.splitlines()[-1]
    assert last.startswith("error: cannot write")
    assert "training_state.pt" in last
    assert "free some space" in last
    (folder,) = tmp_path.iterdir()
    assert list((folder / "saved_models").iterdir()) == []
    assert json.loads((folder / "training_hyperparameters.json").read_text())["seed"] == 0


def test_fashioniq_s_schedule_refuses_another_number_of_epochs(trained_on_fashioniq):
    given = ("--resume", trained_on_fashioniq, "--num-epochs", 5)
    _, stderr = run("blip_fine_tune_2.py", *given, code=2)
    assert_one_clear_line(
        stderr,
        f"--num-epochs 5: {trained_on_fashioniq} was started with --num-epochs 2, and FashionIQ's learning "
        "rate schedule spans all epochs of a run",
    )


SLOW = 768  # pixels, so that filling a cache takes seconds


@pytest.mark.slow
def test_control_c_while_it_starts_or_fills_a_cache_is_one_line(data, tmp_path):
    flags = ("--dataset", "CIRR", "--backbone", "tiny", "--freeze-vit", "--data-path", data)
    flags += ("--feature-cache", tmp_path / "cache", "--batch-size", 1, "--num-workers", 2)
    flags += ("--image-size", SLOW)
    command = [sys.executable, ROOT / "src" / "extract_features.py", *flags]

    def stopped_when(happened):
        process = subprocess.Popen(
            [*map(str, command)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_until(process, lambda: happened(process))
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the readers of images, too
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 130, stderr
        lines = [line for line in stderr.splitlines() if line.strip() and "image" not in line]
        assert lines == ["stopped by SIGINT"], stderr

    stopped_when(lambda process: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    stopped_when(lambda _: any((tmp_path / "cache").glob("*/tokens.bin")))


def test_resume_refuses_what_is_no_run_or_another(never_killed, tmp_path):
    _, stderr = run("blip_fine_tune_2.py", "--resume", tmp_path, code=2)
    assert_one_clear_line(
        stderr, "training_hyperparameters.json is missing; give --resume the folder of a run"
    )
    shutil.copytree(never_killed, tmp_path / "run")
    path = tmp_path / "run" / "training_hyperparameters.json"
    path.write_text(path.read_text().replace('"max_txt_len": 32', '"max_txt_len": 0'))
    _, stderr = run("blip_fine_tune_2.py", "--resume", tmp_path / "run", code=2)
    assert_one_clear_line(stderr, "max_txt_len=0 must be at least 1")
    (tmp_path / "training_hyperparameters.json").write_text("{")
    _, stderr = run("blip_fine_tune_2.py", "--resume", tmp_path, code=2)
    assert_one_clear_line(stderr, "training_hyperparameters.json is broken")


def test_the_command_line_wins_over_the_environment(data, tmp_path):
    switches = tmp_path / "switches.yaml"
    switches.write_text("fusion_strategy: weighted\npool: all\n")
    os.environ["SPRC_SWITCHES"] = ENVIRONMENT["SPRC_SWITCHES"] = str(switches)
    try:
        folder, _, _ = train(data, tmp_path, "--fusion-strategy", "additive")
        written = json.loads((folder / "training_hyperparameters.json").read_text())
        assert (written["fusion_strategy"], written["pool"]) == ("additive", "all")
        switches.write_text("fusion: off\n")
        _, _, stderr = train(data, tmp_path, code=2)
        assert_one_clear_line(stderr, "switches.yaml: fusion; give lines such as")
    finally:
        del os.environ["SPRC_SWITCHES"], ENVIRONMENT["SPRC_SWITCHES"]
