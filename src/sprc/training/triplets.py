"""Which triplets a run trains on, and how it weighs the losses of triplets that may be wrong."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprc.data.datasets import TripletDataset, per_epoch
from sprc.data.extra import load_extra
from sprc.data.images import Loader
from sprc.data.noise import make_wrong
from sprc.data.split import Split, Triplet, images_of, triplets_of
from sprc.errors import InputError
from sprc.scoring.benchmarks import training_benchmark
from sprc.training.settings import TrainingSettings


@dataclass(frozen=True)
class TrainingTriplets:
    """What is trained on."""

    own: list[Triplet]  # the training set's, or a share of them, some of them made wrong
    extra: list[Triplet]  # of --extra-triplets
    paths: dict[str, Path]  # of the images that both need, for a re-ranker those of the image sets, too
    changes: list[dict[str, Any]]  # what --noise-ratio made wrong

    def dataset(self, load: Loader, settings: TrainingSettings) -> TripletDataset:
        """The items of the triplets; ``load`` reads an image by its path."""
        return TripletDataset(self.own, self.paths, load, settings.seed, self.extra, settings.extra_weight)


def read_triplets(settings: TrainingSettings, splits: Iterable[Split]) -> TrainingTriplets:
    """The triplets of the training ``splits``, and of ``--extra-triplets``; what is unusual is printed.

    Raises :class:`InputError` for a file of extra triplets that is wrong, and where too few are left to be
    made wrong, or to be trained on.
    """
    splits = list(splits)
    own, paths = triplets_of(splits, settings.train_share, settings.seed)
    if settings.train_share < 1:
        print(f"training on {len(own):,} triplets, --train-share {settings.train_share:g}", flush=True)
    own, changes = make_wrong(own, settings.noise_ratio, settings.noise_kind, settings.seed)
    if changes:
        print(f"made wrong: {len(changes):,} of {len(own):,} training triplets", flush=True)
    known = {name: path for split in splits for name, path in split.image_paths.items()}
    if settings.reranks:
        paths |= {name: known[name] for triplet in own for name in triplet.members}
    extra: list[Triplet] = []
    if settings.extra_triplets is not None:
        missing = {name for split in splits for name in split.left_out.images}
        keys = training_benchmark(settings.dataset).extra_keys
        extra = load_extra(settings.extra_triplets, keys, known, missing)
        if not (count := per_epoch(len(extra), settings.extra_weight)):
            raise InputError(
                f"--extra-weight {settings.extra_weight} of {len(extra):,} triplets is none; give more"
            )
        print(f"extra triplets: {len(extra):,}, {count:,} of them each epoch", flush=True)
        paths |= {name: known[name] for name in images_of(extra)}
    return TrainingTriplets(own, extra, paths, changes)


def loss_weights(settings: TrainingSettings) -> dict[str, float]:
    """The weight of each loss by its name, of settings in which nothing is left to the benchmark.

    Of both contrastive losses the complementary one has the share ``--complementary-weight``, and InfoNCE the
    rest.
    """
    names = ("loss_itm", "loss_rtc", "loss_align", "loss_mined")
    weights = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    if (share := settings.complementary_weight) is not None:
        for name, weight in (("loss_itc", 1.0), ("loss_rtc", weights["loss_rtc"])):
            weights |= {name: (1 - share) * weight, f"{name}_complementary": share * weight}
    return weights
