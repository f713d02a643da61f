"""Rates of a part's own, epochs in which only the fusion learns, and training on a share of the triplets."""

import json

import pytest
import torch
from helpers.runner import assert_one_clear_line, read_csv, run, train

from sprc.data.split import Split, Triplet, triplets_of


def weights(run_folder, epoch):
    return torch.load(run_folder / "saved_models" / f"tuned_clip_{epoch}.pt", weights_only=True)[
        "Blip2QformerCirAlignPrompt"
    ]


@pytest.mark.slow
def test_in_its_epochs_only_the_fusion_learns(data, tmp_path):
    flags = ("--save-training", "--fusion-start", "identity")
    one, _, _ = train(data, tmp_path / "one", *flags, "--num-epochs", 2, "--warmup-fusion", 1)
    # With a rate that rounds to nothing the weights stay where the model began.
    still, _, _ = train(data, tmp_path / "still", *flags, "--learning-rate", 1e-30)
    start, first, second = weights(still, 0), weights(one, 0), weights(one, 1)
    others = [name for name in start if not name.startswith("gated_fusion.")]
    for name in others:
        assert torch.equal(first[name], start[name]), name
    assert not torch.equal(first["gated_fusion.alpha"], start["gated_fusion.alpha"])
    assert not torch.equal(second["text_proj.weight"], start["text_proj.weight"])


@pytest.mark.slow
def test_a_rate_of_a_group_is_the_fusion_s_and_of_other_parts_too(data, tmp_path):
    flags = ("--freeze-vit", "--lr-group", "gated_fusion.=1e-2", "--lr-group", "Qformer.=1e-4", "temp=1e-5")
    one, stdout, _ = train(data, tmp_path / "one", *flags)
    (line,) = (line for line in stdout.splitlines() if line.startswith("Qformer.*"))
    assert line.endswith(" weights: learning rate 0.0001")
    two, _, _ = train(
        data, tmp_path / "two", *flags[:1], "--fusion-lr", 1e-2, "--lr-group", "Qformer.=1e-4", "temp=1e-5"
    )
    three, _, _ = train(data, tmp_path / "three", *flags[:1], "--fusion-lr", 1e-2)
    losses = [(folder / "train_metrics.csv").read_bytes() for folder in (one, two, three)]
    assert losses[0] == losses[1] != losses[2]
    written = json.loads((one / "training_hyperparameters.json").read_text())
    assert written["lr_group"] == ["gated_fusion.=1e-2", "Qformer.=1e-4", "temp=1e-5"]


@pytest.mark.slow
def test_a_share_of_the_triplets_is_drawn_by_the_seed(data, tmp_path):
    folder, stdout, _ = train(data, tmp_path, "--train-share", 0.5)
    full = len(json.loads(next((data / "cirr_dataset").rglob("cap.rc2.train.json")).read_text()))
    assert f"training on {round(full / 2)} triplets, --train-share 0.5" in stdout
    assert len(read_csv(folder / "train_metrics.csv")) == 1
    _, stderr = run("blip_fine_tune_2.py", "--resume", folder, "--train-share", 0.4, code=2)
    assert_one_clear_line(stderr, "--train-share 0.4")


def test_a_larger_share_has_the_triplets_of_a_smaller_one_and_the_images_that_they_need(tmp_path):
    paths = {f"{kind}{i}": tmp_path / f"{kind}{i}" for kind in "rt" for i in range(100)}
    split = Split("train", [Triplet(i, f"r{i}", f"t{i}", "red") for i in range(100)], paths)
    whole, all_paths = triplets_of([split])
    assert (len(whole), len(all_paths)) == (100, 200)
    drawn = {share: triplets_of([split], share, seed=3) for share in (0.001, 0.1, 0.3)}
    numbers = {share: [triplet.pair_id for triplet in found] for share, (found, _) in drawn.items()}
    assert [len(found) for found in numbers.values()] == [1, 10, 30]
    assert all(found == sorted(found) for found in numbers.values())
    assert set(numbers[0.001]) < set(numbers[0.1]) < set(numbers[0.3])
    assert drawn[0.1][1].keys() == {f"{kind}{i}" for kind in "rt" for i in numbers[0.1]}
    other, _ = triplets_of([split], 0.1, seed=4)
    assert [triplet.pair_id for triplet in other] != numbers[0.1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr-group", "gated_fusion."), "--lr-group 'gated_fusion.': give PREFIX=RATE, such as"),
        (("--lr-group", "=1e-3"), "--lr-group '=1e-3': give PREFIX=RATE"),
        (("--lr-group", "temp=nan"), "--lr-group 'temp=nan': give PREFIX=RATE"),
        (("--lr-group", "temp=1e-3", "temp=1e-4"), "--lr-group 'temp=1e-4': temp* has a rate already"),
        (("--lr-group", "Qfromer=1e-3"), "Qfromer*, and no trained parameter's name starts so"),
        (("--lr-group", "gated_fusion.=1", "--fusion-lr", 1), "are two rates for the same parameters"),
        (
            ("--warmup-fusion", 1, "--no-use-gated-fusion", "--num-epochs", 2),
            "--warmup-fusion 1: fusion is off",
        ),
        (("--warmup-fusion", 1), "1 epochs in which only gated_fusion.* learns do not fit --num-epochs 1"),
        (("--warmup-fusion", -1), "do not fit --num-epochs 1"),
        (("--train-share", 0), "--train-share 0.0 must be more than 0 and at most 1"),
        (("--train-share", 1.5), "--train-share 1.5 must be more than 0 and at most 1"),
        (("--train-share", "nan"), "--train-share nan must be more than 0 and at most 1"),
    ],
)
def test_flags_that_do_not_fit_are_one_clear_line(data, tmp_path, flags, message):
    _, _, stderr = train(data, tmp_path, *flags, code=2)
    assert_one_clear_line(stderr, message)
    assert not list(tmp_path.iterdir())
