"""Score a checkpoint: on a split with targets (``blip_validate.py``), or for CIRR's server."""

import argparse
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sprc.benchmark import Benchmark
from sprc.checkpoint import Checkpoint, load_checkpoint
from sprc.data.cirr import CirrSplit, load_cirr
from sprc.data.datasets import Transform
from sprc.data.transforms import make_transform
from sprc.distributed import from_main
from sprc.errors import InputError
from sprc.feature_cache import open_images
from sprc.models.device import SCORING_HELPS, default_workers, memory_explained, place, start_device
from sprc.ranking import Ranking
from sprc.run_folder import compact_json, write_atomically, write_csv
from sprc.validation import LARGEST_BATCH, EncodedSplit, Split, encode_split, rank_split

TOP = 50
TOP_IN_SET = 3

# Where CIRR's authors score test1, and the largest file that is taken there.
SERVER = "https://cirr.cecs.anu.edu.au/test_process/"
LARGEST_SUBMISSION = 5_000_000  # bytes

# How a checkpoint that does not say it is scored: as SPRC's are.
PUBLISHED = {
    "transform": "targetpad",
    "target_ratio": 1.25,
    "batch_size": 32,
    "save_memory": False,
    "gallery_dtype": "float32",
    "cache_dtype": "float16",
}


@dataclass(frozen=True)
class Scorer:
    """A checkpoint on its device, and the settings to score it with."""

    checkpoint: Checkpoint
    settings: dict[str, Any]  # PUBLISHED's names, num_workers and feature_cache

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        blip_model_name: str | None = None,
        backbone: str | None = None,
        vocab: Path | None = None,
        device: torch.device,
        feature_cache: Path | None = None,
        **given: Any,
    ) -> "Scorer":
        """Load the checkpoint at ``path``; settings that are not ``given`` are its training's own.

        Raises :class:`InputError`, see :func:`sprc.checkpoint.load_checkpoint`.
        """
        checkpoint = load_checkpoint(path, model_name=blip_model_name, backbone=backbone, vocab=vocab)
        print(checkpoint.found, flush=True)
        for title, found in checkpoint.hyperparameters.get("left_out", {}).items():
            if title.startswith("train") and found["images"]:
                print(
                    f"its training left {found['images']:,} images without a file and {found['triplets']:,} "
                    f"triplets of {title} out",
                    flush=True,
                )
        place(checkpoint.model, device)
        own = {name: checkpoint.hyperparameters.get(name, value) for name, value in PUBLISHED.items()}
        own["num_workers"] = default_workers(device)
        own["batch_size"] = min(own["batch_size"], LARGEST_BATCH)
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        return cls(checkpoint, {**own, **given, "feature_cache": feature_cache})

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace, device: torch.device) -> "Scorer":
        """The same from the command line of :func:`sprc.flags.add_scoring_flags`."""
        names = ("blip_model_name", "backbone", "vocab", "feature_cache", "num_workers", *PUBLISHED)
        flags = {name: getattr(arguments, name) for name in names}
        return cls.load(arguments.model_path, device=device, **flags)

    @property
    def transform(self) -> Transform:
        """The preprocessing, for pictures to be looked at."""
        size = self.checkpoint.model.config.image_size
        return make_transform(self.settings["transform"], size, self.settings["target_ratio"])

    def memory_explained(self) -> AbstractContextManager[None]:
        """The context in which this scores; see :func:`sprc.models.device.memory_explained`."""
        settings = self.settings
        in_use = {"--save-memory": settings["save_memory"]}
        in_use["--gallery-dtype float16"] = settings["gallery_dtype"] == "float16"
        helps = [flag for flag in SCORING_HELPS if not in_use.get(flag)]
        return memory_explained(self.checkpoint.model.device, settings["batch_size"], helps)

    def encode(self, splits: list[Split]) -> list[EncodedSplit]:
        """The splits as vectors, all their images looked at before the first is encoded."""
        settings, model = self.settings, self.checkpoint.model
        load = open_images(
            model,
            {name: settings[name] for name in ("transform", "target_ratio")},
            [path for split in splits for path in split.image_paths.values()],
            **{n: settings[n] for n in ("feature_cache", "cache_dtype", "batch_size", "num_workers")},
        )
        encoding = {n: settings[n] for n in ("batch_size", "num_workers", "save_memory", "gallery_dtype")}
        with self.memory_explained():
            return [encode_split(model, split, load, **encoding) for split in splits]


def run_validation(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Print and return the metrics of a checkpoint.

    With ``save_rankings`` write each query's top 50, with ``save_ranks`` its target's ranks. With the
    settings of its training, the default, the figures of "val" are those that training wrote.
    """
    device = start_device(arguments.device)
    for flag in ("save_ranks", "save_rankings"):
        file = getattr(arguments, flag)
        if file is not None and not file.absolute().parent.is_dir():
            name = f"--{flag.replace('_', '-')} {file}"
            raise InputError(f"{name}: its folder does not exist; make it, or give another")
    benchmark = Benchmark.load(
        arguments.dataset,
        arguments.data_path,
        arguments.fiq_protocol,
        arguments.split,
        missing_images=arguments.missing_images,
    )
    scorer = Scorer.from_flags(arguments, device)
    with scorer.memory_explained():
        encoded = scorer.encode(benchmark.splits)
        return from_main(lambda: report_scores(arguments, benchmark, encoded))


def report_scores(
    arguments: argparse.Namespace, benchmark: Benchmark, encoded: list[EncodedSplit]
) -> dict[str, float | str]:
    """Rank, print, and write what :func:`run_validation` is asked for."""
    k = TOP if arguments.save_rankings else None
    rankings = [rank_split(split, one, k=k) for split, one in zip(benchmark.splits, encoded, strict=True)]
    metrics = benchmark.metrics(rankings)
    for name, value in metrics.items():
        print(f"{name}: {value}")
    if arguments.save_rankings:
        text = compact_json(named_rankings(benchmark, rankings))
        write_atomically(arguments.save_rankings, lambda file: file.write(text))
        print(f"wrote {arguments.save_rankings}")
    if arguments.save_ranks:
        write_csv(arguments.save_ranks, query_ranks(benchmark, rankings))
        print(f"wrote {arguments.save_ranks}")
    return metrics


def named_rankings(benchmark: Benchmark, rankings: list[Ranking]) -> list[dict[str, Any]]:
    """Each query with its best candidates, best first, as names."""
    result = []
    for split, ranking in zip(benchmark.splits, rankings, strict=True):
        names = list(split.image_paths)
        for triplet, row in zip(split.triplets, ranking.top.tolist(), strict=True):
            entry = {"pairid": triplet.pair_id} if benchmark.name == "CIRR" else {"type": split.dress_type}
            entry |= {"reference": triplet.reference, "caption": triplet.caption, "target": triplet.target}
            result.append({**entry, "ranking": [names[i] for i in row]})
    return result


def query_ranks(benchmark: Benchmark, rankings: list[Ranking]) -> list[dict[str, int | str]]:
    """The rank of each query's target, from 0: all that the metrics are made of.

    CIRR: `pairid`, `rank` in the gallery, `subset_rank` in the image set. FashionIQ: `type`, `number` of the
    entry in the type's captions file, `rank`.
    """
    rows = []
    for split, ranking in zip(benchmark.splits, rankings, strict=True):
        for number, (triplet, rank) in enumerate(zip(split.triplets, ranking.ranks.tolist(), strict=True)):
            if isinstance(split, CirrSplit):
                set_rank = ranking.set_ranks[number].item()
                rows.append({"pairid": triplet.pair_id, "rank": rank, "subset_rank": set_rank})
            else:
                rows.append({"type": split.dress_type, "number": triplet.pair_id, "rank": rank})
    return rows


def run_submission(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Write CIRR's two submission files for test1 and return their paths.

    Both are checked first, so that a file exists only if it is right.
    """
    if arguments.missing_images == "skip":
        raise InputError(
            "--missing-images skip: CIRR's server wants every query of test1, ranked over all its images; "
            "restore the files and leave the flag out"
        )
    device = start_device(arguments.device)
    split = load_cirr(arguments.data_path, "test1")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {arguments.out} cannot be made ({error.strerror}); give another folder"
        ) from error
    scorer = Scorer.from_flags(arguments, device)
    with scorer.memory_explained():
        (encoded,) = scorer.encode([split])
        return from_main(lambda: write_submission(arguments, split, encoded))


def write_submission(
    arguments: argparse.Namespace, split: CirrSplit, encoded: EncodedSplit
) -> tuple[Path, Path]:
    """Rank, check and write what :func:`run_submission` promises."""
    ranking = rank_split(split, encoded, k=TOP)
    names = list(split.image_paths)
    ids = [str(triplet.pair_id) for triplet in split.triplets]
    files = []
    for metric, rows in (("recall", ranking.top), ("recall_subset", ranking.set_order[:, :TOP_IN_SET])):
        ranked = {pair_id: [names[i] for i in row] for pair_id, row in zip(ids, rows.tolist(), strict=True)}
        check_submission(split, metric, ranked)
        text = compact_json({"version": "rc2", "metric": metric, **ranked})
        if len(text) > LARGEST_SUBMISSION:
            raise InputError(
                f"the {metric} submission would have {len(text):,} bytes, and CIRR's server takes at most "
                f"{LARGEST_SUBMISSION:,}; {len(ids):,} queries of {arguments.data_path} are not CIRR's "
                "test1: correct --data-path"
            )
        files.append((arguments.out / f"{metric}_submission_{arguments.name}.json", text))
    for path, text in files:
        write_atomically(path, lambda file, text=text: file.write(text))
        print(f"wrote {path} ({len(text):,} bytes)")
    print(f"send both to CIRR's evaluation server, {SERVER}")
    return tuple(path for path, _ in files)


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
