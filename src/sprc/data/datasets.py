"""Triplets and images as a ``DataLoader`` takes them, and the loader whose processes no signal ends."""

import os
import random
import signal
from collections.abc import Sequence
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sprc.data.captions import process_caption
from sprc.data.images import Loader
from sprc.data.split import Triplet
from sprc.distributed import rank, world_size


class TripletDataset(Dataset):
    """Triplets as the model takes them.

    An item is ``{"image": reference, "target": target, "text_input": str}``: the two as ``load`` gives them,
    (3, S, S) pixels or (N, D) tokens, the caption as :func:`process_caption` leaves it. The default collate
    makes ``text_input`` a list of B strings.
    Of a triplet's ``training_captions`` each is as likely; which one it is depends on ``seed``, the epoch and
    the index alone, not on the worker or on what was read before.

    Behind the triplets come some of ``extra``: ``extra_weight`` times their number, each epoch the next ones
    in an order drawn by ``seed``, over and over. So an extra triplet is trained on ``extra_weight`` times for
    each time that one of ``triplets`` is, and what weighs little takes little time.
    Raises :class:`InputError` for an image that cannot be read.
    """

    def __init__(
        self,
        triplets: list[Triplet],
        image_paths: dict[str, Path],
        load: Loader,
        seed: int = 0,
        extra: Sequence[Triplet] = (),
        extra_weight: float | None = None,
    ) -> None:
        if any(triplet.target is None for triplet in triplets):
            raise ValueError("triplets without a target cannot be trained on; use ImageDataset to score them")
        self.own = len(triplets)
        self.triplets = [*triplets, *random.Random(f"{seed} extra").sample(list(extra), len(extra))]
        self.extra_per_epoch = per_epoch(len(extra), extra_weight)
        self.image_paths = image_paths
        self.load = load
        self.seed = seed
        # Persistent workers keep the copy of this object that they were started with: only memory that all
        # processes share can tell them of a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw the texts of ``epoch`` from now on. Call it before the epoch's iteration starts."""
        self._epoch.fill_(epoch)

    def number(self, index: int) -> int:
        """Which of ``triplets`` item ``index`` is in the present epoch."""
        if index < self.own:
            return index
        place = int(self._epoch.item()) * self.extra_per_epoch + index - self.own
        return self.own + place % (len(self.triplets) - self.own)

    def text(self, index: int) -> str:
        """The text of item ``index`` in the present epoch, raw."""
        triplet = self.triplets[self.number(index)]
        if not triplet.training_captions:
            return triplet.caption
        return random.Random(f"{self.seed} {self._epoch.item()} {index}").choice(triplet.training_captions)

    def __len__(self) -> int:
        return self.own + self.extra_per_epoch

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        triplet = self.triplets[self.number(index)]
        return {
            "image": self.load(self.image_paths[triplet.reference]),
            "target": self.load(self.image_paths[cast(str, triplet.target)]),
            "text_input": process_caption(self.text(index)),
        }


def per_epoch(count: int, weight: float | None) -> int:
    """How many of ``count`` extra triplets of this weight an epoch has; None is 1."""
    return count if weight is None else round(weight * count)


class ImageDataset(Dataset):
    """Images in the order of ``names``, a gallery for one.

    An item is ``(index, image)``, the image as ``load`` gives it.
    Raises :class:`InputError` for an image that cannot be read.
    """

    def __init__(self, names: list[str], image_paths: dict[str, Path], load: Loader) -> None:
        self.names = names
        self.image_paths = image_paths
        self.load = load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.load(self.image_paths[self.names[index]])


def batches_of_rank(length: int, batch_size: int) -> list[range]:
    """Which of ``length`` items this rank takes: every batch of them that is its turn.

    Whole batches, so that the tensors are those of a single process, and so is their rounding.
    """
    starts = range(rank() * batch_size, length, world_size() * batch_size)
    return [range(start, min(start + batch_size, length)) for start in starts]


class SteadyLoader(DataLoader):
    """A ``DataLoader`` whose processes no signal ends, see :func:`leave_signals_to_parent`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "worker_init_fn": leave_signals_to_parent})

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        # What comes while the processes start is for this one, which gets it afterwards.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """For a process that reads images: a signal ends it only where the one it reads for sends it.

    A terminal, torchrun and Slurm send SIGINT, SIGHUP and SIGTERM to all processes of a run. Were the readers
    gone at once, there would be no step to stop after.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # a handler would not know who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()  # for the system it may be a fork server, which sends nothing
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
