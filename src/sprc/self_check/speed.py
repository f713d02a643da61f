"""How fast and how large: training steps, the vision transformer, reading pictures; and the flags that fit."""

import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from sprc.data.datasets import ImageDataset, image_loader, leave_signals_to_parent
from sprc.data.transforms import make_transform
from sprc.errors import ran_out_of_memory
from sprc.grad_cache import Embedder, GradCache
from sprc.self_check.report import FAIL, NOTE, OK, Line
from sprc.self_check.setting import LOSS_WEIGHTS, Samples, Setting, fill_vit, make_pictures, pixels
from sprc.training import make_optimizer

VOCABULARY = 30_523  # the published one
WARM_UP, TIMED = 3, 5  # steps
LOADER_SECONDS = 1.5
PICTURES = 64
SPARE = 0.92  # of a card's memory: what torch's allocator cannot use goes beside it
OTHER_FLAGS = "--dataset CIRR --backbone pretrain"


class Cost(NamedTuple):
    """What a step takes."""

    batch: int
    seconds: float
    bytes: int  # the most that was allocated; 0 where the device does not tell


def check_speed(setting: Setting) -> Iterator[Line]:
    """Time and memory of a step with each source and fusion; images a second; what to give on the command line."""
    costs: dict[tuple[str, bool], Cost] = {}
    vit_rate = 0.0
    for fusion in (True, False):
        model = speed_model(setting, fusion)
        for source in ("pixels", "cache"):
            name = f"speed, {source}, fusion {'on' if fusion else 'off'}"
            cost, lost = largest_that_fits(setting, model, source)
            if cost is None:
                yield Line(FAIL, name, "not even a batch of 1 fits into memory", "see machine, memory")
                continue
            costs[source, fusion] = cost
            figures = f"batch {cost.batch}: {1000 * cost.seconds:.0f} ms a step, {in_gigabytes(cost.bytes)}"
            if lost:
                remedy = f"give --grad-cache {cost.batch} with larger batches, or --feature-cache DIR"
                yield Line(NOTE, name, f"{figures}; memory ran out at {lost}", remedy)
            else:
                yield Line(OK, name, figures)
        if fusion:
            vit_rate = images_a_second(setting, model)
            yield Line(OK, "speed, ViT", f"{vit_rate:.0f} images a second in batches of {setting.shapes.large_batch}")
        del model
        setting.free()
    rates = yield from loader_rates(setting)
    yield from advice(setting, costs, rates)


def speed_model(setting: Setting, fusion: bool) -> nn.Module:
    """All layers, the published vocabulary, the whole vision transformer; on the device."""
    words = VOCABULARY if setting.shapes.large_batch == 64 else 300
    model = setting.model(layers=setting.shapes.all_layers, words=words, use_gated_fusion=fusion)
    depth = setting.shapes.vit["vit_depth"] if setting.on_gpu else 1
    fill_vit(model, depth)
    return setting.placed(model)


def largest_that_fits(setting: Setting, model: nn.Module, source: str) -> tuple[Cost | None, int]:
    """The cost at the largest batch that fits, halved from the published one, and the size that did not, or 0."""
    batch, lost = setting.shapes.large_batch, 0
    while batch:
        try:
            return cost_of(setting, model, source, batch), lost
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        model.zero_grad(set_to_none=True)
        setting.free()
        batch, lost = batch // 2, batch
    return None, lost


def cost_of(setting: Setting, model: nn.Module, source: str, batch: int, chunk: int = 0) -> Cost:
    """Time and peak memory of training steps at this batch."""
    samples = setting.samples(model.config, batch)
    if source == "pixels":
        samples |= {name: pixels(model.config, batch, seed) for seed, name in enumerate(("image", "target"))}
    samples = setting.on_device(samples)
    optimizer = make_optimizer(model, 1e-9)
    step = step_of(setting, model, optimizer, samples, chunk)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    timed = TIMED if setting.on_gpu else 1
    for _ in range(WARM_UP if setting.on_gpu else 1):
        step()
    setting.synchronise()
    start = time.perf_counter()
    for _ in range(timed):
        step()
    setting.synchronise()
    seconds = (time.perf_counter() - start) / timed
    peak = torch.cuda.max_memory_allocated(setting.device) if setting.on_gpu else 0
    return Cost(batch, seconds, peak if peak > 2**20 else 0)


def step_of(
    setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, chunk: int
) -> Callable[[], None]:
    """A training step in the precision of --amp auto, in chunks where ``chunk`` is not 0."""

    def autocast() -> torch.autocast:
        return setting.autocast("auto")

    cache = GradCache(model, Embedder(model), chunk, autocast) if chunk else None

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            losses = cache.losses(samples) if cache else model(samples)
            total = sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items())
        total.backward()
        if cache:
            cache.backward()
        optimizer.step()

    return step


@torch.no_grad()
def images_a_second(setting: Setting, model: nn.Module) -> float:
    """Of the vision transformer."""
    images = pixels(model.config, setting.shapes.large_batch).to(setting.device)
    times = 3 if setting.on_gpu else 1
    model.vit_tokens(images)
    setting.synchronise()
    start = time.perf_counter()
    for _ in range(times):
        model.vit_tokens(images)
    setting.synchronise()
    return times * len(images) / (time.perf_counter() - start)


def loader_rates(setting: Setting) -> Iterator[Line]:
    """Images a second that 1, 2, 4, ... workers read, as one line; the rates are returned."""
    paths = make_pictures(setting.folder / "pictures", PICTURES, setting.shapes.picture)
    load = image_loader(make_transform("targetpad", setting.model().config.image_size))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [2**power for power in range(7) if 2**power < cores] + [cores]
    files = {str(number): path for number, path in enumerate(islice(cycle(paths), 100_000))}
    rates: dict[int, float] = {}
    for workers in counts:
        loader = DataLoader(
            ImageDataset(list(files), files, load),
            16,
            num_workers=workers,
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_parent,
        )
        batches = iter(loader)
        for _ in range(3 * workers):  # what is read ahead while the workers start
            next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < LOADER_SECONDS:
            count += len(next(batches)[0])
        rates[workers] = count / (time.perf_counter() - start)
        del batches
    size = "{} x {}".format(*setting.shapes.picture)
    told = ", ".join(f"{workers}: {rate:.0f}" for workers, rate in rates.items())
    yield Line(OK, "speed, reading pictures", f"images a second of {size} by number of workers: {told}")
    return rates


def advice(
    setting: Setting, costs: dict[tuple[str, bool], Cost], rates: dict[int, float]
) -> Iterator[Line]:
    """Command lines that fit the card, from pixels and from a cache; fusion on, which is the larger."""
    if setting.shapes.large_batch != 64:
        yield Line(NOTE, "advice", f"none: {setting.shapes.told}")
        return
    for source, more in (("pixels", ""), ("cache", " --feature-cache features")):
        cost = costs.get((source, True))
        if cost is None:
            continue
        chunk = f" --grad-cache {cost.batch}" if cost.batch < 64 else ""
        needed = 2 * cost.batch / cost.seconds if source == "pixels" else 0
        enough = [workers for workers, rate in rates.items() if rate >= needed]
        workers = min(enough, default=max(rates)) if source == "pixels" else min(4, max(rates))
        figures = f"{OTHER_FLAGS} --batch-size 64{chunk} --num-workers {workers}{more}"
        told = largest_batch(setting, cost)
        if source == "pixels":
            told += f"; a step reads {needed:.0f} images a second"
            told += "" if enough else f", {max(rates.values()):.0f} can be read: the GPU will wait, use a cache"
        yield Line(NOTE, f"advice, {source}", f"{figures} ({told})")


def largest_batch(setting: Setting, cost: Cost) -> str:
    """The largest power of two that fits without gradient caching, from what a triplet takes."""
    if not cost.bytes:
        return "this device does not tell its memory"
    total = SPARE * torch.cuda.get_device_properties(setting.device).total_memory
    # All but what each triplet takes: float16 ViT-g, and 16 bytes for each trained parameter.
    fixed = 2.0e9 + 16 * 2.0e8
    batch = cost.batch
    while fixed + (cost.bytes - fixed) * 2 * batch / cost.batch < total:
        batch *= 2
    return f"up to {batch} fit" if cost.batch == 64 else f"{cost.batch} fit at once"


def in_gigabytes(size: int) -> str:
    """Of memory."""
    return f"{size / 1e9:.1f} GB at most" if size else "its memory is not told"
