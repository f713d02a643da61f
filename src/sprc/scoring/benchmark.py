"""What a benchmark is: the class by which training, scoring and the wings ask what benchmarks differ in.

The benchmarks themselves are in :mod:`sprc.scoring.benchmarks`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from torch import Tensor

from sprc.data.extra import Keys
from sprc.data.missing import left_out_columns, left_out_text, tell_left_out
from sprc.data.split import Split, Triplet
from sprc.errors import InputError
from sprc.scoring.ranking import Ranking

B = TypeVar("B", bound="Benchmark")
BENCHMARKS: dict[str, type["Benchmark"]] = {}


def register_benchmark(key: str) -> Callable[[type[B]], type[B]]:
    """Make a class available as ``--dataset key``."""

    def add(cls: type[B]) -> type[B]:
        cls.key = key
        BENCHMARKS[key] = cls
        return cls

    return add


@dataclass(frozen=True)
class Benchmark(ABC):
    """The splits to score, and in the class the published habits around them.

    A split is in ``parts``, each with a gallery of its own: FashionIQ's types. The one part of others has no
    name. A benchmark that is trained on besides is a :class:`TrainingBenchmark`.
    """

    splits: list[Split]  # one a part
    protocol: str | None = None  # which gallery, or which text; its name stands beside every figure

    key: ClassVar[str]  # of --dataset, and in a run's hyperparameters
    name: ClassVar[str]  # as the authors write it
    parts: ClassVar[tuple[str, ...]] = ("",)
    part_column: ClassVar[str | None] = None  # of the file of ranks, where there are parts to tell apart
    id_column: ClassVar[str]  # of the file of ranks: a triplet's pair_id
    edits: ClassVar[str]  # where the built-in data in this format tell the edits of a split
    protocols: ClassVar[tuple[str, ...]] = ()  # the first is the default
    protocol_setting: ClassVar[str | None] = None  # the field of a command's settings that names one
    training_protocol: ClassVar[str | None] = None
    split_names: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    scored: ClassVar[tuple[str, ...]] = ("val",)  # splits whose targets can be known

    headline: ClassVar[str]  # the metric that two ways are compared by

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
        Raises :class:`InputError` for a split that the benchmark does not have.
        """
        names = list(dict.fromkeys(map(cls.split_name, names)))
        if "train" in names and "train" not in cls.split_names:
            raise InputError(f"{cls.name} has no split train; give {' or '.join(cls.split_names)}")
        splits = [
            cls.read(
                data_path,
                name,
                part=part,
                protocol=cls.training_protocol if name == "train" else protocol,
                missing_images=missing_images,
                with_targets=with_targets,
            )
            for name in names
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
    def protocol_of(cls, settings: object) -> str | None:
        """The protocol that a command's settings name; the default where they cannot, None without any."""
        default = cls.protocols[0] if cls.protocols else None
        return default if cls.protocol_setting is None else getattr(settings, cls.protocol_setting, default)

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

        After them comes what SPRC's files do not have: what the annotations tell of groups of queries, the
        protocol, and what the splits are without.
        """
        parts = [split.dress_type for split in self.splits]
        values = self.metrics_of(dict(zip(parts, rankings, strict=True)))
        protocol = {} if self.protocol is None else {"protocol": self.protocol}
        return {**values, **self.metrics_of_groups(rankings), **protocol, **left_out_columns(self.splits)}

    def metrics_of_groups(self, rankings: list[Ranking]) -> dict[str, float]:
        """The metrics of groups of queries, where the annotations put them into such."""
        return {}

    def summary(self, metrics: Mapping[str, Any]) -> str:
        """The headline metrics in one line, and what was left out of the splits."""
        return self.shown(metrics) + left_out_text(self.splits)

    @abstractmethod
    def shown(self, metrics: Mapping[str, Any]) -> str:
        """The headline metrics in one line."""

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


class TrainingBenchmark(Benchmark):
    """A benchmark with a training split, and the published habits of training on it."""

    short_name: ClassVar[str]  # in the name of a run's folder
    extra_keys: ClassVar[Keys]  # of --extra-triplets, those of its own captions files
    criterion: ClassVar[str]  # the metric whose best epoch is kept
    checkpoint: ClassVar[str]  # under this name
    plotted: ClassVar[tuple[str, ...]]  # the metrics that an ablation plots
    unprinted: ClassVar[tuple[str, ...]] = ()  # the metrics that its printed table leaves out
    by_kind: ClassVar[tuple[str, ...]]  # of sprc.scoring.kinds.CUTS, what it tells of each kind of edit

    loss_weights: ClassVar[dict[str, float]]  # the published ones; a loss that is not named weighs 1
    # The learning rate's one cycle: it spans the epochs that are run, and no fewer than these.
    schedule_epochs: ClassVar[int]
    schedule_in_words: ClassVar[str]
    start_divisor: ClassVar[float]  # the peak rate over the first one

    @classmethod
    def train_splits(cls, data_path: Path, *, missing_images: str = "error") -> list[Split]:
        """The parts of the training split; ``missing_images`` as for :meth:`load`."""
        return cls.read_parts(data_path, ["train"], cls.training_protocol, missing_images=missing_images)

    @classmethod
    @abstractmethod
    def headline_scores(cls, ranks: Mapping[str, np.ndarray]) -> np.ndarray:
        """What each query adds to the headline metric, (Q,), in percent, from the columns of a file of ranks.

        The headline is their mean over the queries of each part, and then over the parts.
        """

    @classmethod
    def schedule_span(cls, num_epochs: int) -> int:
        """Epochs that the learning rate's schedule spans where ``num_epochs`` are run."""
        return max(cls.schedule_epochs, num_epochs)

    @classmethod
    @abstractmethod
    def warm_up(cls, span: int) -> float:
        """The share of a schedule of ``span`` epochs after which the rate is at its peak."""


def known(ranks: Tensor | None) -> Tensor:
    """``ranks``, which are None where the targets are secret: then a :class:`ValueError`."""
    if ranks is None:
        raise ValueError("a ranking without targets has no recall; score a split whose targets are known")
    return ranks
