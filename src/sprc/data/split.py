"""What a reader makes of a benchmark's files: triplets, and the split that they are in. Imports no torch."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Triplet:
    """A query (reference and modification text) and its target.

    ``caption`` is raw. ``target`` is None where the benchmark keeps it secret. ``members`` are the names of
    CIRR's image set, reference and target among them; empty elsewhere. ``training_captions`` are the
    texts of which training takes one at random, raw; empty where it takes ``caption`` (CIRR).
    ``also_targets`` are the names of the other images that count as a target: CIRR's `target_soft` names
    some, CIRCO's `gt_img_ids` all. ``aspects`` are what CIRCO's authors say that the caption asks for.
    """

    pair_id: int
    reference: str
    target: str | None
    caption: str
    members: tuple[str, ...] = ()
    training_captions: tuple[str, ...] = ()
    also_targets: tuple[str, ...] = ()
    aspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """What a split was left without: images that have no file, and how many triplets needed one of them."""

    images: tuple[str, ...] = ()  # in the order of the split file
    triplets: int = 0


@dataclass(frozen=True)
class Split:
    """One split, or one type of it: its triplets, and its gallery's images in the order of the split file."""

    name: str  # "train", "val", or the benchmark's own name of its test split
    triplets: list[Triplet]
    image_paths: dict[str, Path]
    left_out: LeftOut = LeftOut()
    dress_type: str = ""  # FashionIQ's
    # Whether a query's own reference is a candidate like any other, or is left out of its ranking.
    ranks_reference: bool = False
    # Whether its metrics count all targets of a query, or only the one it was written for (CIRCO: all).
    several_targets: bool = False

    @property
    def title(self) -> str:
        """The split's name, FashionIQ's with its type."""
        return f"{self.name}, {self.dress_type}" if self.dress_type else self.name


def triplets_of(
    splits: Iterable[Split], share: float = 1.0, seed: int = 0
) -> tuple[list[Triplet], dict[str, Path]]:
    """The triplets of ``splits`` with targets, chained, and the paths of the images they need.

    Of a ``share`` below 1 they are drawn by ``seed`` and stay in their order; a larger share of the same seed
    has those of a smaller one.
    """
    splits = list(splits)
    triplets = [triplet for split in splits for triplet in split.triplets]
    if share < 1:
        drawn = random.Random(seed).sample(range(len(triplets)), len(triplets))
        triplets = [triplets[place] for place in sorted(drawn[: max(1, round(share * len(triplets)))])]
    paths = {name: path for split in splits for name, path in split.image_paths.items()}
    return triplets, {name: paths[name] for name in images_of(triplets)}


def images_of(triplets: Iterable[Triplet]) -> list[str]:
    """The names of the triplets' references and known targets, each once, in their order."""
    return list(dict.fromkeys(name for t in triplets for name in (t.reference, t.target) if name is not None))
