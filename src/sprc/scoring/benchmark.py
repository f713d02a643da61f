"""What CIRR and FashionIQ differ in, for training and for validation."""

from dataclasses import dataclass
from pathlib import Path

from sprc.data import TYPES
from sprc.data.cirr import load_cirr, load_cirr_test
from sprc.data.datasets import Triplet
from sprc.data.fashioniq import load_fashioniq
from sprc.data.missing import left_out_columns, left_out_text, tell_left_out
from sprc.errors import InputError
from sprc.scoring.encoding import Split
from sprc.scoring.ranking import Ranking
from sprc.scoring.recall import metrics


def triplets_of(splits: list[Split]) -> tuple[list[Triplet], dict[str, Path]]:
    """The triplets of ``splits``, chained, and the paths of the images they need."""
    triplets = [triplet for split in splits for triplet in split.triplets]
    paths = {name: path for split in splits for name, path in split.image_paths.items()}
    needed = dict.fromkeys(name for t in triplets for name in (t.reference, t.target))
    return triplets, {name: paths[name] for name in needed}


@dataclass(frozen=True)
class Benchmark:
    """A data set's splits to score and the published habits around them."""

    name: str  # "CIRR" or "FashionIQ"
    protocol: str | None  # FashionIQ's gallery; its name stands beside every figure
    splits: list[Split]
    criterion: str  # the metric whose best epoch is kept
    checkpoint: str  # under this name

    @classmethod
    def load(
        cls,
        dataset: str,
        data_path: Path,
        protocol: str,
        split: str = "val",
        *,
        missing_images: str = "error",
    ) -> "Benchmark":
        """Read and check the annotations of ``dataset``, "cirr" or "fashioniq".

        ``split`` is "val" or, where the built-in data in CIRR's format hold its targets, "test1".
        With ``missing_images`` "skip" what has no file is left out, and printed: :mod:`sprc.data.missing`.
        Raises :class:`InputError` naming the file and the entry.
        """
        if dataset == "cirr":
            if split == "test1":
                splits = [load_cirr_test(data_path, missing_images=missing_images)]
            else:
                splits = [load_cirr(data_path, "val", missing_images=missing_images)]
            benchmark = cls("CIRR", None, splits, "arithmetic_mean", "tuned_clip_arithmetic")
        elif split != "val":
            raise InputError(
                f"--split {split}: FashionIQ's runs are scored on its validation split; give val"
            )
        else:
            splits = [
                load_fashioniq(data_path, "val", dress_type, protocol, missing_images=missing_images)
                for dress_type in TYPES
            ]
            benchmark = cls("FashionIQ", protocol, splits, "average_recall", "tuned_clip_best")
        if missing_images == "skip":
            tell_left_out(splits)
        return benchmark

    def image_paths(self) -> list[Path]:
        """The images of the galleries."""
        return [path for split in self.splits for path in split.image_paths.values()]

    def train_splits(self, data_path: Path, *, missing_images: str = "error") -> list[Split]:
        """The training split, FashionIQ's one a type; ``missing_images`` as for :meth:`load`."""
        if self.name == "CIRR":
            splits = [load_cirr(data_path, "train", missing_images=missing_images)]
        else:  # val-split is the gallery of the triplets' images alone; training needs no others
            splits = [
                load_fashioniq(data_path, "train", dress_type, "val-split", missing_images=missing_images)
                for dress_type in TYPES
            ]
        if missing_images == "skip":
            tell_left_out(splits)
        return splits

    def metrics(self, rankings: list[Ranking]) -> dict[str, float | str]:
        """The metrics of the ranked splits in percent, named and ordered as in SPRC's CSV files.

        After them comes what SPRC's files do not have: FashionIQ's protocol, and what the splits are without.
        """
        values = metrics(self.splits, rankings)
        protocol = {} if self.protocol is None else {"protocol": self.protocol}
        return {**values, **protocol, **left_out_columns(self.splits)}

    def summary(self, metrics: dict[str, float | str]) -> str:
        """The headline metrics in one line, and what was left out of the splits."""
        return self._headline(metrics) + left_out_text(self.splits)

    def _headline(self, metrics: dict[str, float | str]) -> str:
        if self.name == "CIRR":
            shown = {
                "R@1": "recall_at1",
                "R@5": "recall_at5",
                "R_s@1": "group_recall_at1",
                "mean(R@5+R_s@1)": "mean(R@5+R_s@1)",
                "arithmetic mean": "arithmetic_mean",
            }
            return ", ".join(f"{label} {metrics[key]:.2f}" for label, key in shown.items())
        return (
            f"R@10 {metrics['average_recall_at10']:.2f}, R@50 {metrics['average_recall_at50']:.2f}, "
            f"mean {metrics['average_recall']:.2f} ({self.protocol} gallery)"
        )
