"""The made benchmark in CIRR's format on disk."""

import itertools
from itertools import product
from pathlib import Path

from tqdm import tqdm

from sprc.data.synthetic.scenes import edit_between, render, write_caption
from sprc.data.synthetic.splits import SyntheticConfig, draw_parts, draw_queries, json_text, write_once

SHADES = {"": (225, 250)}  # of the one type of images
SPLIT_FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}  # also the prefix of image names


def make_cirr(out: Path, config: SyntheticConfig) -> None:
    """Write the benchmark to ``out/cirr_dataset``; see :func:`write_once`.

    Beside CIRR's own files it writes, for each split, ``edits.SPLIT.json``: {pair id: {"kind", "cells",
    "target"}}, which holds test1's targets as well.
    """
    write_once(out / "cirr_dataset", config, _write_benchmark)


def _write_benchmark(root: Path, config: SyntheticConfig) -> None:
    for folder in ("captions", "image_splits"):
        (root / "cirr" / folder).mkdir(parents=True)
    pair_ids, set_ids = itertools.count(), itertools.count()
    images = 36 * (config.val_families + config.test_families + config.train_families)
    bar = tqdm(total=images, desc="made data", unit="image")
    for part, _, families, rng in draw_parts(config, SHADES):
        split = "test1" if part == "test" else part
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
            (root / path).write_text(json_text(content), encoding="utf-8")
    bar.close()
