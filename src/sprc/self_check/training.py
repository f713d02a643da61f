"""Training through the trainer itself: steps, gradient caching, a stop and a resume, waits for the GPU."""

import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sprc.errors import Interrupted
from sprc.self_check.numerics import BECAUSE, BOUND, OTHER_WHEEL
from sprc.self_check.report import FAIL, OK, SKIP, Line, bounded
from sprc.self_check.setting import (
    LOSS_WEIGHTS,
    MadeTriplets,
    Model,
    Samples,
    Setting,
    distance,
    take_gradients,
    weighted,
)
from sprc.training.grad_cache import Embedder, GradCache
from sprc.training.loop import Trainer, TrainingConfig

PRECISIONS = ("off", "bf16", "fp16")
STEPS = 5
LEARNING_RATE = 1e-4
NO_DROPOUT: dict[str, Any] = {"dropout": 0.0, "fusion_dropout": 0.0}


def make_trainer(
    setting: Setting, model: Model, folder: str, amp: str = "off", *, epochs: int = 1, steps: int = STEPS
) -> Trainer:
    """A trainer of ``steps`` steps an epoch, with nothing read from the disk."""
    batch = setting.shapes.batch
    config = TrainingConfig(
        num_epochs=epochs,
        batch_size=batch,
        learning_rate=LEARNING_RATE,
        loss_weights=LOSS_WEIGHTS,
        num_workers=0,
        amp=amp,
    )
    run_folder = setting.folder / folder
    (run_folder / "saved_models").mkdir(parents=True, exist_ok=True)
    return Trainer(model, MadeTriplets(model.config, steps * batch), config, run_folder)


def train(trainer: Trainer) -> None:
    """Train, with a validation that scores nothing."""
    trainer.train(lambda *_: {"recall": 0.0}, lambda *_: None)


def check_steps(setting: Setting) -> Iterator[Line]:
    """Five steps in each precision: finite losses, one that falls, a scaler that works."""
    start = setting.model(**NO_DROPOUT)
    first: dict[str, float] = {}
    for amp in PRECISIONS:
        model = setting.placed(start)
        trainer = make_trainer(setting, model, f"steps_{amp}", amp)
        seen = recorded(trainer)
        samples = setting.on_device(setting.samples(model.config, setting.shapes.batch))
        before = loss_of(setting, model, samples, amp)
        train(trainer)
        after = loss_of(setting, model, samples, amp)
        losses = [loss.item() for loss in seen]
        first[amp] = losses[0]
        scale = trainer.scaler.get_scale()
        taken = STEPS - round(math.log2(max(2.0**16 / scale, 1))) if amp == "fp16" else STEPS
        told = " ".join(f"{loss:.4f}" for loss in losses)
        figures = f"losses {told}; of one batch {before:.4f} to {after:.4f}"
        if amp == "fp16":
            figures += f"; scale {scale:.0f}, {taken} of {STEPS} steps taken"
        name = f"steps, {'float32' if amp == 'off' else amp}"
        off_by = abs(losses[0] / first["off"] - 1)
        problem = ""
        if not all(map(math.isfinite, losses)):
            problem = "a loss is not finite"
        elif off_by > BOUND[amp]:
            problem = f"the first loss is off float32's by {off_by:.1e}, bound {BOUND[amp]:.1e}"
        elif not after < before:
            problem = "the loss does not fall"
        elif taken < 1 or not 1 <= scale <= 2.0**24:
            problem = "the gradient scaler skips every step: gradients overflow in float16"
        if problem:
            other = "--amp off" if amp != "off" else "--device cpu"
            yield Line(FAIL, name, f"{figures}; {problem}", f"train with {other}; {OTHER_WHEEL}")
        else:
            yield Line(OK, name, figures)
        del model, trainer
        setting.free()


def recorded(trainer: Trainer) -> list[Tensor]:
    """The list fills with the total loss of each step."""
    seen: list[Tensor] = []
    compute = trainer.losses

    def watched(samples: Samples) -> dict[str, Tensor]:
        losses = compute(samples)
        seen.append(weighted({name: loss.detach().float() for name, loss in losses.items()}))
        return losses

    trainer.losses = watched
    return seen


@torch.no_grad()
def loss_of(setting: Setting, model: Model, samples: Samples, amp: str) -> float:
    """The total loss of a batch."""
    with setting.autocast(amp):
        losses = model(samples)
    return sum(LOSS_WEIGHTS[name] * loss.item() for name, loss in losses.items())


def check_grad_cache(setting: Setting) -> Iterator[Line]:
    """Gradient caching: its two passes draw the same dropout; without dropout it is the plain step."""
    remedy = f"train without --grad-cache; {OTHER_WHEEL}"
    chunk = setting.shapes.batch - 1  # the last one is of another size
    yield check_passes(setting, chunk, remedy)
    # In float32: where half a precision makes two similarities level, the largest may be another one.
    model = setting.placed(setting.model(**NO_DROPOUT))
    samples = setting.on_device(setting.samples(model.config, setting.shapes.batch))
    weighted(model(samples)).backward()
    wanted = take_gradients(model)
    yield bounded(
        "grad cache, without dropout",
        "gradients off those of the whole batch by",
        distance(cached_step(setting, model, samples, chunk, "off"), wanted),
        BOUND["off"],
        BECAUSE["off"],
        remedy,
    )


def check_passes(setting: Setting, chunk: int, remedy: str) -> Line:
    """Both passes of a step with dropout."""
    model = setting.placed(setting.model())
    samples = setting.on_device(setting.samples(model.config, setting.shapes.batch))
    passes: list[dict[str, Tensor]] = []
    embed = model.embed

    def watched(part: Samples) -> dict[str, Tensor]:
        passes.append(embed(part))
        return passes[-1]

    model.embed = watched  # type: ignore[assignment]
    cached_step(setting, model, samples, chunk, "auto")
    chunks = len(passes) // 2
    apart = max(
        float((first[name].detach().float() - second[name].detach().float()).abs().max())
        for first, second in zip(passes[:chunks], passes[chunks:], strict=True)
        for name in first
    )
    other = float((passes[0]["query"] - embed(first_rows(samples, chunk))["query"]).detach().abs().max())
    return bounded(
        "grad cache, with dropout",
        f"{chunks} chunks, embeddings of both passes apart by",
        apart,
        1e-5,
        f"the same kernels on the same numbers; other dropout would be {other:.1e}",
        remedy,
    )


def first_rows(samples: Samples, count: int) -> Samples:
    """The first ``count`` samples."""
    return {name: value[:count] for name, value in samples.items()}


def cached_step(setting: Setting, model: Model, samples: Samples, chunk: int, amp: str) -> dict[str, Tensor]:
    """The gradients by way of :class:`GradCache`."""
    cache = GradCache(model, Embedder(model), chunk, lambda: setting.autocast(amp))
    with setting.autocast(amp):
        total = weighted(cache.losses(samples))
    total.backward()
    cache.backward()
    return take_gradients(model)


def check_resume(setting: Setting) -> Iterator[Line]:
    """A run that a signal stops within an epoch and that is resumed, against one that is not stopped."""
    start = setting.model()

    def begin(folder: str, seed: int) -> Trainer:
        torch.manual_seed(seed)
        return make_trainer(setting, setting.placed(start), folder, "auto", steps=4)

    whole = begin("whole", 1)
    train(whole)
    stopped = begin("stopped", 1)
    stopped.after_backward = signal_after(2)
    try:
        train(stopped)
        yield Line(FAIL, "resume", "SIGTERM did not stop the training", "report it")
        return
    except Interrupted:
        resumed = begin("stopped", 2)  # a new process begins with other random numbers
    resumed.load_state()
    resumed_at = resumed.progress.step
    train(resumed)
    weights = {"whole": trained_weights(whole.model), "stopped": trained_weights(resumed.model)}
    names = weights["whole"]
    begun = trained_weights(start)
    moved = {name: names[name] - begun[name] for name in names}
    error = distance({name: weights["stopped"][name] - begun[name] for name in names}, moved)
    equal = all(torch.equal(names[name], weights["stopped"][name]) for name in names)
    figures = f"stopped by SIGTERM, resumed at step {resumed_at} of 4; weights " + (
        "equal to the bit" if equal else f"apart by {error:.1e} of what the training moved them"
    )
    # A GPU adds up some gradients in an order of its own. Lost random numbers or moments would be near 1.
    bound = 0.05 if setting.on_gpu else 0.0
    if error <= bound:
        yield Line(OK, "resume", f"{figures}, bound {bound}")
    else:
        yield Line(FAIL, "resume", f"{figures}, bound {bound}", "do not resume runs; report it")


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """On the CPU in float64."""
    return {name: p.detach().cpu().double() for name, p in model.named_parameters() if p.requires_grad}


def signal_after(steps: int) -> Callable[[], None]:
    """What sends this process a SIGTERM at the ``steps``-th call."""
    left = [steps]

    def after_backward() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    return after_backward


def check_waits(setting: Setting) -> Iterator[Line]:
    """A step makes the CPU wait for the GPU once, when it reads the losses."""
    if not setting.on_gpu:
        yield Line(SKIP, "waits", "there is no GPU to wait for")
        return
    with counted_waits() as seen:
        torch.ones(1, device=setting.device).item()
    if not seen:
        yield Line(SKIP, "waits", "this device does not report waits (torch.cuda.set_sync_debug_mode)")
        return
    start = setting.model()
    for amp in PRECISIONS:
        trainer = make_trainer(setting, setting.placed(start), f"waits_{amp}", amp)
        with counted_waits() as seen:
            counts: list[int] = []
            trainer.after_backward = partial(note_count, counts, seen)
            train(trainer)
        # From one backward pass to the next: the first step has none before it.
        each = [after - before for before, after in pairwise(counts)]
        places = ", ".join(dict.fromkeys(seen[counts[0] : counts[-1]]))
        name = f"waits, {'float32' if amp == 'off' else amp}"
        figures = f"waits for the GPU in each of {len(each)} steps: {' '.join(map(str, each))}; at {places}"
        if all(count == 1 for count in each):
            yield Line(OK, name, figures)
        else:
            remedy = "training is slower, the numbers are right; report it with the places"
            yield Line(FAIL, name, figures, remedy)
        del trainer
        setting.free()


def note_count(counts: list[int], seen: list[str]) -> None:
    """Write down how many waits were seen until now."""
    counts.append(len(seen))


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Within it the list fills with where the CPU waited for the GPU."""
    seen: list[str] = []

    def note(message: Warning | str, category: type, filename: str, line: int, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            seen.append(f"{Path(filename).name}:{line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        try:
            torch.cuda.set_sync_debug_mode("warn")
        except RuntimeError:  # no driver
            yield seen
            return
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
