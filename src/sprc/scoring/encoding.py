"""A split as vectors: every image through the model once, every query composed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sprc.config import ModelConfig
from sprc.data.datasets import ImageDataset, SteadyLoader, batches_of_rank
from sprc.data.images import Loader
from sprc.data.split import Split
from sprc.distributed import sum_over_ranks, world_size
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Text
from sprc.models.qformer import ImageKeys


@dataclass(frozen=True)
class EncodedSplit:
    """A split's gallery and its queries as vectors. T triplets, G images, Q tokens, E width, K members.

    A query of CIRCO has up to A targets beside the first.
    """

    gallery: Tensor  # (G, Q, E)
    composed: Tensor  # (T, E), reference and text
    text_only: Tensor  # (T, E), the text alone: SPRC's call 4
    references: Tensor  # (T,) gallery indices
    targets: Tensor | None  # (T,); None where the benchmark keeps them secret
    members: Tensor  # (T, K); K is 0 where there are no image sets
    also_targets: Tensor | None = None  # (T, A), -1 where a query has fewer; None where one target counts
    prompts: Tensor | None = None  # (T, Q, C) float16, the sentence prompts, if they were asked for


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; its mode is put back, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def encode_split(
    model: Blip2QformerCirAlignPrompt,
    split: Split,
    load: Loader,
    *,
    batch_size: int,
    num_workers: int,
    save_memory: bool = False,
    gallery_dtype: str = "float32",
    with_prompts: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> EncodedSplit:
    """Encode a split's gallery and queries, in eval mode; the model's mode is put back afterwards.

    A query is composed while its reference's image tokens are at hand, so that no image passes the model
    twice and no gallery of tokens is ever kept. Several ranks share the images, and all get the whole result.

    Args:
        model: on its device.
        split: of any benchmark; without triplets there are no queries, and the gallery alone is encoded.
        load: reads an image by its path, see :func:`sprc.scoring.feature_cache.open_images`.
        batch_size: images, and queries, at once.
        num_workers: processes that read images.
        save_memory: keep the gallery's features in main memory instead of the GPU's.
        gallery_dtype: "float32", or "float16" at half the memory.
        with_prompts: keep the queries' sentence prompts, too, which a re-ranker reads.
        on_batch: is called after each batch of images, on all ranks equally often; what it raises ends it.
    """
    names = list(split.image_paths)
    index = {name: i for i, name in enumerate(names)}
    queries_of = queries_by_reference(split, index)
    vectors = empty_vectors(
        model.config,
        images=len(names),
        queries=len(split.triplets),
        gallery_dtype=getattr(torch, gallery_dtype),
        gallery_device=torch.device("cpu") if save_memory else model.device,
        with_prompts=with_prompts,
    )
    own = batches_of_rank(len(names), batch_size)
    loader = SteadyLoader(
        ImageDataset(names, split.image_paths, load), batch_sampler=own, num_workers=num_workers
    )
    label = " ".join([split.dress_type, split.name]).strip()
    with eval_mode(model):
        for image_indices, images in tqdm(loader, desc=f"encode {label}", leave=False):
            encode_batch(model, image_indices, images, queries_of, vectors, batch_size)
            on_batch()
        for _ in range(math.ceil(len(names) / (batch_size * world_size())) - len(own)):
            on_batch()  # other ranks have a batch more
    for rows in vectors:
        if rows is not None:
            sum_over_ranks(rows)
    return EncodedSplit(
        **vectors._asdict(),
        references=torch.tensor([index[t.reference] for t in split.triplets], dtype=torch.int64),
        targets=target_indices(split, index),
        members=member_indices(split, index),
        also_targets=other_target_indices(split, index),
    )


class Vectors(NamedTuple):
    """What is filled batch by batch. A row is one rank's, and zero on the others. As in an EncodedSplit."""

    gallery: Tensor
    composed: Tensor
    text_only: Tensor
    prompts: Tensor | None


class Query(NamedTuple):
    """A triplet's number in its split, and its caption."""

    number: int
    caption: str


def queries_by_reference(split: Split, index: dict[str, int]) -> dict[int, list[Query]]:
    """The queries of each gallery image that is a reference, in the order of the triplets."""
    found: dict[int, list[Query]] = {}
    for number, triplet in enumerate(split.triplets):
        query = Query(number, triplet.caption)
        found.setdefault(index[triplet.reference], []).append(query)
    return found


def empty_vectors(
    config: ModelConfig,
    *,
    images: int,
    queries: int,
    gallery_dtype: torch.dtype,
    gallery_device: torch.device,
    with_prompts: bool,
) -> Vectors:
    """Zeros for as many images and queries; those of the queries are on the CPU."""
    shape = (images, config.num_query_tokens, config.embed_dim)
    return Vectors(
        gallery=torch.zeros(shape, dtype=gallery_dtype, device=gallery_device),
        composed=torch.zeros(queries, config.embed_dim),
        text_only=torch.zeros(queries, config.embed_dim),
        prompts=torch.zeros(queries, *shape[1:2], config.hidden_size, dtype=torch.float16)
        if with_prompts
        else None,
    )


def encode_batch(
    model: Blip2QformerCirAlignPrompt,
    image_indices: Tensor,
    images: Tensor,
    queries_of: dict[int, list[Query]],
    vectors: Vectors,
    batch_size: int,
) -> None:
    """Fill the rows of a batch of images, and of the queries whose references they are.

    Args:
        model: on its device.
        image_indices: (B,) gallery indices.
        images: (B, 3, S, S) pixels or (B, N, D) tokens.
        queries_of: from :func:`queries_by_reference`.
        vectors: what is filled.
        batch_size: queries at once; an image may be the reference of many.
    """
    image_embeds = model.encode_image(images.to(model.device))
    keys = model.Qformer.bert.image_keys(image_embeds)
    vectors.gallery[image_indices] = model.target_features(keys).to(vectors.gallery)
    for numbers, text, prompts in prompts_of_batch(
        model, image_indices, image_embeds, keys, queries_of, batch_size
    ):
        if vectors.prompts is not None:
            vectors.prompts[numbers] = prompts.to("cpu", torch.float16)
        vectors.composed[numbers] = model.query_of(prompts, text).cpu()
        vectors.text_only[numbers] = model.text_features(text).cpu()


def prompts_of_batch(
    model: Blip2QformerCirAlignPrompt,
    image_indices: Tensor,
    image_embeds: Tensor,
    keys: ImageKeys,
    queries_of: dict[int, list[Query]],
    batch_size: int,
) -> Iterator[tuple[list[int], Text, Tensor]]:
    """The sentence prompts of the queries whose references are in a batch of images, some at once.

    Args:
        model: on its device.
        image_indices: (B,) gallery indices.
        image_embeds: (B, N, D) tokens.
        keys: ``Qformer.bert.image_keys`` of them.
        queries_of: from :func:`queries_by_reference`.
        batch_size: queries at once; an image may be the reference of many.

    Yields:
        The queries' numbers, their texts, and the prompts (R, Q, C).
    """
    pairs = [(row, query) for row, i in enumerate(image_indices.tolist()) for query in queries_of.get(i, ())]
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        rows, numbers = [row for row, _ in part], [query.number for _, query in part]
        text = model.tokenize([query.caption for _, query in part])
        if model.gated_fusion is None:  # a reference's keys and values are those it has as a target
            reference: Tensor | ImageKeys = [pair and (pair[0][rows], pair[1][rows]) for pair in keys]
        else:
            reference = image_embeds[rows]
        yield numbers, text, model.prompts_of(reference, text)


def target_indices(split: Split, index: dict[str, int]) -> Tensor | None:
    """Gallery indices of the targets, (T,); None where the benchmark keeps them secret."""
    targets = [triplet.target for triplet in split.triplets]
    known = [index[target] for target in targets if target is not None]
    return torch.tensor(known, dtype=torch.int64) if len(known) == len(targets) else None


def other_target_indices(split: Split, index: dict[str, int]) -> Tensor | None:
    """Gallery indices of the targets beside the first, (T, A), -1 where a triplet has fewer.

    None where one target counts, or where they are secret.
    """
    if not split.several_targets or any(triplet.target is None for triplet in split.triplets):
        return None
    most = max((len(triplet.also_targets) for triplet in split.triplets), default=0)
    rows = [[index[name] for name in triplet.also_targets] for triplet in split.triplets]
    filled = [row + [-1] * (most - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), most)


def member_indices(split: Split, index: dict[str, int]) -> Tensor:
    """Gallery indices of each triplet's image set, (T, K).

    A set of fewer than K images is filled up with its reference, which is left out of the ranking anyway.
    """
    longest = max((len(triplet.members) for triplet in split.triplets), default=0)
    return torch.tensor(
        [
            [index[name] for name in (*t.members, *[t.reference] * (longest - len(t.members)))]
            for t in split.triplets
        ],
        dtype=torch.int64,
    )
