"""Our ranking against the published way, and how it grows with the gallery, on random features."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from measure import (
    Memory,
    Row,
    Settings,
    in_bytes,
    in_seconds,
    memory_row,
    peak_memory,
    ratio_row,
    require_memory,
    side_by_side,
    spread,
    within,
)
from published import published_ranking
from torch import Tensor

from sprc.data.split import Split
from sprc.scoring import screening
from sprc.scoring.benchmarks import CIRR
from sprc.scoring.encoding import EncodedSplit
from sprc.scoring.recall import rank_split

TOKENS, WIDTH, SET = 32, 256, 6
CIRR_VAL = (4181, 2297)  # queries, gallery images
CIRR_ALL = (4181, 21551)


def make_gallery(images: int, dtype: torch.dtype, device: str) -> Tensor:
    """(G, 32, 256), normalised, in ``dtype``; made piece by piece, so that no more memory is needed."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.empty(images, TOKENS, WIDTH, dtype=dtype, device=device)
    for part in gallery.split(2048):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=-1))
    return gallery


def make_task(queries: int, images: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Features and indices of CIRR's shape; a query lies near its target, so that recalls are not all 0."""
    generator = torch.Generator().manual_seed(1)
    gallery = make_gallery(images, dtype, device)
    sets = make_sets(queries, images)
    noise = 0.28 * torch.randn(queries, WIDTH, generator=generator).to(device)
    near = gallery[sets[:, 1].to(device), 0].float()
    return {"queries": F.normalize(near + noise, dim=-1), "gallery": gallery, "sets": sets}


def make_sets(queries: int, images: int) -> Tensor:
    """(T, 6) gallery indices, none twice in a row: the reference, the target, and other members."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.rand(images, generator=generator).topk(SET).indices for _ in range(queries)]
    return torch.stack(rows)


def our_ranking(queries: Tensor, gallery: Tensor, sets: Tensor, k: int | None = None) -> dict[str, float]:
    """CIRR's metrics, and with ``k`` the best k of each query as well."""
    encoded = EncodedSplit(gallery, queries, queries, sets[:, 0], sets[:, 1], sets)
    ranking = rank_split(Split("val", [], {}), encoded, k=k)
    return CIRR.metrics_of({"": ranking})


def in_float32(**task: Any) -> dict[str, float]:
    """Ours as it is where a processor has no instructions for bfloat16."""
    with patch.object(screening, "product_type", lambda: torch.float32):
        return our_ranking(**task)


def products_alone(dtype: torch.dtype, queries: Tensor, gallery: Tensor) -> Callable[[], None]:
    """The matrix products of our ranking on a CPU and nothing else, on what is in ``dtype`` already."""
    rows = gallery.to(dtype).flatten(0, 1).split(screening.GALLERY_CHUNK * TOKENS)
    columns = [part.to(dtype).T.contiguous() for part in queries.split(screening.QUERY_BLOCK)]

    def run() -> None:
        for column in columns:
            for row in rows:
                row @ column

    return run


def with_names(queries: Tensor, gallery: Tensor, sets: Tensor) -> Callable[[], dict[str, float]]:
    """The published way on the same task, with names in CIRR's form."""
    names = np.array([f"dev-{number}-{number % 4}-img{number % 2}" for number in range(len(gallery))])
    members = names[sets.numpy()]
    return partial(published_ranking, queries, gallery, names, members[:, 0], members[:, 1], members[:, 1:])


def prepare(
    side: str, queries: int, images: int, dtype: str, k: int | None, device: str
) -> Callable[[], dict[str, float]]:
    """One ranking of one side, ready to run."""
    task = make_task(queries, images, getattr(torch, dtype), device)
    return with_names(**task) if side == "published" else partial(our_ranking, **task, k=k)


def against_published(settings: Settings) -> list[Row]:
    """CIRR's validation, both ways: the same recalls, time and peak memory; and ours against its products."""
    queries, images = (50, 40) if settings.quick else CIRR_VAL
    require_memory(0.5 if settings.quick else 5)
    task = make_task(queries, images, torch.float32, settings.device)
    sides = {"ours": partial(our_ranking, **task), "published": with_names(**task)}
    ours, published = (side() for side in sides.values())
    dtype = screening.product_type()
    if settings.device == "cpu":
        sides["products"] = products_alone(dtype, task["queries"], task["gallery"])
        sides["float32"] = partial(in_float32, **task)
        sides["products in float32"] = products_alone(torch.float32, task["queries"], task["gallery"])
        assert sides["float32"]() == ours, "the type of the products has changed a recall"
    for name, value in published.items():
        assert abs(ours[name] - value) < 1e-9, f"{name} is {ours[name]}, the published way says {value}"
    times = side_by_side(sides, settings)
    del task, sides
    peaks = {
        side: peak_memory(
            prepare, side, queries, images, "float32", None, settings.device, device=settings.device
        )
        for side in ("ours", "published")
    }
    shape = f"{queries} x {images}"
    limits = []
    if settings.device == "cpu":
        kind = str(dtype).removeprefix("torch.")
        limits = [
            ratio_row(
                f"ranking, ours in {kind} / its products alone, {shape}: time",
                "1.3 x or less",
                times["ours"],
                times["products"],
                most=1.3,
            ),
            ratio_row(
                f"ranking, ours in float32 / its products alone, {shape}: time",
                "1.3 x or less",
                times["float32"],
                times["products in float32"],
                most=1.3,
            ),
            ratio_row(
                f"ranking, ours in float32 / ours in {kind}, {shape}: time",
                "",
                times["float32"],
                times["ours"],
            ),
        ]
    return [
        *limits,
        ratio_row(
            f"ranking, published way / ours, {shape}: time",
            "5 x or more",
            times["published"],
            times["ours"],
            least=5,
        ),
        memory_row(
            f"ranking, ours / published way, {shape}: peak memory",
            "0.1 x or less",
            peaks["ours"],
            peaks["published"],
            0.1,
        ),
    ]


def whole_of_cirr(settings: Settings) -> list[Row]:
    """All of CIRR's images as one gallery, and the best 50 of each query: ours alone."""
    queries, images = (50, 80) if settings.quick else CIRR_ALL
    require_memory(0.5 if settings.quick else 2)
    arguments = ("ours", queries, images, "float16", 50, settings.device)
    times = side_by_side({"ours": prepare(*arguments)}, settings)["ours"]
    peak = peak_memory(prepare, *arguments, device=settings.device)
    return [
        Row(
            f"ranking, ours, {queries} x {images} in float16, top 50: time and memory",
            "whole process in 2 GB",
            spread(times, in_seconds),
            f"{in_bytes(peak.whole)} in all, {in_bytes(peak.extra)} above features and libraries",
            within(peak.whole, None, 2e9),
        )
    ]


def growing_gallery(settings: Settings) -> list[Row]:
    """Time of one product of query and image, and peak memory, as the gallery grows."""
    queries, sizes = (16, (40, 80)) if settings.quick else (256, (1000, 10_000, 100_000))
    require_memory(0.5 if settings.quick else 4)
    last = make_task(queries, sizes[-1], torch.float16, settings.device)
    sides = {
        size: partial(our_ranking, last["queries"], last["gallery"][:size], make_sets(queries, size))
        for size in sizes
    }
    times = side_by_side(sides, settings)
    del last, sides
    peaks: dict[int, Memory] = {
        size: peak_memory(
            prepare, "ours", queries, size, "float16", None, settings.device, device=settings.device
        )
        for size in sizes
    }
    rows = []
    for size in sizes[1:]:
        name = f"growth, {queries} queries in float16, {size} / {sizes[0]} gallery images: time"
        row = ratio_row(name, "", times[size], times[sizes[0]])
        memory = f"peak memory {in_bytes(peaks[size].extra)} against {in_bytes(peaks[sizes[0]].extra)}"
        rows.append(row._replace(detail=f"{row.detail}; {memory}, beside the features"))
    return rows
