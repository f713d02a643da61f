"""Flags that the scripts of the search share. Imports nothing slow, so that `--help` is quick."""

import argparse

from sprc.scoring.settings import VocabSettings
from sprc.settings import INDEX as INDEX
from sprc.settings import ROOT as ROOT
from sprc.settings import add_flags
from sprc.settings import text as text


def add_vocab_flag(parser: argparse.ArgumentParser) -> None:
    """Where BERT's vocabulary is, for a machine that reaches no model hub."""
    add_flags(parser, VocabSettings)


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
