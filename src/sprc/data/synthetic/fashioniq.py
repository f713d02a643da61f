"""The made benchmark in FashionIQ's format on disk: three types, two captions a triplet."""

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from sprc.data.synthetic.scenes import Edit, Scene, cell_name, edit_between, object_phrase
from sprc.data.synthetic.splits import Draw, SyntheticConfig, draw_parts, draw_queries, json_text, write_once

# The types, in the order in which they are drawn, and what tells a type's images at sight: the background is
# light, grey or dark.
SHADES = {"dress": (225, 250), "shirt": (165, 185), "toptee": (30, 55)}

# Words as in scenes.TEMPLATES, but the captions describe the target, as FashionIQ's do; {old} is the edited
# attribute before, {color}, {shape} and {size} are the object's after. Each of STATEMENTS gives the target
# by itself; HINTS may leave out which object or where.
STATEMENTS = {
    "color": (
        "{it} is {new}",
        "{it} is {new} instead of {old}",
        "has {it} in {new}",
        "has a {new} {shape} instead of a {old} one",
        "is the same but {it} is {new}",
    ),
    "shape": (
        "{it} is a {new}",
        "{it} is a {new} instead of a {old}",
        "has a {new} instead of {it}",
        "has a {color} {new} instead of a {color} {old}",
        "is the same but {it} is a {new}",
    ),
    "size": (
        "{it} is {new}",
        "{it} is {new} instead of {old}",
        "has {it} in {new} size",
        "has a {new} {color} {shape} instead of a {old} one",
        "is the same but {it} is {new}",
    ),
    "add": (
        "has a {thing} {place}",
        "also has a {thing} {place}",
        "there is a {thing} {place}",
        "is the same with a {thing} {place}",
    ),
    "remove": (
        "does not have {it}",
        "is without {it}",
        "{it} is gone",
        "has no {color} {shape}",
    ),
    "move": (
        "{it} is {place}",
        "has {it} {place}",
        "has the {color} {shape} {place} instead",
        "is the same but {it} is {place}",
    ),
}
HINTS = {
    "color": ("is more {new}", "has a {new} {shape}"),
    "shape": ("has a {new}", "has a {color} {new}"),
    "size": ("has a {new} {shape}", "has a {new} {color} object"),
    "add": ("has one more {shape}", "also has a {color} {shape}"),
    "remove": ("has one {shape} less", "has less {color}"),
    "move": ("has a {shape} {place}", "has a {color} object {place}"),
}


@dataclass(frozen=True)
class FashionIQConfig(SyntheticConfig):
    """What :func:`make_fashioniq` makes: families *of each type*, each with an image a set in no triplet."""

    train_families: int = 80
    val_families: int = 6
    test_families: int = 2
    train_queries_per_set: int = 4
    eval_queries_per_set: int = 4
    png: bool = False  # all images as PNG, which alone SPRC's own scripts read
    most_queries_per_set: ClassVar[int] = 12


def write_captions(edit: Edit, reference: Scene, rng: random.Random) -> list[str]:
    """Write two captions for ``edit``, each of which mostly suffices: one in eight is a hint only.

    Lower case; some end in a full stop, as some of FashionIQ's do.
    """
    templates = rng.sample(STATEMENTS[edit.kind], 2)
    if rng.random() < 0.25:
        templates[rng.randrange(2)] = rng.choice(HINTS[edit.kind])
    return [fill_statement(one, edit, reference, rng) + rng.choice(("", "", ".")) for one in templates]


def fill_statement(template: str, edit: Edit, reference: Scene, rng: random.Random) -> str:
    """Fill in a template of ``STATEMENTS`` or ``HINTS``; phrases fit one object of ``reference``."""
    thing = edit.after or edit.before
    assert thing is not None  # one of the two is there
    words = {"color": thing.color, "shape": thing.shape, "size": thing.size}
    words |= {"thing": " ".join(words[name] for name in ("size", "color", "shape"))}
    words |= {"place": f"in the {cell_name(thing.cell)}"}
    if edit.kind in ("color", "shape", "size"):
        words |= {"old": getattr(edit.before, edit.kind), "new": getattr(edit.after, edit.kind)}
    if edit.before:
        words["it"] = object_phrase(edit.before, reference, rng)
    return template.format(**words)


def make_fashioniq(out: Path, config: FashionIQConfig) -> None:
    """Write the benchmark to ``out/fashionIQ_dataset``; see :func:`write_once`.

    Of each image set one image is a distractor: it is in `image_splits` and in no triplet, so that the
    gallery of the original protocol is larger than that of the val-split. Every other image is a JPEG,
    unless ``config.png``.
    Beside FashionIQ's own files it writes ``edits.TYPE.SPLIT.json``: a list of {"kind", "cells", "target"}
    in the order of the captions, which holds the test split's targets as well.
    """
    write_once(out / "fashionIQ_dataset", config, _write_benchmark)


def _write_benchmark(root: Path, config: FashionIQConfig, draw: Draw) -> None:
    for folder in ("captions", "image_splits", "images"):
        (root / folder).mkdir()
    images = 36 * len(SHADES) * (config.val_families + config.test_families + config.train_families)
    bar = tqdm(total=images, desc="made data", unit="image")
    for split, dress_type, families, rng in draw_parts(config, SHADES):
        queries_per_set = config.train_queries_per_set if split == "train" else config.eval_queries_per_set
        gallery: list[str] = []
        entries: list[dict[str, Any]] = []
        edits: list[dict[str, Any]] = []
        for (family, image_sets), number in product(enumerate(families), range(6)):
            scenes = rng.sample([scene for row in image_sets[number] for scene in row], 6)
            names = {
                scene: f"{dress_type}-{split}-{family}-{number}-img{i}" for i, scene in enumerate(scenes)
            }
            for scene, name in names.items():
                suffix = ".jpg" if len(gallery) % 2 and not config.png else ".png"
                # Only a JPEG takes the options: without subsampling edges of equal lightness stay sharp.
                options: dict[str, Any] = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
                draw(scene, root / "images" / f"{name}{suffix}", **options)
                gallery.append(name)
                bar.update()
            distractor = rng.choice(scenes)
            pairs = [pair for pair in draw_queries(image_sets[number], 18, rng) if distractor not in pair]
            for reference, target in pairs[:queries_per_set]:
                edit = edit_between(reference, target)
                entry = {"candidate": names[reference], "captions": write_captions(edit, reference, rng)}
                if split != "test":
                    entry["target"] = names[target]
                entries.append(entry)
                edits.append({"kind": edit.kind, "cells": edit.cells, "target": names[target]})
        for path, content in (
            (f"captions/cap.{dress_type}.{split}.json", entries),
            (f"image_splits/split.{dress_type}.{split}.json", gallery),
            (f"edits.{dress_type}.{split}.json", edits),
        ):
            (root / path).write_text(json_text(content), encoding="utf-8")
    bar.close()
