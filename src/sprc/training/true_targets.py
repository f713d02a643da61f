"""Which training images are no negatives of a query: its target, its other targets, and copies of these.

A batch rarely shows a query one of them; a bank of all images always does.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sprc.data.captions import process_caption
from sprc.data.split import Triplet
from sprc.distributed import from_main
from sprc.errors import InputError
from sprc.files import file_digest


class TrueTargets(NamedTuple):
    """Rows of a list of images, for each of T triplets."""

    own: Tensor  # (T,), of its target
    # (T, M): those that are no negatives of its query, its own target first; what is too few is filled with
    # the number of images, which is no row.
    all: Tensor


def true_targets(triplets: list[Triplet], image_paths: dict[str, Path]) -> TrueTargets:
    """The rows, in ``image_paths``, of what each triplet's query asks for.

    These are its target; the targets of all triplets of the same reference and caption, as the tokenizer sees
    it; what CIRR's `target_soft` gives more than 0; and whatever file has the same bytes as one of them. The
    same bytes make the same reference, too.
    """
    copies = from_main(lambda: first_copies(image_paths))
    rows = {name: row for row, name in enumerate(image_paths)}
    same_bytes = defaultdict(list)
    for name, first in copies.items():
        same_bytes[first].append(rows[name])
    queries = [(copies[triplet.reference], process_caption(triplet.caption)) for triplet in triplets]
    asked_for: dict[tuple[str, str], set[str]] = defaultdict(set)
    for query, triplet in zip(queries, triplets, strict=True):
        names = (triplet.target, *triplet.also_targets)
        asked_for[query] |= {copies[name] for name in names if name in copies}
    own, found = [], []
    for query, triplet in zip(queries, triplets, strict=True):
        assert triplet.target is not None  # or it could not be trained on
        own.append(rows[triplet.target])
        of_all = {row for first in asked_for[query] for row in same_bytes[first]}
        found.append([own[-1], *sorted(of_all - {own[-1]})])
    longest = max(map(len, found))
    filled = [row + [len(rows)] * (longest - len(row)) for row in found]
    return TrueTargets(torch.tensor(own), torch.tensor(filled))


def first_copies(image_paths: dict[str, Path]) -> dict[str, str]:
    """For each image the name of the first one whose file has the same bytes, in most cases itself.

    Only files of one size are read. Raises :class:`InputError` for a file that cannot be.
    """
    by_size = defaultdict(list)
    found = {}
    try:
        for name, path in image_paths.items():
            by_size[path.stat().st_size].append(name)
        for names in by_size.values():
            first: dict[str, str] = {}
            for name in names:
                key = file_digest(image_paths[name]) if len(names) > 1 else ""
                found[name] = first.setdefault(key, name)
    except OSError as error:
        raise InputError(f"an image cannot be read ({error}); restore it from a copy") from error
    return found


def excluded(rows: Tensor, images: int) -> Tensor:
    """(B, M) rows, as :class:`TrueTargets` has them, to a (B, images) mask, True at them."""
    mask = torch.zeros(len(rows), images + 1, dtype=torch.bool, device=rows.device)
    return mask.scatter_(1, rows, True)[:, :images]
