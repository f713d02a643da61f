"""A made benchmark for composed image retrieval: what the writers of CIRR's and FashionIQ's format share.

Neither the caption alone nor the reference alone gives the target, because images come in families: one
base scene and every combination of a few edits of it, 36 images. Many images fit a caption and differ in the
rest of the scene; many differ from the reference by one edit and do not fit the caption.
"""

import json
import os
import random
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice, permutations, product
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from sprc.data.synthetic.scenes import (
    CELLS,
    COLORS,
    SHAPES,
    SIZES,
    Edit,
    Scene,
    SceneObject,
    edit_between,
    render,
)
from sprc.errors import InputError
from sprc.processes import own_cores

AT_ONCE = 32  # pictures that a process gets at once
MOST_WAITING = 16  # such parts
GENERATOR_VERSION = 2  # raise it whenever the same arguments give other files


@dataclass(frozen=True)
class SyntheticConfig:
    """What a writer makes, by default `make_cirr`; a family is 36 images in 6 image sets.

    Raises:
        InputError: a value out of its range, with the name of the flag.
    """

    seed: int = 0
    image_size: int = 96
    train_families: int = 240
    val_families: int = 14
    test_families: int = 28
    train_queries_per_set: int = 10
    eval_queries_per_set: int = 6
    most_queries_per_set: ClassVar[int] = 18

    def __post_init__(self) -> None:
        limits = {"seed": (0, 2**63), "size": (24, 1024), "families": (1, 10000)}
        limits["set"] = (2, self.most_queries_per_set)
        for name, value in asdict(self).items():
            if isinstance(value, bool):
                continue
            low, high = limits[name.rsplit("_", 1)[-1]]
            if not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value}: give a whole number from {low} to {high}")


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
C = TypeVar("C", bound=SyntheticConfig)
Draw = Callable[..., None]  # of picture_maker
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
        states = [replace(thing, **cast(Any, {kind: name})) for name in names]
    return rng.sample(states, len(states))


def draw_family(
    pair: tuple[str, str], rng: random.Random, used: set[Scene], shades: tuple[int, int] = (225, 250)
) -> list[ImageSet]:
    """Draw a family of 36 scenes as 6 image sets; none of them is in ``used``, to which they are added.

    ``pair`` names the two axes along which the images of a set differ. The whole family has 6 x 6 states of
    two objects, or 6 x 3 x 2 (a third axis, with size and presence among the three) of three objects.
    The background is a grey from the first of ``shades`` to the second.
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
        shade = rng.randint(*shades)
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
        rows = zip(*block, strict=True) if swap else map(tuple, block)
        image_sets.append(cast(ImageSet, tuple(rows)))
    return image_sets


class Query(NamedTuple):
    """A reference, a target, and what turns the one into the other, each edit by itself."""

    reference: Scene
    target: Scene
    edits: tuple[Edit, ...]


class Part(NamedTuple):
    """The families of one type in one split; ``rng`` goes on with the order of its images and its queries."""

    split: str  # val, test or train
    type_name: str
    families: list[list[ImageSet]]
    rng: random.Random


def draw_parts(config: SyntheticConfig, shades: Mapping[str, tuple[int, int]]) -> Iterator[Part]:
    """Draw the families of each split and type; ``shades`` names the types and limits their backgrounds.

    Train comes last, so that another number of train families leaves the other splits as they are.
    """
    seeds = random.Random(config.seed)
    used: set[Scene] = set()
    counts = {"val": config.val_families, "test": config.test_families, "train": config.train_families}
    for split, type_name in product(counts, shades):
        rng = random.Random(seeds.getrandbits(64))
        pairs = islice(axis_pairs(rng), counts[split])
        families = [draw_family(pair, rng, used, shades[type_name]) for pair in pairs]
        yield Part(split, type_name, families, rng)


def draw_queries(image_set: ImageSet, count: int, rng: random.Random) -> list[tuple[Scene, Scene]]:
    """Draw ``count`` of a set's 18 (reference, target) pairs, half along each axis as far as there are."""
    along_rows = [pair for row in image_set for pair in permutations(row, 2)]
    along_columns = [pair for column in zip(*image_set, strict=True) for pair in permutations(column, 2)]
    short = min(len(along_rows), count // 2)
    pairs = rng.sample(along_rows, short) + rng.sample(along_columns, count - short)
    return rng.sample(pairs, len(pairs))


def draw_double_queries(image_set: ImageSet, count: int, rng: random.Random) -> list[Query]:
    """Draw ``count`` of a set's 12 queries whose target is in another row and another column."""
    queries = []
    for (row, other_row), (column, other_column) in product(permutations(image_set, 2), ((0, 1), (1, 0))):
        reference, target = row[column], other_row[other_column]
        edits = (edit_between(reference, other_row[column]), edit_between(reference, row[other_column]))
        queries.append(Query(reference, target, edits))
    return rng.sample(queries, count)


def write_once(root: Path, config: C, write: Callable[[Path, C, Draw], None]) -> None:
    """Have ``write`` fill the folder ``root``, whole or not at all; nothing to do if the same is there.

    It gets the folder, ``config``, and what draws its pictures, see :func:`picture_maker`.

    Adds ``made_by.json``, the arguments, by which a later call knows the folder.
    Raises :class:`InputError` if the folder exists and was made otherwise, or cannot be written.
    """
    arguments = {name: value for name, value in asdict(config).items() if value is not False}
    made_by = {"generator": "sprc.data.synthetic", "version": GENERATOR_VERSION, **arguments}
    if root.exists():
        record = root / "made_by.json"
        if not record.is_file() or record.read_bytes() != json_text(made_by).encode():
            raise InputError(
                f"{root}: exists, but was not made with these arguments; delete it or choose another --out"
            )
        print(f"{root}: already made with these arguments, nothing to do")
        return
    out = root.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{root.name}-") as folder:
            unfinished = Path(folder) / root.name
            unfinished.mkdir()
            with picture_maker(config.image_size) as draw:
                write(unfinished, config, draw)
            (unfinished / "made_by.json").write_text(json_text(made_by), encoding="utf-8")
            unfinished.rename(root)
    except BrokenProcessPool as error:
        raise InputError("a process that draws was killed; see that memory is free, and try again") from error
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error}); choose another folder") from error


@contextmanager
def picture_maker(image_size: int) -> Iterator[Draw]:
    """What draws a scene and saves it at a path, with options of ``Image.save``: on all cores, in processes.

    What goes wrong is raised by a later call, or at the end, when all pictures are saved.
    """
    started: list[tuple[Scene, Path, dict[str, Any]]] = []
    waiting: deque[Future[None]] = deque()
    # Forked before any thread is there, and so without importing anything again.
    context = get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(own_cores(), mp_context=context, initializer=stay_with_parent) as pool:
        pool.submit(draw_pictures, [], image_size).result()

        def hand_over() -> None:
            waiting.append(pool.submit(draw_pictures, started.copy(), image_size))
            started.clear()

        def draw(scene: Scene, path: Path, **options: Any) -> None:
            started.append((scene, path, options))
            if len(started) == AT_ONCE:
                hand_over()
            if len(waiting) > MOST_WAITING:
                waiting.popleft().result()

        yield draw
        hand_over()
        for one in waiting:
            one.result()


def stay_with_parent() -> None:
    """For a process that draws: an interrupt is its parent's to act on, and it ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def draw_pictures(pictures: list[tuple[Scene, Path, dict[str, Any]]], image_size: int) -> None:
    """Draw scenes and save each at its path, with its options."""
    for scene, path, options in pictures:
        render(scene, image_size).save(path, **options)


def json_text(content: object) -> str:
    """``content`` as the text of a JSON file."""
    return json.dumps(content, indent=1) + "\n"
