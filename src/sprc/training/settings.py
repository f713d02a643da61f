"""The settings of ``blip_fine_tune_2.py``. Imports no torch, so that `--help` is quick."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprc.config import AMP, CONTRASTS, FUSION, ModelConfig
from sprc.data import NOISE_KINDS
from sprc.errors import InputError
from sprc.scoring.settings import (
    CacheSettings,
    DatasetSettings,
    DataSettings,
    DeviceSettings,
    GallerySettings,
    ImageSettings,
    ProtocolSettings,
    ReaderSettings,
    StartSettings,
    TimeoutSettings,
)
from sprc.settings import ROOT, add_flags, flag_parser, like, setting

SPEED = "speed and memory"  # the flags' group


@dataclass(frozen=True, kw_only=True)
class LoopSettings(ReaderSettings):
    """What the training loop needs: how long, how fast, in what parts."""

    num_epochs: int = setting(10, help="default: %(default)s")
    batch_size: int = setting(64, help="triplets a step, of all GPUs; default: %(default)s")
    learning_rate: float = setting(1e-5, help="peak of the schedule; default: %(default)s")
    validation_frequency: int = setting(1, help="epochs between validations; default: %(default)s")
    checkpoint_every: int = setting(0, metavar="STEPS", help="save the state also within epochs")
    num_workers: int | None = like(
        ReaderSettings, "num_workers", help="processes a GPU that read images; default: by the cores"
    )
    seed: int = setting(0, help="of weights, data order and dropout; default: %(default)s")
    amp: str = setting(
        "auto",
        choices=AMP,
        help="mixed precision; auto (default): bf16 where the GPU has it, else fp16, off on a CPU; "
        "fp16 is plain SPRC's",
        group=SPEED,
    )
    grad_cache: int | None = setting(
        None,
        metavar="CHUNK",
        help="larger batches than memory holds: embed CHUNK triplets at once, twice; the result is the same",
        unset="with --resume: embed whole batches again",
        group=SPEED,
    )


@dataclass(frozen=True, kw_only=True)
class TripletSettings:
    """Triplets beside the training set's own, or made wrong, and the loss for those that may be wrong."""

    contrast: str = setting(
        "infonce",
        choices=CONTRASTS,
        help="complementary: the robust loss of TME, for training sets in which some triplets are wrong",
    )
    complementary_weight: float | None = setting(
        None,
        metavar="W",
        help="of --contrast complementary: W times it and 1 - W times InfoNCE; default: 1, as TME has it",
    )
    noise_ratio: float = setting(
        0.0,
        metavar="RATIO",
        help="make this share of the training triplets wrong, drawn by --seed; default: %(default)s",
    )
    noise_kind: str = setting(
        "target",
        choices=NOISE_KINDS,
        help="what a wrong triplet has of another one: its target, or mix, as TME's: in a third each of "
        "them the reference, the caption, the target; default: %(default)s",
    )
    extra_triplets: Path | None = setting(
        None,
        metavar="FILE",
        help="train on these, too: JSON as the data set's captions files, of its training images",
    )
    extra_weight: float | None = setting(
        None,
        metavar="W",
        help="of --extra-triplets: the share of them that each epoch takes in turn, at most 1; default: 1",
    )

    def check_triplets(self) -> None:
        """Raise :class:`InputError` for a flag that has nothing to act on, or a value that cannot work."""
        weight = self.complementary_weight
        if weight is not None and self.contrast == "infonce":
            raise InputError(
                f"--complementary-weight {weight}: the loss is InfoNCE alone; add --contrast complementary, "
                "or leave the flag out"
            )
        if weight is not None and not 0 <= weight <= 1:
            raise InputError(f"--complementary-weight {weight} must be a number from 0 to 1")
        if not 0 <= self.noise_ratio <= 1:
            raise InputError(f"--noise-ratio {self.noise_ratio} must be a number from 0 to 1")
        if self.extra_weight is not None and self.extra_triplets is None:
            raise InputError(f"--extra-weight {self.extra_weight} weighs nothing; give --extra-triplets")
        if self.extra_weight is not None and not 0 < self.extra_weight <= 1:
            raise InputError(f"--extra-weight {self.extra_weight} must be more than 0 and at most 1")

    def weights_where_unset(self) -> dict[str, float]:
        """The weights that act and are None."""
        found = {}
        if self.contrast == "complementary" and self.complementary_weight is None:
            found["complementary_weight"] = 1.0
        if self.extra_triplets is not None and self.extra_weight is None:
            found["extra_weight"] = 1.0
        return found


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(
    TimeoutSettings,
    DeviceSettings,
    GallerySettings,
    CacheSettings,
    ImageSettings,
    TripletSettings,
    LoopSettings,
    StartSettings,
    DataSettings,
    ProtocolSettings,
    DatasetSettings,
):
    """All that a run is started with; further the switches of the model, see :func:`training_parser`."""

    dataset: str = like(DatasetSettings, "dataset", None)  # not needed with --resume: the run knows it
    resume: Path | None = setting(
        None,
        metavar="RUN_FOLDER",
        help="go on with a run, with its own flags; docs/training.md says which may be given anew",
    )
    models_path: Path = setting(ROOT / "models", help="where the run's folder goes; default: models/")
    loss_align: float | None = setting(None, help="alignment loss's weight; default: CIRR 0.4, FashionIQ 1")
    loss_rtc: float | None = setting(None, help="text-only loss's weight; default: CIRR 0.4, FashionIQ 1")
    loss_itm: float = setting(1.0, help="weight of a matching loss; this model has none")
    save_training: bool = setting(False, help="save the model after each validation")
    save_best: bool = setting(False, help="with --save-training: keep only the best one")
    save_full: bool = setting(False, help="save the frozen vision transformer, too")
    save_memory: bool = like(GallerySettings, "save_memory", negatable=True)
    feature_cache: Path | None = like(
        CacheSettings, "feature_cache", unset="with --resume: read the images again", group=SPEED
    )
    cache_dtype: str = like(CacheSettings, "cache_dtype", group=SPEED)
    compile: bool = setting(False, help="torch.compile what is trained", group=SPEED)
    lr_group: Sequence[str] = setting(
        (),
        metavar="PREFIX=RATE",
        help="peak rate of the parameters whose names start with PREFIX; the longest PREFIX counts",
    )
    train_share: float = setting(
        1.0, metavar="SHARE", help="train on this share of the triplets, drawn by --seed; default: all"
    )
    fusion_lr: float | None = setting(
        None,
        metavar="RATE",
        help="the module's own peak rate, as --lr-group gated_fusion.=RATE; default: --learning-rate",
        group=FUSION,
    )
    warmup_fusion: int = setting(
        0, metavar="EPOCHS", help="epochs at the start in which only the module learns", group=FUSION
    )
    log_fusion_every: int = setting(
        50,
        metavar="STEPS",
        help="steps between rows of fusion_metrics.csv; 0: none; default: %(default)s",
        group=FUSION,
    )
    tensorboard: bool = setting(
        False, negatable=True, help="write what goes to CSV files for TensorBoard, too"
    )


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """Several runs in place of one."""

    recipe: Path | None = setting(
        None,
        metavar="YAML",
        help="run the stages of this file, or go on with them; other flags are for all of them; "
        "docs/recipes.md",
    )


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings(DeviceSettings, ReaderSettings):
    """What ``pretrain_tiny.py`` is told."""

    out: Path = setting(help="the folder of the run and its weights; the same one goes on with a run")
    scenes: int = setting(20000, help="made scenes to train on; default: %(default)s")
    num_epochs: int = setting(16, help="default: %(default)s")
    batch_size: int = setting(128, help="scenes a step; default: %(default)s")
    learning_rate: float = setting(1e-3, help="peak of the schedule; default: %(default)s")
    validation_frequency: int = setting(4, help="epochs between validations; default: %(default)s")
    num_workers: int | None = like(LoopSettings, "num_workers")
    seed: int = like(
        LoopSettings, "seed", help="of scenes, descriptions, weights and data order; default: %(default)s"
    )


def training_parser(description: str | None) -> ArgumentParser:
    """A parser of the settings and of the model's switches; None, for a switch, is the backbone's own."""
    parser = flag_parser(description, TrainingSettings, RecipeSettings)
    add_flags(parser, ModelConfig, may_be_unset=True)
    return parser


def default_flags() -> dict[str, Any]:
    """The default of every flag of :func:`training_parser`, by its name."""
    return vars(training_parser(None).parse_args([]))
