"""Training steps: an epoch with the feature cache and without, the Q-Former, the fusion's share, growth.

Random weights of true shapes (ViT-g and BLIP-2's Q-Former), or small ones with ``--quick``. A step is the
losses and their gradients; ``trainable`` is what is left of it when the image tokens are at hand.
"""

import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import (
    Row,
    Settings,
    in_seconds,
    memory_row,
    not_measured,
    peak_memory,
    ratio_row,
    require_memory,
    side_by_side,
    spread,
)
from PIL import Image, ImageDraw
from products import products_of
from published import HAS_LAVIS, NO_LAVIS, LavisStep
from torch import Tensor, nn

from sprc.config import ModelConfig
from sprc.data.images import load_image
from sprc.data.transforms import make_transform
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.device import place, precision
from sprc.scoring.feature_cache import FeatureCache
from sprc.self_check.setting import LOSS_WEIGHTS, WORDS, made_tokenizer
from sprc.training.loop import make_optimizer

SMALL = {
    "image_size": 28,
    "vit_width": 32,
    "vit_depth": 2,
    "vit_heads": 2,
    "vocab_size": 300,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "num_query_tokens": 4,
    "embed_dim": 8,
}
TRIPLETS = 28_225  # of CIRR's training split
IMAGES = 21_551  # of CIRR's
BATCH = 64  # the default of --batch-size
PREPROCESSING = {"transform": "targetpad", "target_ratio": 1.25}

Samples = dict[str, Tensor | list[str]]
Step = Callable[[Samples], None]


# --- what all of them share


def make_config(quick: bool, **changes: Any) -> ModelConfig:
    """True shapes, or small ones."""
    return ModelConfig(**{**(SMALL if quick else {}), **changes})


def make_model(config: ModelConfig, device: str, *, with_vit: bool = False) -> Blip2QformerCirAlignPrompt:
    """The model on ``device``, its vision transformer of one block unless it is asked for."""
    torch.manual_seed(0)
    one_block = ModelConfig(**{**vars(config), "vit_depth": 1})
    model = Blip2QformerCirAlignPrompt(one_block, made_tokenizer(config.vocab_size))
    assert len(model.tokenizer) == config.vocab_size
    if with_vit:
        with torch.device("meta"):  # the model's own start of a billion weights takes half a minute
            vit = model.vision_transformer(config)
        model.visual_encoder = vit.to_empty(device="cpu").requires_grad_(False)
        for name, weights in vit.named_parameters():
            if "norm" in name:
                weights.fill_(float(name.endswith("weight")))
            else:
                weights.uniform_(-0.03, 0.03)
    return place(model.train(), torch.device(device))


def make_captions(count: int) -> list[str]:
    """Captions of CIRR's lengths: a mean of 11 words, few below 5 or above 20."""
    draw = random.Random(0)
    lengths = [min(max(round(draw.gammavariate(5, 11.3 / 5)), 3), 28) for _ in range(count)]
    return [" ".join(draw.choices(WORDS, k=length)) for length in lengths]


def make_samples(config: ModelConfig, batch: int, device: str) -> Samples:
    """A batch as a feature cache in float16 gives it: (B, N, D) tokens of references and targets."""
    shape = (2, batch, config.num_patches**2 + 1, config.vit_width)
    generator = torch.Generator().manual_seed(3)
    image, target = torch.randn(shape, generator=generator).half().to(device)
    return {"image": image, "target": target, "text_input": make_captions(batch)}


def backward(model: nn.Module, device: str, samples: Samples) -> None:
    """Losses and gradients, in the precision that ``--amp auto`` takes; then the gradients are dropped."""
    amp = precision("auto", torch.device(device))
    with torch.autocast(device, amp, enabled=amp is not None):
        losses = model(samples)
        total = sum(LOSS_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items())
    total.backward()
    model.zero_grad(set_to_none=True)


def assert_equal(ours: nn.Module, theirs: nn.Module, samples: Samples) -> None:
    """Without dropout both give the same losses, and the same gradients of what both train."""
    shared = dict(ours.Qformer.bert.named_parameters())
    found = []
    for model, bert in ((ours, ours.Qformer.bert), (theirs, theirs.bert)):
        model.eval()
        losses = model(samples)
        sum(losses.values()).backward()
        found.append((losses, {name: p.grad for name, p in bert.named_parameters() if name in shared}))
        model.zero_grad(set_to_none=True)
        model.train()
    (our_losses, our_grads), (their_losses, their_grads) = found
    largest = max(grad.abs().max() for grad in their_grads.values() if grad is not None)
    for name, loss in their_losses.items():
        assert torch.allclose(our_losses[name], loss, rtol=1e-4), f"{name}: {our_losses[name]} is not {loss}"
    reached = 0
    for name, grad in their_grads.items():
        if grad is None:
            assert our_grads[name] is None, name
            continue
        assert (our_grads[name] - grad).abs().max() <= 1e-4 * largest, f"gradient of {name}"
        reached += 1
    assert reached > 10


def step_batch(settings: Settings) -> int:
    """Triplets a step: few on a CPU, the default batch on a GPU."""
    return 2 if settings.quick else 8 if settings.device == "cpu" else BATCH


# --- the rows


def qformer(settings: Settings) -> list[Row]:
    """The trainable part of plain SPRC: all four calls, ours against LAVIS's and against its products."""
    batch = step_batch(settings)
    name = f"Q-Former's four calls, LAVIS's / ours, B {batch}: time"
    wanted = "1.4 x or more"
    require_memory(1 if settings.quick else 10)
    model = make_model(make_config(settings.quick, use_gated_fusion=False), settings.device)
    samples = make_samples(model.config, batch, settings.device)
    sides: dict[str, Callable[[], object]] = {"ours": partial(backward, model, settings.device, samples)}
    if HAS_LAVIS:
        theirs = LavisStep(model)
        assert_equal(model, theirs, samples)
        sides["LAVIS"] = partial(backward, theirs, settings.device, samples)
    products = {side: products_of(step) for side, step in sides.items()}
    sides["products"] = products["ours"].alone()
    times = side_by_side(sides, settings)
    rate = products["ours"].flop / median(times["products"]) / 1e9
    limit = ratio_row(
        f"Q-Former's four calls, ours / its matrix products alone, B {batch}: time",
        "",
        times["ours"],
        times["products"],
    )
    told = f"{products['ours'].flop / 1e9:,.0f} GFLOP, alone at {rate:.0f} GFLOP/s"
    rows = [limit._replace(detail=f"{limit.detail}; {told}")]
    if not HAS_LAVIS:
        return [*rows, not_measured(name, wanted, NO_LAVIS)]
    del model, theirs, sides
    peaks = {
        side: peak_memory(prepare_step, side, settings, batch, device=settings.device)
        for side in ("ours", "LAVIS")
    }
    return [
        ratio_row(name, wanted, times["LAVIS"], times["ours"], least=1.4),
        *rows,
        ratio_row(
            f"Q-Former's four calls, LAVIS's / our matrix products alone, B {batch}: what no other work at "
            "all would give",
            "",
            times["LAVIS"],
            times["products"],
        ),
        memory_row(
            f"Q-Former's four calls, ours / LAVIS's, B {batch}: peak memory",
            "",
            peaks["ours"],
            peaks["LAVIS"],
        ),
    ]


def prepare_step(side: str, settings: Settings, batch: int) -> Callable[[], None]:
    """A trainable step of one side, ready to run."""
    model = make_model(make_config(settings.quick, use_gated_fusion=False), settings.device)
    step = LavisStep(model) if side == "LAVIS" else model
    return partial(backward, step, settings.device, make_samples(model.config, batch, settings.device))


# A strategy to what its overhead is asked to stay under, in percent.
OVERHEADS = {"gated": 10, "cross": 15, "select": 15}


def overhead(settings: Settings) -> list[Row]:
    """What each fusion adds to a step with cached tokens, all of them in turns with plain SPRC."""
    require_memory(1 if settings.quick else 14)
    batch = step_batch(settings)
    changes: dict[str, dict[str, Any]] = {"off": {"use_gated_fusion": False}}
    changes |= {strategy: {"fusion_strategy": strategy} for strategy in OVERHEADS}
    models = {
        side: make_model(make_config(settings.quick, **given), settings.device)
        for side, given in changes.items()
    }
    samples = make_samples(models["off"].config, batch, settings.device)
    sides = {side: partial(backward, model, settings.device, samples) for side, model in models.items()}
    flop = {side: products_of(step).flop for side, step in sides.items()}
    times = side_by_side(sides, settings)
    rows = []
    for strategy, limit in OVERHEADS.items():
        ratios = [on / off for off, on in zip(times["off"], times[strategy], strict=True)]
        percent = [100 * (ratio - 1) for ratio in ratios]
        more = 100 * (flop[strategy] / flop["off"] - 1)
        # The first design's row keeps its name, under which earlier figures stand.
        side = "fusion on" if strategy == "gated" else f"fusion `{strategy}`"
        rows.append(
            Row(
                f"{side} against off, whole step with cached tokens, B {batch}: overhead",
                f"under {limit} %",
                spread(percent, "{:.1f} %".format, ratios=ratios),
                f"{in_seconds(median(times[strategy]))} against {in_seconds(median(times['off']))}; "
                f"{more:.1f} % more matrix products",
                median(percent) < limit,
            )
        )
    return rows


def growing_batch(settings: Settings) -> list[Row]:
    """The trainable step, fusion on, as the batch grows."""
    sizes = (1, 2) if settings.quick else (1, 4, 16)
    require_memory(1 if settings.quick else 14)
    model = make_model(make_config(settings.quick), settings.device)
    sides = {
        size: partial(backward, model, settings.device, make_samples(model.config, size, settings.device))
        for size in sizes
    }
    times = side_by_side(sides, settings)
    seconds = {size: median(times[size]) for size in sizes}
    rows = []
    for size in sizes[1:]:
        name = f"growth, trainable step, B {size} / B {sizes[0]}: time"
        row = ratio_row(name, "", times[size], times[sizes[0]])
        a_triplet = f"{in_seconds(seconds[size] / size)} a triplet against {in_seconds(seconds[sizes[0]])}"
        rows.append(row._replace(detail=a_triplet))
    return rows


def epoch(settings: Settings) -> list[Row]:
    """A step from image files and a step from the feature cache, and what an epoch of them takes."""
    names = {
        "plain": "epoch, plain SPRC (LAVIS's Q-Former) / ours with the cache",
        "cache alone": "epoch, plain SPRC / its trainable part alone: what a cache alone could give",
        "ours": "epoch, ours without the cache / ours with it",
        "limit": "epoch, cached step / its trainable part alone",
        "hours": f"epoch of {TRIPLETS} triplets, extrapolated",
    }
    device = settings.device
    batch = 2 if settings.quick else 4 if device == "cpu" else BATCH
    require_memory(1 if settings.quick else 14)
    config = make_config(settings.quick, use_gated_fusion=False)
    model = make_model(config, device, with_vit=True)
    transform = make_transform(image_size=config.image_size, kind="targetpad", target_ratio=1.25)
    captions = make_captions(batch)
    steps = {"ours": partial(backward, model, device)}
    if HAS_LAVIS:
        steps["LAVIS"] = partial(backward, LavisStep(model), device)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        paths = make_images(Path(folder) / "images", 2 * batch)
        cache = FeatureCache(Path(folder) / "cache", model, PREPROCESSING, "float16")
        cache.fill(paths, model, transform, batch_size=batch, num_workers=0)
        # On a GPU's machine many cores read, as a data loader's workers would; on a CPU they compute.
        read = pool.map if device == "cuda" else map
        some = paths if device == "cuda" else paths[:1]
        in_memory = torch.stack([cache(path) for path in paths]).to(device)

        def run_step(tokens: Tensor, step: Step) -> None:
            image, target = tokens.chunk(2)
            step({"image": image, "target": target, "text_input": captions})

        def read_pixels(paths: list[Path]) -> Tensor:
            return torch.stack(list(read(partial(load_image, transform=transform), paths))).to(device)

        @torch.no_grad()
        def from_images() -> None:
            pixels = read_pixels(paths)
            # On a CPU vit_tokens takes one image at a time, for the sake of the cache, which is slower.
            encode = model.vit_tokens if device == "cuda" else model.visual_encoder
            tokens = encode(pixels)
            with torch.enable_grad():
                run_step(tokens, steps["LAVIS"])

        def from_cache(step: Step) -> None:
            run_step(torch.stack(list(read(cache, paths))).to(device), step)

        sides: dict[str, Callable[[], object]] = {
            "cached": partial(from_cache, steps["ours"]),
            "alone": partial(run_step, in_memory, steps["ours"]),
            "images": lambda: model.vit_tokens(read_pixels(some)),
        }
        if HAS_LAVIS:
            sides["LAVIS alone"] = partial(run_step, in_memory, steps["LAVIS"])
            sides["LAVIS"] = from_images
        files = [*paths, cache.store.values]
        times = side_by_side(sides, settings, before=partial(drop_from_memory, files))
        # A step without the cache is its images, one after the other on a CPU, and the step alone.
        an_image = [seconds / len(some) for seconds in times["images"]]
        times["ours"] = [
            2 * batch * image + step for image, step in zip(an_image, times["alone"], strict=True)
        ]

    rows = []
    if HAS_LAVIS:
        rows += [
            ratio_row(names["plain"], "7 x or more", times["LAVIS"], times["cached"], least=7),
            ratio_row(names["cache alone"], "", times["LAVIS"], times["LAVIS alone"]),
        ]
    else:
        rows += [not_measured(names["plain"], "7 x or more", NO_LAVIS)]
    rows += [
        ratio_row(names["ours"], "", times["ours"], times["cached"]),
        ratio_row(names["limit"], "1.1 x or less", times["cached"], times["alone"], most=1.1),
    ]

    update = median(time_updates(model, settings))
    hours = {
        side: (TRIPLETS * median(seconds) / batch + TRIPLETS / BATCH * update) / 3600
        for side, seconds in times.items()
    }
    said = {"LAVIS": "plain SPRC", "ours": "ours without the cache", "cached": "ours with the cache"}
    value = ", ".join(f"{what} {hours[side]:.2f} h" for side, what in said.items() if side in hours)
    detail = (
        f"steps of {batch} triplets, {in_seconds(median(times['cached']) / batch)} a triplet with the cache; "
        f"AdamW's {in_seconds(update)} once in {BATCH}; filling the cache with CIRR's {IMAGES} images, once: "
        f"{IMAGES * median(an_image) / 3600:.2f} h"
    )
    rows.append(Row(names["hours"], "", value, detail))
    return rows


def time_updates(model: nn.Module, settings: Settings) -> list[float]:
    """Seconds of AdamW's step over all that is trained."""
    optimizer = make_optimizer(model, 1e-9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return side_by_side({"update": optimizer.step}, settings)["update"]


def make_images(folder: Path, count: int) -> list[Path]:
    """Files of CIRR's kind, 640 x 480, PNG and JPEG in turns: shapes over a gradient, with some noise."""
    folder.mkdir()
    random_values = np.random.default_rng(0)
    slope = np.linspace(0, 150, 640)[None, :, None] + np.linspace(0, 60, 480)[:, None, None]
    paths = []
    for number in range(count):
        noise = random_values.normal(0, 6, (480, 640, 3))
        image = Image.fromarray((slope + noise + 20).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for left, top, *color in random_values.integers(0, 255, (12, 5)).tolist():
            draw.ellipse([2 * left, top, 2 * left + 110, top + 90], fill=tuple(color))
        paths.append(folder / f"{number}.{('png', 'jpg')[number % 2]}")
        image.save(paths[-1])
    return paths


def drop_from_memory(paths: list[Path]) -> None:
    """Make the next reading of these files a reading from the disk."""

    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
