"""Score a model on a benchmark's split: every image through the model once, then ranks and recall."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from sprc.data.captions import process_caption
from sprc.data.cirr import CirrSplit
from sprc.data.datasets import ImageDataset
from sprc.data.fashioniq import FashionIQSplit
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.ranking import cirr_metrics, fashioniq_metrics, similarities, subset_ranks, target_ranks

Split = CirrSplit | FashionIQSplit


@dataclass(frozen=True)
class EncodedSplit:
    """A split's gallery and its queries as vectors. T triplets, G images, Q tokens, E width, K members."""

    gallery: Tensor  # (G, Q, E)
    composed: Tensor  # (T, E), reference and text
    text_only: Tensor  # (T, E), the text alone: SPRC's call 4
    references: Tensor  # (T,) gallery indices
    targets: Tensor | None  # (T,); None where the benchmark keeps them secret
    members: Tensor  # (T, K); K is 0 for FashionIQ


@torch.no_grad()
def encode_split(
    model: Blip2QformerCirAlignPrompt,
    split: Split,
    transform: Callable[[Image], Tensor],
    *,
    batch_size: int,
    num_workers: int,
    save_memory: bool = False,
) -> EncodedSplit:
    """Encode a split's gallery and queries, in eval mode; the model's mode is put back afterwards.

    A query is composed while its reference's image tokens are at hand, so that no image passes the model
    twice and no gallery of tokens is ever kept.

    Args:
        model: on its device.
        split: of CIRR or FashionIQ.
        transform: the preprocessing the model was trained with.
        batch_size: images, and queries, at once.
        num_workers: processes that read images.
        save_memory: keep the gallery's features in main memory instead of the GPU's.
    """
    names = list(split.image_paths)
    label = " ".join([getattr(split, "dress_type", ""), split.name]).strip()
    index = {name: i for i, name in enumerate(names)}
    captions = [process_caption(triplet.caption) for triplet in split.triplets]
    queries_of: dict[int, list[int]] = {}
    for number, triplet in enumerate(split.triplets):
        queries_of.setdefault(index[triplet.reference], []).append(number)

    config, device = model.config, model.device
    gallery = torch.empty(len(names), config.num_query_tokens, config.embed_dim)
    gallery = gallery.to("cpu" if save_memory else device)
    composed = torch.empty(len(captions), config.embed_dim)
    text_only = torch.empty_like(composed)
    loader = DataLoader(
        ImageDataset(names, split.image_paths, transform), batch_size, num_workers=num_workers
    )
    hidden = any(triplet.target is None for triplet in split.triplets)
    was_training = model.training
    model.eval()
    for image_indices, images in tqdm(loader, desc=f"encode {label}", leave=False):
        image_embeds = model.encode_image(images.to(device))
        keys = model.Qformer.bert.image_keys(image_embeds)
        gallery[image_indices] = model.target_features(keys).to(gallery.device)
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
    model.train(was_training)
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


def image_similarities(encoded: EncodedSplit) -> Tensor:
    """Similarity of each reference *image alone* to the gallery, (T, G): the image-only baseline.

    Late interaction as for a query, averaged over the reference's Q tokens.
    """
    unique, inverse = encoded.references.unique(return_inverse=True)
    tokens = encoded.gallery[unique.to(encoded.gallery.device)]  # (R, Q, E)
    scores = sum(similarities(tokens[:, q], encoded.gallery) for q in range(tokens.shape[1]))
    return scores[inverse] / tokens.shape[1]


def score(encoded: EncodedSplit, scores: Tensor) -> dict[str, float]:
    """CIRR's metrics of (T, G) similarities, the reference taken out of the ranking."""
    return cirr_metrics(
        target_ranks(scores, encoded.targets, encoded.references),
        subset_ranks(scores, encoded.targets, encoded.references, encoded.members),
    )


def validate(splits: list[Split], encoded: list[EncodedSplit]) -> dict[str, float]:
    """The benchmark's metrics of the composed queries, in percent.

    Args:
        splits: CIRR's one split, or FashionIQ's one split a type.
        encoded: the same splits, encoded.
    """
    scores = [similarities(one.composed, one.gallery) for one in encoded]
    if isinstance(splits[0], CirrSplit):
        return score(encoded[0], scores[0])
    return fashioniq_metrics(
        {
            split.dress_type: target_ranks(matrix, one.targets)
            for split, one, matrix in zip(splits, encoded, scores, strict=True)
        }
    )


def modality_table(encoded: EncodedSplit) -> dict[str, dict[str, float]]:
    """CIRR's metrics of the composed query, the text alone and the image alone.

    A benchmark where either half does as well as the whole does not test composition.
    """
    return {
        "reference and text": score(encoded, similarities(encoded.composed, encoded.gallery)),
        "text only": score(encoded, similarities(encoded.text_only, encoded.gallery)),
        "image only": score(encoded, image_similarities(encoded)),
    }
