"""`--resume` with other flags: which are honoured, which are refused, and what a moved run needs."""

import json
import os
import shutil

import pytest
import torch
from helpers.runner import ENVIRONMENT, assert_one_clear_line, read_csv, run, train

import blip_fine_tune_2
from sprc.errors import InputError
from sprc.training.resume import MAY_DIFFER, PATHS, own_timeout, read_run, resumed_flags

HYPERPARAMETERS = "training_hyperparameters.json"


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of a finished run of two epochs, elsewhere."""
    return shutil.copytree(trained[0], tmp_path / "elsewhere" / "run")


@pytest.fixture(scope="module")
def three_epochs(data, tmp_path_factory):
    flags = ("--num-epochs", 3, "--save-training", "--save-best")
    return train(data, tmp_path_factory.mktemp("three"), *flags)[0]


@pytest.fixture
def resumed(monkeypatch):
    """The flags to go on with, and those that differ, from a run's folder and a command line."""

    def from_command_line(folder, *flags):
        monkeypatch.setattr("sys.argv", ["x", "--resume", str(folder), *map(str, flags)])
        return resumed_flags(*blip_fine_tune_2.parse_arguments())

    return from_command_line


def written(folder):
    return json.loads((folder / HYPERPARAMETERS).read_text())


def change(folder, **changes):
    (folder / HYPERPARAMETERS).write_text(json.dumps(written(folder) | changes))


def test_a_finished_run_that_was_moved_goes_on_with_more_epochs_and_moved_data(
    data, finished, three_epochs, tmp_path
):
    moved = shutil.copytree(data, tmp_path / "moved")
    flags = ("--data-path", os.path.relpath(moved), "--num-epochs", 3)
    stdout, _ = run("blip_fine_tune_2.py", "--resume", os.path.relpath(finished), *flags)
    assert f"resuming with --data-path {moved} (was {data}), --num-epochs 3 (was 2)" in stdout
    assert f"resuming {finished} at epoch 2, step 0" in stdout
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (finished / name).read_bytes() == (three_epochs / name).read_bytes()
    found = written(finished)
    assert (found["data_path"], found["num_epochs"]) == (str(moved), 3)
    assert found["models_path"] == str(finished.parent)

    stdout, _ = run("blip_fine_tune_2.py", "--resume", finished, "--seed", 0, "--dataset", "CIRR")
    assert "resuming with" not in stdout
    assert "all of its 3 epochs are done; --num-epochs with more goes on" in stdout
    _, stderr = run("blip_fine_tune_2.py", "--resume", finished, "--num-epochs", 2, code=2)
    assert_one_clear_line(stderr, "has 3 epochs trained already; give more than 3, or leave the flag out")
    _, stderr = run("blip_fine_tune_2.py", "--resume", finished, "--learning-rate", 0.5, code=2)
    assert_one_clear_line(
        stderr, f"--learning-rate 0.5: {finished} was started with --learning-rate 0.001, which cannot change"
    )


def test_an_earlier_version_s_run_goes_on_with_gradient_caching(finished, three_epochs):
    later = ("digests", "grad_cache", "fusion_text", "fusion_lr", "log_fusion_every", "tensorboard")
    later += (
        "report_to",
        "timeout",
        "ranks",
        "feature_cache",
        "cache_dtype",
        "amp",
        "compile",
        "model_config",
    )
    later += ("fusion_width", "fusion_top_k", "extra_triplets", "extra_weight", "report_to")
    known = {name: value for name, value in written(finished).items() if name not in later}
    (finished / HYPERPARAMETERS).write_text(json.dumps(known))
    stdout, _ = run(
        "blip_fine_tune_2.py",
        *("--resume", finished, "--num-epochs", 3, "--grad-cache", 5, "--batch-size", 16),
    )
    assert "resuming with --num-epochs 3 (was 2), --grad-cache 5 (was None)" in stdout
    mine, theirs = (read_csv(folder / "train_metrics.csv") for folder in (finished, three_epochs))
    assert mine[:2] == theirs[:2]
    assert mine[2] != theirs[2]  # rounding
    for name, value in theirs[2].items():
        assert float(mine[2][name]) == pytest.approx(float(value), abs=2e-3), name
    assert written(finished)["grad_cache"] == 5


def test_a_feature_cache_is_computed_at_its_new_place_and_can_be_left(data, tmp_path):
    place, old = tmp_path / "data", tmp_path / "old cache"
    shutil.copytree(data, place)
    folder, _, _ = train(
        os.path.relpath(place),
        tmp_path / "models",
        *("--freeze-vit", "--feature-cache", os.path.relpath(old), "--cache-dtype", "float32"),
        *("--save-training", "--save-best", "--validation-frequency", 2),
    )
    found = written(folder)
    paths = [found[name] for name in ("data_path", "feature_cache", "models_path")]
    assert paths == [str(place), str(old), str(tmp_path / "models")]
    # A checkpoint travels: what it says of its training holds on any machine.
    checkpoint = folder / "saved_models" / "tuned_clip_arithmetic.pt"
    told = torch.load(checkpoint, weights_only=True)["hyperparameters"]
    assert found.items() >= told.items()
    lacks = found.keys() - told.keys()
    assert lacks == {*PATHS, "num_workers", "model_config", "command"}
    assert str(tmp_path) not in json.dumps(told)
    shutil.rmtree(old)
    place = place.rename(tmp_path / "moved")
    other = shutil.copytree(folder, tmp_path / "other" / "run")
    cache = tmp_path / "new cache"
    flags = ("--num-epochs", 2, "--data-path", place)
    stdout, _ = run("blip_fine_tune_2.py", "--resume", folder, *flags, "--feature-cache", cache)
    assert f"--feature-cache {cache} (was {old})" in stdout
    assert "108 images, 108 of them new" in stdout
    assert written(folder)["feature_cache"] == str(cache)
    stdout, _ = run("blip_fine_tune_2.py", "--resume", other, *flags, "--no-feature-cache")
    assert f"no --feature-cache (was {old})" in stdout
    assert written(other)["feature_cache"] is None
    assert not old.exists()
    assert len(read_csv(other / "train_metrics.csv")) == 2
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_other_data_are_refused(data, finished, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    captions = other / "cirr_dataset/cirr/captions/cap.rc2.train.json"
    captions.write_text(captions.read_text().replace("red", "blue", 1))
    given = ("--resume", finished, "--num-epochs", 3, "--data-path", other)
    _, stderr = run("blip_fine_tune_2.py", *given, code=2)
    assert_one_clear_line(
        stderr, f"--data-path {other} holds something else than when {finished} was started"
    )
    assert written(finished)["num_epochs"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", 1), "--seed 1: .* was started with --seed 0, which cannot change within a run"),
        (("--batch-size", 8), "--batch-size 8: .* started with --batch-size 16, .* give --grad-cache$"),
        (("--no-use-gated-fusion",), "no --use-gated-fusion: .* started with --use-gated-fusion,"),
        (("--compile",), "--compile: .* was started with no --compile,"),
        (("--dataset", "FashionIQ"), "--dataset fashioniq: .* was started with --dataset cirr,"),
        (("--models-path", "x"), "--models-path .*x: .* was started with --models-path .*elsewhere,"),
        (("--model-path", "x"), "--model-path .*x: .* was started with no --model-path,"),
        (("--num-epochs", 81), "--num-epochs 81: .* --num-epochs 2, and CIRR's .* spans 80 epochs"),
        (("--num-epochs", 1), "--num-epochs 1: .* has 2 epochs trained already; give more than 2"),
        (("--feature-cache", "x"), "no --feature-cache, and --cache-dtype float16 rounds .* cpu .* float32$"),
    ],
)
def test_a_flag_that_would_change_the_run_is_refused_with_both_values(finished, resumed, flags, message):
    with pytest.raises(InputError, match=message):
        resumed(finished, *flags)


def test_every_flag_must_be_the_run_s_own_but_those_that_may_differ(finished, resumed, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--resume", "y"])
    defaults, given = blip_fine_tune_2.parse_arguments()
    assert given.keys() == {"resume"}
    assert defaults.keys() >= MAY_DIFFER
    for name in defaults.keys() - MAY_DIFFER - {"resume", "cache_dtype"}:
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} .*other: .* was started with "):
            resumed_flags(defaults, {"resume": finished, name: "other"})


def test_flags_that_are_given_and_equal_are_fine(data, finished, resumed):
    flags, differing = resumed(
        finished,
        *(
            "--dataset",
            "cirr",
            "--seed",
            0,
            "--batch-size",
            16,
            "--learning-rate",
            "0.001",
            "--pool",
            "masked",
        ),
        *("--data-path", data, "--loss-align", 0.4, "--save-best", "--use-gated-fusion", "--num-epochs", 2),
    )
    assert differing == []
    assert flags["device"] == "cpu"
    assert flags["resume"] == finished


def test_what_does_not_change_the_result_is_honoured_and_told(finished, resumed):
    flags, differing = resumed(
        finished,
        *("--num-workers", 1, "--timeout", 7, "--save-memory", "--checkpoint-every", 5, "--grad-cache", 4),
        *("--log-fusion-every", 0, "--tensorboard", "--num-epochs", 80, "--device", "meta"),
        *("--report-to", "wandb", "mlflow"),
        *("--feature-cache", "x", "--cache-dtype", "float32"),
    )
    assert len(differing) == 12
    assert "--report-to wandb mlflow (was [])" in differing
    assert "--num-workers 1 (was 0)" in differing
    assert (flags["timeout"], flags["save_memory"], flags["device"]) == (7, True, "meta")
    change(finished, feature_cache="/old", grad_cache=4, save_memory=True, timeout=9)
    assert own_timeout(finished, 1800) == 9
    flags, differing = resumed(finished, "--no-grad-cache", "--no-save-memory")
    assert sorted(differing) == ["no --grad-cache (was 4)", "no --save-memory (was True)"]
    with pytest.raises(InputError, match=r"--cache-dtype bfloat16: .* with --cache-dtype float16"):
        resumed(finished, "--cache-dtype", "bfloat16")
    with pytest.raises(InputError, match=r"no --feature-cache: .* float16 rounds .*; leave the flag out$"):
        resumed(finished, "--no-feature-cache")
    # On a GPU the frozen vision transformer computes in float16.
    change(finished, device="cuda:0")
    assert resumed(finished, "--no-feature-cache")[0]["feature_cache"] is None


def test_the_checkpoint_that_a_run_started_from_may_lie_elsewhere(finished, resumed, tmp_path):
    change(finished, model_path="/old/start.pt")
    digests = written(finished)["digests"]
    with pytest.raises(
        InputError, match=r"--model-path .*new.pt: .* started with --model-path /old/start.pt"
    ):
        resumed(finished, "--model-path", tmp_path / "new.pt")
    change(finished, digests=digests | {"model_path": "0" * 32})
    _, differing = resumed(finished, "--model-path", tmp_path / "new.pt")
    assert differing == [f"--model-path {tmp_path / 'new.pt'} (was /old/start.pt)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is broken: it holds no object"),
        ("{}", "is broken: it has no usable dataset, backbone"),
        ('{"seed": ', "is broken; restore it from a copy"),
        ("[" * 10000, "is broken; restore it from a copy"),
        (None, "is missing; give --resume the folder of a run"),
    ],
)
def test_a_run_s_file_that_says_nothing_is_one_clear_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / HYPERPARAMETERS).write_text(text)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path)
    assert own_timeout(tmp_path, 1800) == 1800


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(InputError, match="is missing; give --resume the folder of a run"):
        read_run(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", "zero"), ("dataset", "imagenet"), ("data_path", 3), ("batch_size", None), ("digests", [])],
)
def test_a_value_that_cannot_be_is_named(finished, name, value):
    change(finished, **{name: value})
    with pytest.raises(InputError, match=f"it has no usable {name}; restore it from a copy"):
        read_run(finished)


def test_the_run_s_own_model_goes_on_without_the_environment_that_it_was_started_in(
    data, tmp_path, monkeypatch
):
    switches = tmp_path / "switches.yaml"
    switches.write_text("norm_eps: 0.001\nmax_txt_len: 24\n")
    monkeypatch.setitem(ENVIRONMENT, "SPRC_SWITCHES", str(switches))
    folder, _, _ = train(data, tmp_path, "--num-epochs", 1)
    whole, _, _ = train(data, tmp_path / "whole", "--num-epochs", 2)
    for environment in (None, "norm_eps: 0.1\n"):
        copy = shutil.copytree(folder, tmp_path / f"copy {environment is None}")
        if environment is None:
            monkeypatch.delitem(ENVIRONMENT, "SPRC_SWITCHES")
        else:
            switches.write_text(environment)
            monkeypatch.setitem(ENVIRONMENT, "SPRC_SWITCHES", str(switches))
        run("blip_fine_tune_2.py", "--resume", copy, "--num-epochs", 2)
        assert written(copy)["model_config"]["norm_eps"] == 0.001
        for name in ("train_metrics.csv", "validation_metrics.csv"):
            assert (copy / name).read_bytes() == (whole / name).read_bytes()
