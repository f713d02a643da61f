"""From the command line of ``extract_features.py`` to a filled feature cache."""

import argparse
from pathlib import Path

import torch

from sprc.models.device import default_workers, place, start_device
from sprc.scoring.benchmarks import benchmark_class
from sprc.scoring.feature_cache import open_images
from sprc.training.fine_tuning import start_model


def extract_features(arguments: argparse.Namespace) -> None:
    """Compute the tokens of every image of the splits that is not in the cache yet.

    Raises :class:`InputError`, see :class:`sprc.scoring.feature_cache.FeatureCache`.
    """
    device = start_device(arguments.device)
    paths = image_paths(arguments)
    torch.manual_seed(arguments.seed)
    # Its captions only make a vocabulary, which comes after the vision transformer and does not touch it.
    model = place(start_model(arguments, captions=[]), device)
    open_images(
        model,
        {"transform": arguments.transform, "target_ratio": arguments.target_ratio},
        paths,
        feature_cache=arguments.feature_cache,
        cache_dtype=arguments.cache_dtype,
        batch_size=arguments.batch_size,
        num_workers=default_workers(device) if arguments.num_workers is None else arguments.num_workers,
        read_at_once=0,
    )


def image_paths(arguments: argparse.Namespace) -> list[Path]:
    """The images that training on the splits, or scoring them, reads."""
    splits = benchmark_class(arguments.dataset).read_parts(
        arguments.data_path,
        arguments.splits,
        arguments.fiq_protocol,
        missing_images=arguments.missing_images,
    )
    return [path for split in splits for path in split.image_paths.values()]
