"""A step with --grad-cache against the plain step: peak memory and time, fusion on, from cached tokens."""

from collections.abc import Callable
from functools import partial

import torch
from measure import Row, Settings, memory_row, peak_memory, ratio_row, require_memory, side_by_side
from steps import LOSS_WEIGHTS, Samples, backward, make_config, make_model, make_samples
from torch import nn

from sprc.models.device import precision
from sprc.training.grad_cache import Embedder, GradCache


def cached_backward(model: nn.Module, device: str, chunk: int, samples: Samples) -> None:
    """As ``steps.backward``, in chunks."""
    cached_gradients(model, device, chunk, samples)
    model.zero_grad(set_to_none=True)


def cached_gradients(model: nn.Module, device: str, chunk: int, samples: Samples) -> None:
    """Losses and gradients in chunks, in the precision that ``--amp auto`` takes."""
    amp = precision("auto", torch.device(device))

    def mixed_precision() -> torch.autocast:
        return torch.autocast(device, amp, enabled=amp is not None)

    cache = GradCache(model, Embedder(model), chunk, mixed_precision)
    with mixed_precision():
        losses = cache.losses(samples)
        total = sum(LOSS_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items())
    total.backward()
    cache.backward()


def assert_equal(settings: Settings) -> None:
    """Without dropout, in float32, the gradients are the plain step's, to 1e-4 of the largest."""
    config = make_config(settings.quick, dropout=0.0, fusion_dropout=0.0)
    model = make_model(config, "cpu")
    samples = make_samples(config, 3, "cpu")
    losses = model(samples)
    sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items()).backward()
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    cached_gradients(model, "cpu", 2, samples)
    found = dict(model.named_parameters())
    largest = max(grad.abs().max() for grad in plain.values())
    for name, grad in plain.items():
        assert (found[name].grad - grad).abs().max() <= 1e-4 * largest, f"gradient of {name}"


def prepare(side: str, settings: Settings, batch: int, chunk: int) -> Callable[[], None]:
    """One step of one side, ready to run."""
    model = make_model(make_config(settings.quick), settings.device)
    samples = make_samples(model.config, batch, settings.device)
    if side == "plain":
        return partial(backward, model, settings.device, samples)
    return partial(cached_backward, model, settings.device, chunk, samples)


def run(settings: Settings) -> list[Row]:
    """Time and peak memory of a batch in chunks of a quarter and an eighth of it."""
    batch, chunks = (4, (1, 2)) if settings.quick else (32, (4, 8))
    if settings.device == "cuda":
        batch, chunks = 8 * batch, tuple(8 * chunk for chunk in chunks)
    require_memory(1 if settings.quick else 14)
    assert_equal(settings)
    model = make_model(make_config(settings.quick), settings.device)
    samples = make_samples(model.config, batch, settings.device)
    sides = {"plain": partial(backward, model, settings.device, samples)}
    for chunk in chunks:
        sides[chunk] = partial(cached_backward, model, settings.device, chunk, samples)
    times = side_by_side(sides, settings)
    del model, samples, sides
    peaks = {
        side: peak_memory(prepare, side, settings, batch, side, device=settings.device) for side in times
    }
    rows = []
    for chunk in chunks:
        name = f"--grad-cache {chunk} / plain step, B {batch}"
        rows.append(ratio_row(f"{name}: time", "", times[chunk], times["plain"]))
        rows.append(memory_row(f"{name}: peak memory", "", peaks[chunk], peaks["plain"]))
    return rows
