"""Scenes and descriptions of them, for image-text pre-training; and the scenes that it must leave out."""

import random
import re
from collections.abc import Iterable
from itertools import product, takewhile

from sprc.data.synthetic import cirr, fashioniq, statements
from sprc.data.synthetic.fashioniq import HINTS, STATEMENTS, FashionIQConfig
from sprc.data.synthetic.scenes import (
    CELL_NAMES,
    CELLS,
    COLORS,
    NAMING,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEMPLATES,
    Scene,
    SceneObject,
    alike,
    cell_name,
    group_name,
    object_phrase,
)
from sprc.data.synthetic.splits import SyntheticConfig, draw_parts

# By whether the first words are of several objects.
OPENINGS = {False: ("", "", "there is ", "a picture of "), True: ("", "", "there are ", "a picture of ")}
JOINTS = (" with ", " and ", " and ", " and also ", " and there is ")  # the first between the first two only
NEXT_TO = "next to"


def random_scene(rng: random.Random) -> Scene:
    """A valid scene of two to six objects; its background is one of the made benchmarks', mostly light."""
    cells = rng.sample(CELLS, rng.randint(2, 6))
    looks = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], len(cells))
    things = (
        SceneObject(cell, *look, rng.choice(list(SIZES))) for cell, look in zip(cells, looks, strict=True)
    )
    (light,), others = cirr.SHADES.values(), tuple(fashioniq.SHADES.values())
    return Scene(tuple(sorted(things)), rng.randint(*(light if rng.random() < 0.7 else rng.choice(others))))


def describe(scene: Scene, rng: random.Random) -> str:
    """A random description of ``scene``, such as "a large red circle in the top left and a star".

    It is of all objects or of a random part, at least two; each with some of its attributes and mostly with
    its place. "below" and the like mean the same row or column, "directly below" and "next to" the next
    cell, and a number is that of all such objects of the scene. Lower case, no punctuation; true of the
    scene, and of its objects alone: the background is never told.
    """
    count = len(scene.objects)
    things = rng.sample(scene.objects, count if rng.random() < 0.5 else rng.randint(min(2, count), count))
    parts = []
    counted, text = _group(scene, rng) if rng.random() < 0.25 else ([], "")
    if counted:
        opening = rng.choice(OPENINGS[True])
        parts.append(text)
        things = [thing for thing in things if thing not in counted]
    elif count > 1 and rng.random() < 0.1:
        opening = f"{rng.choice(OPENINGS[True])}{NUMBERS[count]} objects including "
    else:
        opening = rng.choice(OPENINGS[False])
    told: list[SceneObject] = []
    while things:
        thing = things.pop()
        told.append(thing)
        text, fate = _with_article(thing, scene, rng), rng.random()
        others = [other for other in scene.objects if other not in counted and _relation(thing, other, rng)]
        if others and fate < 0.35:
            other = rng.choice(others)
            known = other in told
            anchor = object_phrase(other, scene, rng, False) if known else _with_article(other, scene, rng)
            text += f" {_relation(thing, other, rng)} {anchor}"
            told.append(other)
            things = [waiting for waiting in things if waiting != other]
        elif fate < 0.85:
            text += f" in the {cell_name(thing.cell)}"
        parts.append(text)
    joints = [rng.choice(JOINTS if i == 0 else JOINTS[1:]) for i in range(len(parts) - 1)]
    return opening + parts[0] + "".join(joint + part for joint, part in zip(joints, parts[1:], strict=True))


def _group(scene: Scene, rng: random.Random) -> tuple[list[SceneObject], str]:
    """All objects of some look that several have, and "two red objects"; nothing if all differ."""
    groups = []
    for names, thing in product(NAMING, scene.objects):
        found = alike(thing, names, scene)
        if len(found) > 1:
            groups.append((found, f"{NUMBERS[len(found)]} {group_name(thing, names, many=True)}"))
    return rng.choice(groups) if groups else ([], "")


def _with_article(thing: SceneObject, scene: Scene, rng: random.Random) -> str:
    """The object by a random part of its look: "a small red star"; "one star" where there is no other."""
    names = tuple(name for name in ("size", "color", "shape") if rng.random() < 0.8)
    name = group_name(thing, names)
    if len(alike(thing, names, scene)) == 1 and rng.random() < 0.1:
        return f"{NUMBERS[1]} {name}"
    return f"{'an' if name == 'object' else 'a'} {name}"


def _relation(thing: SceneObject, other: SceneObject, rng: random.Random) -> str:
    """How ``thing`` lies to ``other``: "below", "directly below" or "next to"; empty if in no such way."""
    down, right = thing.cell[0] - other.cell[0], thing.cell[1] - other.cell[1]
    if (down == 0) == (right == 0):  # itself, or neither in its row nor in its column
        return ""
    distance = abs(down + right)
    relation = RELATIONS[down // distance, right // distance]
    return rng.choice((relation, f"directly {relation}", NEXT_TO)) if distance == 1 else relation


def held_out_scenes() -> set[Scene]:
    """The scenes of val and test that both makers make by default, drawn without writing or rendering."""
    found: set[Scene] = set()
    for config, shades in ((SyntheticConfig(), cirr.SHADES), (FashionIQConfig(), fashioniq.SHADES)):
        for part in takewhile(lambda part: part.split != "train", draw_parts(config, shades)):
            found.update(
                scene for family in part.families for rows in family for row in rows for scene in row
            )
    return found


def words() -> list[str]:
    """Every word of both makers' captions and of the descriptions, sorted."""
    by_kind = (TEMPLATES, STATEMENTS, HINTS, statements.NOT_BUT, statements.CLAUSES)
    groups: list[Iterable[str]] = [texts for templates in by_kind for texts in templates.values()]
    groups += [
        statements.GONE,
        statements.GONE_BUT,
        statements.COUNTED,
        statements.RECOUNTED,
        statements.FEWER,
    ]
    groups += [statements.ORDERS_JOINED, statements.CLAUSES_JOINED, *CELL_NAMES]
    groups += [COLORS, SHAPES, SIZES, RELATIONS.values(), OPENINGS[False], OPENINGS[True], JOINTS, [NEXT_TO]]
    groups.append(NUMBERS[1:])
    groups.append(["directly the in to a an object objects including instead of"])
    groups.append(f"{shape}{'es' if shape.endswith('s') else 's'}" for shape in SHAPES)
    texts = [text for group in groups for text in group]
    return sorted({word for text in texts for word in re.sub(r"{\w*}", " ", text).split()})
