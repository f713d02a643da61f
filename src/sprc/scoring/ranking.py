"""Ranking a gallery, and recall.

A candidate's rank is the number of candidates before it: those with a higher similarity, and those with
an equal one and a lower gallery index. So ties never depend on a sort's whims.

Similarities come in blocks of queries, and each block walks the gallery in chunks: neither a (queries x
gallery) nor a (queries x gallery x tokens) tensor exists, and memory does not grow with the queries' number.

Shapes: T queries, R queries of a block, G gallery images, Q tokens an image, E embedding width, K members
of a set, A targets of a query beside the first (CIRCO).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Queries scored at once, and gallery images a matrix product. On a CPU a chunk's products, (64 x 32 x 128)
# floats, stay in its cache; a GPU wants larger products.
QUERY_BLOCK = 128
GALLERY_CHUNK = {"cpu": 64, "cuda": 4096}

# Which queries, and their (R, G) similarities on the CPU.
ScoreBlocks = Iterable[tuple[Tensor, Tensor]]


def score_blocks(queries: Tensor, gallery: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Late-interaction similarity of every query to every gallery image, block by block.

    Args:
        queries: (T, E), normalised.
        gallery: (G, Q, E), normalised, float32 or float16, on any device: the products are made there, in
            float32 either way. Scores rounded to float16 would make ties, and so ranks, of their own.

    Yields:
        (R,) numbers of queries, and their (R, G) similarities, on the CPU.

    Raises:
        FloatingPointError: a similarity is not finite. A rank among NaNs would look like a perfect one.
    """
    for numbers in torch.arange(len(queries)).split(QUERY_BLOCK):
        yield numbers, block_scores(queries[numbers], gallery)


def block_scores(queries: Tensor, gallery: Tensor) -> Tensor:
    """(R, E) queries and the (G, Q, E) gallery to (R, G) on the CPU; see :func:`score_blocks`."""
    chunk = GALLERY_CHUNK[gallery.device.type]
    columns = queries.to(gallery.device, torch.float32).T.contiguous()  # (E, R)
    scores = torch.empty(len(gallery), len(queries))
    for start in range(0, len(gallery), chunk):
        part = gallery[start : start + chunk].to(torch.float32)
        products = (part.flatten(0, 1) @ columns).unflatten(0, part.shape[:2])  # (chunk, Q, R)
        scores[start : start + chunk] = products.amax(dim=1)
    refuse_what_is_not_finite(scores)
    return scores.T.contiguous()


def refuse_what_is_not_finite(scores: Tensor) -> None:
    """Raise :class:`FloatingPointError` for NaN or inf among similarities."""
    if not scores.isfinite().all():
        raise FloatingPointError(
            "similarities are not finite: the model's weights or features hold NaN or inf"
        )


def mean_query(queries: Sequence[Tensor]) -> Tensor:
    """The query of several rounds: the mean of their vectors, each (..., E), normalised again: (..., E).

    What was asked for in earlier rounds of a dialogue still counts ("history averaging").
    """
    return normalize(torch.stack(list(queries)).mean(dim=0), dim=-1)


class Ranking(NamedTuple):
    """Where the targets came, and what came first; None for what was not asked for or cannot be known."""

    ranks: Tensor | None = None  # (T,), of the target in the gallery, from 0
    set_ranks: Tensor | None = None  # (T,), of the target in its image set
    top: Tensor | None = None  # (T, k) gallery indices, best first
    set_order: Tensor | None = None  # (T, K) gallery indices of the image set, best first, the reference last
    also_ranks: Tensor | None = None  # (T, A), of the other targets in the gallery; -1 fills up

    @property
    def columns(self) -> dict[str, Tensor]:
        """The targets' ranks under their names in a file of ranks, each (T,); those that are known."""
        named = {"rank": self.ranks, "subset_rank": self.set_ranks}
        return {name: ranks for name, ranks in named.items() if ranks is not None}


def rank(
    blocks: ScoreBlocks,
    *,
    targets: Tensor | None,
    references: Tensor | None,
    members: Tensor | None,
    also_targets: Tensor | None = None,
    k: int | None = None,
) -> Ranking:
    """Rank block by block.

    Args:
        blocks: from :func:`score_blocks`, every query once.
        targets: (T,) gallery indices, or None where they are secret.
        references: (T,) gallery indices taken out of the ranking (CIRR), or None (FashionIQ).
        members: (T, K) gallery indices of the image sets (CIRR), or None. They need ``references``.
        also_targets: (T, A) gallery indices of the other targets (CIRCO), -1 where there are fewer; or None.
        k: how many candidates a query to return, and with them the image sets' order; None for neither.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in ("numbers", *Ranking._fields)}
    for numbers, scores in blocks:
        target, reference, group = (x if x is None else x[numbers] for x in (targets, references, members))
        rows["numbers"].append(numbers)
        if target is not None:
            rows["ranks"].append(target_ranks(scores, target, reference))
        if target is not None and reference is not None and group is not None:
            rows["set_ranks"].append(subset_ranks(scores, target, reference, group))
        if also_targets is not None:
            rows["also_ranks"].append(ranks_of_others(scores, also_targets[numbers], reference))
        if k is not None:
            rows["top"].append(top_k(scores, k, reference))
        if k is not None and reference is not None and group is not None:
            rows["set_order"].append(subset_order(scores, reference, group))
    order = torch.cat(rows.pop("numbers")).argsort()
    return Ranking(**{name: torch.cat(parts)[order] if parts else None for name, parts in rows.items()})


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


def ranks_of_others(scores: Tensor, others: Tensor, references: Tensor | None = None) -> Tensor:
    """Rank of each of a query's other targets in the whole gallery, from 0: as ``others``, (T, A), -1 kept.

    Few queries have many, so that only the rows that have one more are looked at again.
    """
    ranks = torch.full_like(others, -1)
    for place in range(others.shape[1]):
        rows = (others[:, place] >= 0).nonzero()[:, 0]
        own = None if references is None else references[rows]
        ranks[rows, place] = target_ranks(scores[rows], others[rows, place], own)
    return ranks


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
    k = min(k, available)
    found = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    best = found.indices[:, :k]
    # Where the last one in equals the first one out, topk does not say which it takes: there sort the row.
    cut = (found.values[:, k - 1 : k] == found.values[:, k : k + 1]).any(dim=1)
    best[cut] = scores[cut].sort(dim=1, descending=True, stable=True).indices[:, :k]
    best = best.sort(dim=1).values  # by gallery index, so that a stable sort breaks ties by it
    return best.gather(1, scores.gather(1, best).sort(dim=1, descending=True, stable=True).indices)


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


def average_precision(ranks: Tensor, also_ranks: Tensor, k: int) -> Tensor:
    """Average precision at k of each query from the ranks of all its targets: (T,) float64, from 0 to 1.

    It is the sum, over the targets among the first k, of the precision down to each, divided by the number
    of targets or by k, whichever is less: 1 where the first candidates are all targets.

    Args:
        ranks: (T,) of one target, from 0.
        also_ranks: (T, A) of the others, -1 where a query has fewer.
        k: how many candidates count.
    """
    every = torch.cat([ranks[:, None], also_ranks], dim=1)
    targets = (every >= 0).sum(dim=1)
    places = every.masked_fill(every < 0, k).sort(dim=1).values  # what fills up is found nowhere
    found = torch.arange(1, every.shape[1] + 1, dtype=torch.float64)  # targets down to each
    precision = torch.where(places < k, found / (places + 1), 0.0)
    return precision.sum(dim=1) / targets.clamp(max=k)


def recall(ranks: Tensor, k: int) -> float:
    """Recall at k in percent: the share of targets among the first k."""
    return 100 * (ranks < k).double().mean().item()
