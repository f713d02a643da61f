"""A checkpoint with the settings to score it with."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sprc.data.images import Loader, Transform
from sprc.data.split import Split
from sprc.data.transforms import make_transform
from sprc.models.checkpoint import Checkpoint, load_checkpoint
from sprc.models.device import SCORING_HELPS, default_workers, memory_explained, place
from sprc.models.reranker import load_reranker
from sprc.scoring.encoding import EncodedSplit, encode_split
from sprc.scoring.feature_cache import open_images
from sprc.scoring.reranking import Stages, match_split
from sprc.scoring.settings import (
    LARGEST_BATCH,
    RERANK_TOP,
    SCORING_BATCH,
    CacheSettings,
    GallerySettings,
    ImageSettings,
    RerankSettings,
    ScoringSettings,
)

# How a checkpoint that does not say it is scored: as SPRC's are.
PUBLISHED = {
    "transform": ImageSettings.transform,
    "target_ratio": ImageSettings.target_ratio,
    "batch_size": SCORING_BATCH,
    "save_memory": GallerySettings.save_memory,
    "gallery_dtype": GallerySettings.gallery_dtype,
    "cache_dtype": CacheSettings.cache_dtype,
}


def batch_size_of(checkpoint: Checkpoint) -> int:
    """Images at once where the user does not say it: as its training had them, if a rank can hold so many."""
    told: int = checkpoint.hyperparameters.get("batch_size", PUBLISHED["batch_size"])
    return min(told, LARGEST_BATCH)


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

        Raises :class:`InputError`, see :func:`sprc.models.checkpoint.load_checkpoint`.
        """
        checkpoint = load_checkpoint(path, model_name=blip_model_name, backbone=backbone, vocab=vocab)
        for line in checkpoint.told():
            print(line, flush=True)
        place(checkpoint.model, device)
        own = {name: checkpoint.hyperparameters.get(name, value) for name, value in PUBLISHED.items()}
        own["num_workers"] = default_workers(device)
        own["batch_size"] = batch_size_of(checkpoint)
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        return cls(checkpoint, {**own, **given, "feature_cache": feature_cache})

    @classmethod
    def from_settings(cls, settings: ScoringSettings, device: torch.device) -> "Scorer":
        """The same from a command's settings."""
        names = ("blip_model_name", "backbone", "vocab", "feature_cache", "num_workers", *PUBLISHED)
        return cls.load(
            settings.model_path, device=device, **{name: getattr(settings, name) for name in names}
        )

    @property
    def transform(self) -> Transform:
        """The preprocessing, for pictures to be looked at."""
        size = self.checkpoint.model.config.image_size
        return make_transform(self.settings["transform"], size, self.settings["target_ratio"])

    @property
    def reading(self) -> dict[str, Any]:
        """How many images are read at once, and by how many processes."""
        return {name: self.settings[name] for name in ("batch_size", "num_workers")}

    @property
    def gallery(self) -> dict[str, Any]:
        """How a gallery's features are kept."""
        return {name: self.settings[name] for name in ("save_memory", "gallery_dtype")}

    def memory_explained(self) -> AbstractContextManager[None]:
        """The context in which this scores; see :func:`sprc.models.device.memory_explained`."""
        settings = self.settings
        in_use = {"--save-memory": settings["save_memory"]}
        in_use["--gallery-dtype float16"] = settings["gallery_dtype"] == "float16"
        helps = [flag for flag in SCORING_HELPS if not in_use.get(flag)]
        return memory_explained(self.checkpoint.model.device, settings["batch_size"], helps)

    def loader(self, splits: list[Split]) -> Loader:
        """What reads the images of the splits, all of which are looked at before."""
        settings = self.settings
        return open_images(
            self.checkpoint.model,
            {name: settings[name] for name in ("transform", "target_ratio")},
            [path for split in splits for path in split.image_paths.values()],
            **{n: settings[n] for n in ("feature_cache", "cache_dtype", "batch_size", "num_workers")},
        )

    def encode(self, splits: list[Split]) -> list[EncodedSplit]:
        """The splits as vectors, all their images looked at before the first is encoded."""
        return self.stages(splits).encoded

    def encode_one(self, split: Split, load: Loader) -> EncodedSplit:
        """The vectors of a split whose images ``load``, of :meth:`loader`, reads."""
        return encode_split(self.checkpoint.model, split, load, **self.reading, **self.gallery)

    def stages(self, splits: list[Split], second: RerankSettings | None = None) -> Stages:
        """The splits as this model sees them, and as the re-ranker that ``second`` names does, if any.

        Several ranks share the work, and all get the whole result. Raises :class:`InputError`, see
        :func:`sprc.models.reranker.load_reranker`.
        """
        first = self.checkpoint.model
        reranker, top = None, RERANK_TOP
        if second is not None and second.rerank is not None:
            reranker = load_reranker(second.rerank, first, any_first_stage=second.rerank_any)
            place(reranker, first.device)
            top = second.top_again
        load = self.loader(splits)
        with self.memory_explained():
            gallery = self.gallery | {"with_prompts": reranker is not None}
            encoded = [encode_split(first, one, load, **self.reading, **gallery) for one in splits]
            matches = None
            if reranker is not None:
                parts = zip(splits, encoded, strict=True)
                matches = [match_split(reranker, *part, load, top=top, **self.reading) for part in parts]
        return Stages(splits, encoded, matches, first.temp.item())
