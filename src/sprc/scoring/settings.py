"""The settings that commands share, in groups, and those of the commands that score. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from sprc.config import BACKBONES, CACHE_DTYPES, GALLERY_DTYPES, MODEL_SWITCHES
from sprc.data import (
    CIRCO_QUERIES,
    DATASETS,
    DATASETS_METAVAR,
    MISSING_IMAGES,
    PICTURE_PERTURBATIONS,
    PROTOCOLS,
    TEXT_PERTURBATIONS,
    TRAINED_ON,
    TRAINED_ON_METAVAR,
    TRANSFORMS,
)
from sprc.errors import InputError
from sprc.settings import ROOT, like, setting


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Which benchmark."""

    dataset: str = setting(parse=str.lower, choices=tuple(DATASETS), metavar=DATASETS_METAVAR)


@dataclass(frozen=True, kw_only=True)
class FashionIQSettings:
    """Which gallery FashionIQ's queries are ranked in."""

    fiq_protocol: str = setting(
        "original", choices=PROTOCOLS, help="FashionIQ's gallery; default: %(default)s"
    )


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings(FashionIQSettings):
    """What the benchmarks leave open: FashionIQ's gallery, the text of CIRCO's queries."""

    circo_query: str = setting(
        CIRCO_QUERIES[0],
        choices=CIRCO_QUERIES,
        help="CIRCO's text: the caption alone, or 'find CONCEPT but CAPTION' with the shared concept; "
        "default: %(default)s",
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the data are, and what is done about an image that has no file."""

    data_path: Path = setting(
        ROOT, help="folder of cirr_dataset/, fashionIQ_dataset/, circo_dataset/; default: %(default)s"
    )
    missing_images: str = setting(
        "error",
        choices=MISSING_IMAGES,
        help="an image without a file is an error, or left out with the triplets that need it, and counted; "
        "default: %(default)s",
    )


@dataclass(frozen=True, kw_only=True)
class VocabSettings:
    """Where BERT's vocabulary is, for a machine that reaches no model hub."""

    vocab: Path | None = setting(
        None,
        metavar="FILE",
        help="vocab.txt of bert-base-uncased, where a model brings no vocabulary; default: the model hub's",
    )


@dataclass(frozen=True, kw_only=True)
class StartSettings(VocabSettings):
    """The model to start from.

    ``switches`` are fields of :class:`sprc.config.ModelConfig` that the user sets, over the backbone's own.
    """

    blip_model_name: str = setting("blip2_cir_align_prompt", metavar="NAME", help="default: %(default)s")
    backbone: str = setting("pretrain", metavar="NAME", help=f"{', '.join(BACKBONES)}; default: %(default)s")
    model_path: Path | None = setting(None, metavar="FILE", help="start from this checkpoint's weights")
    switches: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_flags(cls, flags: Mapping[str, Any]) -> Self:
        """From flags by name, those of the model's switches among them; what it does not know is left out."""
        names = {one.name for one in fields(cls)}
        known = {name: value for name, value in flags.items() if name in names}
        switches = {name: flags[name] for name in MODEL_SWITCHES if flags.get(name) is not None}
        return cls(**known, switches=switches)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How images are preprocessed."""

    transform: str = setting("targetpad", choices=TRANSFORMS, help="default: %(default)s")
    target_ratio: float = setting(1.25, help="targetpad's longest side ratio; default: %(default)s")


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """Who reads the images."""

    num_workers: int | None = setting(None, help="processes that read images; default: by the cores")


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where the frozen vision transformer's tokens are kept, and as what."""

    feature_cache: Path | None = setting(
        None,
        metavar="DIR",
        help="read the frozen vision transformer's tokens from here, and fill it where they are missing",
    )
    cache_dtype: str = setting(
        "float16", choices=CACHE_DTYPES, help="type of the values in it; default: %(default)s"
    )


@dataclass(frozen=True, kw_only=True)
class GallerySettings:
    """How the gallery's features are kept."""

    gallery_dtype: str = setting(
        "float32",
        choices=GALLERY_DTYPES,
        help="of the gallery's features in validation; default: %(default)s",
    )
    save_memory: bool = setting(False, help="keep the gallery's features in main memory")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Where it is computed."""

    device: str | None = setting(None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")


@dataclass(frozen=True, kw_only=True)
class TimeoutSettings:
    """How long the processes that torchrun started wait for each other."""

    timeout: int = setting(
        1800,
        metavar="SECONDS",
        help="with torchrun: how long ranks wait for one that does not answer; default: %(default)s",
    )


SCORING_BATCH = 32  # images at once where nothing says how many
# Images that a rank encodes at once where nobody says how many: a training's batch may be that of many GPUs.
LARGEST_BATCH = 64
RERANK = "a second stage"  # the flags' group
RERANK_TOP = 50


def training_s_own(declared: type, name: str) -> Any:
    """A setting whose default is what the checkpoint's training had, or else the one in ``declared``."""
    default = getattr(declared, name)
    return like(declared, name, None, help=f"default: the training's own, else {default}")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(DeviceSettings, VocabSettings):
    """A checkpoint, and how its images are read: by default as its training did."""

    model_path: Path = setting(
        metavar="FILE",
        help="the checkpoint, its run's folder, a saved model's, or a name: docs/checkpoints.md",
    )
    blip_model_name: str | None = setting(None, metavar="NAME", help="default: what the checkpoint says")
    backbone: str | None = setting(None, metavar="NAME", help="default: what the checkpoint says")
    transform: str | None = training_s_own(ImageSettings, "transform")
    target_ratio: float | None = training_s_own(ImageSettings, "target_ratio")
    batch_size: int | None = setting(None, help=f"default: the training's own, else {SCORING_BATCH}")
    num_workers: int | None = like(ReaderSettings, "num_workers")


@dataclass(frozen=True, kw_only=True)
class RerankSettings:
    """The second stage, if there is one."""

    rerank: Path | None = setting(
        None,
        metavar="FILE",
        help="a re-ranker's checkpoint, which looks again at what comes first",
        group=RERANK,
    )
    rerank_top: int | None = setting(
        None, metavar="N", help=f"candidates a query that it looks at; default: {RERANK_TOP}", group=RERANK
    )
    rerank_weight: Sequence[float] = setting(
        (),
        metavar="W",
        help="its score's share of the order, the rest is the first stage's; validation compares several; "
        "default: 1",
        group=RERANK,
    )
    rerank_any: bool = setting(
        False, help="take it although it was trained on another first stage", group=RERANK
    )

    @property
    def weights(self) -> tuple[float, ...]:
        """``rerank_weight``, or its default."""
        return tuple(self.rerank_weight) or (1.0,)

    @property
    def top_again(self) -> int:
        """``rerank_top``, or its default."""
        return self.rerank_top or RERANK_TOP

    def check_rerank(self) -> None:
        """Raise :class:`InputError` for a flag that has nothing to act on, or a value that cannot work."""
        if self.rerank is None:
            for name, default in (("rerank_top", None), ("rerank_weight", ()), ("rerank_any", False)):
                value = getattr(self, name)
                if (tuple(value) if isinstance(value, list) else value) != default:
                    flag = f"--{name.replace('_', '-')}"
                    raise InputError(f"{flag}: nothing re-ranks; give --rerank FILE, or leave it out")
        for weight in self.rerank_weight:
            if not 0 <= weight <= 1:
                raise InputError(f"--rerank-weight {weight} must be a number from 0 to 1")
        if self.rerank_top is not None and self.rerank_top < 1:
            raise InputError(f"--rerank-top {self.rerank_top} is too small; the least is 1")


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(TimeoutSettings, CheckpointSettings, DataSettings):
    """What is scored and how."""

    gallery_dtype: str | None = training_s_own(GallerySettings, "gallery_dtype")
    feature_cache: Path | None = like(CacheSettings, "feature_cache")
    cache_dtype: str | None = like(
        CacheSettings, "cache_dtype", None, help="type of the values in it; default: that of the training"
    )
    save_memory: bool = like(GallerySettings, "save_memory")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(RerankSettings, ScoringSettings, ProtocolSettings, DatasetSettings):
    """Of ``blip_validate.py``."""

    split: str = setting(
        "val",
        choices=("val", "test1", "test"),
        metavar="{val,test1}",
        help="test1: only of the built-in data in CIRR's format; default: %(default)s",
    )
    save_ranks: Path | None = setting(None, metavar="FILE", help="CSV: the rank of each target, from 0")
    save_rankings: Path | None = setting(None, metavar="FILE", help="JSON: each query's top 50")


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings(ScoringSettings, FashionIQSettings, DatasetSettings):
    """Of ``check_robustness.py``. A query's difference to its clean one is in recall: no mean precision."""

    dataset: str = like(DatasetSettings, "dataset", choices=tuple(TRAINED_ON), metavar=TRAINED_ON_METAVAR)
    split: str = like(ValidationSettings, "split")
    perturbations: Sequence[str] = setting(
        (*TEXT_PERTURBATIONS, *PICTURE_PERTURBATIONS),
        choices=(*TEXT_PERTURBATIONS, *PICTURE_PERTURBATIONS),
        metavar="NAME",
        help=f"some of {', '.join((*TEXT_PERTURBATIONS, *PICTURE_PERTURBATIONS))}; default: all",
    )
    seed: int = setting(0, help="of what is drawn for each query; default: %(default)s")
    out: Path | None = setting(None, metavar="FOLDER", help="default: robustness beside the checkpoint")


@dataclass(frozen=True, kw_only=True)
class SubmissionSettings(RerankSettings, ScoringSettings, DatasetSettings):
    """Of ``cirr_test_submission.py``."""

    dataset: str = like(
        DatasetSettings,
        "dataset",
        "cirr",
        choices=("cirr", "circo"),
        metavar="{CIRR,CIRCO}",
        help="default: CIRR",
    )
    out: Path = setting(ROOT / "submission", help="folder of the files; default: submission/")
    name: str | None = setting(
        None, help="end of the files' names; default: the run folder's or the checkpoint's, of the last stage"
    )


@dataclass(frozen=True, kw_only=True)
class DialogueSettings(ScoringSettings):
    """Of ``check_dialogue.py``."""

    data_path: Path = like(
        DataSettings,
        "data_path",
        ROOT / "demo",
        help="the built-in data in CIRR's format; default: %(default)s",
    )
    split: str = like(ValidationSettings, "split", "test1", help="default: %(default)s")
    rounds: int = setting(
        3, metavar="N", help="of each dialogue, the query's own included; default: %(default)s"
    )
    seed: int = setting(0, help="of what is said in the rounds after the first; default: %(default)s")
    out: Path | None = setting(None, metavar="FILE", help="CSV: the printed table")

    def check(self) -> None:
        """Raise :class:`InputError` for a number that cannot be."""
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds}: give a whole number of at least 1")


SPELLINGS = ("train", "val", "test", "test1")  # the last is CIRR's own name of its test split


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings(
    TimeoutSettings,
    DeviceSettings,
    ReaderSettings,
    ImageSettings,
    CacheSettings,
    StartSettings,
    DataSettings,
    FashionIQSettings,
    DatasetSettings,
):
    """Of ``extract_features.py``; further the switches of the vision transformer."""

    feature_cache: Path = setting(
        metavar="DIR", help="where the tokens go; what is there is verified, what is missing computed"
    )
    splits: Sequence[str] | None = setting(None, choices=SPELLINGS, help="default: all that there are")
    fiq_protocol: str = like(
        FashionIQSettings,
        "fiq_protocol",
        help="FashionIQ's galleries of val and test; default: %(default)s",
    )
    model_path: Path | None = like(StartSettings, "model_path", help="this checkpoint's vision transformer")
    batch_size: int = setting(64, help="images at once; default: %(default)s")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(VocabSettings):
    """A checkpoint, and where it is saved for others."""

    model_path: Path = like(CheckpointSettings, "model_path")
    out: Path = setting(metavar="FOLDER", help="where it is written")
    save_full: bool = setting(
        False, help="with the frozen vision transformer, which loading else takes from the backbone"
    )
    push_to: str | None = setting(None, metavar="USER/NAME", help="upload it to the model hub, too")
    revision: str | None = setting(None, metavar="BRANCH", help="with --push-to: another branch than main")
    private: bool = setting(False, help="with --push-to: for you alone, if it is not there yet")
    blip_model_name: str | None = like(CheckpointSettings, "blip_model_name")
    backbone: str | None = like(CheckpointSettings, "backbone")
    transform: str | None = like(CheckpointSettings, "transform")
    target_ratio: float | None = like(CheckpointSettings, "target_ratio")
