"""The training loop. It takes any model that returns a dict of losses, and knows nothing of fusion."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from sprc.errors import InputError
from sprc.run_folder import write_csv


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast, with which weights. A value that cannot work raises :class:`InputError`."""

    dataset: str = "CIRR"
    num_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-5
    loss_weights: dict[str, float] = field(default_factory=dict)  # a loss that is not named weighs 1
    validation_frequency: int = 1
    num_workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_epochs", 1),
            ("batch_size", 1),
            ("validation_frequency", 1),
            ("num_workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is too small; the least is {least}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning-rate {self.learning_rate} must be a positive number")
        for name, weight in self.loss_weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {weight} must be a number of at least 0")

    def check_fits(self, num_triplets: int) -> None:
        """Raise :class:`InputError` if ``num_triplets`` do not fill one batch."""
        if num_triplets < self.batch_size:
            raise InputError(
                f"--batch-size {self.batch_size} is larger than the training set of {num_triplets} triplets"
            )


def make_optimizer(model: nn.Module, learning_rate: float) -> Optimizer:
    """SPRC's AdamW over the parameters that require a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.05)


def make_schedule(
    dataset: str, optimizer: Optimizer, learning_rate: float, steps_per_epoch: int, num_epochs: int
) -> LRScheduler:
    """SPRC's one-cycle schedule, stepped once a batch.

    CIRR's spans 80 epochs however few are run (more, if more are run), so ten epochs stay near the peak.
    """
    if dataset == "CIRR":
        shape = {"pct_start": 1 / 50, "epochs": max(80, num_epochs)}
    else:
        shape = {"pct_start": min(1.5 / num_epochs, 1.0), "div_factor": 100.0, "epochs": num_epochs}
    return OneCycleLR(optimizer, max_lr=learning_rate, steps_per_epoch=steps_per_epoch, **shape)


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainingConfig,
    run_folder: Path,
    validate: Callable[[], dict[str, float]],
    keep: Callable[[int, dict[str, float]], None],
) -> None:
    """Train for ``config.num_epochs``, writing `train_metrics.csv` and `validation_metrics.csv` as it goes.

    Args:
        model: on its device; ``model(batch)`` gives a dict of scalar losses, and ``model.diagnostics`` a
            dict of scalars to log beside them.
        dataset: items that the default collate makes into ``batch``.
        config: see :class:`TrainingConfig`.
        run_folder: where the CSV files go.
        validate: scores the model as it is.
        keep: is given the epoch and the scores, and saves the model if it is worth saving.

    Raises:
        InputError: the batch is larger than the data set.
        FloatingPointError: a loss is not finite; the step is named, what was saved stays.
    """
    config.check_fits(len(dataset))
    order = torch.Generator()
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=RandomSampler(dataset, generator=order),
        drop_last=True,
        # Its own, or starting workers would draw from the order's generator or from the model's.
        generator=torch.Generator(),
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=model.device.type == "cuda",
    )
    optimizer = make_optimizer(model, config.learning_rate)
    schedule = make_schedule(config.dataset, optimizer, config.learning_rate, len(loader), config.num_epochs)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.device.type == "cuda")

    train_rows: list[dict[str, float]] = []
    validation_rows: list[dict[str, float]] = []
    for epoch in range(config.num_epochs):
        order.manual_seed(config.seed + epoch)  # the order of an epoch depends on nothing before it
        means = train_epoch(model, loader, optimizer, schedule, scaler, config.loss_weights, epoch)
        train_rows.append({"epoch": epoch, **means})
        write_csv(run_folder / "train_metrics.csv", train_rows)
        if epoch % config.validation_frequency == 0 or epoch == config.num_epochs - 1:
            metrics = validate()
            validation_rows.append({"epoch": epoch, **metrics})
            write_csv(run_folder / "validation_metrics.csv", validation_rows)
            keep(epoch, metrics)


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
    loss_weights: dict[str, float],
    epoch: int,
) -> dict[str, float]:
    """One pass over the data; the mean of the total loss, of each loss and of each diagnostic."""
    model.train()
    device = model.device
    sums: dict[str, Tensor] = {}
    bar = tqdm(loader, desc=f"epoch {epoch}", mininterval=1.0)
    for step, batch in enumerate(bar):
        batch = {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16, enabled=scaler.is_enabled()):
            losses = model(batch)
            total = sum(loss_weights.get(name, 1.0) * loss for name, loss in losses.items())
        if not torch.isfinite(total):
            values = ", ".join(f"{name}={loss.item()}" for name, loss in losses.items())
            raise FloatingPointError(
                f"the loss is not finite at epoch {epoch}, step {step} ({values}); lower --learning-rate or "
                "check the data. Checkpoints saved so far are kept"
            )
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        for name, value in {"train_loss": total, **losses, **model.diagnostics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
        bar.set_postfix({name: f"{sums[name].item() / (step + 1):.3f}" for name in losses}, refresh=False)
    return {name: (value / len(loader)).item() for name, value in sums.items()}
