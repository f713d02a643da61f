"""What CIRR, FashionIQ and CIRCO differ in: a class each.

Adding a benchmark is a reader and a check in ``sprc.data``, one class in this file under
``@register_benchmark("name")``, and its name in ``sprc.data.DATASETS``, which `--help` shows.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, geometric_mean, harmonic_mean
from typing import Any, ClassVar

import numpy as np

from sprc.data import CIRCO_QUERIES, PROTOCOLS, TYPES
from sprc.data.circo import ASPECTS, load_circo
from sprc.data.cirr import canonical_split, edits_of_test1, load_cirr, load_cirr_test
from sprc.data.extra import Keys
from sprc.data.fashioniq import load_fashioniq
from sprc.data.split import Split
from sprc.errors import InputError
from sprc.scoring.benchmark import BENCHMARKS, Benchmark, TrainingBenchmark, known, register_benchmark
from sprc.scoring.ranking import Ranking, average_precision, recall

__all__ = [
    "BENCHMARKS",
    "CIRCO",
    "CIRR",
    "Benchmark",
    "FashionIQ",
    "TrainingBenchmark",
    "benchmark_class",
    "register_benchmark",
    "training_benchmark",
]


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a data set, by its name in any case; :class:`InputError` lists the known ones."""
    if name.lower() not in BENCHMARKS:
        raise InputError(f"--dataset {name!r} is unknown; choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name.lower()]


def training_benchmark(name: str) -> type[TrainingBenchmark]:
    """The same of a data set that is trained on; :class:`InputError` for one without a training split."""
    found = benchmark_class(name)
    if not issubclass(found, TrainingBenchmark):
        raise InputError(
            f"--dataset {found.name}: {found.name} has no training split; train on CIRR, then score the "
            f"checkpoint with blip_validate.py --dataset {found.name}"
        )
    return found


@register_benchmark("cirr")
class CIRR(TrainingBenchmark):
    """Liu et al., ICCV 2021: one gallery, a reference left out of its own ranking, image sets of six."""

    name = "CIRR"
    short_name = "cirr"
    id_column = "pairid"
    edits = "cirr_dataset/edits.{split}.json"
    extra_keys = Keys("reference", "target_hard", "caption")
    scored = ("val", "test1")
    criterion = "arithmetic_mean"
    checkpoint = "tuned_clip_arithmetic"
    headline = "mean(R@5+R_s@1)"
    plotted = ("recall_at1", "recall_at5", "group_recall_at1", "arithmetic_mean")
    unprinted = ("arithmetic_mean", "harmonic_mean", "geometric_mean")
    by_kind = ("recall_at5", "group_recall_at1")
    loss_weights: ClassVar[dict[str, float]] = {"loss_rtc": 0.4, "loss_align": 0.4}
    schedule_epochs = 80  # so ten epochs stay near the peak
    schedule_in_words = "80 epochs, or all of more"
    start_divisor = 25.0

    @classmethod
    def read(
        cls,
        data_path: Path,
        split: str,
        *,
        part: str = "",
        protocol: str | None = None,
        missing_images: str = "error",
        with_targets: bool = False,
    ) -> Split:
        """The whole split; the targets of test1 are in a file beside the built-in data's."""
        if with_targets and cls.split_name(split) == "test1":
            return load_cirr_test(data_path, missing_images=missing_images)
        return load_cirr(data_path, split, missing_images=missing_images)

    @classmethod
    def split_name(cls, name: str) -> str:
        """The test split is "test1" in CIRR's files; "test" is taken for it."""
        return canonical_split(name)

    @classmethod
    def split_to_report(cls, data_path: Path) -> str:
        """The test split where the built-in data hold its targets."""
        return "test1" if edits_of_test1(data_path).exists() else "val"

    @classmethod
    def metrics_of(cls, rankings: Mapping[str, Ranking]) -> dict[str, float]:
        """Recall in the sets first, then in the gallery, then the means."""
        (ranking,) = rankings.values()
        ranks, set_ranks = known(ranking.ranks), known(ranking.set_ranks)
        recalls = {f"group_recall_at{k}": recall(set_ranks, k) for k in (1, 2, 3)}
        recalls |= {f"recall_at{k}": recall(ranks, k) for k in (1, 5, 10, 50)}
        values = list(recalls.values())
        return {
            **recalls,
            "mean(R@5+R_s@1)": (recalls["recall_at5"] + recalls["group_recall_at1"]) / 2,
            "arithmetic_mean": fmean(values),
            # Both are zero where one value is; the library refuses to say so of the geometric mean.
            "harmonic_mean": harmonic_mean(values) if all(values) else 0.0,
            "geometric_mean": geometric_mean(values) if all(values) else 0.0,
        }

    def shown(self, metrics: Mapping[str, Any]) -> str:
        """R@1, R@5, R_s@1 and two means."""
        shown = {
            "R@1": "recall_at1",
            "R@5": "recall_at5",
            "R_s@1": "group_recall_at1",
            "mean(R@5+R_s@1)": "mean(R@5+R_s@1)",
            "arithmetic mean": "arithmetic_mean",
        }
        return ", ".join(f"{label} {metrics[key]:.2f}" for label, key in shown.items())

    @classmethod
    def headline_scores(cls, ranks: Mapping[str, np.ndarray]) -> np.ndarray:
        """The mean of R@5 and R_s@1."""
        return 50.0 * ((ranks["rank"] < 5).astype(int) + (ranks["subset_rank"] < 1).astype(int))

    @classmethod
    def warm_up(cls, span: int) -> float:
        """A fiftieth of the span."""
        return 1 / 50


@register_benchmark("fashioniq")
class FashionIQ(TrainingBenchmark):
    """Wu et al., CVPR 2021: a gallery a type, references among the candidates, two protocols."""

    name = "FashionIQ"
    short_name = "fiq"
    parts = TYPES
    part_column = "type"
    id_column = "number"
    edits = "fashionIQ_dataset/edits.{part}.{split}.json"
    extra_keys = Keys("candidate", "target", "captions")
    protocols = PROTOCOLS
    protocol_setting = "fiq_protocol"
    training_protocol = "val-split"  # the gallery of the triplets' images alone
    criterion = "average_recall"
    checkpoint = "tuned_clip_best"
    headline = "average_recall"
    plotted = ("average_recall_at10", "average_recall_at50", "average_recall")
    by_kind = ("recall_at10",)
    loss_weights: ClassVar[dict[str, float]] = {"loss_rtc": 1.0, "loss_align": 1.0}  # the unweighted sum
    schedule_epochs = 2  # warming up takes 1.5: one epoch is the first of two
    schedule_in_words = "all epochs of a run"
    start_divisor = 100.0

    @classmethod
    def read(
        cls,
        data_path: Path,
        split: str,
        *,
        part: str,
        protocol: str | None = None,
        missing_images: str = "error",
        with_targets: bool = False,
    ) -> Split:
        """The split of the type ``part``; its test split has no targets anywhere."""
        return load_fashioniq(data_path, split, part, protocol or PROTOCOLS[0], missing_images=missing_images)

    @classmethod
    def metrics_of(cls, rankings: Mapping[str, Ranking]) -> dict[str, float]:
        """Recall of each type in its own gallery, then the means over types."""
        metrics = {
            f"{part}_recall_at{k}": recall(known(ranking.ranks), k)
            for part, ranking in rankings.items()
            for k in (10, 50)
        }
        means = [fmean(metrics[f"{part}_recall_at{k}"] for part in rankings) for k in (10, 50)]
        return {
            **metrics,
            "average_recall_at10": means[0],
            "average_recall_at50": means[1],
            "average_recall": fmean(means),
        }

    def shown(self, metrics: Mapping[str, Any]) -> str:
        """The means over types, and the gallery."""
        return (
            f"R@10 {metrics['average_recall_at10']:.2f}, R@50 {metrics['average_recall_at50']:.2f}, "
            f"mean {metrics['average_recall']:.2f} ({self.protocol} gallery)"
        )

    @classmethod
    def headline_scores(cls, ranks: Mapping[str, np.ndarray]) -> np.ndarray:
        """The mean of R@10 and R@50."""
        return 50.0 * ((ranks["rank"] < 10).astype(int) + (ranks["rank"] < 50).astype(int))

    @classmethod
    def warm_up(cls, span: int) -> float:
        """One and a half epochs."""
        return 1.5 / span


@register_benchmark("circo")
class CIRCO(Benchmark):
    """Baldrati et al., ICCV 2023: several targets a query, references among the candidates, no training."""

    name = "CIRCO"
    id_column = "id"
    edits = "circo_dataset/edits.{split}.json"
    protocols = CIRCO_QUERIES
    protocol_setting = "circo_query"
    split_names = ("val", "test")
    headline = "map_at5"
    cuts: ClassVar[tuple[int, ...]] = (5, 10, 25, 50)

    @classmethod
    def read(
        cls,
        data_path: Path,
        split: str,
        *,
        part: str = "",
        protocol: str | None = None,
        missing_images: str = "error",
        with_targets: bool = False,
    ) -> Split:
        """The whole split, over all of COCO's unlabeled images."""
        return load_circo(data_path, split, protocol or CIRCO_QUERIES[0], missing_images=missing_images)

    @classmethod
    def metrics_of(cls, rankings: Mapping[str, Ranking]) -> dict[str, float]:
        """Mean average precision over all targets, then the recall of the one that was written for."""
        (ranking,) = rankings.values()
        ranks, also_ranks = known(ranking.ranks), known(ranking.also_ranks)
        precision = {
            f"map_at{k}": 100 * average_precision(ranks, also_ranks, k).mean().item() for k in cls.cuts
        }
        return precision | {f"recall_at{k}": recall(ranks, k) for k in cls.cuts}

    def metrics_of_groups(self, rankings: list[Ranking]) -> dict[str, float]:
        """Mean average precision at 10 of the queries of each semantic aspect that has any."""
        (split,), (ranking,) = self.splits, rankings
        precision = average_precision(known(ranking.ranks), known(ranking.also_ranks), 10).tolist()
        found = {}
        for aspect in ASPECTS:
            own = [p for p, one in zip(precision, split.triplets, strict=True) if aspect in one.aspects]
            if own:
                found[f"map_at10_{aspect}"] = 100 * fmean(own)
        return found

    def shown(self, metrics: Mapping[str, Any]) -> str:
        """Mean average precision, one recall, and the query's text."""
        return (
            f"mAP@5 {metrics['map_at5']:.2f}, mAP@10 {metrics['map_at10']:.2f}, "
            f"R@10 {metrics['recall_at10']:.2f} ({self.protocol} query)"
        )
