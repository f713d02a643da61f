"""The settings of ``blip_fine_tune_2.py``. Imports no torch, so that `--help` is quick."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprc.config import AMP, CONTRASTS, FUSION, GALLERY_DTYPES, RERANKER, ModelConfig
from sprc.data import NOISE_KINDS, TRAINED_ON_METAVAR
from sprc.errors import InputError
from sprc.scoring.settings import (
    LARGEST_BATCH,
    RERANK,
    RERANK_TOP,
    CacheSettings,
    DatasetSettings,
    DataSettings,
    DeviceSettings,
    FashionIQSettings,
    GallerySettings,
    ImageSettings,
    ReaderSettings,
    StartSettings,
    TimeoutSettings,
)
from sprc.settings import ROOT, add_flags, flag_parser, like, setting

SPEED = "speed and memory"  # the flags' group
NEGATIVES = "what a query is contrasted with"
NO_TRACKER = "none"
TRACKERS = ("tensorboard", "wandb", "mlflow")


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
class NegativeSettings:
    """What a query is contrasted with. What is None and acts is as in :data:`WHERE_UNSET`."""

    negatives: str = setting(
        "batch",
        choices=("batch", "bank", "mined", "both"),
        help="the batch's other targets (default), a bank of all training images' in place of these, mined "
        "images beside these, or both; docs/negatives.md",
        group=NEGATIVES,
    )
    train: str = setting(
        "all",
        choices=("all", "query", "call2"),
        help="with a bank: what learns; query: not the targets, call2: the text's half of call 2; default: "
        "%(default)s",
        group=NEGATIVES,
    )
    refresh_bank: int | None = setting(
        None,
        metavar="EPOCHS",
        help="compute the bank again that often; default: once",
        group=NEGATIVES,
    )
    bank_temperature: float | None = setting(None, help="default: 0.05", group=NEGATIVES)
    bank_positive: str | None = setting(
        None,
        choices=("current", "bank"),
        help="the target's features: the bank's (bank, default), or as the step computes them (current)",
        group=NEGATIVES,
    )
    bank_dtype: str | None = setting(
        None, choices=GALLERY_DTYPES, help="of the bank's features; default: float16", group=NEGATIVES
    )
    mining_rule: str | None = setting(
        None,
        choices=("qure", "top", "random"),
        help="between the two largest drops of the score after the target (qure, default), the best, or any",
        group=NEGATIVES,
    )
    mine_every: int | None = setting(
        None,
        metavar="EPOCHS",
        help="how often the training set is ranked; default: 1",
        group=NEGATIVES,
    )
    negatives_per_query: int | None = setting(
        None, metavar="N", help="images mined for each; default: 1", group=NEGATIVES
    )
    loss_mined: float | None = setting(None, help="the mined negatives' weight; default: 1", group=NEGATIVES)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is there beside the batch: of "bank" and "mined" those that act."""
        return {"batch": (), "both": ("bank", "mined")}.get(self.negatives, (self.negatives,))

    def check(self) -> None:
        """Raise :class:`InputError` for a flag that has nothing to act on, or a value that cannot work."""
        for kind, names in OF_KIND.items():
            for name in names:
                value = getattr(self, name)
                if kind not in self.kinds and value is not None:
                    raise InputError(
                        f"--{name.replace('_', '-')} {value} is for --negatives {kind} or both, and this is "
                        f"--negatives {self.negatives}; leave one of the flags out"
                    )
        if self.train != "all" and "bank" not in self.kinds:
            raise InputError(
                f"--train {self.train} leaves the targets as they are, which only a bank allows; give "
                "--negatives bank or both, or leave the flag out"
            )
        for name in ("refresh_bank", "mine_every", "negatives_per_query"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} is too small; the least is 1")
        if self.bank_temperature is not None and not 0 < self.bank_temperature < float("inf"):
            raise InputError(f"--bank-temperature {self.bank_temperature} must be a positive number")

    def where_unset(self) -> dict[str, Any]:
        """The values of those that act and are None."""
        acting = [name for kind in self.kinds for name in OF_KIND[kind] if getattr(self, name) is None]
        return {name: WHERE_UNSET[name] for name in acting if name in WHERE_UNSET}


OF_KIND = {
    "bank": ("refresh_bank", "bank_temperature", "bank_positive", "bank_dtype"),
    "mined": ("mining_rule", "mine_every", "negatives_per_query", "loss_mined"),
}
WHERE_UNSET = {
    "bank_temperature": 0.05,  # SPN4CIR's
    # A target that learns beside negatives that do not would learn to be told from these by being new.
    "bank_positive": "bank",
    "bank_dtype": "float16",
    "mining_rule": "qure",
    "mine_every": 1,
    "negatives_per_query": 1,
    "loss_mined": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class TrackerSettings:
    """Where a run can be watched beside its CSV files."""

    report_to: Sequence[str] = setting(
        (),
        choices=(NO_TRACKER, *TRACKERS),
        help="tell settings, metrics, curves and reports to these, too; docs/training.md; default: none",
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers, each once."""
        return tuple(name for name in dict.fromkeys(self.report_to) if name != NO_TRACKER)

    def check_trackers(self) -> None:
        """Raise :class:`InputError` for a name that is unknown, or trackers beside "none"."""
        for name in self.report_to:
            if name not in (NO_TRACKER, *TRACKERS):
                raise InputError(
                    f"--report-to {name!r} is unknown; choose from {', '.join((NO_TRACKER, *TRACKERS))}"
                )
        if NO_TRACKER in self.report_to and self.trackers:
            others = ", ".join(self.trackers)
            raise InputError(f"--report-to {NO_TRACKER} and {others} do not go together; give one of them")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(
    TrackerSettings,
    TimeoutSettings,
    DeviceSettings,
    GallerySettings,
    CacheSettings,
    ImageSettings,
    TripletSettings,
    NegativeSettings,
    LoopSettings,
    StartSettings,
    DataSettings,
    FashionIQSettings,
    DatasetSettings,
):
    """All that a run is started with; further the switches of the model, see :func:`training_parser`."""

    # Not needed with --resume: the run knows it.
    dataset: str = like(DatasetSettings, "dataset", None, metavar=TRAINED_ON_METAVAR)
    resume: Path | None = setting(
        None,
        metavar="RUN_FOLDER",
        help="go on with a run, with its own flags; docs/training.md says which may be given anew",
    )
    models_path: Path = setting(ROOT / "models", help="where the run's folder goes; default: models/")
    loss_align: float | None = setting(None, help="alignment loss's weight; default: CIRR 0.4, FashionIQ 1")
    loss_rtc: float | None = setting(None, help="text-only loss's weight; default: CIRR 0.4, FashionIQ 1")
    loss_itm: float = setting(1.0, help="weight of the re-ranker's loss; default: %(default)s")
    rerank_negatives: int | None = setting(
        None,
        metavar="N",
        help=f"--blip-model-name {RERANKER}: images that a target is contrasted with; default: 8",
        group=RERANK,
    )
    rerank_top: int | None = setting(
        None,
        metavar="N",
        help=f"likewise: candidates a query that validation looks at; default: {RERANK_TOP}",
        group=RERANK,
    )
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
    tensorboard: bool = setting(False, negatable=True, help="as --report-to tensorboard")

    @property
    def trackers(self) -> tuple[str, ...]:
        """Those of both flags."""
        own = ("tensorboard",) if self.tensorboard else ()
        return tuple(dict.fromkeys((*own, *super().trackers)))

    def check_trackers(self) -> None:
        """As there; ``tensorboard`` beside "none" is refused as well."""
        if self.tensorboard and NO_TRACKER in self.report_to:
            raise InputError(
                f"--report-to {NO_TRACKER} and --tensorboard do not go together; leave one out, or give "
                "--no-tensorboard"
            )
        super().check_trackers()

    @property
    def reranks(self) -> bool:
        """Whether a re-ranker is trained, and not a first stage."""
        return self.blip_model_name == RERANKER

    @property
    def reading(self) -> dict[str, Any]:
        """How many images are read at once where nothing learns, and by whom: arguments of scoring."""
        return {"batch_size": min(self.batch_size, LARGEST_BATCH), "num_workers": self.num_workers}

    @property
    def gallery(self) -> dict[str, Any]:
        """How a gallery's features are kept, likewise."""
        return {"save_memory": self.save_memory, "gallery_dtype": self.gallery_dtype}

    def check_reranker(self) -> None:
        """Raise :class:`InputError` for a flag of the one kind of model that the other has no use for."""
        if not self.reranks:
            for name in ("rerank_negatives", "rerank_top"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(
                        f"--{name.replace('_', '-')} {value} is for --blip-model-name {RERANKER}, and this "
                        f"is {self.blip_model_name}; leave one of the flags out"
                    )
            return
        unused: dict[str, Any] = {
            "negatives": "batch",
            "train": "all",
            "contrast": "infonce",
            "fusion_lr": None,
        }
        unused |= {"loss_align": None, "loss_rtc": None, "warmup_fusion": 0}
        for name, default in unused.items():
            if (value := getattr(self, name)) != default:
                raise InputError(
                    f"--{name.replace('_', '-')} {value} does nothing for --blip-model-name {RERANKER}; "
                    "leave it out"
                )
        for name, value in self.switches.items():
            if (name, value) != ("use_gated_fusion", False):
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: a re-ranker's model is that of its first stage; "
                    "leave the flag out"
                )
        for name in ("rerank_negatives", "rerank_top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} is too small; the least is 1")

    def reranker_where_unset(self) -> dict[str, int]:
        """What a re-ranker's training takes where the user gives nothing."""
        values = {"rerank_negatives": 8, "rerank_top": RERANK_TOP} if self.reranks else {}
        return {name: value for name, value in values.items() if getattr(self, name) is None}


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
class PretrainingSettings(TrackerSettings, DeviceSettings, ReaderSettings):
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
