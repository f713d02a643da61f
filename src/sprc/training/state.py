"""Where a run is, on the disk: what its next step depends on is saved together, atomically.

Weights, optimizer, schedule, scaler, random states, the place in the data's order, the CSV files' rows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sprc.distributed import from_main, of_all_ranks, rank, seed_rank, wait_for_all, world_size
from sprc.errors import InputError
from sprc.files import write_atomically
from sprc.run_folder import RunFolder


@dataclass
class Progress:
    """Where a run is, and what it has written so far."""

    epoch: int = 0
    step: int = 0  # batches of this epoch that are trained
    sums: dict[str, float] = field(default_factory=dict)  # over those batches, of what is logged
    train_rows: list[dict[str, float]] = field(default_factory=list)
    validation_rows: list[dict[str, Any]] = field(default_factory=list)
    time_rows: list[dict[str, float]] = field(default_factory=list)


class RunState:
    """All that the next step of a run depends on, and its file.

    Args:
        run_folder: whose state it is.
        model: on its device.
        optimizer: of its parameters.
        schedule: of the optimizer's rates.
        scaler: of the gradients.
        seed: the run's.
        steps_per_epoch: batches of an epoch.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        scaler: torch.amp.GradScaler,
        *,
        seed: int,
        steps_per_epoch: int,
    ) -> None:
        self.run_folder, self.model = run_folder, model
        self.device = cast(torch.device, model.device)
        self.optimizer, self.schedule, self.scaler = optimizer, schedule, scaler
        self.seed, self.steps_per_epoch = seed, steps_per_epoch
        self.progress = Progress()
        self.saved_step = 0  # of the state that is on the disk

    def is_within_epoch(self, step: int) -> bool:
        """Whether an epoch has steps both before and after ``step``."""
        return 0 < step < self.steps_per_epoch

    def save(self) -> None:
        """Write all that the next step depends on. Frozen weights are not part of it.

        All ranks call it at the same step, and go on when rank 0 has written.
        """
        device, step = self.device, self.progress.step
        weights = self.model.state_dict()
        state = {
            "model": {name: value for name, value in weights.items() if self._is_trained(name)},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": of_all_ranks(torch.get_rng_state()),  # a row a rank
            "random_cuda": of_all_ranks(torch.cuda.get_rng_state(device)) if device.type == "cuda" else [],
            "progress": vars(self.progress),
        }
        if rank() == 0:
            within = self.is_within_epoch(step)
            if within and not self.saved_step and self.run_folder.state.exists():
                self.run_folder.state.replace(self.run_folder.epoch_state)
            write_atomically(self.run_folder.state, lambda file: torch.save(state, file))
            if not within:
                self.run_folder.epoch_state.unlink(missing_ok=True)
        self.saved_step = step
        wait_for_all()

    def load(self) -> str:
        """Go on from :meth:`save`, if there is a state yet.

        Where another number of ranks saved it, the epoch begins again; what is returned says so, and is else
        empty.

        Raises:
            InputError: the epoch's beginning is not there, or a rank does not see the file, or it is broken.
        """
        has_state, has_beginning = from_main(
            lambda: (self.run_folder.state.exists(), self.run_folder.epoch_state.exists())
        )
        if not has_state and not has_beginning:
            return ""
        state = read_state(self.run_folder.state if has_state else self.run_folder.epoch_state)
        random = torch.atleast_2d(state["random"])  # an earlier version saved one row
        same_ranks = len(random) == world_size()
        note = "" if same_ranks else f"; {len(random)} ranks saved it and {world_size()} go on"
        epoch, step = state["progress"]["epoch"], state["progress"]["step"]
        if not same_ranks and self.is_within_epoch(step):
            note += f", so epoch {epoch} begins again and its {step} steps are dropped"
            if has_beginning:
                state = read_state(self.run_folder.epoch_state)
            if not has_beginning or state["progress"]["epoch"] != epoch:
                if epoch:
                    raise InputError(
                        f"{self.run_folder.state} was saved within epoch {epoch} by {len(random)} ranks, and "
                        f"{self.run_folder.epoch_state.name} of the epoch's beginning is missing; resume "
                        f"with {len(random)} ranks"
                    )
                seed_rank(self.seed, epoch)
                self.saved_step = step
                return note  # the first epoch begins with the model as it is
        own = self.model.state_dict()
        frozen = {name: value for name, value in own.items() if not self._is_trained(name)}
        self.model.load_state_dict(frozen | state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.scaler.is_enabled():  # --amp auto may differ on another GPU
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.saved_step = step
        if same_ranks:
            torch.set_rng_state(random[rank()].clone())  # torch crashes on a view that starts further in
            if len(state["random_cuda"]) and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random_cuda"][rank()].clone(), self.device)
        else:
            seed_rank(self.seed, self.progress.epoch)
        return note

    def _is_trained(self, name: str) -> bool:
        try:
            return self.model.get_parameter(name).requires_grad
        except AttributeError:  # a buffer
            return True


def read_state(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The state in ``path``, on the CPU; ``mapped`` reads of its tensors only what is looked at.

    Raises :class:`InputError` where this rank does not see the file, or it is broken.
    """
    if not path.exists():
        raise InputError(
            f"rank {rank()} does not see {path}, and rank 0 does; put the run folder on a disk that all "
            "machines share"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # A broken file comes out of the unpickler as almost any exception.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read: it is cut short or damaged; restore it from a copy, or delete it to "
            "begin the run again"
        ) from error


def saved_progress(run_folder: RunFolder) -> Progress | None:
    """Where the run in ``run_folder`` was saved; None before its first state."""
    for file in (run_folder.state, run_folder.epoch_state):
        if file.exists():
            return Progress(**read_state(file, mapped=True)["progress"])
    return None
