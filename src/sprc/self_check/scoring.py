"""Encoding, ranking and recall of a small made split on the device against the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from torch import Tensor

from sprc.data.cirr import CirrSplit
from sprc.data.datasets import Triplet
from sprc.scoring.encoding import EncodedSplit, encode_split
from sprc.scoring.ranking import block_scores
from sprc.scoring.recall import metrics, rank_split
from sprc.self_check.report import FAIL, OK, Line
from sprc.self_check.setting import MadeTriplets, Setting, caption

IMAGES, QUERIES, MEMBERS = 24, 48, 6
# Two candidates whose similarities differ by less may change places: float32 sums in another order, and a
# gallery in float16 may round to the neighbour, 2^-11 of a value, where such a sum falls on the other side.
TIES = {"float32": 2e-5, "float16": 2e-3}
OFF_BY = {"float32": 1e-4, "float16": 2e-3}


def check_scoring(setting: Setting) -> Iterator[Line]:
    """Similarities, ranks and metrics, the gallery in float32 and in float16."""
    model = setting.model()
    triplets = MadeTriplets(model.config, IMAGES)
    names = [str(number) for number in range(IMAGES)]
    split = CirrSplit("val", made_queries(names), {name: Path(name) for name in names})

    def load(path: Path) -> Tensor:
        return triplets[int(path.name)]["image"]

    for dtype in ("float32", "float16"):
        wanted, found = (
            encode_split(one, split, load, batch_size=10, num_workers=0, gallery_dtype=dtype)
            for one in (model, setting.placed(model))
        )
        yield compare(split, wanted, found, dtype)


def made_queries(names: list[str]) -> list[Triplet]:
    """Queries of every reference, each in a set of six."""
    queries = []
    for number in range(QUERIES):
        members = [names[(number + step) % len(names)] for step in range(MEMBERS)]
        queries.append(Triplet(number, members[0], members[1 + number % 5], caption(number), tuple(members)))
    return queries


def compare(split: CirrSplit, wanted: EncodedSplit, found: EncodedSplit, dtype: str) -> Line:
    """Equal but for ties: a rank may move by as many places as candidates are level with the target."""
    scores = block_scores(wanted.composed, wanted.gallery)
    error = float((block_scores(found.composed, found.gallery) - scores).abs().max())
    rankings = [rank_split(split, encoded) for encoded in (wanted, found)]
    ranks = [cast(Tensor, ranking.ranks) for ranking in rankings]
    moved = (ranks[0] - ranks[1]).abs()
    level = level_with_target(scores, cast(Tensor, wanted.targets), TIES[dtype])
    wrong = int((moved > level).sum())
    values = [metrics([split], [ranking]) for ranking in rankings]
    difference = max(abs(values[0][name] - values[1][name]) for name in values[0])
    figures = (
        f"similarities apart by {error:.1e}, bound {OFF_BY[dtype]:.1e}; {int((moved > 0).sum())} of "
        f"{QUERIES} ranks moved, {wrong} of them without a tie; recall apart by {difference:.2f}"
    )
    name = f"scoring, gallery {dtype}"
    if error <= OFF_BY[dtype] and not wrong:
        return Line(OK, name, figures)
    return Line(FAIL, name, figures, "score with --device cpu, and report it with the card's name")


def level_with_target(scores: Tensor, targets: Tensor, tie: float) -> Tensor:
    """How many other candidates are within ``tie`` of each query's target: (T,)."""
    own = scores.gather(1, targets[:, None])
    return ((scores - own).abs() <= tie).sum(dim=1) - 1
