"""A split as vectors: every image through the model once, every query composed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sprc.data.datasets import ImageDataset, SteadyLoader, batches_of_rank
from sprc.data.images import Loader
from sprc.data.split import Split
from sprc.distributed import sum_over_ranks, world_size
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt

# Images that a rank encodes at once where nobody says how many: a training's batch may be that of many GPUs.
LARGEST_BATCH = 64


@dataclass(frozen=True)
class EncodedSplit:
    """A split's gallery and its queries as vectors. T triplets, G images, Q tokens, E width, K members."""

    gallery: Tensor  # (G, Q, E)
    composed: Tensor  # (T, E), reference and text
    text_only: Tensor  # (T, E), the text alone: SPRC's call 4
    references: Tensor  # (T,) gallery indices
    targets: Tensor | None  # (T,); None where the benchmark keeps them secret
    members: Tensor  # (T, K); K is 0 for FashionIQ


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
    on_batch: Callable[[], None] = lambda: None,
) -> EncodedSplit:
    """Encode a split's gallery and queries, in eval mode; the model's mode is put back afterwards.

    A query is composed while its reference's image tokens are at hand, so that no image passes the model
    twice and no gallery of tokens is ever kept. Several ranks share the images, and all get the whole result.

    Args:
        model: on its device.
        split: of CIRR or FashionIQ.
        load: reads an image by its path, see :func:`sprc.scoring.feature_cache.open_images`.
        batch_size: images, and queries, at once.
        num_workers: processes that read images.
        save_memory: keep the gallery's features in main memory instead of the GPU's.
        gallery_dtype: "float32", or "float16" at half the memory.
        on_batch: is called after each batch of images, on all ranks equally often; what it raises ends it.
    """
    names = list(split.image_paths)
    label = " ".join([split.dress_type, split.name]).strip()
    index = {name: i for i, name in enumerate(names)}
    captions = [triplet.caption for triplet in split.triplets]
    queries_of: dict[int, list[int]] = {}
    for number, triplet in enumerate(split.triplets):
        queries_of.setdefault(index[triplet.reference], []).append(number)

    config, device = model.config, model.device
    gallery = torch.zeros(
        (len(names), config.num_query_tokens, config.embed_dim),
        dtype=getattr(torch, gallery_dtype),
        device="cpu" if save_memory else device,
    )
    composed = torch.zeros(len(captions), config.embed_dim)
    text_only = torch.zeros_like(composed)
    own = batches_of_rank(len(names), batch_size)
    loader = SteadyLoader(
        ImageDataset(names, split.image_paths, load),
        batch_sampler=own,
        num_workers=num_workers,
    )
    hidden = any(triplet.target is None for triplet in split.triplets)
    with eval_mode(model):
        for image_indices, images in tqdm(loader, desc=f"encode {label}", leave=False):
            image_embeds = model.encode_image(images.to(device))
            keys = model.Qformer.bert.image_keys(image_embeds)
            gallery[image_indices] = model.target_features(keys).to(gallery)
            rows = [(row, q) for row, i in enumerate(image_indices.tolist()) for q in queries_of.get(i, ())]
            for start in range(0, len(rows), batch_size):
                row, query = (list(column) for column in zip(*rows[start : start + batch_size], strict=True))
                text = model.tokenize([captions[q] for q in query])
                if model.gated_fusion is None:  # a reference's keys and values are those it has as a target
                    reference = [pair and (pair[0][row], pair[1][row]) for pair in keys]
                else:
                    reference = image_embeds[row]
                composed[query] = model.compose(reference, text).cpu()
                text_only[query] = model.text_features(text).cpu()
            on_batch()
        for _ in range(math.ceil(len(names) / (batch_size * world_size())) - len(own)):
            on_batch()  # other ranks have a batch more
    for rows in (gallery, composed, text_only):  # a row is one rank's, and zero on the others
        sum_over_ranks(rows)
    return EncodedSplit(
        gallery=gallery,
        composed=composed,
        text_only=text_only,
        references=torch.tensor([index[t.reference] for t in split.triplets]),
        targets=None if hidden else torch.tensor([index[t.target] for t in split.triplets]),
        members=member_indices(split, index),
    )


def member_indices(split: Split, index: dict[str, int]) -> Tensor:
    """Gallery indices of each triplet's image set, (T, K).

    A set of fewer than K images is filled up with its reference, which is left out of the ranking anyway.
    """
    longest = max(len(triplet.members) for triplet in split.triplets)
    return torch.tensor(
        [
            [index[name] for name in (*t.members, *[t.reference] * (longest - len(t.members)))]
            for t in split.triplets
        ],
        dtype=torch.int64,
    )
