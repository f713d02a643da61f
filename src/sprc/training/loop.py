"""The training loop. It takes any model that returns a dict of losses, and knows nothing of fusion.

A run can be killed at any moment and resumed, see :mod:`sprc.training.state`. A validation can take long and
can fail, so the state is saved before that as well, and a resumed run begins there.

With torchrun each of R ranks takes its R-th of every batch. Their losses see all ranks' targets, and
DistributedDataParallel averages the gradients, so a step is the single process's step on the same batch.
Weights and the data's order come from the seed alone. Dropout's random numbers come from the seed and the
rank: rank 0 draws what a single process draws.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from tqdm import tqdm

from sprc.data.datasets import SteadyLoader
from sprc.distributed import of_all_ranks, rank, seed_rank, world_size
from sprc.errors import Interrupted
from sprc.files import write_csv
from sprc.models.device import default_workers, precision
from sprc.processes import stop_signals
from sprc.run_folder import RunFolder
from sprc.training.grad_cache import Embedder, GradCache
from sprc.training.optimisation import TrainingConfig, make_optimizer, make_schedule
from sprc.training.state import Progress, RunState
from sprc.training.trackers import Trackers


class EpochItems(Protocol):
    """What is trained on: items by their number, which may depend on the epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def set_epoch(self, epoch: int, /) -> None:
        """Tell the epoch."""


def order_of_epoch(length: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch takes its ``length`` items: (length,), of seed and epoch alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class EpochOrder(Sampler[int]):
    """A random order for each epoch, a function of seed and epoch alone, from any place in it.

    Each rank is given its own part of every batch; what does not fill a batch is dropped.
    """

    def __init__(self, length: int, seed: int, batch_size: int) -> None:
        self.length = length
        self.seed = seed
        self.batch_size = batch_size  # of all ranks together
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return (self.length - self.start) // self.batch_size * (self.batch_size // world_size())

    def __iter__(self) -> Iterator[int]:
        order = order_of_epoch(self.length, self.seed, self.epoch)[self.start :]
        batches, rows = len(order) // self.batch_size, self.batch_size // world_size()
        order = order[: batches * self.batch_size].view(batches, world_size(), rows)
        return iter(order[:, rank()].flatten().tolist())


class Trainer:
    """A model, what trains it, and the state that a resumed run needs.

    ``trackers``, none at first, are given what the CSV files are given, and the learning rates.

    Args:
        model: on its device; ``model(batch)`` gives a dict of scalar losses, and ``model.diagnostics`` a dict
            of scalars to log beside them. For gradient caching see :class:`GradCache`.
        dataset: items that the default collate makes into ``batch``; ``set_epoch`` tells it the epoch.
        config: see :class:`TrainingConfig`.
        run_folder: where the CSV files and the state go.
        objective: a module around the model that gives the losses in its place, as ``model(batch)`` would,
            and likewise what gradient caching asks of a model.
        before_epoch: is called when an epoch begins or goes on, with its number and the steps of it that are
            done; what it draws of random numbers has to be its own.
        after_backward: is called once a step, when the gradients are there and not scaled.

    Raises:
        InputError: the batch is larger than the data set, or does not divide by the ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: EpochItems,
        config: TrainingConfig,
        run_folder: RunFolder | Path,
        *,
        objective: nn.Module | None = None,
        before_epoch: Callable[[int, int], None] = lambda epoch, step: None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        config.check_fits(len(dataset))
        self.model, self.dataset, self.config = model, dataset, config
        self.device = cast(torch.device, model.device)
        self.run_folder = RunFolder(run_folder)
        self.before_epoch, self.after_backward, self.trackers = before_epoch, after_backward, Trackers()
        self.steps_per_epoch = len(dataset) // config.batch_size
        self.order = EpochOrder(len(dataset), config.seed, config.batch_size)
        workers = default_workers(self.device) if config.num_workers is None else config.num_workers
        self.loader = SteadyLoader(
            dataset,
            config.batch_size // world_size(),
            sampler=self.order,
            # Its own, or starting workers would draw from the model's.
            generator=torch.Generator(),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        self.optimizer = make_optimizer(model, config.learning_rate, config.other_rates)
        self.schedule = make_schedule(config, self.optimizer, self.steps_per_epoch)
        named = model.named_parameters()
        self.waiting = [parameter for name, parameter in named if not name.startswith(config.alone_prefix)]
        self.precision = precision(config.amp, self.device)
        # float16's gradients would vanish without scaling; bfloat16 has float32's range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        if rank():  # rank 0 goes on with what the weights were drawn from, as a single process does
            seed_rank(config.seed, epoch=0)
        objective = model if objective is None else objective
        forward = in_parallel(Embedder(objective) if config.grad_cache else objective)
        self.cache = None
        if config.grad_cache:
            self.cache = GradCache(objective, forward, config.grad_cache, self.mixed_precision)
        self.losses = self.cache.losses if self.cache else forward
        self.state = RunState(
            self.run_folder,
            model,
            self.optimizer,
            self.schedule,
            self.scaler,
            seed=config.seed,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.received: list[int] = []  # the signals that ask this process to stop

    def mixed_precision(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        return self.state.progress

    def load_state(self) -> str:
        """Go on from the state on the disk, see :meth:`RunState.load`."""
        return self.state.load()

    def train(
        self,
        validate: Callable[[Callable[[], None]], dict[str, Any]],
        keep: Callable[[int, dict[str, Any], list[dict[str, Any]]], None],
    ) -> None:
        """Train up to ``config.num_epochs``, writing the CSV files of metrics.

        That of step times holds each epoch's median wall-clock seconds a step, reading the batch included,
        and the share of the epoch in which this process waited for a batch, while a GPU may still have been
        at work. It is a file of its own: times are the one thing that two runs of one seed do not share.

        The state is saved after an epoch's last step, before the validation, and again after it.

        Args:
            validate: scores the model as it is. It is given :meth:`stop_if_asked`, to be called every so
                often, by all ranks alike.
            keep: is given the epoch, its scores and the rows of earlier validations, and saves the model if
                it is worth saving.

        Raises:
            FloatingPointError: a loss is not finite; the step is named, what was saved stays.
            Interrupted: one of :data:`sprc.processes.STOP_SIGNALS` came; the state is saved.
        """
        config, progress = self.config, self.progress
        with stop_signals() as self.received:
            while progress.epoch < config.num_epochs:
                seconds, waited = self.train_epoch()
                epoch, sums = progress.epoch, progress.sums
                validates = epoch % config.validation_frequency == 0 or epoch == config.num_epochs - 1
                if seconds:  # none after a resume at an epoch's very end
                    times = {"median_step_seconds": median(seconds), "data_wait_share": waited / sum(seconds)}
                    progress.time_rows.append({"epoch": epoch, **times})
                    self.write(self.run_folder.step_times, progress.time_rows)
                    if validates:
                        self.state.save()
                means = {name: value / self.steps_per_epoch for name, value in sums.items()}
                progress.train_rows.append({"epoch": epoch, **means})
                self.write(self.run_folder.train_metrics, progress.train_rows)
                rates = map(float, self.schedule.get_last_lr())
                named = dict(zip(("base", *config.other_rates), rates, strict=True))
                self.trackers.log("learning_rate", named, step=self.last_step(epoch), epoch=epoch)
                if validates:
                    metrics = validate(self.stop_if_asked)
                    row = {"epoch": epoch, **metrics}
                    keep(epoch, metrics, progress.validation_rows)
                    progress.validation_rows.append(row)
                    self.write(self.run_folder.validation_metrics, progress.validation_rows)
                progress.epoch, progress.step, progress.sums = epoch + 1, 0, {}
                self.state.save()
                if progress.epoch < config.num_epochs:
                    self.stop_if_asked()

    def write(self, file: Path, rows: list[dict[str, Any]]) -> None:
        """Write all rows to the CSV file, and tell the numbers of the last one to the trackers."""
        write_csv(file, rows)
        row = rows[-1]
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        self.trackers.log(file.stem, numbers, step=self.last_step(row["epoch"]), epoch=row["epoch"])

    def last_step(self, epoch: int) -> int:
        """The number of an epoch's last step over the whole run, from 0."""
        return (epoch + 1) * self.steps_per_epoch - 1

    def stop_if_asked(self) -> None:
        """Raise :class:`Interrupted` if any rank was sent a signal. All ranks call it alike."""
        own = torch.tensor(self.received[0] if self.received else 0)
        if signum := int(of_all_ranks(own).max()):
            raise Interrupted(signum)

    def train_epoch(self) -> tuple[list[float], float]:
        """Train the rest of the current epoch, adding to ``progress.sums``.

        Returns each step's seconds, and how many of them in all went by until the batches were there.
        """
        model, progress, config = self.model, self.progress, self.config
        self.before_epoch(progress.epoch, progress.step)
        model.train()
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
        seconds, waited, before = [], 0.0, time.perf_counter()
        for batch in bar:
            waited += time.perf_counter() - before
            batch = {
                key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            self.optimizer.zero_grad(set_to_none=True)
            with self.mixed_precision():
                losses = self.losses(batch)
                weighted = (config.loss_weights.get(name, 1.0) * loss for name, loss in losses.items())
                total = cast(Tensor, sum(weighted))
            values, signum = self.agree(total, losses)
            self.scaler.scale(total).backward()
            if self.cache:
                self.cache.backward()
            self.scaler.unscale_(self.optimizer)
            if progress.epoch < config.alone_epochs:
                for parameter in self.waiting:
                    parameter.grad = None  # which the optimizer passes over: no step, no decay, no moments
            self.after_backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            for name, value in values.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
            progress.step += 1
            shown = {name: f"{progress.sums[name] / progress.step:.3f}" for name in losses}
            bar.set_postfix(shown, refresh=False)
            if signum:
                self.state.save()
                raise Interrupted(signum)
            due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
            if due and progress.step < self.steps_per_epoch:  # the last step's is saved in any case
                self.state.save()
        return seconds, waited

    def agree(self, total: Tensor, losses: dict[str, Tensor]) -> tuple[dict[str, float], int]:
        """What is logged of a step, as means over the ranks, and the signal that any was sent, or 0.

        One transfer from the device and one exchange for all of it, before the backward pass: so that a loss
        that is not finite ends all ranks before it reaches a weight, and all save the state of one step.

        Raises:
            FloatingPointError: a rank's total is not finite.
        """
        logged = {"train_loss": total, **losses, **cast(dict[str, Tensor], self.model.diagnostics)}
        own = [value.detach().float() for value in logged.values()]
        own.append(own[0].new_tensor(float(self.received[0]) if self.received else 0.0))
        rows = of_all_ranks(torch.stack(own)).tolist()
        for number, row in enumerate(rows):
            values = dict(zip([*logged, "signal"], row, strict=True))
            if not math.isfinite(values["train_loss"]):
                raise FloatingPointError(
                    f"the loss is not finite at epoch {self.progress.epoch}, step {self.progress.step} "
                    f"({', '.join(f'{name}={values[name]}' for name in losses)})"
                    f"{f' on rank {number}' if len(rows) > 1 else ''}; "
                    "lower --learning-rate or check the data. Checkpoints saved so far are kept"
                )
        *columns, signals = zip(*rows, strict=True)
        means = {name: sum(column) / len(rows) for name, column in zip(logged, columns, strict=True)}
        return means, int(max(signals))


def in_parallel(module: nn.Module) -> nn.Module:
    """``module``, its gradients averaged over the ranks; without torchrun as it is.

    All that requires a gradient must get one in every step.
    """
    if world_size() == 1:
        return module
    # What is not trained is the same on all ranks, and may lie elsewhere.
    fixed = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    fixed += [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, fixed)
    return DistributedDataParallel(module, gradient_as_bucket_view=True)
