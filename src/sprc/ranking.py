"""Ranking a gallery and the recall metrics of CIRR and FashionIQ.

A candidate's rank is the number of candidates before it: those with a higher similarity, and those with
an equal one and a lower gallery index. So ties never depend on a sort's whims.
Shapes: T queries, G gallery images, Q tokens an image, E embedding width, K set members.
"""

from statistics import fmean, geometric_mean, harmonic_mean

import torch
from torch import Tensor

from sprc.losses import similarity

# Query rows scored at once: bounds the memory for the (rows x G x Q) products.
BLOCK = 64


def similarities(queries: Tensor, gallery: Tensor) -> Tensor:
    """Late-interaction similarity of every query to every gallery image.

    Args:
        queries: (T, E), normalised.
        gallery: (G, Q, E), normalised.

    Returns:
        (T, G) on the CPU.

    Raises:
        FloatingPointError: a similarity is not finite. A rank among NaNs would look like a perfect one.
    """
    rows = [similarity(block.to(gallery.device), gallery).cpu() for block in queries.split(BLOCK)]
    result = torch.cat(rows)
    if not result.isfinite().all():
        raise FloatingPointError(
            "similarities are not finite: the model's weights or features hold NaN or inf"
        )
    return result


def target_ranks(scores: Tensor, targets: Tensor, references: Tensor | None = None) -> Tensor:
    """Rank of each query's target in the whole gallery, from 0.

    Args:
        scores: (T, G) similarities.
        targets: (T,) gallery indices.
        references: (T,) gallery indices taken out of the ranking (CIRR), or None (FashionIQ).

    Returns:
        (T,) int64.
    """
    own = scores.gather(1, targets[:, None])  # (T, 1)
    index = torch.arange(scores.shape[1])
    before = (scores > own) | ((scores == own) & (index < targets[:, None]))
    if references is not None:
        before.scatter_(1, references[:, None], False)
    return before.sum(dim=1)


def subset_ranks(scores: Tensor, targets: Tensor, references: Tensor, members: Tensor) -> Tensor:
    """Rank of each query's target among its image set's members, the reference left out.

    Args:
        scores: (T, G) similarities.
        targets: (T,) gallery indices, each among its row of ``members``.
        references: (T,) gallery indices.
        members: (T, K) gallery indices of the image sets.

    Returns:
        (T,) int64.
    """
    own = scores.gather(1, targets[:, None])
    among = scores.gather(1, members)  # (T, K)
    before = (among > own) | ((among == own) & (members < targets[:, None]))
    before &= members != references[:, None]
    return before.sum(dim=1)


def top_k(scores: Tensor, k: int, references: Tensor | None = None) -> Tensor:
    """The k best gallery indices a query, best first: (T, G) to (T, k), or fewer where the gallery has fewer.

    References, (T,) gallery indices, are left out.
    """
    available = scores.shape[1]
    if references is not None:
        scores = scores.scatter(1, references[:, None], -torch.inf)
        available -= 1
    return scores.sort(dim=1, descending=True, stable=True).indices[:, : min(k, available)]


def subset_order(scores: Tensor, references: Tensor, members: Tensor) -> Tensor:
    """Each image set's members, best first, the reference (and what fills up a short set) last: (T, K).

    Args:
        scores: (T, G) similarities.
        references: (T,) gallery indices.
        members: (T, K) gallery indices.
    """
    members = members.sort(dim=1).values  # so that a stable sort breaks ties by gallery index
    among = scores.gather(1, members).masked_fill(members == references[:, None], -torch.inf)
    return members.gather(1, among.sort(dim=1, descending=True, stable=True).indices)


def recall(ranks: Tensor, k: int) -> float:
    """Recall at k in percent: the share of targets among the first k."""
    return 100 * (ranks < k).double().mean().item()


def cirr_metrics(ranks: Tensor, set_ranks: Tensor) -> dict[str, float]:
    """CIRR's metrics in percent (Liu et al. 2021), named and ordered as in SPRC's CSV files.

    Args:
        ranks: (T,) from :func:`target_ranks`.
        set_ranks: (T,) from :func:`subset_ranks`.
    """
    recalls = {f"recall_at{k}": recall(ranks, k) for k in (1, 5, 10, 50)}
    recalls |= {f"group_recall_at{k}": recall(set_ranks, k) for k in (1, 2, 3)}
    values = list(recalls.values())
    return {
        **recalls,
        "mean(R@5+R_s@1)": (recalls["recall_at5"] + recalls["group_recall_at1"]) / 2,
        "arithmetic_mean": sum(values) / len(values),
        # Both are zero where one value is; the library refuses to say so of the geometric mean.
        "harmonic_mean": harmonic_mean(values) if all(values) else 0.0,
        "geometric_mean": geometric_mean(values) if all(values) else 0.0,
    }


def fashioniq_metrics(ranks_by_type: dict[str, Tensor]) -> dict[str, float]:
    """FashionIQ's metrics in percent, in the order of SPRC's CSV files: types first, then their means.

    Args:
        ranks_by_type: for each type (dress, shirt, toptee) the (T,) ranks from :func:`target_ranks` in the
            type's own gallery, references left in.
    """
    metrics = {
        f"{dress_type}_recall_at{k}": recall(ranks, k)
        for dress_type, ranks in ranks_by_type.items()
        for k in (10, 50)
    }
    means = [fmean(metrics[f"{dress_type}_recall_at{k}"] for dress_type in ranks_by_type) for k in (10, 50)]
    return {
        **metrics,
        "average_recall_at10": means[0],
        "average_recall_at50": means[1],
        "average_recall": fmean(means),
    }
