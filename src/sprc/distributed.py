"""Several processes that torchrun started, one a GPU: who is who, what they share, how they end.

Without torchrun there is one rank, 0 of 1, and all of this does nothing. With it the ranks do the same things
in the same order. Whatever they exchange goes through torch.distributed: NCCL for what is on a GPU, gloo for
what is on the CPU.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sprc.errors import EXPECTED, InputError, OutOfResources, explained, print_error
from sprc.processes import objects_of_all_ranks as objects_of_all_ranks
from sprc.processes import rank as rank
from sprc.processes import world_size as world_size

T = TypeVar("T")

LAUNCH = "start with torchrun --nproc-per-node N, or unset WORLD_SIZE to run one process"
# How long a rank that lost the others waits for them to say that they are alive. They look every second.
ROLL_CALL_SECONDS = 5.0


def local_rank() -> int:
    """This process's number on its own machine, which is also its GPU's."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def seed_rank(seed: int, epoch: int) -> None:
    """Seed this rank's random numbers (dropout's) from the run's seed, the epoch and the rank."""
    torch.manual_seed(random.Random(f"{seed} {epoch} {rank()}").getrandbits(63))


def of_all_ranks(value: Tensor) -> Tensor:
    """(...) of each rank, alike in shape, to (ranks, ...) on all of them."""
    if world_size() == 1:
        return value[None]
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.stack(parts)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add up in place what each rank has, so that all have the sum."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def from_main(make: Callable[[], T]) -> T:
    """What ``make()`` gives on rank 0, on all ranks. The others do not call it."""
    found: list[Any] = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def wait_for_all() -> None:
    """Go on when all ranks are here."""
    sum_over_ranks(torch.zeros(()))


@contextmanager
def local_main_first() -> Iterator[None]:
    """Let the first rank of each machine through, then its others: for what is fetched to the disk once."""
    if local_rank():
        wait_for_all()
    yield
    if not local_rank():
        wait_for_all()


@contextmanager
def process_group(timeout: int) -> Iterator[None]:
    """Join the ranks that torchrun started; without torchrun do nothing.

    Within it, ranks above 0 print nothing to stdout. What one of them raises ends them all. An error that a
    user can act on is one line, from the first rank that met it, with the exit code of
    :func:`sprc.errors.run_script`. A rank that is lost (killed, or stuck for ``timeout``) is named by
    another.

    Args:
        timeout: seconds that a rank waits for the others.

    Raises:
        InputError: torchrun's environment is incomplete, or the ranks do not find each other.
    """
    if timeout < 1:
        raise InputError(f"--timeout {timeout} is too small; the least is 1 (second)")
    here, ranks = read_environment()
    if ranks == 1:
        yield
        return
    try:
        calls = connect(here, timeout)
        backend = "cpu:gloo,cuda:nccl" if sees_gpu() else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", calls),
            rank=here,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"rank {here} of {ranks} did not find the others within {timeout} s ({reason}); check "
            "--nnodes, --rdzv-endpoint and the network between the machines (GLOO_SOCKET_IFNAME picks one)"
        ) from error
    calls.set(f"name {here}", f"rank {here} of {ranks} ({socket.gethostname()}, process {os.getpid()})")
    # A connection of its own: the main thread may be waiting in a call.
    ended, answering = Event(), connect(here, timeout, client=True)
    thread = Thread(target=answer_roll_call, args=(answering, here, ended), daemon=True)
    thread.start()
    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere) if here else nullcontext(),
        ):
            yield
    except Exception as error:
        end_all_ranks(calls, error, timeout)
        raise
    finally:
        ended.set()
        thread.join()
    dist.destroy_process_group()


def sees_gpu() -> bool:
    """Whether torch finds a GPU; what it warns of otherwise :mod:`sprc.models.device` says in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def read_environment() -> tuple[int, int]:
    """This process's rank and their number, as torchrun tells them; (0, 1) without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")  # srun sets it, and nothing else does
        if tasks.isdecimal() and int(tasks) > 1:
            raise InputError(
                f"srun started {tasks} tasks of this script, and each would do the whole work by itself; let "
                "srun start torchrun, once a machine (srun --ntasks-per-node 1 torchrun --nproc-per-node N "
                "..., see docs/several_gpus.md), or unset SLURM_STEP_NUM_TASKS if that is meant"
            )
        return 0, 1
    values = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value.isdecimal():
            told = f"is {value!r}, not a number" if value else "is not set"
            raise InputError(f"the environment has WORLD_SIZE, but its {name} {told}; {LAUNCH}")
        values[name] = int(value)
    if not os.environ.get("MASTER_ADDR"):
        raise InputError(f"the environment has WORLD_SIZE, but its MASTER_ADDR is not set; {LAUNCH}")
    if not values["RANK"] < values["WORLD_SIZE"]:
        raise InputError(
            f"the environment has RANK={values['RANK']}, which is not below "
            f"WORLD_SIZE={values['WORLD_SIZE']}; {LAUNCH}"
        )
    return values["RANK"], values["WORLD_SIZE"]


def connect(here: int, timeout: int, *, client: bool = False) -> dist.Store:
    """The notes that all ranks can read and write: torchrun's, or rank 0's where it keeps none."""
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=here == 0 and not kept_by_torchrun and not client,
        timeout=timedelta(seconds=timeout),
    )
    # torchrun --max-restarts starts the processes again and keeps the notes of those before.
    return dist.PrefixStore(f"sprc {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def answer_roll_call(calls: dist.Store, here: int, ended: Event) -> None:
    """A thread's work: say that this process is alive when another rank asks."""
    while not ended.wait(1.0):
        try:
            if calls.check(["roll call"]):
                calls.set(f"alive {here}", "")
                return
        except RuntimeError:  # the machine that keeps the notes is gone
            return


def end_all_ranks(calls: dist.Store, error: Exception, timeout: int) -> None:
    """End this process after ``error``, so that of all ranks one says why; return if it is a bug.

    A bug keeps its traceback. The ranks that only notice that another one is gone end in silence where that
    one, or another, has spoken already.
    """
    error = explained(error)
    if isinstance(error, OutOfResources):
        error = OutOfResources(f"rank {rank()} of {world_size()}: {error}")
    lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
    try:
        if lost and not calls.check(["ending"]):
            error = OSError(call_roll(calls, error, timeout))
        is_first = calls.add("ending", 1) == 1
        if not isinstance(error, EXPECTED) and not lost:
            calls.set("said", "")
            return
        if is_first:
            code = print_error(error)
            calls.set("said", "")
        else:
            # Or torchrun, seeing this process end, would end the one that is about to speak.
            calls.wait(["said"], timedelta(seconds=10))
            code = 2 if isinstance(error, InputError) else 1
    except RuntimeError:
        code = print_error(OSError(f"rank {rank()} lost the machine of rank 0, which leads the others"))
    sys.stderr.flush()
    sys.exit(code)


def call_roll(calls: dist.Store, error: Exception, timeout: int) -> str:
    """Which ranks are gone, for this one to say: those that do not answer, or else those that are stuck."""
    calls.set(f"lost {rank()}", "")
    calls.set("roll call", "")
    time.sleep(ROLL_CALL_SECONDS)
    ranks = range(world_size())
    gone = [r for r in ranks if not calls.check([f"alive {r}"]) and not calls.check([f"lost {r}"])]
    stuck = [r for r in ranks if not calls.check([f"lost {r}"])]
    names = ", ".join(calls.get(f"name {r}").decode() for r in gone or stuck)
    if gone:
        return f"{names} has died or was stopped, so the run ends; what was saved stays"
    if stuck:
        return f"{names} did not come within --timeout {timeout} seconds; look at what it does, or allow more"
    return f"the ranks lost each other ({str(error).splitlines()[0]}); check the network between them"
