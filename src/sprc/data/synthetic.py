"""A made benchmark for composed image retrieval, in CIRR's format on disk.

The images are small scenes of colored shapes on a 3 x 3 grid, and the captions are edits of them, in the
manner of CSS (Color, Shape, Size; Vo et al., "Composing Text and Image for Image Retrieval", CVPR 2019).

Neither the caption alone nor the reference alone gives the target, because images come in families: one
base scene and every combination of a few edits of it, 36 images. Many images fit a caption and differ in the
rest of the scene; many differ from the reference by one edit and do not fit the caption.
"""

import itertools
import json
import math
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations, product
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from sprc.errors import InputError

GENERATOR_VERSION = 1  # raise it whenever the same arguments give other files
SPLIT_FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}  # also the prefix of image names
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


@dataclass(frozen=True)
class SyntheticConfig:
    """What :func:`make_cirr` makes; a family is 36 images in 6 image sets.

    Raises:
        InputError: a value out of its range, with the name of the flag.
    """

    seed: int = 0
    image_size: int = 96
    train_families: int = 60
    val_families: int = 7
    test_families: int = 7
    train_queries_per_set: int = 12
    eval_queries_per_set: int = 6

    def __post_init__(self) -> None:
        limits = {"seed": (0, 2**63), "size": (24, 1024), "families": (1, 10000), "set": (2, 18)}
        for name, value in asdict(self).items():
            low, high = limits[name.rsplit("_", 1)[-1]]
            if not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value}: give a whole number from {low} to {high}")


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
    def cells(self) -> list[list[int]]:
        """The grid cells [row, col] that the edit concerns: two for a move, else one."""
        return [
            list(cell) for cell in dict.fromkeys(thing.cell for thing in (self.before, self.after) if thing)
        ]


def edit_between(reference: Scene, target: Scene) -> Edit:
    """The one edit between two scenes; ``ValueError`` if they differ in none or in more than one."""
    before = [thing for thing in reference.objects if thing not in target.objects]
    after = [thing for thing in target.objects if thing not in reference.objects]
    if len(before) == 0 and len(after) == 1:
        return Edit("add", None, after[0])
    if len(before) == 1 and len(after) == 0:
        return Edit("remove", before[0], None)
    if len(before) == len(after) == 1:
        kinds = {"cell": "move", "color": "color", "shape": "shape", "size": "size"}
        changed = [kinds[name] for name in kinds if getattr(before[0], name) != getattr(after[0], name)]
        if len(changed) == 1:
            return Edit(changed[0], before[0], after[0])
    raise ValueError(f"not one edit apart: {reference} and {target}")


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
    scale = 4  # Pillow's polygons have hard edges: draw large, then take the mean of 4 x 4 pixels
    cell_side = image_size * scale / 3
    image = Image.new("RGB", (image_size * scale, image_size * scale), (scene.shade,) * 3)
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        y, x = ((index + 0.5) * cell_side for index in thing.cell)
        radius = SIZES[thing.size] * cell_side
        if thing.shape == "circle":
            radius *= 0.95
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[thing.color])
        else:
            draw.polygon(outline(thing.shape, x, y, radius), fill=COLORS[thing.color])
    return image.reduce(scale)


def cell_name(cell: tuple[int, int]) -> str:
    """The name of a grid cell, such as "top left"."""
    return CELL_NAMES[cell[0]][cell[1]]


def object_phrase(thing: SceneObject, scene: Scene, rng: random.Random, by_cell: bool = True) -> str:
    """A random phrase for ``thing`` that fits no other object of ``scene``, such as "the red circle".

    With ``by_cell`` it may say the cell: "the object in the center".
    """
    if by_cell and rng.random() < 0.25:
        name = rng.choice((thing.shape, f"{thing.color} {thing.shape}", "object"))
        return f"the {name} in the {cell_name(thing.cell)}"
    phrases = []
    for names in NAMING:
        wanted = [getattr(thing, name) for name in names]
        if sum([getattr(other, name) for name in names] == wanted for other in scene.objects) == 1:
            phrases.append(" ".join(["the", *wanted] + ([] if "shape" in names else ["object"])))
    return rng.choice(phrases)


def place_phrase(cell: tuple[int, int], scene: Scene, moved: SceneObject | None, rng: random.Random) -> str:
    """A random phrase for ``cell``: "the center", or "below the star" (a neighbor that is not ``moved``)."""
    beside = []
    for other in scene.objects:
        step = (cell[0] - other.cell[0], cell[1] - other.cell[1])
        if other != moved and step in RELATIONS:
            # "below" an object of the top row could be one cell down or two.
            beyond = (cell[0] + step[0], cell[1] + step[1])
            beside.append((other, ("directly " if beyond in CELLS else "") + RELATIONS[step]))
    if beside and rng.random() < 0.5:
        other, relation = rng.choice(beside)
        return f"{relation} {object_phrase(other, scene, rng, by_cell=False)}"
    return f"the {cell_name(cell)}"


def write_caption(edit: Edit, reference: Scene, rng: random.Random) -> str:
    """Write a caption for ``edit``: with ``reference`` it fits one scene only. Lower case, no punctuation."""
    templates = TEMPLATES[edit.kind]
    if edit.kind == "size" and edit.before.size == "medium":
        # Only from the middle does "smaller" mean one size.
        templates = templates + TEMPLATES["smaller" if edit.after.size == "small" else "larger"]
    template = rng.choice(templates)
    words = {}
    if edit.before:
        words["it"] = object_phrase(edit.before, reference, rng)
    if edit.kind in ("color", "shape", "size"):
        words["new"] = getattr(edit.after, edit.kind)
    if edit.kind == "add":
        words["thing"] = f"{edit.after.size} {edit.after.color} {edit.after.shape}"
    if edit.kind in ("add", "move"):
        place = place_phrase(edit.after.cell, reference, edit.before, rng)
        by_name = place == f"the {cell_name(edit.after.cell)}"
        words |= {"place": f"in {place}" if by_name else place, "goal": f"to {place}" if by_name else place}
    return template.format(**words)


def caption_words() -> list[str]:
    """Every word that a caption can hold, sorted: a vocabulary where there is no data to take one from."""
    names = [name for row in CELL_NAMES for name in row]
    templates = [re.sub(r"{\w+}", " ", text) for texts in TEMPLATES.values() for text in texts]
    phrases = [*templates, *names, *RELATIONS.values(), *COLORS, *SHAPES, *SIZES, "directly the in to object"]
    return sorted({word for phrase in phrases for word in phrase.split()})


# An image set varies two kinds of axis, three states of one by two of the other. Six families, four with a
# presence axis and two others, give color, shape, move, size, add and remove about as many queries each.
# Color with shape cannot be: the two objects would meet in one color and shape.
PRESENCE_PAIRS = (("color", "presence"), ("shape", "presence"), ("move", "presence"), ("size", "presence"))
OTHER_PAIRS = (
    (("color", "move"), ("size", "shape")),
    (("shape", "move"), ("size", "color")),
    (("color", "color"), ("size", "move")),
    (("shape", "shape"), ("size", "move")),
)
ImageSet = tuple[tuple[Scene, Scene], ...]  # 3 rows of 2: rows differ by one edit, columns by another


def axis_pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Without end: the two kinds of axis that the image sets of the next family vary, in balance."""
    while True:
        for others in OTHER_PAIRS:
            yield from rng.sample(PRESENCE_PAIRS + others, 6)


def axis_states(
    kind: str, thing: SceneObject, objects: list[SceneObject], rng: random.Random
) -> list[SceneObject | None]:
    """What ``thing`` becomes along one kind of axis: 6 states, size 3, presence 2; None is absent."""
    if kind == "presence":
        states = [thing, None]
    elif kind == "move":
        empty = [cell for cell in CELLS if cell not in {other.cell for other in objects}]
        states = [replace(thing, cell=cell) for cell in [thing.cell, *rng.sample(empty, 5)]]
    else:
        names = {"color": COLORS, "shape": SHAPES, "size": SIZES}[kind]
        states = [replace(thing, **{kind: name}) for name in names]
    return rng.sample(states, len(states))


def draw_family(pair: tuple[str, str], rng: random.Random, used: set[Scene]) -> list[ImageSet]:
    """Draw a family of 36 scenes as 6 image sets; none of them is in ``used``, to which they are added.

    ``pair`` names the two axes along which the images of a set differ. The whole family has 6 x 6 states of
    two objects, or 6 x 3 x 2 (a third axis, with size and presence among the three) of three objects.
    """
    kinds = list(pair)
    if "size" in kinds or "presence" in kinds:
        kinds += [kind for kind in ("size", "presence") if kind not in kinds]
        if len(kinds) == 2:
            kinds.append(rng.choice(("color", "shape", "move")))
    while True:
        count = rng.randint(3, 4 if "move" in kinds else 5)  # a move needs five empty cells
        objects = [
            SceneObject(cell, rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(SIZES)))
            for cell in rng.sample(CELLS, count)
        ]
        shade = rng.randint(225, 250)
        axes = [axis_states(kind, objects[i], objects, rng) for i, kind in enumerate(kinds)]
        fixed = objects[len(axes) :]
        scenes = {
            states: Scene(tuple(sorted(thing for thing in (*states, *fixed) if thing)), shade)
            for states in product(*axes)
        }
        distinct = set(scenes.values())
        if len(distinct) == 36 and distinct.isdisjoint(used) and all(scene.is_valid() for scene in distinct):
            break
    used |= distinct

    # Six states split into rows of 3 or columns of 2; size can only give the rows, presence only the columns.
    rows_first = len(axes[0]) % 3 == 0 and len(axes[1]) % 2 == 0
    columns_first = len(axes[0]) % 2 == 0 and len(axes[1]) % 3 == 0
    swap = columns_first and not (rows_first and rng.random() < 0.5)
    steps = (2, 3) if swap else (3, 2)
    blocks = [
        [axis[start : start + step] for start in range(0, len(axis), step)]
        for axis, step in zip(axes[:2], steps, strict=True)
    ]
    rest = [(state,) for state in axes[2]] if len(axes) == 3 else [()]
    image_sets = []
    for first, second, third in product(*blocks, rest):
        block = [[scenes[(a, b, *third)] for b in second] for a in first]
        image_sets.append(tuple(zip(*block, strict=True)) if swap else tuple(map(tuple, block)))
    return image_sets


def draw_queries(image_set: ImageSet, count: int, rng: random.Random) -> list[tuple[Scene, Scene]]:
    """Draw ``count`` of a set's 18 (reference, target) pairs, half along each axis as far as there are."""
    along_rows = [pair for row in image_set for pair in permutations(row, 2)]
    along_columns = [pair for column in zip(*image_set, strict=True) for pair in permutations(column, 2)]
    short = min(len(along_rows), count // 2)
    pairs = rng.sample(along_rows, short) + rng.sample(along_columns, count - short)
    return rng.sample(pairs, len(pairs))


def make_cirr(out: Path, config: SyntheticConfig) -> None:
    """Write the benchmark to ``out/cirr_dataset``, whole or not at all; nothing to do if the same is there.

    Beside CIRR's own files it writes ``made_by.json`` (the arguments) and, for each split,
    ``edits.SPLIT.json``: {pair id: {"kind", "cells", "target"}}, which holds test1's targets as well.

    Raises:
        InputError: the folder exists and was made otherwise, or cannot be written.
    """
    root = out / "cirr_dataset"
    made_by = {"generator": "sprc.data.synthetic", "version": GENERATOR_VERSION, **asdict(config)}
    if root.exists():
        record = root / "made_by.json"
        if not record.is_file() or record.read_bytes() != _json(made_by).encode():
            raise InputError(
                f"{root}: exists, but was not made with these arguments; delete it or choose another --out"
            )
        print(f"{root}: already made with these arguments, nothing to do")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".cirr_dataset-") as folder:
            unfinished = Path(folder) / "cirr_dataset"
            unfinished.mkdir()
            _write_benchmark(unfinished, config)
            (unfinished / "made_by.json").write_text(_json(made_by), encoding="utf-8")
            unfinished.rename(root)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error}); choose another folder") from error


def _json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


def _write_benchmark(root: Path, config: SyntheticConfig) -> None:
    for folder in ("captions", "image_splits"):
        (root / "cirr" / folder).mkdir(parents=True)
    seeds, used = random.Random(config.seed), set()
    pair_ids, set_ids = itertools.count(), itertools.count()
    # Train comes last, so that another number of train families leaves the other splits as they are.
    counts = {"val": config.val_families, "test1": config.test_families, "train": config.train_families}
    bar = tqdm(total=36 * sum(counts.values()), desc="made data", unit="image")
    for split, count in counts.items():
        rng = random.Random(seeds.getrandbits(64))
        families = [draw_family(pair, rng, used) for pair in itertools.islice(axis_pairs(rng), count)]
        queries_per_set = config.train_queries_per_set if split == "train" else config.eval_queries_per_set
        paths, entries, edits = {}, [], {}
        for (family, image_sets), number in product(enumerate(families), range(6)):
            top = SPLIT_FOLDERS[split]
            folder = f"{top}/{family % 100}" if split == "train" else top
            (root / folder).mkdir(parents=True, exist_ok=True)
            scenes = rng.sample([scene for row in image_sets[number] for scene in row], 6)
            names = {scene: f"{top}-{family}-{number}-img{i}" for i, scene in enumerate(scenes)}
            for scene, name in names.items():
                render(scene, config.image_size).save(root / folder / f"{name}.png")
                paths[name] = f"./{folder}/{name}.png"
                bar.update()
            set_id = next(set_ids)
            for reference, target in draw_queries(image_sets[number], queries_per_set, rng):
                edit = edit_between(reference, target)
                image_set = {"id": set_id, "members": list(names.values())}
                image_set["reference_rank"] = scenes.index(reference)
                entry = {"pairid": next(pair_ids), "reference": names[reference]}
                if split != "test1":
                    entry |= {"target_hard": names[target], "target_soft": {names[target]: 1.0}}
                    image_set["target_rank"] = scenes.index(target)
                entry |= {"caption": write_caption(edit, reference, rng), "img_set": image_set}
                entries.append(entry)
                edits[entry["pairid"]] = {"kind": edit.kind, "cells": edit.cells, "target": names[target]}
        for path, content in (
            (f"cirr/captions/cap.rc2.{split}.json", entries),
            (f"cirr/image_splits/split.rc2.{split}.json", paths),
            (f"edits.{split}.json", edits),
        ):
            (root / path).write_text(_json(content), encoding="utf-8")
    bar.close()
