"""The training loop. It takes any model that returns a dict of losses, and knows nothing of fusion.

A run can be killed at any moment and resumed. What the next step depends on is saved together, atomically:
weights, optimizer, schedule, scaler, random states, the place in the data's order, the CSV files' rows.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from sprc.config import AMP
from sprc.data.datasets import TripletDataset
from sprc.errors import InputError, Interrupted
from sprc.run_folder import write_atomically, write_csv

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast, with which weights. A value that cannot work raises :class:`InputError`."""

    dataset: str = "CIRR"
    num_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-5
    # Of the parameters whose names start with a key; a rate that a model's part needs for itself.
    other_rates: dict[str, float] = field(default_factory=dict)
    loss_weights: dict[str, float] = field(default_factory=dict)  # a loss that is not named weighs 1
    validation_frequency: int = 1
    checkpoint_every: int = 0  # steps between saved states; 0 saves one an epoch
    num_workers: int = 2
    seed: int = 0
    amp: str = "off"  # see precision

    def __post_init__(self) -> None:
        for name, least in (
            ("num_epochs", 1),
            ("batch_size", 1),
            ("validation_frequency", 1),
            ("checkpoint_every", 0),
            ("num_workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is too small; the least is {least}"
                )
        rates = {"--learning-rate": self.learning_rate}
        rates |= {f"the learning rate of {prefix}*": rate for prefix, rate in self.other_rates.items()}
        for name, rate in rates.items():
            if not 0 < rate < math.inf:
                raise InputError(f"{name} {rate} must be a positive number")
        for name, weight in self.loss_weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {weight} must be a number of at least 0")

        if self.amp not in AMP:
            raise InputError(f"--amp {self.amp!r} is unknown; choose from {', '.join(AMP)}")

    def check_fits(self, num_triplets: int) -> None:
        """Raise :class:`InputError` if ``num_triplets`` do not fill one batch."""
        if num_triplets < self.batch_size:
            raise InputError(
                f"--batch-size {self.batch_size} is larger than the training set of {num_triplets} triplets"
            )


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that mixed precision computes in: ``--amp`` on ``device``; None is float32 throughout.

    "auto" is bfloat16 on a GPU that has it, float16 on another, and off on a CPU.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def make_optimizer(
    model: nn.Module, learning_rate: float, other_rates: dict[str, float] | None = None
) -> Optimizer:
    """SPRC's AdamW over the parameters that require a gradient.

    Parameters whose names start with a key of ``other_rates`` are a group of their own, at its rate. Raises
    :class:`InputError` if there are none.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = []
    for prefix, rate in (other_rates or {}).items():
        names = [name for name in trained if name.startswith(prefix)]
        if not names:
            raise InputError(f"a learning rate of {rate} is for {prefix}*, which this model does not have")
        groups.append({"params": [trained.pop(name) for name in names], "lr": rate})
    groups.insert(0, {"params": list(trained.values()), "lr": learning_rate})
    # fused: one pass over the parameters in place of ten; on a CPU five times as fast.
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.05, fused=True)


def make_schedule(dataset: str, optimizer: Optimizer, steps_per_epoch: int, num_epochs: int) -> LRScheduler:
    """SPRC's one-cycle schedule, stepped once a batch, up to each group's own rate.

    CIRR's spans 80 epochs however few are run (more, if more are run), so ten epochs stay near the peak.
    """
    if dataset == "CIRR":
        shape = {"pct_start": 1 / 50, "epochs": max(80, num_epochs)}
    else:
        span = max(2, num_epochs)  # the warm-up takes 1.5 epochs: one epoch is the first of two
        shape = {"pct_start": 1.5 / span, "div_factor": 100.0, "epochs": span}
    rates = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=rates, steps_per_epoch=steps_per_epoch, **shape)


class EpochOrder(Sampler[int]):
    """A random order for each epoch, a function of seed and epoch alone, from any place in it."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator)[self.start :].tolist())


@dataclass
class Progress:
    """Where a run is, and what it has written so far."""

    epoch: int = 0
    step: int = 0  # batches of this epoch that are trained
    sums: dict[str, float] = field(default_factory=dict)  # over those batches, of what is logged
    train_rows: list[dict[str, float]] = field(default_factory=list)
    validation_rows: list[dict[str, float]] = field(default_factory=list)
    time_rows: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """A model, what trains it, and the state that a resumed run needs.

    Args:
        model: on its device; ``model(batch)`` gives a dict of scalar losses, and ``model.diagnostics`` a dict
            of scalars to log beside them.
        dataset: items that the default collate makes into ``batch``; ``set_epoch`` tells it the epoch.
        config: see :class:`TrainingConfig`.
        run_folder: where the CSV files and the state go.
        after_backward: is called once a step, when the gradients are there and not scaled.
        scalars: a TensorBoard ``SummaryWriter`` that is given what the CSV files are given.

    Raises:
        InputError: the batch is larger than the data set.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: TripletDataset,
        config: TrainingConfig,
        run_folder: Path,
        *,
        after_backward: Callable[[], None] = lambda: None,
        scalars: "SummaryWriter | None" = None,
    ) -> None:
        config.check_fits(len(dataset))
        self.model, self.dataset, self.config, self.run_folder = model, dataset, config, run_folder
        self.after_backward, self.scalars = after_backward, scalars
        self.steps_per_epoch = len(dataset) // config.batch_size
        self.order = EpochOrder(len(dataset), config.seed)
        self.loader = DataLoader(
            dataset,
            config.batch_size,
            sampler=self.order,
            drop_last=True,
            # Its own, or starting workers would draw from the model's.
            generator=torch.Generator(),
            num_workers=config.num_workers,
            persistent_workers=config.num_workers > 0,
            pin_memory=model.device.type == "cuda",
        )
        self.optimizer = make_optimizer(model, config.learning_rate, config.other_rates)
        self.schedule = make_schedule(config.dataset, self.optimizer, self.steps_per_epoch, config.num_epochs)
        self.precision = precision(config.amp, model.device)
        # float16's gradients would vanish without scaling; bfloat16 has float32's range.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=self.precision is torch.float16)
        self.progress = Progress()

    @property
    def state_file(self) -> Path:
        """Where the state is kept while the run is not finished."""
        return self.run_folder / "saved_models" / "training_state.pt"

    def save_state(self) -> None:
        """Write all that the next step depends on. Frozen weights are not part of it."""
        weights = self.model.state_dict()
        state = {
            "model": {name: value for name, value in weights.items() if self._is_trained(name)},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.model.device.type == "cuda" else [],
            "progress": vars(self.progress),
        }
        write_atomically(self.state_file, lambda file: torch.save(state, file))

    def load_state(self) -> None:
        """Go on from :meth:`save_state`, if there is a state yet."""
        if not self.state_file.exists():
            return
        state: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
        own = self.model.state_dict()
        frozen = {name: value for name, value in own.items() if not self._is_trained(name)}
        self.model.load_state_dict(frozen | state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.scaler.is_enabled():  # --amp auto may differ on another GPU
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.progress = Progress(**state["progress"])

    def _is_trained(self, name: str) -> bool:
        try:
            return self.model.get_parameter(name).requires_grad
        except AttributeError:  # a buffer
            return True

    def train(
        self,
        validate: Callable[[], dict[str, float]],
        keep: Callable[[int, dict[str, float], list[dict[str, float]]], None],
    ) -> None:
        """Train up to ``config.num_epochs``, writing `train_metrics.csv` and `validation_metrics.csv`.

        `step_times.csv` holds each epoch's median wall-clock seconds a step, reading the batch included: a
        file of its own, because times are the one thing that two runs of one seed do not share.

        Args:
            validate: scores the model as it is.
            keep: is given the epoch, its scores and the rows of earlier validations, and saves the model if
                it is worth saving.

        Raises:
            FloatingPointError: a loss is not finite; the step is named, what was saved stays.
            Interrupted: SIGINT or SIGTERM came; the state is saved.
        """
        config, progress = self.config, self.progress
        with stop_signals() as stop:
            while progress.epoch < config.num_epochs:
                seconds = self.train_epoch(stop)
                epoch, sums = progress.epoch, progress.sums
                if seconds:  # none after a resume at an epoch's very end
                    progress.time_rows.append({"epoch": epoch, "median_step_seconds": median(seconds)})
                    write_csv(self.run_folder / "step_times.csv", progress.time_rows)
                means = {name: value / self.steps_per_epoch for name, value in sums.items()}
                progress.train_rows.append({"epoch": epoch, **means})
                self.write("train_metrics", progress.train_rows)
                if epoch % config.validation_frequency == 0 or epoch == config.num_epochs - 1:
                    metrics = validate()
                    row = {"epoch": epoch, **metrics}
                    keep(epoch, metrics, progress.validation_rows)
                    progress.validation_rows.append(row)
                    self.write("validation_metrics", progress.validation_rows)
                progress.epoch, progress.step, progress.sums = epoch + 1, 0, {}
                self.save_state()

    def write(self, name: str, rows: list[dict[str, float | str]]) -> None:
        """Write all rows to `name.csv`, and the numbers of the last one to TensorBoard."""
        write_csv(self.run_folder / f"{name}.csv", rows)
        if self.scalars is not None:
            for key, value in rows[-1].items():
                if key != "epoch" and isinstance(value, float):
                    self.scalars.add_scalar(f"{name}/{key}", value, rows[-1]["epoch"])

    def train_epoch(self, stop: list[int]) -> list[float]:
        """Train the rest of the current epoch, adding to ``progress.sums``; return each step's seconds."""
        model, progress, config = self.model, self.progress, self.config
        model.train()
        device = model.device
        self.dataset.set_epoch(progress.epoch)
        self.order.epoch = progress.epoch
        self.order.start = progress.step * config.batch_size
        bar = tqdm(
            self.loader,
            desc=f"epoch {progress.epoch}",
            initial=progress.step,
            total=self.steps_per_epoch,
            mininterval=1.0,
        )
        seconds, before = [], time.perf_counter()
        for batch in bar:
            batch = {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, self.precision, enabled=self.precision is not None):
                losses = model(batch)
                total = sum(config.loss_weights.get(name, 1.0) * loss for name, loss in losses.items())
            if not torch.isfinite(total):
                values = ", ".join(f"{name}={loss.item()}" for name, loss in losses.items())
                raise FloatingPointError(
                    f"the loss is not finite at epoch {progress.epoch}, step {progress.step} ({values}); "
                    "lower --learning-rate or check the data. Checkpoints saved so far are kept"
                )
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimizer)
            self.after_backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            logged = {"train_loss": total, **losses, **model.diagnostics}
            # One transfer for all of them. It waits for the device: the step is over.
            values = torch.stack([value.detach().float() for value in logged.values()]).tolist()
            for name, value in zip(logged, values, strict=True):
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
            progress.step += 1
            shown = {name: f"{progress.sums[name] / progress.step:.3f}" for name in losses}
            bar.set_postfix(shown, refresh=False)
            if stop:
                self.save_state()
                raise Interrupted(stop[0])
            if config.checkpoint_every and progress.step % config.checkpoint_every == 0:
                self.save_state()
        return seconds


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM only fill the list; a second one acts at once, as usual."""
    received: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, _frame: object) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    for signum in before:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
