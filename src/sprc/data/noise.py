"""Triplets made wrong on purpose, to learn what a training bears: the noisy-triplet papers' protocol."""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from sprc.data.split import Triplet
from sprc.errors import InputError

# What a wrong triplet has of another one: what of it is compared, and the fields that are taken.
PARTS: dict[str, tuple[Callable[[Triplet], Hashable], tuple[str, ...]]] = {
    "reference": (lambda triplet: triplet.reference, ("reference",)),
    "caption": (lambda triplet: triplet.caption, ("caption", "training_captions")),
    "target": (lambda triplet: triplet.target, ("target", "also_targets")),
}


def make_wrong(
    triplets: Sequence[Triplet], ratio: float, kind: str, seed: int
) -> tuple[list[Triplet], list[dict[str, Any]]]:
    """The triplets with a share of them wrong, in the same order, and what was changed.

    The wrong ones, round(``ratio`` * their number), are drawn by ``seed``. With ``kind`` "target" their
    targets change places. With "mix" a third of them have other references, a third other captions, and a
    third other targets: that is the protocol of TME (CVPR 2025).

    A triplet never keeps its own, as far as that can be: where more than half of those that change places
    have one target, too few others are there. Targets are told apart by name, not by looking at the images;
    by chance a triplet may be given one that is right, or its own reference.

    Returns:
        The triplets, and a row each that has changed: `number` (its place, from 0), `pair_id`, `part`,
        `before`, `after`.

    Raises:
        InputError: the ratio is too small for two triplets to change places.
    """
    wrong = list(triplets)
    changes: list[dict[str, Any]] = []
    if ratio == 0:
        return wrong, changes
    draw = random.Random(f"{seed} noise")
    drawn = draw.sample(range(len(triplets)), round(ratio * len(triplets)))
    thirds = [len(drawn) * third // 3 for third in range(4)]
    groups = {part: drawn[a:b] for part, a, b in zip(PARTS, thirds, thirds[1:], strict=False)}
    if kind == "target":
        groups = {"target": drawn}
    if min(map(len, groups.values())) < 2:
        raise InputError(
            f"--noise-ratio {ratio} of {len(triplets):,} triplets is {len(drawn)}, too few to change places; "
            "give more, or leave the flag out"
        )
    for part, places in groups.items():
        key, fields = PARTS[part]
        others = deranged([key(triplets[place]) for place in places], draw)
        for place, other in zip(places, others, strict=True):
            before, giver = triplets[place], triplets[places[other]]
            if key(before) != key(giver):
                wrong[place] = replace(before, **{field: getattr(giver, field) for field in fields})
                row = {"number": place, "pair_id": before.pair_id, "part": part}
                changes.append({**row, "before": key(before), "after": key(giver)})
    return wrong, sorted(changes, key=lambda row: row["number"])


def deranged(values: Sequence[Hashable], draw: random.Random) -> list[int]:
    """For each value the place of the one that it is exchanged for: a random permutation.

    Equal values are not exchanged for each other, but for as few as possible where one is more than half of
    them all.
    """
    places = list(range(len(values)))
    draw.shuffle(places)
    groups: dict[Hashable, list[int]] = {}
    for place in places:
        groups.setdefault(values[place], []).append(place)
    # Equal ones side by side, all moved on by the largest group's length: so each leaves its own group, and
    # comes round to it again only where that group is more than half.
    ordered = [place for group in groups.values() for place in group]
    shift = max(map(len, groups.values()))
    found = [0] * len(values)
    for place, other in zip(ordered, ordered[shift:] + ordered[:shift], strict=True):
        found[place] = other
    return found
