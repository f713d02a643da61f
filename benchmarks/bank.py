"""A step with --negatives bank against the batch's, fusion on, from cached tokens, as the bank grows."""

from collections.abc import Callable
from functools import partial

import torch
from measure import Row, Settings, in_bytes, memory_row, peak_memory, ratio_row, require_memory, side_by_side
from steps import Samples, backward, make_config, make_model, make_samples

from sprc.config import ModelConfig
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.training.bank import Bank
from sprc.training.negatives import WiderNegatives
from sprc.training.true_targets import TrueTargets

BATCH = "batch"  # the side without a bank


def made_bank(config: ModelConfig, images: int, batch: int, device: str) -> Bank:
    """A bank in float16; the features of 100 random images over and over, of which time does not depend."""
    few = torch.randn(100, config.num_query_tokens, config.embed_dim)
    features = torch.nn.functional.normalize(few, dim=-1).half().repeat(images // 100, 1, 1)
    own = torch.arange(batch)
    bank = Bank(TrueTargets(own, own[:, None]), 0.05, "current")
    bank.fill(features, torch.device(device))
    return bank


def with_bank(
    model: Blip2QformerCirAlignPrompt, images: int | str, batch: int, device: str
) -> torch.nn.Module:
    """The side's module: the model, or what contrasts it with so many images."""
    if images == BATCH:
        return model
    return WiderNegatives(model, made_bank(model.config, int(images), batch, device), learn_targets=True)


def prepare(images: int | str, settings: Settings, batch: int) -> Callable[[], None]:
    """One step of one side, ready to run."""
    model = make_model(make_config(settings.quick), settings.device)
    samples = numbered(make_samples(model.config, batch, settings.device), batch, settings.device)
    return partial(backward, with_bank(model, images, batch, settings.device), settings.device, samples)


def numbered(samples: Samples, batch: int, device: str) -> Samples:
    """The samples with the triplets' numbers."""
    return {**samples, "triplet": torch.arange(batch, device=device)}


def growing_bank(settings: Settings) -> list[Row]:
    """Time and peak memory of a step with 1,000, 10,000 and 100,000 images beside the batch's."""
    batch, sizes = (2, (100, 200)) if settings.quick else (8, (1000, 10_000, 100_000))
    if settings.device == "cuda":
        batch *= 8
    require_memory(1 if settings.quick else 8)
    model = make_model(make_config(settings.quick), settings.device)
    samples = numbered(make_samples(model.config, batch, settings.device), batch, settings.device)
    sides = {
        str(size): partial(backward, with_bank(model, size, batch, settings.device), settings.device, samples)
        for size in (BATCH, *sizes)
    }
    times = side_by_side(sides, settings)
    del model, samples, sides
    peaks = {
        side: peak_memory(prepare, side, settings, batch, device=settings.device) for side in (BATCH, *sizes)
    }
    rows = []
    for size in sizes:
        name = f"a bank of {size} images / the batch's negatives, a step of B {batch}"
        bank = in_bytes(made_bank_bytes(make_config(settings.quick), size))
        rows.append(ratio_row(f"{name}: time", "", times[str(size)], times[BATCH]))
        row = memory_row(f"{name}: peak memory", "", peaks[size], peaks[BATCH])
        rows.append(row._replace(detail=f"{row.detail}, beside {bank} of the bank"))
    return rows


def made_bank_bytes(config: ModelConfig, images: int) -> int:
    """What a bank of so many images takes in float16."""
    return images * config.num_query_tokens * config.embed_dim * 2
