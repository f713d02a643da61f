"""Which of several processes this one is, the cores it may use, the signals that ask it to stop.

It does without torch: what only starts processes, the ablation, or only reads files need not import it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

# What asks a run to stop. A closed ssh session sends SIGHUP, which Windows does not have.
SIGHUP = getattr(signal, "SIGHUP", None)
STOP_SIGNALS = tuple(signum for signum in (signal.SIGINT, signal.SIGTERM, SIGHUP) if signum is not None)


def rank() -> int:
    """This process's number, from 0. Rank 0 alone prints and writes files."""
    dist = sys.modules.get("torch.distributed")  # a process that joined the ranks has imported it
    return dist.get_rank() if dist is not None and dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    dist = sys.modules.get("torch.distributed")
    return dist.get_world_size() if dist is not None and dist.is_initialized() else 1


def objects_of_all_ranks(value: T) -> list[T]:
    """What each rank has, in their order, on all of them."""
    found: list[T] = [value] * world_size()
    if world_size() > 1:
        sys.modules["torch.distributed"].all_gather_object(found, value)
    return found


def own_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it :data:`STOP_SIGNALS` only fill the list; a second SIGINT or SIGTERM acts at once, as usual.

    Of several ranks each may be sent the same one twice, by torchrun and by Slurm. There torchrun itself
    kills what has not ended half a minute after a signal. SIGHUP comes twice where a session is closed, from
    the shell and from the kernel; under nohup it is ignored, and stays so.
    """
    received: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    if SIGHUP is not None and before[SIGHUP] is signal.SIG_IGN:
        del before[SIGHUP]

    def note(signum: int, _frame: object) -> None:
        received.append(signum)
        if world_size() == 1 and signum != SIGHUP:
            signal.signal(signum, before[signum])

    for signum in before:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
