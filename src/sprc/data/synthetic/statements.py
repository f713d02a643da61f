"""Captions that published models fail at: what is no more, how many there are, and two edits at once.

A caption of the first two kinds says something of the target and seldom what to do. It is written only where,
of all scenes of the family that are one edit from the reference, it is true of the target alone; nor is it
true of the reference.
"""

import random
from collections.abc import Iterable
from itertools import permutations, product

from sprc.data.synthetic.scenes import (
    NAMING,
    NUMBERS,
    Edit,
    Scene,
    SceneObject,
    alike,
    edit_between,
    fill,
    group_name,
    orders,
)

LONGEST = 30  # words: with the two marks at its ends a caption stays within the models' 32 tokens

# Words as in scenes.TEMPLATES; {old} is the edited attribute or the place before, {group} the look of an
# object that is gone, or of those that are counted, {number} how many these are, {former} how many they were.
NOT_BUT = {
    "color": (
        "{it} is not {old} any more but {new}",
        "{it} is no longer {old} but {new}",
        "{it} should not be {old} but {new}",
    ),
    "shape": (
        "{it} is not a {old} any more but a {new}",
        "{it} is no longer a {old} but a {new}",
        "{it} should not be a {old} but a {new}",
    ),
    "move": (
        "{it} is not {old} any more but {place}",
        "{it} is no longer {old} but {place}",
        "{it} should not be {old} but {place}",
    ),
}
NOT_BUT["size"] = NOT_BUT["color"]
GONE = (
    "no {group} left",
    "no {group} any more",
    "there is no {group} any more",
    "there should be no {group}",
    "not a single {group} is left",
    "the scene no longer has a {group}",
    "same scene but without any {group}",
)
GONE_BUT = (
    "there is no {group} any more but {new}",
    "no {group} but {new}",
    "not a single {group} but {new}",
)
COUNTED = (
    "{number} {group}",
    "there should be {number} {group}",
    "exactly {number} {group}",
    "{number} {group} in all",
    "make it {number} {group}",
    "same scene but with {number} {group}",
)
RECOUNTED = ("{number} {group} instead of {former}", "not {former} but {number} {group}")
FEWER = ("only {number} {group} {is_} left", "only {number} {group}", "keep only {number} {group}")

# Two clauses: both from scenes.TEMPLATES, those that begin with a verb, or both of CLAUSES.
ORDERS_JOINED = ("{} and {}", "{} and also {}", "{} while you {}")
NO_VERB = ("{it}", "same scene", "there")
CLAUSES = {
    "color": ("{it} is {new}", "{it} has become {new}"),
    "shape": ("{it} is a {new}", "{it} has become a {new}"),
    "size": ("{it} is {new}", "{it} has become {new}"),
    "add": ("there is a {thing} {place}", "a {thing} is {place}"),
    "remove": ("{it} is gone", "{it} is missing"),
    "move": ("{it} is {place}", "{it} has moved {goal}"),
}
CLAUSES_JOINED = ("{} and {}", "{} while {}", "{} and also {}", "same scene but {} and {}")


def rivals(reference: Scene, target: Scene, family: Iterable[Scene]) -> list[Scene]:
    """The scenes of ``family`` besides ``target`` that are one edit from ``reference``."""
    found = []
    for scene in family:
        try:
            edit_between(reference, scene)
        except ValueError:
            continue
        if scene != target:
            found.append(scene)
    return found


def negation_caption(edit: Edit, reference: Scene, others: list[Scene], rng: random.Random) -> str | None:
    """Write what is no more: "no red object left", "the star is not red any more but blue".

    What it says is false of ``reference``, and of all ``others``: the scenes besides the target that could
    be meant. None where there are no such words, as for an added object.
    """
    before, after = edit.before, edit.after
    if before is None:
        return None
    if after is None:
        groups = [
            group_name(before, names)
            for names in NAMING
            if len(alike(before, names, reference)) == 1
            and all(alike(before, names, other) for other in others)
        ]
        return rng.choice(GONE).format(group=rng.choice(groups)) if groups else None
    groups = [
        group_name(before, names)
        for names in NAMING
        if {edit.kind, "shape"} <= {*names}
        and len(alike(before, names, reference)) == 1
        and all(
            alike(before, names, other) or not alike(after, (edit.kind, "shape"), other) for other in others
        )
    ]
    if groups and rng.random() < 0.6:
        new = f"a {after.shape}" if edit.kind == "shape" else f"a {getattr(after, edit.kind)} one"
        return rng.choice(GONE_BUT).format(group=rng.choice(groups), new=new)
    return fill(rng.choice(NOT_BUT[edit.kind]), edit, reference, (), rng)


def counting_caption(
    edit: Edit, reference: Scene, target: Scene, others: list[Scene], rng: random.Random
) -> str | None:
    """Write how many objects of some look there are: "two circles", "only one star is left".

    The number is that of ``target``, and neither that of ``reference`` nor that of any of ``others``: the
    scenes besides the target that could be meant. None where no look has such numbers, or has none of either.
    """
    found: list[tuple[SceneObject, tuple[str, ...], int, int]] = []
    for thing, names in product((edit.before, edit.after), ((), *NAMING)):
        if thing is None or {"color", "shape"} <= {*names}:  # of which there is one at most
            continue
        count = len(alike(thing, names, target))
        former = len(alike(thing, names, reference))
        if 0 < former != count > 0 and all(len(alike(thing, names, other)) != count for other in others):
            found.append((thing, names, former, count))
    if not found:
        return None
    thing, names, former, count = rng.choice(found)
    templates = FEWER if count < former and rng.random() < 0.5 else COUNTED + RECOUNTED
    return rng.choice(templates).format(
        number=NUMBERS[count],
        former=NUMBERS[former],
        group=group_name(thing, names, many=count > 1),
        is_="are" if count > 1 else "is",
    )


def double_caption(edits: tuple[Edit, Edit], reference: Scene, rng: random.Random) -> str:
    """Write two edits of ``reference`` in one sentence: "make the red circle blue and remove the star".

    Whichever is done first, the words for the other still fit: its objects are named so that they fit no
    object that the first one makes, and its place is by no object that the first one changes.
    """
    while True:
        ordered = rng.random() < 0.6
        parts = []
        for edit, other in permutations(rng.sample(edits, 2)):
            seen = Scene((*reference.objects, *((other.after,) if other.after else ())))
            verbs = [text for text in orders(edit) if not text.startswith(NO_VERB)]
            changed = tuple(thing for thing in (other.before, other.after) if thing)
            parts.append(fill(rng.choice(verbs if ordered else CLAUSES[edit.kind]), edit, seen, changed, rng))
        caption = rng.choice(ORDERS_JOINED if ordered else CLAUSES_JOINED).format(*parts)
        if len(caption.split()) <= LONGEST:
            return caption
