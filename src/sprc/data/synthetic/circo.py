"""The made benchmark in CIRCO's format on disk: a concept that is shared, and several targets a query."""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sprc.data.synthetic.fashioniq import STATEMENTS, fill_statement
from sprc.data.synthetic.scenes import Edit, Scene, SceneObject, alike, cell_name, edit_between
from sprc.data.synthetic.splits import Draw, SyntheticConfig, draw_parts, draw_queries, json_text, write_once

SHADES = {"": (225, 250)}  # of the one type of images
# Of CIRCO's semantic aspects those that a caption of one edit can ask for.
ASPECTS = {
    "color": ("compare_change",),
    "shape": ("compare_change",),
    "size": ("comparative_statement",),
    "add": ("addition", "spatial_relations_background"),
    "remove": ("negation",),
    "move": ("spatial_relations_background",),
}
LARGEST_ID = 600_000  # of COCO's images, about


@dataclass(frozen=True)
class CIRCOConfig(SyntheticConfig):
    """What :func:`make_circo` makes; there is no training split, so that its sizes are of no use."""

    val_families: int = 4
    test_families: int = 4
    eval_queries_per_set: int = 3


def make_circo(out: Path, config: CIRCOConfig) -> None:
    """Write the benchmark to ``out/circo_dataset``; see :func:`write_once`.

    The targets of a query are all images of the gallery that show what it shares with its reference, an
    object, and where its edit is done. Whatever else they show may differ. The gallery is that of both
    splits. Beside CIRCO's own files it writes, for each split, ``edits.SPLIT.json``: {id: {"kind", "cells",
    "target"}}, which holds a target of test's queries as well.
    """
    write_once(out / "circo_dataset", config, _write_benchmark)


def _write_benchmark(root: Path, config: CIRCOConfig, draw: Draw) -> None:
    images = root / "COCO2017_unlabeled" / "unlabeled2017"
    for folder in (root / "annotations", images.parent / "annotations", images):
        folder.mkdir(parents=True)
    parts = list(islice(draw_parts(config, SHADES), 2))  # val and test; train would come last
    scenes = [
        scene
        for part in parts
        for family in part.families
        for rows in family
        for row in rows
        for scene in row
    ]
    rng = random.Random(config.seed)
    rng.shuffle(scenes)
    ids = dict(zip(scenes, rng.sample(range(1, LARGEST_ID), len(scenes)), strict=True))
    listing = []
    for scene, number in tqdm(ids.items(), desc="made data", unit="image"):
        file = f"{number:012d}.jpg"
        # Without subsampling edges of equal lightness stay sharp.
        draw(scene, images / file, quality=95, subsampling=0)
        size = config.image_size
        listing.append({"file_name": file, "height": size, "width": size, "id": number})
    content = {"info": {"description": "made scenes, no photographs"}, "images": listing, "licenses": []}
    path = images.parent / "annotations" / "image_info_unlabeled2017.json"
    path.write_text(json_text(content), encoding="utf-8")
    for part in parts:
        entries: list[dict[str, Any]] = []
        edits: dict[int, dict[str, Any]] = {}
        for image_set in (one for family in part.families for one in family):
            for reference, target in draw_queries(image_set, config.eval_queries_per_set, part.rng):
                edit = edit_between(reference, target)
                shared = part.rng.choice([one for one in reference.objects if one in target.objects])
                targets = [ids[scene] for scene in scenes if answers(scene, shared, edit)]
                own = ids[target]
                entry: dict[str, Any] = {"reference_img_id": ids[reference]}
                if part.split == "val":
                    entry["target_img_id"] = own
                # Else the rest of the scene would count.
                statements = [one for one in STATEMENTS[edit.kind] if "same" not in one]
                statement = part.rng.choice(statements)
                entry["relative_caption"] = fill_statement(statement, edit, reference, part.rng)
                entry["shared_concept"] = concept_phrase(shared)
                if part.split == "val":
                    entry["gt_img_ids"] = [own, *(one for one in targets if one != own)]
                entry["id"] = len(entries)
                if part.split == "val":
                    entry["semantic_aspects"] = list(ASPECTS[edit.kind])
                edits[entry["id"]] = {"kind": edit.kind, "cells": edit.cells, "target": str(own)}
                entries.append(entry)
        (root / "annotations" / f"{part.split}.json").write_text(json_text(entries), encoding="utf-8")
        (root / f"edits.{part.split}.json").write_text(json_text(edits), encoding="utf-8")


def concept_phrase(thing: SceneObject) -> str:
    """What a query shares with its targets, in words that tell the object in any scene."""
    return f"a {thing.size} {thing.color} {thing.shape} in the {cell_name(thing.cell)}"


def answers(scene: Scene, shared: SceneObject, edit: Edit) -> bool:
    """Whether ``scene`` shows the object ``shared``, and what ``edit`` makes, or not what it removes."""
    if shared not in scene.objects:
        return False
    if edit.after is None:
        assert edit.before is not None  # an edit has one of the two
        return not alike(edit.before, ("color", "shape"), scene)
    return edit.after in scene.objects
