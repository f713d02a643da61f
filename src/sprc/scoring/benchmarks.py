"""What CIRR and FashionIQ differ in: a class each, by which training, scoring and the wings ask.

Adding a benchmark is a reader in ``sprc.data``, one class in this file under ``@register_benchmark("name")``,
and its name in ``sprc.data.DATASETS``, which `--help` shows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean, harmonic_mean
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from sprc.data import PROTOCOLS, TYPES
from sprc.data.check import Findings, examine_cirr, examine_fashioniq
from sprc.data.cirr import canonical_split, edits_of_test1, load_cirr, load_cirr_test
from sprc.data.extra import Keys
from sprc.data.fashioniq import load_fashioniq
from sprc.data.missing import left_out_columns, left_out_text, tell_left_out
from sprc.data.split import Split, Triplet
from sprc.errors import InputError
from sprc.scoring.ranking import Ranking, recall

BENCHMARKS: dict[str, type["Benchmark"]] = {}


def register_benchmark(key: str) -> Callable[[type["Benchmark"]], type["Benchmark"]]:
    """Make a class available as ``--dataset key``."""

    def add(cls: type["Benchmark"]) -> type["Benchmark"]:
        cls.key = key
        BENCHMARKS[key] = cls
        return cls

    return add


def benchmark_class(name: str) -> type["Benchmark"]:
    """The class of a data set, by its name in any case; :class:`InputError` lists the known ones."""
    if name.lower() not in BENCHMARKS:
        raise InputError(f"--dataset {name!r} is unknown; choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name.lower()]


@dataclass(frozen=True)
class Benchmark(ABC):
    """The splits to score, and in the class the published habits around them.

    A split is in ``parts``, each with a gallery of its own: FashionIQ's types. CIRR's one part has no name.
    """

    splits: list[Split]  # one a part
    protocol: str | None = None  # which gallery; its name stands beside every figure

    key: ClassVar[str]  # of --dataset, and in a run's hyperparameters
    name: ClassVar[str]  # as the authors write it
    short_name: ClassVar[str]  # in the name of a run's folder
    parts: ClassVar[tuple[str, ...]] = ("",)
    part_column: ClassVar[str | None] = None  # of the file of ranks, where there are parts to tell apart
    id_column: ClassVar[str]  # of the file of ranks: a triplet's pair_id
    examine: ClassVar["staticmethod[[Path, Findings, str], None]"]  # for check_dataset
    edits: ClassVar[str]  # where the built-in data in this format tell the edits of a split
    protocols: ClassVar[tuple[str, ...]] = ()
    training_protocol: ClassVar[str | None] = None
    extra_keys: ClassVar[Keys]  # of --extra-triplets, those of its own captions files
    scored: ClassVar[tuple[str, ...]] = ("val",)  # splits whose targets can be known

    criterion: ClassVar[str]  # the metric whose best epoch is kept
    checkpoint: ClassVar[str]  # under this name
    headline: ClassVar[str]  # the metric that an ablation tests
    plotted: ClassVar[tuple[str, ...]]  # the metrics that an ablation plots
    unprinted: ClassVar[tuple[str, ...]] = ()  # the metrics that its printed table leaves out
    by_kind: ClassVar[tuple[str, ...]]  # of sprc.scoring.kinds.CUTS, what it tells of each kind of edit

    loss_weights: ClassVar[dict[str, float]]  # the published ones; a loss that is not named weighs 1
    # The learning rate's one cycle: it spans the epochs that are run, and no fewer than these.
    schedule_epochs: ClassVar[int]
    schedule_in_words: ClassVar[str]
    start_divisor: ClassVar[float]  # the peak rate over the first one

    @classmethod
    @abstractmethod
    def read(
        cls,
        data_path: Path,
        split: str,
        *,
        part: str,
        protocol: str | None,
        missing_images: str = "error",
        with_targets: bool = False,
    ) -> Split:
        """Read and check one part of ``split``; :class:`InputError` names the file and the entry.

        Args:
            data_path: the folder that holds the data set's.
            split: its name.
            part: one of ``parts``.
            protocol: one of ``protocols``; None where there are none.
            missing_images: "skip" leaves out what has no file.
            with_targets: read the targets of a test split where the built-in data hold them.
        """

    @classmethod
    def read_parts(
        cls,
        data_path: Path,
        names: Iterable[str],
        protocol: str | None,
        *,
        missing_images: str = "error",
        with_targets: bool = False,
    ) -> list[Split]:
        """All parts of the splits of these names, as :meth:`read` does; what was left out is printed.

        Training needs the triplets' images alone, so "train" is read in the benchmark's smallest gallery.
        """
        splits = [
            cls.read(
                data_path,
                name,
                part=part,
                protocol=cls.training_protocol if name == "train" else protocol,
                missing_images=missing_images,
                with_targets=with_targets,
            )
            for name in dict.fromkeys(map(cls.split_name, names))
            for part in cls.parts
        ]
        if missing_images == "skip":
            tell_left_out(splits)
        return splits

    @classmethod
    def load(
        cls, data_path: Path, protocol: str | None, split: str = "val", *, missing_images: str = "error"
    ) -> Self:
        """The benchmark with the parts of ``split``, which is to be scored.

        ``split`` is "val" or, where the built-in data in CIRR's format hold its targets, "test1".
        With ``missing_images`` "skip" what has no file is left out, and printed: :mod:`sprc.data.missing`.
        Raises :class:`InputError` naming the file and the entry, or for a split without known targets.
        """
        if cls.split_name(split) not in cls.scored:
            raise InputError(
                f"--split {split}: {cls.name}'s runs are scored on its validation split; "
                f"give {' or '.join(cls.scored)}"
            )
        splits = cls.read_parts(
            data_path, [split], protocol, missing_images=missing_images, with_targets=True
        )
        return cls(splits, protocol if cls.protocols else None)

    @classmethod
    def train_splits(cls, data_path: Path, *, missing_images: str = "error") -> list[Split]:
        """The parts of the training split; ``missing_images`` as for :meth:`load`."""
        return cls.read_parts(data_path, ["train"], cls.training_protocol, missing_images=missing_images)

    @classmethod
    def split_name(cls, name: str) -> str:
        """The one name of a split that has several."""
        return name

    def image_paths(self) -> list[Path]:
        """The images of the galleries."""
        return [path for split in self.splits for path in split.image_paths.values()]

    @classmethod
    def edits_file(cls, data_path: Path, split: str, part: str) -> Path:
        """The file of the edits of ``part`` of ``split``; only the built-in data have it."""
        return Path(data_path) / cls.edits.format(split=split, part=part)

    @classmethod
    def split_to_report(cls, data_path: Path) -> str:
        """The split for a table's figures: a held-out one where its targets are at hand, else "val"."""
        return "val"

    @classmethod
    @abstractmethod
    def metrics_of(cls, rankings: Mapping[str, Ranking]) -> dict[str, float]:
        """The metrics in percent of the ranked parts, named and ordered as in SPRC's CSV files.

        Raises :class:`ValueError` where a split keeps its targets secret: there is no rank.
        """

    def metrics(self, rankings: list[Ranking]) -> dict[str, float | str]:
        """The metrics of the ranked splits in percent, named and ordered as in SPRC's CSV files.

        After them comes what SPRC's files do not have: FashionIQ's protocol, and what the splits are without.
        """
        parts = [split.dress_type for split in self.splits]
        values = self.metrics_of(dict(zip(parts, rankings, strict=True)))
        protocol = {} if self.protocol is None else {"protocol": self.protocol}
        return {**values, **protocol, **left_out_columns(self.splits)}

    def summary(self, metrics: Mapping[str, Any]) -> str:
        """The headline metrics in one line, and what was left out of the splits."""
        return self.shown(metrics) + left_out_text(self.splits)

    @abstractmethod
    def shown(self, metrics: Mapping[str, Any]) -> str:
        """The headline metrics in one line."""

    @classmethod
    @abstractmethod
    def headline_scores(cls, ranks: Mapping[str, np.ndarray]) -> np.ndarray:
        """What each query adds to the headline metric, (Q,), in percent, from the columns of a file of ranks.

        The headline is their mean over the queries of each part, and then over the parts.
        """

    @classmethod
    def query_columns(cls) -> list[str]:
        """The columns of the file of ranks that tell a query from all others."""
        return [cls.id_column] if cls.part_column is None else [cls.part_column, cls.id_column]

    @classmethod
    def query_key(cls, split: Split, triplet: Triplet) -> dict[str, int | str]:
        """A query's ``query_columns``."""
        part: dict[str, int | str] = {} if cls.part_column is None else {cls.part_column: split.dress_type}
        return {**part, cls.id_column: triplet.pair_id}

    @classmethod
    def ranking_key(cls, split: Split, triplet: Triplet) -> dict[str, int | str]:
        """What tells where a query is from in the file of rankings: its part, or without parts its id."""
        if cls.part_column is None:
            return {cls.id_column: triplet.pair_id}
        return {cls.part_column: split.dress_type}

    @classmethod
    def schedule_span(cls, num_epochs: int) -> int:
        """Epochs that the learning rate's schedule spans where ``num_epochs`` are run."""
        return max(cls.schedule_epochs, num_epochs)

    @classmethod
    @abstractmethod
    def warm_up(cls, span: int) -> float:
        """The share of a schedule of ``span`` epochs after which the rate is at its peak."""


@register_benchmark("cirr")
class CIRR(Benchmark):
    """Liu et al., ICCV 2021: one gallery, a reference left out of its own ranking, image sets of six."""

    name = "CIRR"
    short_name = "cirr"
    id_column = "pairid"
    examine = staticmethod(examine_cirr)
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
class FashionIQ(Benchmark):
    """Wu et al., CVPR 2021: a gallery a type, references among the candidates, two protocols."""

    name = "FashionIQ"
    short_name = "fiq"
    parts = TYPES
    part_column = "type"
    id_column = "number"
    examine = staticmethod(examine_fashioniq)
    edits = "fashionIQ_dataset/edits.{part}.{split}.json"
    extra_keys = Keys("candidate", "target", "captions")
    protocols = PROTOCOLS
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


def known(ranks: Tensor | None) -> Tensor:
    """``ranks``, which are None where the targets are secret: then a :class:`ValueError`."""
    if ranks is None:
        raise ValueError("a ranking without targets has no recall; score a split whose targets are known")
    return ranks
