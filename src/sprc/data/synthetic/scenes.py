"""Scenes of colored shapes on a 3 x 3 grid: what they hold, how they are drawn, and what an edit is called.

The edits are those of CSS (Color, Shape, Size; Vo et al., "Composing Text and Image for Image Retrieval",
CVPR 2019), and adding, removing and moving an object.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 39, 40),
    "green": (34, 139, 34),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 0),
    "purple": (140, 50, 170),
    "cyan": (0, 190, 210),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
# Radius in sides of a cell; at 0.46 the star, the widest shape, still stays in its cell.
SIZES = {"small": 0.19, "medium": 0.32, "large": 0.46}
CELL_NAMES = (
    ("top left", "top center", "top right"),
    ("middle left", "center", "middle right"),
    ("bottom left", "bottom center", "bottom right"),
)
CELLS = tuple(product(range(3), range(3)))
SCALE = 4  # Pillow's polygons have hard edges: they are drawn large, and 4 x 4 pixels become their mean
# Attributes that may name an object, where no other object of the scene shares them all.
NAMING = (
    ("color", "shape"),
    ("shape",),
    ("color",),
    ("size", "shape"),
    ("size", "color"),
    ("size",),
    ("size", "color", "shape"),
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
RELATIONS = {(1, 0): "below", (-1, 0): "above", (0, 1): "to the right of", (0, -1): "to the left of"}

# {it} is the edited object as the reference shows it, {new} its new color, shape or size, {thing} an added
# object, {place} as in "in the center" or "below the star", {goal} the same with "to the center".
TEMPLATES = {
    "color": (
        "make {it} {new}",
        "change the color of {it} to {new}",
        "paint {it} {new}",
        "turn {it} {new}",
        "{it} should be {new}",
        "same scene but {it} is {new}",
    ),
    "shape": (
        "turn {it} into a {new}",
        "make {it} a {new}",
        "change the shape of {it} to a {new}",
        "{it} should be a {new}",
        "replace {it} with a {new} of the same color and size",
        "same scene but {it} is a {new}",
    ),
    "size": (
        "make {it} {new}",
        "change the size of {it} to {new}",
        "resize {it} to {new}",
        "{it} should be {new}",
        "same scene but {it} is {new}",
    ),
    "smaller": ("make {it} smaller", "shrink {it}"),
    "larger": ("make {it} larger", "make {it} bigger", "enlarge {it}"),
    "add": (
        "add a {thing} {place}",
        "put a {thing} {place}",
        "there should be a {thing} {place}",
        "draw a {thing} {place}",
        "same scene plus a {thing} {place}",
    ),
    "remove": (
        "remove {it}",
        "take away {it}",
        "delete {it}",
        "get rid of {it}",
        "same scene without {it}",
    ),
    "move": (
        "move {it} {goal}",
        "shift {it} {goal}",
        "put {it} {place}",
        "place {it} {place}",
        "{it} should be {place}",
    ),
}


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object: its cell (row, col) from the top left, and its three attributes, by name."""

    cell: tuple[int, int]
    color: str
    shape: str
    size: str


@dataclass(frozen=True)
class Scene:
    """The objects of one image, sorted by cell; ``shade`` is the grey of the background, not compared."""

    objects: tuple[SceneObject, ...]
    shade: int = field(default=240, compare=False)

    @cached_property
    def things(self) -> frozenset[SceneObject]:
        """The objects as a set, which knows their hashes."""
        return frozenset(self.objects)

    def is_valid(self) -> bool:
        """At least two objects, each in its own cell, no two alike in color and shape."""
        cells = {thing.cell for thing in self.objects}
        looks = {(thing.color, thing.shape) for thing in self.objects}
        return len(cells) == len(looks) == len(self.objects) >= 2


@dataclass(frozen=True)
class Edit:
    """What turns one scene into another: ``before`` becomes ``after`` (None where there is no object)."""

    kind: str
    before: SceneObject | None
    after: SceneObject | None

    @property
    def cells(self) -> list[tuple[int, int]]:
        """The grid cells (row, col) that the edit concerns: two for a move, else one."""
        return list(dict.fromkeys(thing.cell for thing in (self.before, self.after) if thing))


def edit_between(reference: Scene, target: Scene) -> Edit:
    """The one edit between two scenes; ``ValueError`` if they differ in none or in more than one."""
    before, after = [*reference.things - target.things], [*target.things - reference.things]
    if len(before) == 0 and len(after) == 1:
        return Edit("add", None, after[0])
    if len(before) == 1 and len(after) == 0:
        return Edit("remove", before[0], None)
    if len(before) == len(after) == 1:
        kinds = {"cell": "move", "color": "color", "shape": "shape", "size": "size"}
        changed = [kinds[name] for name in kinds if getattr(before[0], name) != getattr(after[0], name)]
        if len(changed) == 1:
            return Edit(changed[0], before[0], after[0])
    raise ValueError("not one edit apart", reference, target)  # put into words where it is shown


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape (not the circle) about (x, y), in pixels; all shapes look about equally large."""
    if shape == "square":
        side = 0.84 * radius
        corners = [(-side, -side), (side, -side), (side, side), (-side, side)]
    elif shape == "diamond":
        # Narrow, so that it is no turned square.
        corners = [(0, -1.06 * radius), (0.66 * radius, 0), (0, 1.06 * radius), (-0.66 * radius, 0)]
    elif shape == "triangle":
        corners = [(0, -0.95 * radius), (1.02 * radius, 0.8 * radius), (-1.02 * radius, 0.8 * radius)]
    elif shape == "cross":
        arm, end = 0.3 * radius, 0.98 * radius
        corners, quarter = [], [(-arm, -end), (arm, -end), (arm, -arm)]
        for _ in range(4):
            corners += quarter
            quarter = [(-dy, dx) for dx, dy in quarter]
    elif shape == "star":
        corners = []
        for step in range(10):
            length = 1.08 * radius * (1.0 if step % 2 == 0 else 0.42)
            angle = math.pi * (step / 5 - 0.5)
            corners.append((length * math.cos(angle), length * math.sin(angle)))
    else:
        raise ValueError(f"no outline for {shape}")
    return [(x + dx, y + dy) for dx, dy in corners]


def render(scene: Scene, image_size: int) -> Image.Image:
    """Draw a scene as an RGB image of ``image_size`` x ``image_size`` pixels, a cell a third of the side."""
    background = (scene.shade,) * 3
    if image_size % 3:  # a pixel may lie in two cells
        image = Image.new("RGB", (image_size * SCALE, image_size * SCALE), background)
        draw = ImageDraw.Draw(image)
        for thing in scene.objects:
            draw_shape(draw, thing.cell, thing.shape, thing.size, image_size, COLORS[thing.color])
        return image.reduce(SCALE)
    image = Image.new("RGB", (image_size, image_size), background)
    side = image_size // 3
    for thing in scene.objects:
        image.paste(drawn(thing, scene.shade, image_size), (thing.cell[1] * side, thing.cell[0] * side))
    return image


def draw_shape(
    draw: ImageDraw.ImageDraw,
    cell: tuple[int, int],
    shape: str,
    size: str,
    image_size: int,
    fill: int | tuple[int, int, int],
) -> None:
    """Draw a shape of one size in its cell, on an image ``SCALE`` times as large."""
    cell_side = image_size * SCALE / 3
    y, x = ((index + 0.5) * cell_side for index in cell)
    radius = SIZES[size] * cell_side
    if shape == "circle":
        radius *= 0.95
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        draw.polygon(outline(shape, x, y, radius), fill=fill)


@lru_cache(maxsize=4096)
def drawn(thing: SceneObject, shade: int, image_size: int) -> Image.Image:
    """A cell with its object, on its background: what is drawn once and pasted wherever it occurs."""
    covered = np.arange(SCALE**2 + 1)[:, None]  # of a pixel's parts
    color = np.array(COLORS[thing.color])
    values = (covered * color + (SCALE**2 - covered) * shade + SCALE**2 // 2) // SCALE**2  # rounded as Pillow
    cover = coverage(thing.cell, thing.shape, thing.size, image_size)
    return Image.fromarray(values.astype(np.uint8)[cover])


@cache
def coverage(cell: tuple[int, int], shape: str, size: str, image_size: int) -> np.ndarray:
    """How many of the ``SCALE`` x ``SCALE`` parts of each pixel of a cell a shape covers: (S / 3, S / 3)."""
    image = Image.new("L", (image_size * SCALE, image_size * SCALE))
    draw_shape(ImageDraw.Draw(image), cell, shape, size, image_size, SCALE**2)
    side, (row, column) = image_size // 3, cell
    box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
    return np.asarray(image.reduce(SCALE).crop(box))


def cell_name(cell: tuple[int, int]) -> str:
    """The name of a grid cell, such as "top left"."""
    return CELL_NAMES[cell[0]][cell[1]]


def alike(thing: SceneObject, names: tuple[str, ...], scene: Scene) -> list[SceneObject]:
    """The objects of ``scene`` that have these attributes as ``thing`` has them."""
    wanted = [getattr(thing, name) for name in names]
    return [other for other in scene.objects if [getattr(other, name) for name in names] == wanted]


def object_phrase(thing: SceneObject, scene: Scene, rng: random.Random, by_cell: bool = True) -> str:
    """A random phrase for ``thing`` that fits no other object of ``scene``, such as "the red circle".

    With ``by_cell`` it may say the cell: "the object in the center".
    """
    if by_cell and rng.random() < 0.25:
        name = rng.choice((thing.shape, f"{thing.color} {thing.shape}", "object"))
        return f"the {name} in the {cell_name(thing.cell)}"
    phrases = []
    for names in NAMING:
        if len(alike(thing, names, scene)) == 1:
            phrases.append(f"the {group_name(thing, names)}")
    return rng.choice(phrases)


def group_name(thing: SceneObject, names: tuple[str, ...], many: bool = False) -> str:
    """What all objects that share these attributes with ``thing`` are called: "red object", "small stars"."""
    noun = thing.shape if "shape" in names else "object"
    ending = "" if not many else "es" if noun.endswith("s") else "s"
    return " ".join([getattr(thing, name) for name in names if name != "shape"] + [noun + ending])


def place_phrase(
    cell: tuple[int, int], scene: Scene, changed: tuple[SceneObject, ...], rng: random.Random
) -> str:
    """A random phrase for ``cell``: "the center", or "below the star" (a neighbor not in ``changed``)."""
    beside = []
    for other in scene.objects:
        step = (cell[0] - other.cell[0], cell[1] - other.cell[1])
        if other not in changed and step in RELATIONS:
            # "below" an object of the top row could be one cell down or two.
            beyond = (cell[0] + step[0], cell[1] + step[1])
            beside.append((other, ("directly " if beyond in CELLS else "") + RELATIONS[step]))
    if beside and rng.random() < 0.5:
        other, relation = rng.choice(beside)
        return f"{relation} {object_phrase(other, scene, rng, by_cell=False)}"
    return f"the {cell_name(cell)}"


def write_caption(edit: Edit, reference: Scene, rng: random.Random) -> str:
    """Write a caption for ``edit``: with ``reference`` it fits one scene only. Lower case, no punctuation."""
    return fill(rng.choice(orders(edit)), edit, reference, (), rng)


def orders(edit: Edit) -> tuple[str, ...]:
    """The templates that may ask for ``edit``."""
    if edit.kind == "size" and edit.before and edit.after and edit.before.size == "medium":
        # Only from the middle does "smaller" mean one size.
        return TEMPLATES["size"] + TEMPLATES["smaller" if edit.after.size == "small" else "larger"]
    return TEMPLATES[edit.kind]


def fill(
    template: str, edit: Edit, scene: Scene, changed: tuple[SceneObject, ...], rng: random.Random
) -> str:
    """Fill in a template of ``edit``: phrases fit one object of ``scene``, places are by none ``changed``."""
    before, after = edit.before, edit.after
    words = {}
    if before:
        words["it"] = object_phrase(before, scene, rng)
        changed = (before, *changed)
    if edit.kind in ("color", "shape", "size"):
        words["new"] = getattr(after, edit.kind)
        words["old"] = getattr(before, edit.kind)
    if edit.kind == "move" and before:
        words["old"] = f"in the {cell_name(before.cell)}"
    if edit.kind == "add" and after:
        words["thing"] = f"{after.size} {after.color} {after.shape}"
    if edit.kind in ("add", "move") and after:
        place = place_phrase(after.cell, scene, changed, rng)
        by_name = place == f"the {cell_name(after.cell)}"
        words |= {"place": f"in {place}" if by_name else place, "goal": f"to {place}" if by_name else place}
    return template.format(**words)
