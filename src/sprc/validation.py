"""Score a model on a benchmark's split: every image through the model once, then ranks and recall."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sprc.data.captions import process_caption
from sprc.data.cirr import CirrSplit
from sprc.data.datasets import ImageDataset, Loader, SteadyLoader, batches_of_rank
from sprc.data.fashioniq import FashionIQSplit
from sprc.distributed import sum_over_ranks, world_size
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.ranking import (
    QUERY_BLOCK,
    Ranking,
    ScoreBlocks,
    block_scores,
    cirr_metrics,
    fashioniq_metrics,
    rank,
    score_blocks,
)

Split = CirrSplit | FashionIQSplit

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
        load: reads an image by its path, see :func:`sprc.feature_cache.open_images`.
        batch_size: images, and queries, at once.
        num_workers: processes that read images.
        save_memory: keep the gallery's features in main memory instead of the GPU's.
        gallery_dtype: "float32", or "float16" at half the memory.
        on_batch: is called after each batch of images, on all ranks equally often; what it raises ends it.
    """
    names = list(split.image_paths)
    label = " ".join([getattr(split, "dress_type", ""), split.name]).strip()
    index = {name: i for i, name in enumerate(names)}
    captions = [process_caption(triplet.caption) for triplet in split.triplets]
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


def image_score_blocks(encoded: EncodedSplit) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarity of each reference *image alone* to the gallery, as of :func:`sprc.ranking.score_blocks`.

    Late interaction as for a query, averaged over the reference's Q tokens. A reference of several queries is
    scored once.
    """
    references, of_query = encoded.references.unique(return_inverse=True)
    tokens_each = encoded.gallery.shape[1]
    at_once = max(QUERY_BLOCK // tokens_each, 1)
    for start in range(0, len(references), at_once):
        tokens = encoded.gallery[references[start : start + at_once].to(encoded.gallery.device)]
        scores = block_scores(tokens.flatten(0, 1).float(), encoded.gallery)
        scores = scores.unflatten(0, tokens.shape[:2]).mean(dim=1)
        numbers = ((of_query >= start) & (of_query < start + at_once)).nonzero()[:, 0]
        for part in numbers.split(QUERY_BLOCK):
            yield part, scores[of_query[part] - start]


def rank_split(split: Split, encoded: EncodedSplit, blocks: ScoreBlocks | None = None, **k: int) -> Ranking:
    """Rank a split's queries as its benchmark does: CIRR's without the reference and in sets as well.

    ``blocks`` are the composed queries' similarities by default; ``k`` goes to :func:`sprc.ranking.rank`.
    """
    blocks = score_blocks(encoded.composed, encoded.gallery) if blocks is None else blocks
    if isinstance(split, CirrSplit):
        sets = {"references": encoded.references, "members": encoded.members}
    else:
        sets = {"references": None, "members": None}
    return rank(blocks, targets=encoded.targets, **sets, **k)


def metrics(splits: list[Split], rankings: list[Ranking]) -> dict[str, float]:
    """The benchmark's metrics, in percent.

    Args:
        splits: CIRR's one split, or FashionIQ's one split a type.
        rankings: of the same splits.
    """
    if isinstance(splits[0], CirrSplit):
        return cirr_metrics(rankings[0].ranks, rankings[0].set_ranks)
    return fashioniq_metrics(
        {split.dress_type: ranking.ranks for split, ranking in zip(splits, rankings, strict=True)}
    )


def modality_table(split: CirrSplit, encoded: EncodedSplit) -> dict[str, dict[str, float]]:
    """CIRR's metrics of the composed query, the text alone and the image alone.

    A benchmark where either half does as well as the whole does not test composition.
    """
    blocks = {
        "reference and text": score_blocks(encoded.composed, encoded.gallery),
        "text only": score_blocks(encoded.text_only, encoded.gallery),
        "image only": image_score_blocks(encoded),
    }
    return {name: metrics([split], [rank_split(split, encoded, b)]) for name, b in blocks.items()}
