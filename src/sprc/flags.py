"""Flags that scripts share. Imports nothing slow, so that `--help` is quick."""

import argparse
import os
from contextlib import suppress
from pathlib import Path

from sprc.config import CACHE_DTYPES, GALLERY_DTYPES
from sprc.data import MISSING_IMAGES, TRANSFORMS

SOURCE = Path(__file__).resolve().parent.parent
# Where data and models are by default: the checkout, or for an installed package the working directory.
ROOT = SOURCE.parent if (SOURCE / "blip_fine_tune_2.py").is_file() else Path()
INDEX = ROOT / "picture_index"  # of `search.py index`


def text(value: str) -> str:
    """The type of a flag that takes words; they come as bytes where the system's encoding lacks a letter."""
    try:
        value.encode()
    except UnicodeEncodeError:
        with suppress(UnicodeError):
            return os.fsencode(value).decode()
    return value


def add_cache_flags(
    parser: argparse._ActionsContainer, *, required: bool = False, dtype: str | None = "float16"
) -> None:
    """Where the frozen vision transformer's tokens are kept, and as what; None is the training's own type."""
    parser.add_argument(
        "--feature-cache",
        type=Path,
        default=None,
        required=required,
        metavar="DIR",
        help="read the frozen vision transformer's tokens from here, and fill it where they are missing",
    )
    parser.add_argument(
        "--cache-dtype",
        default=dtype,
        choices=CACHE_DTYPES,
        help=f"type of the values in it; default: {dtype or 'that of the training'}",
    )


def add_missing_flag(parser: argparse._ActionsContainer) -> None:
    """What is done about an image that has no file."""
    parser.add_argument(
        "--missing-images",
        default="error",
        choices=MISSING_IMAGES,
        help="an image without a file is an error, or left out with the triplets that need it, and counted; "
        "default: %(default)s",
    )


def add_vocab_flag(parser: argparse._ActionsContainer) -> None:
    """Where BERT's vocabulary is, for a machine that reaches no model hub."""
    parser.add_argument(
        "--vocab",
        type=Path,
        default=None,
        metavar="FILE",
        help="vocab.txt of bert-base-uncased, where a model brings no vocabulary; default: the model hub's",
    )


def add_timeout_flag(parser: argparse._ActionsContainer) -> None:
    """How long the processes that torchrun started wait for each other."""
    parser.add_argument(
        "--timeout",
        type=int,
        default=1800,
        metavar="SECONDS",
        help="with torchrun: how long ranks wait for one that does not answer; default: %(default)s",
    )


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """What is scored and how: the checkpoint, the data, settings that are by default the training's own."""
    add = parser.add_argument
    add("--model-path", type=Path, required=True, metavar="FILE", help="the checkpoint")
    add("--blip-model-name", default=None, metavar="NAME", help="default: what the checkpoint says")
    add("--backbone", default=None, metavar="NAME", help="default: what the checkpoint says")
    add_vocab_flag(parser)
    add(
        "--data-path",
        type=Path,
        default=ROOT,
        help="the folder that holds the data set's; default: this project",
    )
    add_missing_flag(parser)
    add("--transform", default=None, choices=TRANSFORMS, help="default: the training's own, else targetpad")
    add("--target-ratio", type=float, default=None, help="default: the training's own, else 1.25")
    add("--batch-size", type=int, default=None, help="default: the training's own, else 32")
    add(
        "--num-workers",
        type=int,
        default=None,
        help="processes that read images; default: by the cores",
    )
    add("--gallery-dtype", default=None, choices=GALLERY_DTYPES, help="default: the training's own")
    add_cache_flags(parser, dtype=None)
    add("--save-memory", action="store_true", help="keep the gallery's features in main memory")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add_timeout_flag(parser)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """How an index of pictures is searched."""
    add = parser.add_argument
    add(
        "--engine",
        default="exact",
        choices=("exact", "faiss"),
        help="exact compares the query with every picture; faiss, for very many, with the --candidates "
        "nearest by their mean features alone, and may miss some; default: %(default)s",
    )
    add("--candidates", type=int, default=1000, metavar="N", help="for faiss; default: %(default)s")
