"""Speed and memory of training steps, the vision transformer, reading pictures; and the flags that fit."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from sprc.data.datasets import ImageDataset, SteadyLoader
from sprc.data.images import image_loader
from sprc.data.transforms import make_transform
from sprc.errors import ran_out_of_memory
from sprc.models.device import own_cores, place
from sprc.self_check.report import FAIL, NOTE, OK, Line
from sprc.self_check.setting import Model, Samples, Setting, fill_vit, make_pictures, pixels, weighted
from sprc.training.grad_cache import Embedder, GradCache
from sprc.training.loop import make_optimizer

BATCH = 64  # the documented one; flags are advised where it is what was measured
VOCABULARY = 30_523  # the published one
WARM_UP, TIMED = 3, 5  # steps
LOADER_SECONDS = 1.5
PICTURES = 64
SPARE = 0.92  # of a card's memory: some is lost between torch's blocks
SOURCES = {"pixels": "", "cache": " --feature-cache features"}


class Cost(NamedTuple):
    """What a step takes."""

    batch: int
    seconds: float
    bytes: int  # the most that was allocated; 0 where the device does not tell

    def __str__(self) -> str:
        memory = f"{self.bytes / 1e9:.1f} GB at most" if self.bytes else "its memory is not told"
        return f"batch {self.batch}: {1000 * self.seconds:.0f} ms a step, {memory}"


def check_speed(setting: Setting) -> Iterator[Line]:
    """Time and memory of steps, images a second of the vision transformer and of reading; flags that fit."""
    advice: dict[str, tuple[Cost, str]] = {}
    for fusion in (True, False):
        model = speed_model(setting, fusion)
        if fusion:
            rate = images_a_second(setting, model)
            figures = f"{rate:.0f} images a second in batches of {setting.shapes.large_batch}"
            yield Line(OK, "speed, ViT", figures)
        for source in SOURCES:
            name = f"speed, {source}, fusion {'on' if fusion else 'off'}"
            cost, lost = largest_that_fits(setting, model, source)
            if cost is None:
                remedy = "end what else uses the card (nvidia-smi), or take a larger one"
                yield Line(FAIL, name, "not even a batch of 1 fits into memory", remedy)
                continue
            if not lost:
                yield Line(OK, name, str(cost))
            else:
                yield Line(NOTE, name, f"{cost}; memory ran out at {lost}", f"give --grad-cache {cost.batch}")
            if fusion and setting.shapes.large_batch == BATCH:
                advice[source] = cost, room_of(setting, model, source, cost)
        del model
        setting.free()
    rates = yield from loader_rates(setting)
    if not advice:
        yield Line(NOTE, "advice", f"none, for it is not measured at the true shapes: {setting.shapes.told}")
    for source, (cost, room) in advice.items():
        yield advised(source, cost, room, rates)


def speed_model(setting: Setting, fusion: bool) -> Model:
    """On the device: all layers and, on a GPU, the published vocabulary and the whole vision transformer."""
    words = {"words": VOCABULARY} if setting.shapes.large_batch == BATCH else {}
    model = setting.model(layers=setting.shapes.all_layers, use_gated_fusion=fusion, **words)
    if setting.on_gpu:
        fill_vit(model, setting.shapes.vit["vit_depth"])
    return place(model, setting.device)


def largest_that_fits(setting: Setting, model: Model, source: str) -> tuple[Cost | None, int]:
    """The cost at the largest batch that fits, halved from the first, and the size that did not fit, or 0."""
    batch, lost = setting.shapes.large_batch, 0
    while batch:
        try:
            return cost_of(setting, model, source, batch), lost
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Here the error is gone, and with it the tensors that its traceback held.
        model.zero_grad(set_to_none=True)
        setting.free()
        batch, lost = batch // 2, batch
    return None, lost


def cost_of(setting: Setting, model: Model, source: str, batch: int, chunk: int = 0) -> Cost:
    """Time and peak memory of training steps; in chunks where ``chunk`` is not 0."""
    step = step_of(setting, model, source, batch, chunk)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    for _ in range(WARM_UP if setting.on_gpu else 1):
        step()
    seconds = seconds_of(setting, step, TIMED if setting.on_gpu else 1)
    peak = torch.cuda.max_memory_allocated(setting.device) if setting.on_gpu else 0
    # The optimizer's moments and the gradients go with what made them.
    model.zero_grad(set_to_none=True)
    return Cost(batch, seconds, peak if peak > 2**20 else 0)


def step_of(setting: Setting, model: Model, source: str, batch: int, chunk: int) -> Callable[[], None]:
    """A training step in the precision of --amp auto."""
    samples = setting.samples(model.config, batch)
    if source == "pixels":
        samples |= {name: pixels(model.config, batch, seed) for seed, name in enumerate(("image", "target"))}
    samples = setting.on_device(samples)
    optimizer = make_optimizer(model, 1e-9)
    cache = GradCache(model, Embedder(model), chunk, lambda: setting.autocast("auto")) if chunk else None

    return lambda: take_step(model, optimizer, samples, cache, lambda: setting.autocast("auto"))


def take_step(
    model: Model,
    optimizer: Optimizer,
    samples: Samples,
    cache: GradCache | None,
    mixed_precision: Callable[[], AbstractContextManager],
) -> None:
    """What ``Trainer.train_epoch`` computes in a step, and no more: to be timed, or its memory added up."""
    optimizer.zero_grad(set_to_none=True)
    with mixed_precision():
        losses = cache.losses(samples) if cache else model(samples)
        total = weighted(losses)
    total.backward()
    if cache:
        cache.backward()
    optimizer.step()


def seconds_of(setting: Setting, work: Callable[[], object], times: int) -> float:
    """Of one of ``times`` calls, the GPU's work included."""
    setting.synchronise()
    start = time.perf_counter()
    for _ in range(times):
        work()
    setting.synchronise()
    return (time.perf_counter() - start) / times


@torch.no_grad()
def images_a_second(setting: Setting, model: Model) -> float:
    """Of the vision transformer."""
    images = pixels(model.config, setting.shapes.large_batch).to(setting.device)
    model.vit_tokens(images)
    seconds = seconds_of(setting, lambda: model.vit_tokens(images), 3 if setting.on_gpu else 1)
    return len(images) / seconds


def loader_rates(setting: Setting) -> Generator[Line, None, dict[int, float]]:
    """Images a second that 1, 2, 4, ... workers read and preprocess: one line, and the rates."""
    paths = make_pictures(setting.folder / "pictures", PICTURES, setting.shapes.picture)
    load = image_loader(make_transform("targetpad", setting.model().config.image_size))
    files = {str(number): path for number, path in enumerate(islice(cycle(paths), 100_000))}
    counts = [2**power for power in range(7) if 2**power < own_cores()] + [own_cores()]
    rates: dict[int, float] = {}
    for workers in counts:
        images = ImageDataset(list(files), files, load)
        loader = SteadyLoader(images, 16, num_workers=workers, generator=torch.Generator())
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
    yield Line(OK, "speed, reading pictures", f"images a second of {size}, by number of workers: {told}")
    return rates


def room_of(setting: Setting, model: Model, source: str, cost: Cost) -> str:
    """What else fits: larger batches, from what half of this takes; or, in chunks, the one that does not."""
    if cost.batch < BATCH:
        return f"in chunks of {cost.batch}: {cost_of(setting, model, source, BATCH, cost.batch)}"
    half = cost_of(setting, model, source, cost.batch // 2)
    if not cost.bytes or cost.bytes <= half.bytes:
        return "this device does not tell its memory"
    each = (cost.bytes - half.bytes) / (cost.batch - half.batch)
    total = SPARE * torch.cuda.get_device_properties(setting.device).total_memory
    batch = cost.batch
    while cost.bytes + (2 * batch - cost.batch) * each < total:
        batch *= 2
    return f"{each / 1e6:.0f} MB a triplet; up to --batch-size {batch} fits without --grad-cache"


def advised(source: str, cost: Cost, room: str, rates: dict[int, float]) -> Line:
    """A command line that fits the card."""
    chunk = f" --grad-cache {cost.batch}" if cost.batch < BATCH else ""
    if source == "pixels":
        needed = 2 * cost.batch / cost.seconds  # a reference and a target each
        enough = [workers for workers, rate in rates.items() if rate >= needed]
        workers = min(enough, default=max(rates))
        room += f"; steps take {needed:.0f} images a second"
        if not enough:
            room += f", {max(rates.values()):.0f} can be read: the GPU will wait, a feature cache is faster"
    else:
        workers = min(4, max(rates))  # a record is a copy, no picture to decode
    flags = f"--batch-size {BATCH}{chunk} --num-workers {workers}{SOURCES[source]}"
    command = f"python src/blip_fine_tune_2.py --dataset CIRR --backbone pretrain {flags}"
    return Line(NOTE, f"advice, {source}", f"{command} ({room})")
