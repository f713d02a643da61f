"""The loop with a model that has nothing to do with retrieval: it needs a dict of losses and no more."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers.runner import ROOT
from torch import nn
from torch.utils.data import Dataset

from sprc.errors import InputError, Interrupted, run_script
from sprc.files import write_atomically, write_csv, write_json
from sprc.models.device import precision
from sprc.processes import STOP_SIGNALS, stop_signals
from sprc.run_folder import RunFolder
from sprc.scoring.benchmarks import benchmark_class
from sprc.training.loop import (
    Trainer,
    TrainingConfig,
    make_optimizer,
    make_schedule,
)


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


SETTINGS = {"num_epochs": 3, "batch_size": 4, "num_workers": 0}


def run(folder, model, **changes):
    config = TrainingConfig(**{**SETTINGS, **changes})
    (folder / "saved_models").mkdir(exist_ok=True)
    kept = []

    def validate(_stop_if_asked):
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


class Dropped(Recorder):
    """A loss that depends on random numbers, as with dropout."""

    def forward(self, samples):
        losses = super().forward(samples)
        return {name: loss * torch.rand(()) for name, loss in losses.items()}


class Broken(Exception):
    pass


MOMENTS = ["before validation", "in validation", "while keeping", "after keeping", "after the last step"]


def go_on(folder, moment=None, epoch=1):
    """Run from the state in the folder on; with a moment, fail at it in that epoch.

    Returns the batches, what was kept, and the last weight. Validation draws random numbers, too.
    """
    (folder / "saved_models").mkdir(exist_ok=True)
    torch.manual_seed(5)
    trainer = Trainer(Dropped(), Numbers(10), TrainingConfig(**SETTINGS), folder)
    trainer.load_state()
    kept, write = [], trainer.write

    def fail(here):
        if (here, trainer.progress.epoch) == (moment, epoch):
            raise Broken

    def validate(stop_if_asked):
        stop_if_asked()
        fail("in validation")
        return {"recall": torch.rand(()).item()}

    def keep(epoch, metrics, earlier):
        fail("while keeping")
        if all(metrics["recall"] > row["recall"] for row in earlier):
            kept.append((epoch, metrics["recall"]))

    def fail_or_write(file, rows):
        places = {"train_metrics": "before validation", "validation_metrics": "after keeping"}
        fail(places.get(file.stem, "elsewhere"))
        write(file, rows)

    def after_backward():
        if trainer.progress.step == 1:
            fail("after the last step")

    trainer.write, trainer.after_backward = fail_or_write, after_backward
    if moment is None:
        trainer.train(validate, keep)
    else:
        with pytest.raises(Broken):
            trainer.train(validate, keep)
    return trainer.model.batches, kept, trainer.model.weight.item()


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_fails_around_validation_goes_on_there_and_repeats_no_step(tmp_path, moment):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    batches, kept, weight = go_on(whole)
    first, kept_first, _ = go_on(broken, moment)
    in_training = moment == "after the last step"
    if in_training:
        assert len(first) == 4
    else:
        assert first == batches[:4]
        rows = read_csv(broken / "train_metrics.csv")
        assert len(rows) == (1 if moment == "before validation" else 2)
    second, kept_second, ended = go_on(broken)
    # The state before the epoch is the last one that a failing step leaves.
    assert second == batches[2 if in_training else 4 :]
    assert ended == weight
    assert dict(kept_first + kept_second) == dict(kept)
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert [row["epoch"] for row in read_csv(broken / "step_times.csv")] == ["0", "1", "2"]


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_in_validation_ends_it_at_its_next_look(tmp_path, signum):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        (folder / "saved_models").mkdir(parents=True)
    config = TrainingConfig(**SETTINGS)

    def train(folder, signum=None):
        torch.manual_seed(5)
        trainer = Trainer(Dropped(), Numbers(10), config, folder)
        trainer.load_state()

        def validate(stop_if_asked):
            stop_if_asked()
            if signum is not None:
                os.kill(os.getpid(), signum)
            stop_if_asked()
            return {"recall": 1.0}

        trainer.train(validate, lambda *_: None)
        return trainer.model

    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=signum.name):
        train(stopped, signum)
    assert signal.getsignal(signum) is before
    assert len(read_csv(stopped / "train_metrics.csv")) == 1
    assert not (stopped / "validation_metrics.csv").exists()
    expected, resumed = train(whole), train(stopped)
    assert resumed.batches == expected.batches[2:]
    assert torch.equal(resumed.weight, expected.weight)


def test_a_hangup_that_nohup_has_ignored_stays_ignored_and_one_that_comes_twice_is_noted():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert received == []
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_signals() as received:
            for _ in range(2):  # from the shell and from the kernel
                os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGHUP] * 2
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_acts_at_once(signum):
    acted = []
    before = signal.signal(signum, lambda *_: acted.append(True))
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signum)
            assert (received, acted) == ([signum], [])
            os.kill(os.getpid(), signum)
            assert (received, acted) == ([signum], [True])
    finally:
        signal.signal(signum, before)


def test_control_c_is_one_line_and_of_several_ranks_the_first_alone_says_it(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards
    monkeypatch.setenv("TQDM_DISABLE", "0")
    for rank, expected in ((None, "stopped by SIGINT\n"), ("0", "stopped by SIGINT\n"), ("1", "")):
        if rank is not None:
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            run_script(main)
        assert end.value.code == 130
        assert capsys.readouterr() == ("", expected)


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
"""
# tqdm's bar, interrupted while it is being made.
COMPLAINS = """
class Bar:
    def __init__(self):
        raise KeyboardInterrupt
    def __del__(self):
        self.close()
Bar()
"""


@pytest.mark.parametrize("module", [SWALLOWS, COMPLAINS], ids=["an import swallows it", "a bar complains"])
def test_control_c_is_one_line_whatever_it_meets(tmp_path, module):
    (tmp_path / "module.py").write_text(module)
    code = "from sprc.errors import run_script; run_script(lambda: __import__('module'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", tmp_path)))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "stopped by SIGINT\n")


def test_a_state_that_is_cut_short_is_one_clear_line(tmp_path):
    go_on(tmp_path)
    path = tmp_path / "saved_models" / "training_state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"training_state.pt cannot be read: it is cut short or damaged"):
        go_on(tmp_path)


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


def test_the_optimizer_steps_to_the_bit_as_torch_s_own():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.05, "fused": True}
    optimizers = make_optimizer(ours, 1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2, **settings)
    for step in range(3):
        x = torch.randn(7, 5)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert torch.equal(ours.weight, theirs.weight), step
    assert not any(parameter.grad_fn for parameter in ours.parameters())
    own, expected = (optimizer.state_dict() for optimizer in optimizers)
    assert own["param_groups"] == expected["param_groups"]
    for optimizer in optimizers:  # each can go on from the other's
        optimizer.load_state_dict(expected)
        found = optimizer.state_dict()["state"][0]
        assert all(torch.equal(value, expected["state"][0][name]) for name, value in found.items())


class Two(Recorder):
    """A second part, whose parameters' names start with ``new.``."""

    def __init__(self):
        super().__init__()
        self.new = nn.Linear(1, 1)

    def forward(self, samples):
        losses = super().forward(samples)
        return {**losses, "loss_new": self.new(samples["x"][:, None]).square().mean()}


def test_a_parameter_belongs_to_the_longest_prefix_of_its_name():
    model = Two()
    first, *others = make_optimizer(model, 1e-5, {"new.": 1e-3, "new.bias": 1e-4}).param_groups
    found = [(group["lr"], [id(p) for p in group["params"]]) for group in (first, *others)]
    assert found == [
        (1e-5, [id(model.weight)]),
        (1e-3, [id(model.new.weight)]),
        (1e-4, [id(model.new.bias)]),
    ]
    for prefixes in ({"old.": 1.0}, {"new.": 1.0, "new.w": 1.0, "new.b": 1.0}, {"idle": 1.0}):
        with pytest.raises(InputError, match="no trained parameter's name starts so"):
            make_optimizer(model, 1e-5, prefixes)


def learn_alone(folder, amp, breaks_at=None):
    """Two epochs in which the new part learns alone, and one of all; what each epoch's validation found."""
    (folder / "saved_models").mkdir(exist_ok=True, parents=True)
    torch.manual_seed(0)
    config = TrainingConfig(**SETTINGS, alone_epochs=2, alone_prefix="new.", learning_rate=0.1, amp=amp)
    model, found = Two(), []
    trainer = Trainer(model, Numbers(10), config, folder)
    trainer.load_state()

    def validate(_stop_if_asked):
        if trainer.progress.epoch == breaks_at:
            raise Broken
        found.append((model.weight.item(), model.new.weight.item(), len(trainer.optimizer.state)))
        return {"recall": 0.0}

    with nullcontext() if breaks_at is None else pytest.raises(Broken):
        trainer.train(validate, lambda *_: None)
    return found


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_what_waits_is_not_touched_in_the_first_epochs_and_learns_as_new_after_them(tmp_path, amp):
    found = learn_alone(tmp_path / "whole", amp)
    waiting, new, known = zip(*found, strict=True)
    assert waiting[0] == waiting[1] == 2.0 != waiting[2]
    assert len({*new}) == 3
    assert known == (2, 2, 3)  # decay and moments did not begin either
    parts = learn_alone(tmp_path / "parts", amp, breaks_at=1) + learn_alone(tmp_path / "parts", amp)
    assert parts == found


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
    benchmark = benchmark_class(dataset)
    config = TrainingConfig(
        num_epochs=epochs,
        schedule_epochs=benchmark.schedule_span(epochs),
        warm_up=benchmark.warm_up(benchmark.schedule_span(epochs)),
        start_divisor=benchmark.start_divisor,
    )
    schedule = make_schedule(config, optimizer, steps)
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
        ({"alone_epochs": 10, "alone_prefix": "new."}, r"10 epochs in which only new\.\* learns do not fit"),
    ],
)
def test_a_setting_that_cannot_work_names_its_flag_and_value(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingConfig(**changes)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="--batch-size 11 is larger than the training set of 10"):
        run(tmp_path, Recorder(), batch_size=11)


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = {RunFolder.create(tmp_path, "cirr", "blip2_cir_align_prompt") for _ in range(5)}
    assert len({str(folder) for folder in folders}) == 5
    assert all(f.path.name.startswith("clip_finetuned_on_cirr_blip2_cir_align_prompt_20") for f in folders)
    assert all((folder.path / "saved_models").is_dir() for folder in folders)


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
