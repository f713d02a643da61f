"""The made benchmark in CIRR's format on disk."""

import itertools
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sprc.data.edits import KINDS
from sprc.data.synthetic.scenes import Scene, edit_between, write_caption
from sprc.data.synthetic.splits import (
    Draw,
    ImageSet,
    Part,
    Query,
    SyntheticConfig,
    draw_double_queries,
    draw_parts,
    draw_queries,
    json_text,
    write_once,
)
from sprc.data.synthetic.statements import counting_caption, double_caption, negation_caption, rivals

SHADES = {"": (225, 250)}  # of the one type of images
SPLIT_FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}  # also the prefix of image names
# Of twenty captions of an edit as many are of these kinds, so that in the end all kinds are about equally
# frequent. A caption that is to count is a plain one where no number tells the target.
CAPTIONS = {
    "color": {"color": 12, "negation": 2, "counting": 6},
    "shape": {"shape": 12, "negation": 2, "counting": 6},
    "size": {"size": 12, "negation": 2, "counting": 6},
    "add": {"add": 16, "counting": 4},
    "remove": {"remove": 15, "negation": 3, "counting": 2},
    "move": {"move": 16, "negation": 4},
}


def make_cirr(out: Path, config: SyntheticConfig) -> None:
    """Write the benchmark to ``out/cirr_dataset``; see :func:`write_once`.

    Beside CIRR's own files it writes, for each split, ``edits.SPLIT.json``: {pair id: {"kind", "cells",
    "target"}}, which holds test1's targets as well.
    """
    write_once(out / "cirr_dataset", config, _write_benchmark)


def split_name(part: Part) -> str:
    """The split in CIRR's files."""
    return "test1" if part.split == "test" else part.split


class DrawnSet(NamedTuple):
    """An image set of a split, its images by the names they get, and its queries with kind and caption."""

    number: int  # of its family
    names: dict[Scene, str]
    queries: list[tuple[Query, str, str]]


def draw_sets(part: Part, config: SyntheticConfig) -> Iterator[DrawnSet]:
    """Draw the image sets of a split, six a family."""
    top = SPLIT_FOLDERS[split_name(part)]
    count = config.train_queries_per_set if part.split == "train" else config.eval_queries_per_set
    decks: dict[str, list[str]] = {}
    for (family, image_sets), number in product(enumerate(part.families), range(6)):
        scenes = part.rng.sample([scene for row in image_sets[number] for scene in row], 6)
        names = {scene: f"{top}-{family}-{number}-img{i}" for i, scene in enumerate(scenes)}
        queries = [
            (query, *_write_caption(query, image_sets, decks, part.rng))
            for query in _draw_queries(image_sets[number], count, part.rng)
        ]
        yield DrawnSet(family, names, queries)


def _write_benchmark(root: Path, config: SyntheticConfig, draw: Draw) -> None:
    for folder in ("captions", "image_splits"):
        (root / "cirr" / folder).mkdir(parents=True)
    pair_ids, set_ids = itertools.count(), itertools.count()
    images = 36 * (config.val_families + config.test_families + config.train_families)
    bar = tqdm(total=images, desc="made data", unit="image")
    for part in draw_parts(config, SHADES):
        split, top = split_name(part), SPLIT_FOLDERS[split_name(part)]
        paths, entries, edits = {}, [], {}
        for family, names, queries in draw_sets(part, config):
            folder = f"{top}/{family % 100}" if split == "train" else top
            (root / folder).mkdir(parents=True, exist_ok=True)
            for scene, name in names.items():
                draw(scene, root / folder / f"{name}.png")
                paths[name] = f"./{folder}/{name}.png"
                bar.update()
            set_id, places = next(set_ids), list(names)
            for query, kind, caption in queries:
                reference, target = query.reference, query.target
                image_set = {"id": set_id, "members": list(names.values())}
                image_set["reference_rank"] = places.index(reference)
                entry = {"pairid": next(pair_ids), "reference": names[reference]}
                if split != "test1":
                    entry |= {"target_hard": names[target], "target_soft": {names[target]: 1.0}}
                    image_set["target_rank"] = places.index(target)
                entry |= {"caption": caption, "img_set": image_set}
                entries.append(entry)
                cells = list(dict.fromkeys(cell for edit in query.edits for cell in edit.cells))
                edits[entry["pairid"]] = {"kind": kind, "cells": cells, "target": names[target]}
        for path, content in (
            (f"cirr/captions/cap.rc2.{split}.json", entries),
            (f"cirr/image_splits/split.rc2.{split}.json", paths),
            (f"edits.{split}.json", edits),
        ):
            (root / path).write_text(json_text(content), encoding="utf-8")
    bar.close()


def _draw_queries(image_set: ImageSet, count: int, rng: random.Random) -> list[Query]:
    """Draw ``count`` queries of a set, on average one in ``len(KINDS)`` of two edits."""
    double = count // len(KINDS) + (rng.random() < count % len(KINDS) / len(KINDS))
    queries = draw_double_queries(image_set, double, rng)
    for reference, target in draw_queries(image_set, count - double, rng):
        queries.append(Query(reference, target, (edit_between(reference, target),)))
    return rng.sample(queries, count)


def _write_caption(
    query: Query, family: list[ImageSet], decks: dict[str, list[str]], rng: random.Random
) -> tuple[str, str]:
    """The kind of caption that ``query``'s edit has next in ``decks``, and a caption of it."""
    reference, target, edits = query
    if len(edits) == 2:
        return "two", double_caption(edits, reference, rng)
    (edit,) = edits
    deck = decks.setdefault(edit.kind, [])
    if not deck:
        deck += rng.sample([kind for kind, count in CAPTIONS[edit.kind].items() for _ in range(count)], 20)
    kind, caption = deck.pop(), None
    if kind in ("negation", "counting"):
        others = rivals(reference, target, (scene for rows in family for row in rows for scene in row))
        if kind == "negation":
            caption = negation_caption(edit, reference, others, rng)
        else:
            caption = counting_caption(edit, reference, target, others, rng)
    return (kind, caption) if caption else (edit.kind, write_caption(edit, reference, rng))
