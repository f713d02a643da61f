"""The loop with a model that has nothing to do with retrieval: it needs a dict of losses and no more."""

import csv
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from sprc.errors import InputError
from sprc.models.device import precision
from sprc.run_folder import create_run_folder, write_atomically, write_csv, write_json
from sprc.training import Trainer, TrainingConfig, make_optimizer, make_schedule


class Numbers(Dataset):
    """Item i is {"x": i}."""

    def __init__(self, count):
        self.count = count

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index))}


class Recorder(nn.Module):
    """Keeps the batches it is given; its loss turns to NaN at a chosen step."""

    def __init__(self, nan_at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.idle = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.batches, self.nan_at = [], nan_at
        self.device, self.diagnostics = torch.device("cpu"), {}

    def forward(self, samples):
        self.batches.append(samples["x"].tolist())
        self.diagnostics = {"largest": samples["x"].max()}
        first = self.weight * samples["x"].mean()
        if len(self.batches) - 1 == self.nan_at:
            first = first * math.nan
        return {"loss_first": first, "loss_second": self.weight.square()}


def run(folder, model, **changes):
    config = TrainingConfig(**{"num_epochs": 3, "batch_size": 4, "num_workers": 0, **changes})
    (folder / "saved_models").mkdir(exist_ok=True)
    kept = []

    def validate():
        return {"recall": float(len(kept))}

    def keep(epoch, metrics, earlier):
        assert [row["recall"] for row in earlier] == [recall for _, recall in kept]
        kept.append((epoch, metrics["recall"]))

    Trainer(model, Numbers(10), config, folder).train(validate, keep)
    return kept


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_an_epoch_is_shuffled_drops_the_last_batch_and_repeats_with_its_seed(tmp_path):
    first, second, other = Recorder(), Recorder(), Recorder()
    run(tmp_path, first)
    run(tmp_path, second)
    run(tmp_path, other, seed=100)
    assert len(first.batches) == 3 * 2
    epochs = [first.batches[i][:] + first.batches[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert first.batches == second.batches != other.batches


def test_the_csv_holds_the_mean_of_each_loss_and_diagnostic_and_the_weighted_total(tmp_path):
    model = Recorder()
    run(
        tmp_path, model, num_epochs=1, learning_rate=1e-12, loss_weights={"loss_first": 0.5, "loss_none": 3.0}
    )
    (row,) = read_csv(tmp_path / "train_metrics.csv")
    assert list(row) == ["epoch", "train_loss", "loss_first", "loss_second", "largest"]
    first = sum(2 * sum(batch) / 4 for batch in model.batches) / 2
    assert float(row["loss_first"]) == pytest.approx(first, rel=1e-6)
    assert float(row["train_loss"]) == pytest.approx(0.5 * first + 4, rel=1e-6)
    assert float(row["largest"]) == sum(max(batch) for batch in model.batches) / 2


def test_validation_comes_at_its_frequency_and_after_the_last_epoch(tmp_path):
    kept = run(tmp_path, Recorder(), num_epochs=6, validation_frequency=2)
    assert kept == [(0, 0.0), (2, 1.0), (4, 2.0), (5, 3.0)]
    assert [row["epoch"] for row in read_csv(tmp_path / "validation_metrics.csv")] == ["0", "2", "4", "5"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model = Recorder(nan_at=3)
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 1 \(loss_first=nan, loss_second=4"):
        run(tmp_path, model, learning_rate=1e-12)
    assert len(read_csv(tmp_path / "train_metrics.csv")) == 1
    assert math.isfinite(model.weight.item())


def test_the_optimizer_is_the_published_one_over_what_requires_a_gradient():
    model = Recorder()
    optimizer = make_optimizer(model, 1e-5)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(model.weight)]
    settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert settings == {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.05}


@pytest.mark.parametrize(
    ("dataset", "epochs", "span", "peak_share", "first"),
    [
        ("CIRR", 10, 80, 1 / 50, 1 / 25),
        ("CIRR", 100, 100, 1 / 50, 1 / 25),
        ("FashionIQ", 30, 30, 1.5 / 30, 1 / 100),
        ("FashionIQ", 1, 2, 1.5 / 2, 1 / 100),
    ],
)
def test_the_schedule_spans_and_peaks_where_it_was_published(dataset, epochs, span, peak_share, first):
    """OneCycleLR by its definition: cosine from lr * first up to lr, then down to lr * first / 1e4."""
    steps, rate = 40, 1e-3
    optimizer = make_optimizer(Recorder(), rate)
    schedule = make_schedule(dataset, optimizer, steps, epochs)
    peak = peak_share * span * steps - 1
    total = span * steps
    for step in range(min(total, epochs * steps) - 1):
        if step <= peak:
            low, share = rate * first, step / peak
            expected = low + (rate - low) * (1 - math.cos(math.pi * share)) / 2
        else:
            low, share = rate * first / 1e4, (step - peak) / (total - 1 - peak)
            expected = low + (rate - low) * (1 + math.cos(math.pi * share)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("amp", "device", "has_bfloat16", "expected"),
    [
        ("auto", "cpu", True, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("off", "cuda", True, None),
        ("fp16", "cuda", True, torch.float16),
        ("bf16", "cuda", False, torch.bfloat16),
    ],
)
def test_automatic_precision_is_bfloat16_where_the_gpu_has_it(
    monkeypatch, amp, device, has_bfloat16, expected
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert precision(amp, torch.device(device)) is expected


@pytest.mark.parametrize(("amp", "scaled"), [("off", False), ("bf16", False), ("fp16", True)])
def test_only_float16_scales_its_gradients(tmp_path, amp, scaled):
    trainer = Trainer(Recorder(), Numbers(8), TrainingConfig(batch_size=4, num_workers=0, amp=amp), tmp_path)
    assert trainer.scaler.is_enabled() == scaled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "fp8"}, "--amp 'fp8'"),
        ({"num_epochs": 0}, "--num-epochs 0"),
        ({"batch_size": -1}, "--batch-size -1"),
        ({"validation_frequency": 0}, "--validation-frequency 0"),
        ({"learning_rate": math.nan}, "--learning-rate nan"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
        ({"loss_weights": {"loss_align": -0.1}}, "--loss-align -0.1"),
        ({"num_workers": -1}, "--num-workers -1"),
    ],
)
def test_a_setting_that_cannot_work_names_its_flag_and_value(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingConfig(**changes)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="--batch-size 11 is larger than the training set of 10"):
        run(tmp_path, Recorder(), batch_size=11)


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = {create_run_folder(tmp_path, "CIRR", "blip2_cir_align_prompt") for _ in range(5)}
    assert len(folders) == 5
    assert all(f.name.startswith("clip_finetuned_on_cirr_blip2_cir_align_prompt_20") for f in folders)
    assert all((folder / "saved_models").is_dir() for folder in folders)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"good": 1})

    def half(file):
        file.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"cannot write .*metrics.json \(disk full\); free some space"):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_csv_floats_keep_all_their_digits(tmp_path):
    write_csv(tmp_path / "a.csv", [{"epoch": 0, "value": 0.1 + 0.2}])
    assert float(read_csv(tmp_path / "a.csv")[0]["value"]) == 0.1 + 0.2
