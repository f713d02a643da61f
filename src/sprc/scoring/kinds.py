"""Recall by kind of edit; only the built-in data tell the kinds."""

from collections.abc import Sequence

import torch

from sprc.data.edits import KINDS
from sprc.scoring.ranking import Ranking, recall

ALL = "all"
# What can be told of a kind: whose rank, and k.
CUTS = {
    "recall_at1": ("ranks", 1),
    "recall_at5": ("ranks", 5),
    "recall_at10": ("ranks", 10),
    "group_recall_at1": ("set_ranks", 1),
}


def recall_by_kind(
    kinds: Sequence[str], ranking: Ranking, names: Sequence[str]
) -> list[dict[str, str | int | float]]:
    """A row a kind that has a query, in the order of ``KINDS``, and one of all queries at the end.

    Args:
        kinds: of each of the T queries, one of ``KINDS``.
        ranking: of the T queries, with the ranks that ``names`` need.
        names: of ``CUTS``.

    Returns:
        `kind`, `queries`, and under each name the recall in percent.
    """
    rows = []
    for kind in (*(kind for kind in KINDS if kind in kinds), ALL):
        chosen = torch.tensor([kind in (own, ALL) for own in kinds])
        row: dict[str, str | int | float] = {"kind": kind, "queries": int(chosen.sum())}
        for name in names:
            field, k = CUTS[name]
            row[name] = recall(getattr(ranking, field)[chosen], k)
        rows.append(row)
    return rows
