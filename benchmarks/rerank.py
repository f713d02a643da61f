"""A re-ranker, from cached tokens: a query's second stage against its first, a step against SPRC's."""

from collections.abc import Callable
from functools import partial

import torch
from grad_cache import cached_backward
from measure import Row, Settings, memory_row, peak_memory, ratio_row, require_memory, side_by_side
from steps import Samples, backward, make_captions, make_config, make_model, make_samples
from torch import Tensor

from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.models.reranker import start_reranker
from sprc.scoring.ranking import block_scores

GALLERY = 2297  # images of CIRR's validation split
NEGATIVES = 8


def make_reranker(settings: Settings) -> Blip2QformerCirRerank:
    """The re-ranker of a plain first stage, of random weights, on the device."""
    config = make_config(settings.quick, use_gated_fusion=False)
    return start_reranker(make_model(config, "cpu")).to(settings.device).train()


def made_queries(model: Blip2QformerCirRerank, batch: int, candidates: int, device: str) -> Samples:
    """What the re-ranker takes of so many queries, as a feature cache and a first stage give it."""
    config = model.config
    generator = torch.Generator().manual_seed(3)
    tokens = (config.num_patches**2 + 1, config.vit_width)
    prompts = torch.randn(batch, config.num_query_tokens, config.hidden_size, generator=generator)
    images = torch.randn(batch, candidates, *tokens, generator=generator)
    return {
        "prompts": prompts.half().to(device),
        "candidates": images.half().to(device),
        "text_input": make_captions(batch),
    }


@torch.no_grad()
def look_again(model: Blip2QformerCirRerank, samples: Samples, top: int) -> Tensor:
    """The scores of a query's first ``top`` candidates, at most 64 at once: (top,)."""
    found = []
    for images in samples["candidates"][0, :top].split(64):
        keys = model.Qformer.bert.image_keys(model.encode_image(images))
        beside = model.beside(
            samples["prompts"].expand(len(images), -1, -1), samples["text_input"] * len(images)
        )
        found.append(model.match(keys, beside))
    return torch.cat(found)


def query(settings: Settings) -> list[Row]:
    """A query's first stage (reference and text to a ranked gallery), and its second by candidates."""
    tops, gallery = ((2, 4), 50) if settings.quick else ((10, 50, 100), GALLERY)
    config = make_config(settings.quick, use_gated_fusion=False)
    first = make_model(config, settings.device).eval()
    features = torch.randn(gallery, config.num_query_tokens, config.embed_dim).to(settings.device)
    reference = make_samples(config, 1, settings.device)

    @torch.no_grad()
    def find() -> Tensor:
        text = first.tokenize(reference["text_input"])
        return block_scores(first.compose(first.encode_image(reference["image"]), text), features)

    second = make_reranker(settings).eval()
    samples = made_queries(second, 1, max(tops), settings.device)
    sides: dict[int, Callable[[], object]] = {0: find}
    sides |= {top: partial(look_again, second, samples, top) for top in tops}
    times = side_by_side(sides, settings)
    name = "a query's second stage, {} candidates / its first, " + f"{gallery:,} images"
    return [ratio_row(name.format(top), "", times[top], times[0]) for top in tops]


def prepare(side: str, settings: Settings, batch: int) -> Callable[[], None]:
    """One step of one side, ready to run: "sprc", "rerank", or "rerank" in chunks of one query."""
    if side == "sprc":
        config = make_config(settings.quick, use_gated_fusion=False)
        model = make_model(config, settings.device)
        return partial(backward, model, settings.device, make_samples(config, batch, settings.device))
    model = make_reranker(settings)
    samples = made_queries(model, batch, 1 + NEGATIVES, settings.device)
    if side == "rerank":
        return partial(backward, model, settings.device, samples)
    return partial(cached_backward, model, settings.device, 1, samples)


def step(settings: Settings) -> list[Row]:
    """Time and peak memory of a step with eight negatives a query, whole and in chunks."""
    batch = 2 if settings.device == "cpu" else 16
    require_memory(1 if settings.quick else 12)
    names = {"rerank": "a re-ranker's step", "chunks": "the same with --grad-cache 1"}
    times = side_by_side({side: prepare(side, settings, batch) for side in ("sprc", *names)}, settings)
    peaks = {side: peak_memory(prepare, side, settings, batch, device=settings.device) for side in times}
    rows = []
    for side, name in names.items():
        name = f"{name}, {NEGATIVES} negatives / SPRC's step, B {batch}"
        rows.append(ratio_row(f"{name}: time", "", times[side], times["sprc"]))
        rows.append(memory_row(f"{name}: peak memory", "", peaks[side], peaks["sprc"]))
    return rows
