"""How time and peak memory are measured, and the rows that come of it.

Two sides of a row are timed in turns in one process, A, B, A, B, so that whatever slows the machine slows
both. A ratio is taken within each turn; a row gives the ratios' median and their least and largest. There are
turns until the ratios are steady, and a row whose ratios never were says so.
"""

import ctypes
import ctypes.util
import gc
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
NOT_MEASURED = "not measured"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
FEWEST_TURNS = 3
STEADY = 0.15  # the width of the middle half of the ratios, as a share of their median

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the scripts do

# New processes are forked from one that has imported libraries and done nothing else.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "transformers.models.bert.tokenization_bert"])


class Settings(NamedTuple):
    """What a benchmark is asked for."""

    device: str  # "cpu" or "cuda"
    repeats: int  # turns at most
    quick: bool  # small shapes, whose figures say nothing
    seconds: float = math.inf  # after which no further turn begins


class Row(NamedTuple):
    """A row of the table, in words."""

    name: str
    wanted: str  # empty where nothing was asked for
    value: str
    detail: str = ""
    reached: bool | None = None

    @property
    def cell(self) -> str:
        """What the row's column of this machine says."""
        verdict = {True: "reached", False: "**not reached**", None: ""}[self.reached]
        return "; ".join(part for part in (self.value, self.detail, verdict) if part)


class Memory(NamedTuple):
    """Peak memory of a piece of work, in bytes."""

    extra: int  # above what was there before it
    whole: int  # of the whole process; on a GPU, of all tensors


def not_measured(name: str, wanted: str, reason: str) -> Row:
    """The row of something that cannot be measured here, and why."""
    return Row(name, wanted, NOT_MEASURED, reason)


def synchronise(device: str) -> None:
    """Wait for the GPU, so that the clock sees its work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def side_by_side(
    sides: dict[str, Callable[[], object]], settings: Settings, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Time each side once a turn, after a warm-up, in seconds.

    There are :func:`turns` until all sides are steady against the first.

    Args:
        sides: name to work.
        settings: device, turns at most and time.
        before: what is done before each side and not timed.
    """
    for work in sides.values():
        for _ in range(3 if settings.device == "cuda" else 1):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for _ in turns(settings, lambda: all_steady(seconds)):
            for name, work in sides.items():
                if before is not None:
                    before()
                synchronise(settings.device)
                start = time.perf_counter()
                work()
                synchronise(settings.device)
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def turns(settings: Settings, steady: Callable[[], bool]) -> Iterator[int]:
    """The numbers of the turns: three at least, and more until they are ``steady``.

    They end where the most turns, or the time, are used up. Only where the time is short there are fewer than
    three, but always one.
    """
    end = time.perf_counter() + settings.seconds
    for turn in range(settings.repeats):
        if turn and (time.perf_counter() > end or (turn >= FEWEST_TURNS and steady())):
            return
        yield turn


def all_steady(seconds: dict[str, list[float]]) -> bool:
    """Whether each side's time is steady against the first side's, or that of an only side by itself."""
    first, *others = seconds.values()
    if not others:
        return not is_noisy(first)
    return not any(is_noisy([a / b for a, b in zip(side, first, strict=True)]) for side in others)


def is_noisy(values: list[float]) -> bool:
    """Whether the middle half of the values is wide; what one slow turn does not change."""
    if len(values) < 2:
        return True
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low >= STEADY * median(values)


def keep_compiled(environment: dict[str, str], folder: Path) -> None:
    """Have Python's processes find their sources compiled, in ``folder``, from the second one on.

    So it is for users. Where an ``environment`` forbids it (PYTHONDONTWRITEBYTECODE), importing torch takes
    nearly twice as long.
    """
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(folder)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` in a new Python process and return what it returns.

    Raises :class:`MemoryError` if the process is killed, as the system does when memory runs out.
    """
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError("the process was killed") from error


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any, device: str) -> Memory:
    """Peak memory of the work that ``prepare(*arguments)`` returns, in a process of its own, when warm.

    On a CPU it is the process's peak resident memory, less what was resident before; on a GPU the peak of
    torch's allocations, less what was allocated before.
    """
    return in_fresh_process(_peak_of, prepare, arguments, device)


def _peak_of(prepare: Callable[..., Callable[[], object]], arguments: tuple, device: str) -> Memory:
    # Freed blocks go back to the system at once, so that the peak is what was in use. It costs time, so time
    # is measured elsewhere.
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    work = prepare(*arguments)
    work()  # libraries load, and keep buffers, at the first call
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        libc.malloc_trim(0)
        # A peak of its own: ru_maxrss cannot be reset, and a child inherits its parent's.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        work()
        peak = _resident("VmHWM")
    return Memory(peak - before, peak)


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1])


def require_memory(gigabytes: float) -> None:
    """Raise :class:`MemoryError` where less is free; better than to be killed halfway."""
    if MEMINFO.exists():
        available = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())[1]) / 1e9
        if available < gigabytes:
            raise MemoryError(f"needs {gigabytes:.0f} GB of memory, {available:.1f} GB are free")


def machine(device: str) -> str:
    """The machine's name and software, for the head of a column."""
    import torch

    cores = f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'CPU'}, {cores}, torch {torch.__version__}"


# --- rows


def ratio_row(
    name: str,
    wanted: str,
    above: list[float],
    below: list[float],
    *,
    least: float | None = None,
    most: float | None = None,
) -> Row:
    """``above / below``, turn by turn, in seconds; reached if at least, or at most, what is wanted."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    value = spread(ratios, "{:.2f}".format, " x")
    detail = f"{in_seconds(median(above))} against {in_seconds(median(below))}"
    return Row(name, wanted, value, detail, within(median(ratios), least, most))


def memory_row(name: str, wanted: str, ours: Memory, theirs: Memory, most: float | None = None) -> Row:
    """Our peak as a share of theirs, both above what was there before."""
    share = ours.extra / max(theirs.extra, 1)  # a small one may fit into what was resident
    detail = f"{in_bytes(ours.extra)} against {in_bytes(theirs.extra)}"
    return Row(name, wanted, f"{share:.2f} x", detail, within(share, None, most))


def within(value: float, least: float | None, most: float | None) -> bool | None:
    """Whether ``value`` is what was wanted; None if nothing was."""
    if least is None and most is None:
        return None
    return (least is None or value >= least) and (most is None or value <= most)


def spread(
    values: list[float],
    write: Callable[[float], str],
    unit: str = "",
    ratios: list[float] | None = None,
) -> str:
    """Median, least and largest, the number of turns, and whether ``ratios``, or the values, were noisy."""
    if len(values) == 1:
        return f"{write(values[0])}{unit} (1 turn)"
    count = f"{len(values)} turns{', noisy' if is_noisy(values if ratios is None else ratios) else ''}"
    return f"{write(median(values))}{unit} ({write(min(values))} to {write(max(values))}, {count})"


def in_seconds(value: float) -> str:
    """Seconds, or milliseconds where they are few."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def in_bytes(value: float) -> str:
    """Megabytes, or gigabytes where they are many."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
