"""How a run trains: its configuration, SPRC's optimizer, and its learning rates over the run."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from sprc.config import AMP
from sprc.distributed import world_size
from sprc.errors import InputError
from sprc.training.settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(LoopSettings):
    """How long, how fast, with which weights. A value that cannot work raises :class:`InputError`.

    ``batch_size`` is that of all ranks together; ``grad_cache`` are the triplets that a rank embeds at once,
    see :mod:`sprc.training.grad_cache`, and None embeds all of its own.
    """

    # Of the one-cycle schedule: the epochs it spans, the share of them after which the rate is at its peak,
    # and the peak over the first rate.
    schedule_epochs: int = 80
    warm_up: float = 1 / 50
    start_divisor: float = 25.0
    # Of the parameters whose names start with a key; a rate that a model's part needs for itself.
    other_rates: dict[str, float] = field(default_factory=dict)
    # In so many epochs at the start only the parameters whose names start with the prefix learn.
    alone_epochs: int = 0
    alone_prefix: str = ""
    loss_weights: dict[str, float] = field(default_factory=dict)  # a loss that is not named weighs 1

    def __post_init__(self) -> None:
        for name, least in (
            ("num_epochs", 1),
            ("batch_size", 1),
            ("validation_frequency", 1),
            ("checkpoint_every", 0),
            ("grad_cache", 1),
            ("num_workers", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value} is too small; the least is {least}")
        rates = {"--learning-rate": self.learning_rate}
        rates |= {f"the learning rate of {prefix}*": rate for prefix, rate in self.other_rates.items()}
        for name, rate in rates.items():
            if not 0 < rate < math.inf:
                raise InputError(f"{name} {rate} must be a positive number")
        if self.alone_epochs and not 0 < self.alone_epochs < self.num_epochs:
            raise InputError(
                f"{self.alone_epochs} epochs in which only {self.alone_prefix}* learns do not fit "
                f"--num-epochs {self.num_epochs}; give fewer, or 0"
            )
        for name, weight in self.loss_weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {weight} must be a number of at least 0")

        if self.amp not in AMP:
            raise InputError(f"--amp {self.amp!r} is unknown; choose from {', '.join(AMP)}")

    def check_fits(self, num_triplets: int) -> None:
        """Raise :class:`InputError` if ``num_triplets`` do not fill a batch, or the ranks cannot share it."""
        if num_triplets < self.batch_size:
            raise InputError(
                f"--batch-size {self.batch_size} is larger than the training set of {num_triplets} triplets"
            )
        ranks = world_size()
        if left := self.batch_size % ranks:
            less, more = self.batch_size - left, self.batch_size - left + ranks
            raise InputError(
                f"--batch-size {self.batch_size} is that of all ranks together and does not divide by their "
                f"number, {ranks}; give {f'{less} or {more}' if less else more}"
            )
        if self.grad_cache is not None and self.grad_cache >= self.batch_size // ranks:
            raise InputError(
                f"--grad-cache {self.grad_cache} saves nothing: a rank's batch is {self.batch_size // ranks} "
                "triplets; give fewer than that, or leave the flag out"
            )


class EagerAdamW(AdamW):
    """AdamW, which no model of ours compiles.

    torch hides these methods from its compiler, and imports it to do so: that takes as long as all of torch
    beside it, before the first step. They are taken without that here, and compute the same.
    """

    add_param_group = inspect.unwrap(AdamW.add_param_group)
    state_dict = inspect.unwrap(AdamW.state_dict)
    load_state_dict = inspect.unwrap(AdamW.load_state_dict)
    zero_grad = inspect.unwrap(AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(AdamW.step))


def by_prefix(model: nn.Module, prefixes: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """The parameters that require a gradient, by the longest of ``prefixes`` that their names start with.

    Those without one are under "", which comes first. Raises :class:`InputError` for a prefix without any.
    """
    groups: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in ("", *prefixes)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[max(filter(name.startswith, groups), key=len)].append(parameter)
    for prefix, parameters in groups.items():
        if prefix and not parameters:
            raise InputError(
                f"a learning rate is for {prefix}*, and no trained parameter's name starts so "
                "(or a longer prefix takes them all)"
            )
    return groups


def make_optimizer(
    model: nn.Module, learning_rate: float, other_rates: dict[str, float] | None = None
) -> Optimizer:
    """SPRC's AdamW over the parameters that require a gradient, in groups of one rate.

    ``other_rates`` are those of the parameters whose names start with a key, see :func:`by_prefix`.
    """
    rates = {"": learning_rate, **(other_rates or {})}
    parts = by_prefix(model, other_rates or {})
    groups = [{"params": parameters, "lr": rates[prefix]} for prefix, parameters in parts.items()]
    # fused: one pass over the parameters in place of ten; on a CPU five times as fast.
    return EagerAdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.05, fused=True)


def make_schedule(config: TrainingConfig, optimizer: Optimizer, steps_per_epoch: int) -> LRScheduler:
    """SPRC's one-cycle schedule, stepped once a batch, up to each group's own rate."""
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        epochs=max(config.schedule_epochs, config.num_epochs),
        steps_per_epoch=steps_per_epoch,
        pct_start=config.warm_up,
        div_factor=config.start_divisor,
    )
