"""From the command line of ``extract_features.py`` to a filled feature cache."""

from pathlib import Path

from sprc.models.checkpoint import start_model
from sprc.models.device import default_workers, place, start_device
from sprc.models.model_path import with_files
from sprc.scoring.benchmarks import benchmark_class
from sprc.scoring.feature_cache import open_images
from sprc.scoring.settings import ExtractionSettings


def extract_features(settings: ExtractionSettings) -> None:
    """Compute the tokens of every image of the splits that is not in the cache yet.

    Raises :class:`InputError`, see :class:`sprc.scoring.feature_cache.FeatureCache`.
    """
    device = start_device(settings.device)
    settings = with_files(settings)
    paths = image_paths(settings)
    model = start_model(
        settings.blip_model_name,
        settings.backbone,
        model_path=settings.model_path,
        vocab=settings.vocab,
        switches=settings.switches,
    )
    place(model, device)
    open_images(
        model,
        {"transform": settings.transform, "target_ratio": settings.target_ratio},
        paths,
        feature_cache=settings.feature_cache,
        cache_dtype=settings.cache_dtype,
        batch_size=settings.batch_size,
        num_workers=default_workers(device) if settings.num_workers is None else settings.num_workers,
        read_at_once=0,
    )


def image_paths(settings: ExtractionSettings) -> list[Path]:
    """The images that training on the splits, or scoring them, reads."""
    kind = benchmark_class(settings.dataset)
    splits = kind.read_parts(
        settings.data_path,
        kind.split_names if settings.splits is None else settings.splits,
        kind.protocol_of(settings),
        missing_images=settings.missing_images,
    )
    # CIRCO's splits have the same gallery.
    return list(dict.fromkeys(path for split in splits for path in split.image_paths.values()))
