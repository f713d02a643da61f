"""The second stage: a re-ranker looks again at what the first stage ranks first.

Each image that is a candidate of any query is read once; its keys and values serve all the queries that it is
a candidate of. Memory does not grow with the gallery, but for a number a pair of query and candidate.

Shapes: T queries, G gallery images, K candidates a query, M members of an image set, P pairs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from sprc.data.datasets import ImageDataset, SteadyLoader, batches_of_rank
from sprc.data.images import Loader
from sprc.data.split import Split
from sprc.distributed import from_main, sum_over_ranks, world_size
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.scoring.encoding import EncodedSplit, eval_mode
from sprc.scoring.ranking import Ranking, ScoreBlocks, rank, score_blocks
from sprc.scoring.recall import rank_split


class Matches(NamedTuple):
    """What a re-ranker says of the pairs of a query and an image that it has looked at."""

    top: Tensor  # (T, K) gallery indices, the first stage's best first
    pairs: Tensor  # (P,) int64, ascending: a query's number times G, plus the gallery index
    scores: Tensor  # (P,) float32, logits of a match

    def of(self, numbers: Tensor, rows: Tensor, images: int) -> Tensor:
        """The scores of (R, n) gallery indices of the queries ``numbers``, all of which it has looked at."""
        return self.scores[torch.searchsorted(self.pairs, numbers[:, None] * images + rows)]


@torch.no_grad()
def match_split(
    model: Blip2QformerCirRerank,
    split: Split,
    encoded: EncodedSplit,
    load: Loader,
    *,
    top: int,
    batch_size: int,
    num_workers: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Matches:
    """Look at each query's ``top`` first candidates, and at all of its image set.

    The reference is no candidate where the benchmark leaves it out (CIRR). Several ranks share the images.

    Args:
        model: on its device.
        split: that was encoded.
        encoded: of the first stage, with prompts.
        load: reads an image by its path.
        top: candidates a query.
        batch_size: images, and pairs, at once.
        num_workers: processes that read images.
        on_batch: is called after each batch of images, on all ranks equally often; what it raises ends it.
    """
    assert encoded.prompts is not None
    images = len(encoded.gallery)
    first = cast(Tensor, from_main(lambda: rank_split(split, encoded, k=top).top))
    pairs = pairs_to_look_at(first, encoded, images)
    scores = torch.zeros(len(pairs))
    of_image: dict[int, list[int]] = {}
    for place, image in enumerate((pairs % images).tolist()):
        of_image.setdefault(image, []).append(place)
    every_name = list(split.image_paths)
    needed = sorted(of_image)
    captions = [triplet.caption for triplet in split.triplets]
    own = batches_of_rank(len(needed), batch_size)
    dataset = ImageDataset([every_name[image] for image in needed], split.image_paths, load)
    loader = SteadyLoader(dataset, batch_sampler=own, num_workers=num_workers)
    with eval_mode(model):
        for numbers, pixels in tqdm(loader, desc=f"re-rank {split.title}", leave=False):
            keys = model.Qformer.bert.image_keys(model.encode_image(pixels.to(model.device)))
            wanted = [(row, p) for row, n in enumerate(numbers.tolist()) for p in of_image[needed[n]]]
            for start in range(0, len(wanted), batch_size):
                rows, places = map(list, zip(*wanted[start : start + batch_size], strict=True))
                queries = (pairs[places] // images).tolist()
                beside = model.beside(encoded.prompts[queries], [captions[query] for query in queries])
                chosen = [pair and (pair[0][rows], pair[1][rows]) for pair in keys]
                scores[places] = model.match(chosen, beside).cpu()
            on_batch()
        for _ in range(-(-len(needed) // (batch_size * world_size())) - len(own)):
            on_batch()  # other ranks have a batch more
    sum_over_ranks(scores)
    if not scores.isfinite().all():
        raise FloatingPointError("the re-ranker's scores are not finite: its weights hold NaN or inf")
    return Matches(first, pairs, scores)


def pairs_to_look_at(top: Tensor, encoded: EncodedSplit, images: int) -> Tensor:
    """The pairs of each query with its (T, K) candidates and its image set's members: (P,), ascending."""
    rows = torch.cat([top, encoded.members], dim=1)
    pairs = torch.arange(len(rows))[:, None] * images + rows
    is_reference = torch.zeros_like(rows, dtype=torch.bool)
    # A set's reference is in no ranking; where references are ranked there are no sets.
    is_reference[:, top.shape[1] :] = encoded.members == encoded.references[:, None]
    return pairs[~is_reference].unique()


def rank_again(
    split: Split,
    encoded: EncodedSplit,
    matches: Matches,
    *,
    temp: float,
    weight: float = 1.0,
    k: int | None = None,
) -> Ranking:
    """The ranking after the second stage, as :func:`sprc.scoring.recall.rank_split` gives the first's.

    A candidate's score is weight * match + (1 - weight) * similarity / temp, both logits. By it the first
    candidates are put in order; of equal ones the lower gallery index comes first. Behind them the first
    stage's order stays. An image set is put in order whole, by the same score.

    Args:
        split: that was encoded.
        encoded: of the first stage.
        matches: of the second, from :func:`match_split`.
        temp: the first stage's temperature.
        weight: of the second stage's score, from 0 to 1.
        k: as for :func:`sprc.scoring.ranking.rank`.
    """
    references = None if split.ranks_reference else encoded.references
    in_order = partial(rank, targets=encoded.targets, references=references)
    blocks = top_blocks(encoded, matches, temp, weight)
    ranking = in_order(blocks, members=None, also_targets=encoded.also_targets, k=k)
    if not encoded.members.shape[1]:
        return ranking
    in_sets = in_order(set_blocks(encoded, matches, temp, weight), members=encoded.members, k=k)
    return ranking._replace(set_ranks=in_sets.set_ranks, set_order=in_sets.set_order)


class Stages(NamedTuple):
    """Splits as a first stage sees them, and as a second does, if there is one."""

    splits: list[Split]
    encoded: list[EncodedSplit]
    matches: list[Matches] | None
    temp: float  # of the first stage

    def rankings(self, weight: float = 1.0, k: int | None = None) -> list[Ranking]:
        """Each split's ranking by all stages, see :func:`rank_again`."""
        if self.matches is None:
            return self.first_rankings(k)
        parts = zip(self.splits, self.encoded, self.matches, strict=True)
        return [rank_again(*part, temp=self.temp, weight=weight, k=k) for part in parts]

    def first_rankings(self, k: int | None = None) -> list[Ranking]:
        """Each split's ranking by the first stage."""
        return [rank_split(*pair, k=k) for pair in zip(self.splits, self.encoded, strict=True)]


def top_blocks(encoded: EncodedSplit, matches: Matches, temp: float, weight: float) -> ScoreBlocks:
    """Blocks as :func:`score_blocks` makes them, whose order is that after the second stage.

    Only the order tells something: a first candidate has a number above all similarities, one more than the
    candidate behind it.
    """
    for numbers, scores in score_blocks(encoded.composed, encoded.gallery):
        rows = matches.top[numbers].sort(dim=1).values  # so that a stable sort breaks ties by gallery index
        both = mixed(scores, numbers, rows, matches, temp, weight)
        ordered = rows.gather(1, both.sort(dim=1, descending=True, stable=True).indices)
        places = torch.arange(rows.shape[1], 0, -1).expand(rows.shape)
        yield numbers, scores.scatter(1, ordered, scores.amax() + places)


def set_blocks(encoded: EncodedSplit, matches: Matches, temp: float, weight: float) -> ScoreBlocks:
    """Blocks in which the members of each query's image set have the score of both stages."""
    for numbers, scores in score_blocks(encoded.composed, encoded.gallery):
        members, references = encoded.members[numbers], encoded.references[numbers]
        # The reference has no score, and is in no order: any other member stands in for it.
        others = torch.where(members == references[:, None], members.new_full((), -1), members)
        stand_in = others.amax(dim=1, keepdim=True)
        rows = torch.where(others < 0, stand_in, others)
        both = mixed(scores, numbers, rows, matches, temp, weight)
        yield numbers, scores.double().scatter(1, rows, both)


def mixed(
    scores: Tensor, numbers: Tensor, rows: Tensor, matches: Matches, temp: float, weight: float
) -> Tensor:
    """The scores of both stages for (R, n) gallery indices of the queries ``numbers``, in float64.

    ``scores`` are the first stage's similarities, (R, G). In float32 two that differ in their last bit could
    be equal once they are divided, and in another order than the first stage's.
    """
    second = matches.of(numbers, rows, scores.shape[1]).double()
    return second if weight == 1 else weight * second + (1 - weight) * scores.double().gather(1, rows) / temp
