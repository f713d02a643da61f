"""Recipes: several trainings in one file, each from the one before."""

import json
import os
import shutil
import time

import pytest
from helpers.runner import ENVIRONMENT, FORKS, ROOT, assert_one_clear_line, read_csv, run, run_command, train

from sprc.errors import InputError
from sprc.training.fine_tuning import check_flags
from sprc.training.recipe_file import read_recipe
from sprc.training.settings import default_flags

TWO = """
flags: {dataset: CIRR, backbone: tiny, batch-size: 16, learning-rate: 1e-3, num-workers: 0, amp: off}
stages:
  - name: sprc
    flags: {num-epochs: 2, use-gated-fusion: false}
  - name: longer
    flags: {num-epochs: 1, learning-rate: 5e-4}
"""
SHIPPED = sorted((ROOT / "configs").glob("recipe_*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and read it."""

    def read(text, **given):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return read_recipe(path, given)

    return read


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "two.yaml"
    path.write_text(TWO)
    return path


@pytest.fixture(scope="module")
def whole(data, two, tmp_path_factory):
    """Both stages, never stopped: the models' folder, and what was printed."""
    models = tmp_path_factory.mktemp("whole")
    return models, run("blip_fine_tune_2.py", *command(two, data, models))[0]


def command(recipe, data, models, *flags):
    return ("--recipe", recipe, "--data-path", data, "--models-path", models, *flags)


def run_of(models, stage):
    (folder,) = (models / "two" / stage).glob("clip_finetuned_on_*")
    return folder


def written(folder):
    return json.loads((folder / "training_hyperparameters.json").read_text())


def test_the_stages_have_their_flags_their_starts_and_one_table(whole):
    models, stdout = whole
    first, second = (written(run_of(models, stage)) for stage in ("sprc", "longer"))
    assert (first["num_epochs"], first["learning_rate"], first["model_path"]) == (2, 1e-3, None)
    assert (second["num_epochs"], second["learning_rate"]) == (1, 5e-4)
    assert second["model_path"] == str(run_of(models, "sprc") / "saved_models/tuned_clip_arithmetic.pt")
    # Neither the file nor the command line says them of the second stage.
    assert (second["backbone"], second["use_gated_fusion"]) == ("tiny", False)
    table = read_csv(models / "two" / "recipe.csv")
    assert [row["stage"] for row in table] == ["sprc", "longer"]
    for row in table:
        folder = run_of(models, row["stage"])
        rows = read_csv(folder / "validation_metrics.csv")
        best = max(rows, key=lambda one: float(one["arithmetic_mean"]))
        assert row["run"] == folder.name
        assert {name: float(row[name]) for name in best} == {name: float(best[name]) for name in best}
        told = f"{row['stage']}: epoch {row['epoch']}, R@1 {float(row['recall_at1']):.2f}"
        assert told in stdout
    assert "stage 2 of 2: longer, from sprc" in stdout


def test_what_is_done_is_not_repeated(data, two, whole):
    models, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (models / "two").rglob("*.pt")}
    stdout, _ = run("blip_fine_tune_2.py", *command(two, data, models))
    assert stdout.count("done already") == 2
    assert {path: path.stat().st_mtime_ns for path in (models / "two").rglob("*.pt")} == before


def test_a_stage_is_to_the_bit_the_run_of_its_flags(data, whole, tmp_path):
    models, _ = whole
    start = ("--model-path", run_of(models, "sprc") / "saved_models" / "tuned_clip_arithmetic.pt")
    alone, _, _ = train(
        data, tmp_path, *start, "--no-use-gated-fusion", "--learning-rate", 5e-4, "--save-best"
    )
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (alone / name).read_bytes() == (run_of(models, "longer") / name).read_bytes()


def test_a_recipe_that_is_killed_within_a_stage_goes_on_there(data, two, whole, tmp_path):
    models, _ = whole
    shutil.copytree(models / "two" / "sprc", tmp_path / "two" / "sprc")
    words = [str(word) for word in command(two, data, tmp_path, "--checkpoint-every", 1)]
    printed = tmp_path / "stdout", tmp_path / "stderr"
    script = [str(ROOT / "src" / "blip_fine_tune_2.py"), *words]
    process = FORKS.Process(target=run_command, args=(script, ENVIRONMENT, *printed))
    process.start()
    state = "longer/*/saved_models/training_state.pt"
    while process.is_alive() and not list((tmp_path / "two").glob(state)):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "two" / "longer" / "finished.json").exists(), printed[1].read_text()
    stdout, _ = run("blip_fine_tune_2.py", *words)
    assert stdout.count("done already") == 1
    assert f"resuming {run_of(tmp_path, 'longer')} at epoch 0, step" in stdout
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (run_of(tmp_path, "longer") / name).read_bytes() == (
            run_of(models, "longer") / name
        ).read_bytes()
    table, theirs = (read_csv(folder / "two" / "recipe.csv") for folder in (tmp_path, models))
    assert [row["recall_at1"] for row in table] == [row["recall_at1"] for row in theirs]


def test_a_stage_that_was_begun_with_other_flags_is_refused(data, two, whole):
    models, _ = whole
    _, stderr = run("blip_fine_tune_2.py", *command(two, data, models, "--seed", 1), code=2)
    assert_one_clear_line(
        stderr, "stage sprc began with no --seed, and now has --seed 1; give another --models"
    )


def test_a_wrong_flag_of_the_last_stage_is_told_before_the_first_begins(data, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(TWO.replace("5e-4", "0"))
    _, stderr = run("blip_fine_tune_2.py", *command(path, data, tmp_path / "models"), code=2)
    assert_one_clear_line(stderr, "stage longer: --learning-rate 0.0 must be a positive number")
    assert not (tmp_path / "models").exists()


A = "{name: a, flags: {dataset: CIRR}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "recipe.yaml cannot be read .* give a YAML file"),
        ("[]", "is no mapping; its keys are flags, stages"),
        ("stages: []", "stages is no list of at least one stage"),
        (f"stages: [{A}]\nname: x", "unknown key name; its keys are flags, stages"),
        ("stages: [{name: a, colour: red}]", "stage 1: unknown key colour; its keys are name, start, flags"),
        ("stages: [{name: a/b}]", "stage 1: name 'a/b' cannot name a folder"),
        (f"stages: [{A}, {A}]", "two stages have the name a"),
        ("stages: [{name: a, start: b}]", "stage a starts from 'b', which no stage is called; there are a"),
        ("stages: [{name: a, start: a}]", "a starts from a: a cycle"),
        (f"stages: [{A}, {{name: b, start: c}}, {{name: c}}]", "b starts from c starts from b: a cycle"),
        ("stages: [{name: a, start: b}, {name: b, start: null}]", "stage a starts from b, which comes after"),
        ("stages: [{name: a}]", "stage a: its flags lack dataset"),
        ("stages: [{name: a, flags: [x]}]", "stage a: flags is no mapping"),
        ("stages: [{name: a, flags: {num-epoch: 3}}]", "stage a: unknown flag num-epoch"),
        ("stages: [{name: a, flags: {num-epochs: x}}]", "stage a: .*--num-epochs: invalid int value: 'x'"),
        ("stages: [{name: a, flags: {seed: 1, seed: 2}}]", "the key 'seed' is there twice"),
        ("stages: [{name: a, flags: {resume: x}}]", "resume is not a stage's; give --resume on the command"),
        (f"stages: [{A}, {{name: b, flags: {{model-path: x}}}}]", "b starts from a, and from its model-path"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(recipe, text, message):
    with pytest.raises(InputError, match=message) as caught:
        recipe(text)
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_line_wins_over_a_stage_and_that_over_all(recipe):
    shared = "flags: {dataset: CIRR, backbone: tiny, seed: 1, batch-size: 8, model-path: m.pt}\n"
    own = "{name: a, flags: {seed: 2, pool: all}}, {name: b}, {name: c, start: null}, {name: d, start: a}"
    stages = recipe(f"{shared}stages: [{own}]", batch_size=4, models_path="x")
    assert [stage.start for stage in stages] == [None, "a", None, "a"]
    assert [stage.given["seed"] for stage in stages] == [2, 1, 1, 1]
    assert {stage.given["batch_size"] for stage in stages} == {4}
    # What starts from a stage starts from nothing else, and has its switches by the checkpoint.
    assert ["model_path" in stage.given for stage in stages] == [True, False, True, False]
    assert ["pool" in stage.given for stage in stages] == [True, False, False, False]
    assert all("models_path" not in stage.given for stage in stages)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_has_flags_that_a_run_can_be_started_with(path):
    for stage in read_recipe(path, {}):
        check_flags(default_flags(), stage.given, starts=stage.start is not None)


def test_recipes_are_shipped():
    names = ("gated_fusion", "sprc_bank", "sprc_cirr", "sprc_fashioniq", "sprc_mined", "sprc_rerank")
    assert {path.stem for path in SHIPPED} >= {f"recipe_{name}" for name in names}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fusion_dropout": 1.5}, r"fusion_dropout=1.5 must lie in \[0, 1\)"),
        ({"use_gated_fusion": False, "fusion_lr": 0.1}, "--fusion-lr 0.1: fusion is off"),
        ({"model_path": os.devnull}, "--model-path /dev/null is missing"),
        (
            {"blip_model_name": "blip2_cir_rerank"},
            "re-ranks what a first stage finds; give its checkpoint as",
        ),
        ({"complementary_weight": 0.5}, "add --contrast complementary"),
        (
            {"contrast": "complementary", "negatives": "bank"},
            "over the batch, and --negatives bank has",
        ),
    ],
)
def test_flags_are_checked_before_anything_is_read(flags, message):
    with pytest.raises(InputError, match=message):
        check_flags(default_flags(), {"dataset": "cirr", "backbone": "tiny", **flags})
