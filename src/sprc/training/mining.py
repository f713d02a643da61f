"""Hard negatives: each training query ranks the training images, and some of them are drawn by a rule.

Kwak et al. 2025, QuRe: Query-Relevant Retrieval through Hard Negative Sampling in Composed Image Retrieval
(ICML). The best images after the target are often right, too, and the last ones teach nothing. Between two
steep drops of the score lies what looks near and is not.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sprc.distributed import from_main
from sprc.errors import InputError
from sprc.scoring.encoding import EncodedSplit
from sprc.scoring.ranking import score_blocks
from sprc.training.true_targets import TrueTargets, excluded


@dataclass(frozen=True)
class Miner:
    """Draws each query's negatives for some epochs; the same ones for any number of ranks.

    A query's candidates are all training images but its true targets and their copies, and but its reference
    where the benchmark's own ranking leaves that out (CIRR's).
    """

    targets: TrueTargets
    rule: str  # "qure", "top" or "random", see :func:`pools`
    per_query: int  # P
    every: int  # the epochs that are drawn for at once, M
    seed: int
    ranks_reference: bool

    def draw(self, encoded: EncodedSplit, epoch: int) -> Tensor:
        """Rows of the training images, (M, T, P) int32, for the M epochs from ``epoch`` on.

        From a pool of at least P a query draws each image once an epoch; from a smaller one with repetition.

        Raises:
            InputError: a query has no candidate at all.
        """
        return from_main(lambda: self._draw(encoded, epoch))

    def _draw(self, encoded: EncodedSplit, epoch: int) -> Tensor:
        drawn = torch.empty(self.every, len(encoded.composed), self.per_query, dtype=torch.int32)
        for query, pool in self._pools(encoded):
            for number in range(self.every):
                rows = self._draw_from(pool, f"mined {self.seed} {epoch + number} {query}")
                drawn[number, query] = torch.tensor(rows)
        return drawn

    def _draw_from(self, pool: Tensor, seed: str) -> list[int]:
        if self.rule == "top":  # what is best twice over is no draw
            places = [place % len(pool) for place in range(self.per_query)]
        else:
            generator = random.Random(seed)
            whole = range(len(pool))
            few = len(pool) < self.per_query
            places = (generator.choices if few else generator.sample)(whole, k=self.per_query)
        return pool[places].tolist()

    def _pools(self, encoded: EncodedSplit) -> Iterator[tuple[int, Tensor]]:
        """Each query's number and the images that it may draw."""
        images = len(encoded.gallery)
        for numbers, scores in score_blocks(encoded.composed, encoded.gallery):
            own = self.targets.own[numbers]
            best = scores.gather(1, own[:, None])
            out = excluded(self.targets.all[numbers], images)
            if not self.ranks_reference:
                out.scatter_(1, encoded.references[numbers, None], True)
            before = (scores > best) | ((scores == best) & (torch.arange(images) < own[:, None]))
            places = (before & ~out).sum(dim=1)
            counts = images - out.sum(dim=1)
            ranked = scores.masked_fill(out, -torch.inf).sort(dim=1, descending=True, stable=True)
            for row, query in enumerate(numbers.tolist()):
                count = int(counts[row])
                if count == 0:
                    raise InputError(
                        f"--negatives: of the {images} training images none is a negative of query {query}; "
                        "give --negatives batch, or more images"
                    )
                pool = pools(self.rule, ranked.values[row, :count], int(places[row]))
                yield query, ranked.indices[row, :count][pool]


def pools(rule: str, scores: Tensor, place: int) -> slice:
    """Which of a query's ranked candidates its negatives are drawn from.

    "qure": let s_1 >= s_2 >= ... >= s_n be the scores of the candidates after the target, and d_j = s_j -
    s_(j+1) the drops between neighbours, j = 1 ... n - 1. Let p < q be the places of the two largest drops,
    of equal ones the first. The pool is what lies between them: candidates p + 1 ... q, never none. With
    fewer than two drops it is all that comes after the target; where nothing does, all candidates.

    "top": all candidates, of which the best are taken. "random": all candidates.

    Args:
        rule: its name.
        scores: (C,) of the candidates, the target not among them, best first.
        place: of the target: how many candidates come before it.
    """
    if rule != "qure" or place == len(scores):
        return slice(0, len(scores))
    after = scores[place:]
    if len(after) < 3:
        return slice(place, len(scores))
    drops = after[:-1] - after[1:]
    first = int(drops.argmax())  # argmax takes the first of equal ones
    drops[first] = -1
    second = int(drops.argmax())
    low, high = sorted((first, second))
    return slice(place + low + 1, place + high + 1)
