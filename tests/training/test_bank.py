"""A bank of all training images' features: its loss, what it leaves out, what learns, and going on."""

import math
import re
from dataclasses import replace

import pytest
import torch
from helpers.runner import assert_one_clear_line, read_csv, run, train
from helpers.small_models import CAPTIONS
from helpers.stopping import Stop, go_on
from helpers.wider import (
    IMAGES,
    TRIPLETS,
    batch_of,
    make_model,
    make_negatives,
    make_trainer,
    make_triplets,
    ready,
)

from sprc.errors import InputError
from sprc.models.losses import bank_loss
from sprc.training.grad_cache import Embedder, GradCache
from sprc.training.negatives import choose_learning
from sprc.training.settings import TrainingSettings
from sprc.training.true_targets import true_targets

SAME = {"dropout": 0.0, "fusion_dropout": 0.0}
FULL = {"negatives": "bank", "bank_dtype": "float32"}


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.mark.numeric
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_loss_is_its_formula_in_values_and_gradients(chunk):
    queries, bank, positives = unit(4, 6), unit(7, 3, 6, seed=1), unit(4, 3, 6, seed=2)
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[1, :3] = True  # all that chunks of one and of three begin with
    found = []
    for way in ("ours", "plain"):
        q, p = queries.clone().requires_grad_(), positives.clone().requires_grad_()
        if way == "ours":
            loss = bank_loss(q, bank, p, 0.2, mask, chunk)
        else:
            total = 0.0
            for row in range(4):
                own = torch.exp((p[row] @ q[row]).max() / 0.2)
                rest = [torch.exp((bank[k] @ q[row]).max() / 0.2) for k in range(7) if not mask[row, k]]
                total = total - torch.log(own / (own + sum(rest)))
            loss = total / 4
        loss.backward()
        found.append((loss.detach(), q.grad, p.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_where_nothing_is_left_to_contrast_with_the_loss_is_zero():
    queries = unit(2, 6).requires_grad_()
    loss = bank_loss(queries, unit(5, 3, 6), unit(2, 3, 6), 0.05, torch.ones(2, 5, dtype=torch.bool), 2)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(queries.grad, torch.zeros(2, 6, dtype=torch.float64))


def test_a_bank_of_the_batch_s_targets_gives_the_batch_s_loss(tmp_path):
    model = make_model(**SAME)
    eight = TRIPLETS[:8]
    negatives = make_negatives(tmp_path, model, eight, bank_temperature=model.temp.item(), **FULL)
    ready(negatives)
    # Eight triplets whose targets are the eight images; nothing else is masked than a query's own.
    assert sorted(triplet.target for triplet in eight) == IMAGES
    assert negatives.bank.targets.all.shape == (8, 1)
    samples = batch_of(negatives, range(8))
    model.train()
    mine, theirs = negatives.objective(samples), model(samples)
    assert list(mine) == ["loss_bank", "loss_rtc", "loss_align"]
    assert mine["loss_bank"].item() == pytest.approx(theirs["loss_itc"].item(), abs=1e-6)
    for name in ("loss_rtc", "loss_align"):
        assert mine[name].item() == pytest.approx(theirs[name].item(), abs=1e-6)
    gradients = []
    for losses, name in ((negatives.objective(samples), "loss_bank"), (model(samples), "loss_itc")):
        model.zero_grad()
        losses[name].backward()
        gradients.append(model.text_proj.weight.grad.clone())  # which the query alone reaches
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_bank_is_what_validation_would_compute_and_its_positive_may_be_either(tmp_path):
    model = make_model(**SAME)
    negatives = ready(make_negatives(tmp_path, model, **FULL))
    images = torch.stack([negatives.triplets.load(path) for path in negatives.items.paths])
    features, _ = model.eval().extract_target_features(images)
    torch.testing.assert_close(negatives.bank.features, features)
    half = ready(make_negatives(tmp_path, model, negatives="bank"))
    assert half.bank.features.dtype == torch.float16
    torch.testing.assert_close(half.bank.features.float(), features, rtol=1e-3, atol=1e-4)

    queries, current = unit(2, 8).float(), unit(2, 5, 8, seed=1).float()
    numbers = torch.tensor([3, 5])
    losses = {}
    for positive in ("current", "bank"):
        negatives.bank.positive = positive
        losses[positive] = negatives.bank.loss(queries, current, numbers)
    rows = negatives.bank.targets.own[numbers]
    shown = negatives.bank.loss(queries, features[rows], numbers)
    assert losses["bank"].item() != losses["current"].item()
    torch.testing.assert_close(losses["bank"], shown)


def triplet(number, reference, target, caption):
    return replace(TRIPLETS[0], pair_id=number, reference=reference, target=target, caption=caption)


def test_copies_and_other_targets_of_a_query_are_no_negatives(tmp_path):
    make_triplets(tmp_path, make_model().config)
    triplets = [
        triplet(0, "image0", "image1", CAPTIONS[0]),
        triplet(1, "image0", "image2", CAPTIONS[0].upper() + "!"),  # as the tokenizer sees it, the same
        triplet(2, "image0", "image3", CAPTIONS[1]),
        triplet(3, "image7", "image5", CAPTIONS[0]),  # image7 is image0's copy
        replace(triplet(4, "image4", "image6", CAPTIONS[2]), also_targets=("image3", "elsewhere")),
    ]
    paths = {name: tmp_path / name for name in IMAGES}
    paths["image7"].write_text("image0")
    paths["image4"].write_text("image1")  # and image4 image1's
    found = true_targets(triplets, paths)
    assert found.own.tolist() == [1, 2, 3, 5, 6]
    rows = [{row for row in of_one if row < 8} for of_one in found.all.tolist()]
    assert rows == [{1, 2, 4, 5}, {1, 2, 4, 5}, {3}, {1, 2, 4, 5}, {3, 6}]


@pytest.mark.parametrize("fusion", [True, False])
def test_what_learns_is_what_the_flag_says(tmp_path, fusion):
    of_text = re.compile(r"Qformer\.bert\.encoder\.layer\.\d\.(intermediate|output)\.|text_proj\.")
    wanted = {"query": lambda name: not name.startswith("vision_proj."), "call2": of_text.match}
    for what, is_wanted in wanted.items():
        (tmp_path / what).mkdir()
        model = make_model(use_gated_fusion=fusion)
        could = {name for name, p in model.named_parameters() if p.requires_grad}
        negatives = ready(make_negatives(tmp_path / what, model, train=what, **FULL))
        sum(negatives.objective(batch_of(negatives, range(4))).values()).backward()
        learned = {name for name, p in model.named_parameters() if p.grad is not None}
        assert learned == {name for name in could if is_wanted(name)}
        assert any("attention" in name for name in learned) == (what == "query")


def test_with_call2_the_targets_stay_as_in_the_bank(tmp_path):
    model = make_model()
    negatives = make_negatives(tmp_path, model, train="call2", **FULL)
    before = ready(negatives).bank.features.clone()
    make_trainer(tmp_path, model, negatives, num_epochs=1).train(lambda _: {"recall": 0.0}, lambda *_: None)
    text = model.text_proj.weight
    assert not torch.equal(text, make_model().text_proj.weight)
    images = torch.stack([negatives.triplets.load(path) for path in negatives.items.paths])
    after, _ = model.eval().extract_target_features(images)
    torch.testing.assert_close(after, before)


@pytest.mark.numeric
@pytest.mark.parametrize("what", ["all", "query", "call2"])
def test_gradient_caching_is_exact(tmp_path, what):
    torch.set_default_dtype(torch.float64)
    try:
        model = make_model(**SAME)
        negatives = ready(make_negatives(tmp_path, model, negatives="both", train=what))
        samples = batch_of(negatives, range(5))
        found = []
        model.train()
        for way in ("plain", "cached"):
            if way == "plain":
                losses = negatives.objective(samples)
                sum(losses.values()).backward()
            else:
                objective = negatives.objective
                cache = GradCache(
                    objective, Embedder(objective), 2, lambda: torch.autocast("cpu", enabled=False)
                )
                losses = cache.losses(samples)
                sum(losses.values()).backward()
                cache.backward()
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found.append(({name: loss.item() for name, loss in losses.items()}, grads))
            model.zero_grad(set_to_none=True)
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
        assert found[0][1].keys() == found[1][1].keys()
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    finally:
        torch.set_default_dtype(torch.float32)


def test_mixed_precision_is_close_on_a_cpu(tmp_path):
    model = make_model(**SAME)
    negatives = ready(make_negatives(tmp_path, model, negatives="both"))
    samples = batch_of(negatives, range(8))
    model.train()
    full = negatives.objective(samples)
    with torch.autocast("cpu", torch.bfloat16):
        half = negatives.objective(samples)
    assert list(half) == ["loss_bank", "loss_rtc", "loss_align", "loss_mined"]
    for name, value in full.items():
        assert half[name].item() == pytest.approx(value.item(), rel=0.1, abs=0.05), name
    sum(half.values()).backward()
    assert all(math.isfinite(p.grad.sum()) for p in model.parameters() if p.grad is not None)


def six_steps(folder, stop_at=None):
    """Three epochs with dropout, from the state in the folder on. Bank and draws of epoch 0 serve epoch 1."""
    folder.mkdir(exist_ok=True)
    model = make_model(dropout=0.2, fusion_dropout=0.2)
    torch.manual_seed(5)
    flags = {"negatives": "both", "refresh_bank": 2, "mine_every": 2, "negatives_per_query": 2}
    trainer = make_trainer(
        folder, model, make_negatives(folder, model, **flags), batch_size=8, checkpoint_every=1
    )
    go_on(trainer, stop_at)
    return model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, six_steps(folder)


@pytest.mark.parametrize("stop_at", [(1, 0), (1, 1), (2, 1)])
def test_a_run_that_stops_anywhere_goes_on_to_the_bit(tmp_path, whole, stop_at):
    folder, weights = whole
    with pytest.raises(Stop):
        six_steps(tmp_path, stop_at)
    ended = six_steps(tmp_path)
    for name, value in weights.items():
        assert torch.equal(ended[name], value), name
    assert (tmp_path / "train_metrics.csv").read_bytes() == (folder / "train_metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "bank.safetensors is missing; restore it from a copy"),
        (lambda path: path.write_bytes(b""), "bank.safetensors cannot be read: it is empty or damaged"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            "bank.safetensors cannot be read: it is empty or damaged",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
            "bank.safetensors is damaged: its checksum is another",
        ),
    ],
)
def test_a_bank_that_is_lost_or_damaged_is_one_clear_line(tmp_path, spoil, message):
    model = make_model()
    ready(make_negatives(tmp_path, model, negatives="bank"))
    spoil(tmp_path / "saved_models" / "bank.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        ready(make_negatives(tmp_path, model, negatives="bank"), 0, 1)
    assert "\n" not in str(caught.value)
    ready(make_negatives(tmp_path, model, negatives="bank"), 0, 0)  # there it is made anyway


def test_a_bank_of_another_kind_or_epoch_is_refused(tmp_path):
    model = make_model()
    ready(make_negatives(tmp_path, model, negatives="bank", refresh_bank=1), 1, 0)
    with pytest.raises(InputError, match=r"holds \(8, 5, 8\) values of torch.float16, and .* torch.float32"):
        ready(make_negatives(tmp_path, model, **FULL), 0, 1)
    with pytest.raises(InputError, match="is of epoch 1, and the run goes on with that of epoch 0"):
        ready(make_negatives(tmp_path, model, negatives="bank"), 0, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"refresh_bank": 1},
            "--refresh-bank 1 is for --negatives bank or both, .* --negatives batch; leave",
        ),
        ({"bank_dtype": "float32", "negatives": "mined"}, "--bank-dtype float32 is for --negatives bank"),
        ({"loss_mined": 0.5, "negatives": "bank"}, "--loss-mined 0.5 is for --negatives mined or both"),
        ({"train": "query"}, "--train query leaves the targets as they are, which only a bank allows"),
        ({"negatives": "bank", "refresh_bank": 0}, "--refresh-bank 0 is too small; the least is 1"),
        ({"negatives": "bank", "bank_temperature": math.nan}, "--bank-temperature nan must be a positive"),
        ({"negatives": "mined", "negatives_per_query": 0}, "--negatives-per-query 0 is too small"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        TrainingSettings(dataset="cirr", **flags).check()


def test_a_training_says_so_before_anything_is_read(tmp_path):
    flags = ("--data-path", tmp_path / "nowhere", "--dataset", "CIRR", "--bank-positive", "bank")
    _, stderr = run("blip_fine_tune_2.py", *flags, code=2)
    assert_one_clear_line(stderr, "--bank-positive bank is for --negatives bank or both")
    flags = ("--negatives", "bank", "--train", "call2", "--fusion-lr", 1e-3, "--dataset", "CIRR")
    _, stderr = run("blip_fine_tune_2.py", *flags, code=2)
    assert_one_clear_line(
        stderr, "--fusion-lr 0.001: the fusion does not learn with --train call2; leave one out"
    )


def test_a_run_with_a_bank_is_written_scored_and_goes_on(data, tmp_path):
    flags = ("--negatives", "bank", "--refresh-bank", 1, "--train", "query", "--bank-positive", "bank")
    folder, stdout, _ = train(data, tmp_path, "--num-epochs", 1, *flags)
    assert "bank of epoch 0: 72 images, " in stdout
    (row,) = read_csv(folder / "train_metrics.csv")
    assert {"loss_bank", "loss_rtc", "loss_align"} <= set(row)
    assert "loss_itc" not in row
    stdout, _ = run("blip_fine_tune_2.py", "--resume", folder, "--num-epochs", 2)
    assert "bank of epoch 1: " in stdout
    assert len(read_csv(folder / "validation_metrics.csv")) == 2
    _, stderr = run("blip_fine_tune_2.py", "--resume", folder, "--num-epochs", 3, "--train", "all", code=2)
    assert_one_clear_line(stderr, "--train all: ")


def test_choose_learning_leaves_what_is_frozen_frozen():
    model = make_model()
    choose_learning(model, "all")
    assert not any(p.requires_grad for p in model.visual_encoder.parameters())
    assert model.vision_proj.weight.requires_grad
