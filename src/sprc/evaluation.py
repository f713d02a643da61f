"""Score a checkpoint: on a split with targets (``blip_validate.py``), or for CIRR's server."""

import argparse
from pathlib import Path
from typing import Any

from sprc.benchmark import Benchmark
from sprc.checkpoint import Checkpoint, load_checkpoint
from sprc.data.cirr import CirrSplit, load_cirr
from sprc.data.datasets import check_images
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.models.factory import choose_device, place
from sprc.ranking import similarities, subset_order, subset_ranks, target_ranks, top_k
from sprc.run_folder import write_csv, write_json
from sprc.validation import EncodedSplit, encode_split

TOP = 50
TOP_IN_SET = 3


def load_to_score(arguments: argparse.Namespace) -> tuple[Checkpoint, Any, dict[str, Any]]:
    """The checkpoint on its device, its transform, and how to encode: the training's own, or the flags'."""
    checkpoint = load_checkpoint(
        arguments.model_path, model_name=arguments.blip_model_name, backbone=arguments.backbone
    )
    print(checkpoint.found, flush=True)
    published = {"transform": "targetpad", "target_ratio": 1.25, "batch_size": 32, "num_workers": 2}
    settings = published | {"save_memory": False} | checkpoint.hyperparameters
    for name in (*published, "save_memory"):
        if getattr(arguments, name) not in (None, False):
            settings[name] = getattr(arguments, name)
    place(checkpoint.model, choose_device(arguments.device))
    transform = make_transform(
        settings["transform"], checkpoint.model.config.image_size, settings["target_ratio"]
    )
    encoding = {name: settings[name] for name in ("batch_size", "num_workers", "save_memory")}
    return checkpoint, transform, encoding


def run_validation(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Print and return the metrics of a checkpoint.

    With ``save_rankings`` write each query's top 50, with ``save_ranks`` its target's ranks. With the
    settings of its training, the default, the figures of "val" are those that training wrote.
    """
    benchmark = Benchmark.load(
        arguments.dataset, arguments.data_path, arguments.fiq_protocol, arguments.split
    )
    checkpoint, transform, encoding = load_to_score(arguments)
    benchmark.check_images()
    encoded = benchmark.encode(checkpoint.model, transform, **encoding)
    metrics = benchmark.metrics(encoded)
    for name, value in metrics.items():
        print(f"{name}: {value}")
    if arguments.save_rankings:
        write_json(arguments.save_rankings, rankings(benchmark, encoded))
        print(f"wrote {arguments.save_rankings}")
    if arguments.save_ranks:
        write_csv(arguments.save_ranks, query_ranks(benchmark, encoded))
        print(f"wrote {arguments.save_ranks}")
    return metrics


def rankings(benchmark: Benchmark, encoded: list[EncodedSplit]) -> list[dict[str, Any]]:
    """Each query with its 50 best candidates, best first, as names."""
    result = []
    for split, one in zip(benchmark.splits, encoded, strict=True):
        names = list(split.image_paths)
        references = one.references if benchmark.name == "CIRR" else None
        best = top_k(similarities(one.composed, one.gallery), TOP, references)
        for triplet, row in zip(split.triplets, best.tolist(), strict=True):
            entry = {"pairid": triplet.pair_id} if benchmark.name == "CIRR" else {"type": split.dress_type}
            entry |= {"reference": triplet.reference, "caption": triplet.caption, "target": triplet.target}
            result.append({**entry, "ranking": [names[i] for i in row]})
    return result


def query_ranks(benchmark: Benchmark, encoded: list[EncodedSplit]) -> list[dict[str, int | str]]:
    """The rank of each query's target, from 0: all that the metrics are made of.

    CIRR: `pairid`, `rank` in the gallery, `subset_rank` in the image set. FashionIQ: `type`, `number` of the
    entry in the type's captions file, `rank`.
    """
    rows = []
    for split, one in zip(benchmark.splits, encoded, strict=True):
        scores = similarities(one.composed, one.gallery)
        ids = [triplet.pair_id for triplet in split.triplets]
        if isinstance(split, CirrSplit):
            ranks = target_ranks(scores, one.targets, one.references).tolist()
            set_ranks = subset_ranks(scores, one.targets, one.references, one.members).tolist()
            rows += [
                {"pairid": i, "rank": rank, "subset_rank": set_rank}
                for i, rank, set_rank in zip(ids, ranks, set_ranks, strict=True)
            ]
        else:
            ranks = target_ranks(scores, one.targets).tolist()
            rows += [
                {"type": split.dress_type, "number": i, "rank": rank}
                for i, rank in zip(ids, ranks, strict=True)
            ]
    return rows


def run_submission(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Write CIRR's two submission files for test1 and return their paths.

    Both are checked first, so that a file exists only if it is right.
    """
    split = load_cirr(arguments.data_path, "test1")
    checkpoint, transform, encoding = load_to_score(arguments)
    check_images(split.image_paths, split.image_paths)
    encoded = encode_split(checkpoint.model, split, transform, **encoding)
    names = list(split.image_paths)
    scores = similarities(encoded.composed, encoded.gallery)
    best = top_k(scores, TOP, encoded.references)
    in_set = subset_order(scores, encoded.references, encoded.members)[:, :TOP_IN_SET]
    ids = [str(triplet.pair_id) for triplet in split.triplets]
    files = []
    for metric, rows in (("recall", best), ("recall_subset", in_set)):
        ranked = {pair_id: [names[i] for i in row] for pair_id, row in zip(ids, rows.tolist(), strict=True)}
        check_submission(split, metric, ranked)
        files.append(
            ({"version": "rc2", "metric": metric, **ranked}, f"{metric}_submission_{arguments.name}.json")
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for contents, file_name in files:
        write_json(arguments.out / file_name, contents)
        print(f"wrote {arguments.out / file_name}")
    return tuple(arguments.out / file_name for _, file_name in files)


def check_submission(split: CirrSplit, metric: str, ranked: dict[str, list[str]]) -> None:
    """Raise :class:`InputError` unless CIRR's server would take ``ranked``.

    Every pair id of the split once, with 50 names of the split (or 3 of the image set), each once, and
    never the reference.
    """
    if sorted(ranked) != sorted(str(triplet.pair_id) for triplet in split.triplets):
        raise InputError(f"the {metric} submission does not hold every pair id of {split.name} once")
    for triplet in split.triplets:
        row = ranked[str(triplet.pair_id)]
        allowed = set(triplet.members) if metric == "recall_subset" else set(split.image_paths)
        wanted = min(TOP_IN_SET if metric == "recall_subset" else TOP, len(allowed) - 1)
        if len(row) != wanted or len(set(row)) != wanted or not set(row) <= allowed - {triplet.reference}:
            raise InputError(
                f"the {metric} submission for pair {triplet.pair_id} is not {wanted} different names of "
                f"{'its image set' if metric == 'recall_subset' else split.name} without its reference"
            )
