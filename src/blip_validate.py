"""Score a checkpoint on a benchmark's validation split, or on the test split of the built-in data.

    python src/blip_validate.py --dataset CIRR --model-path FILE
A published SPRC checkpoint does not say what it is: add --backbone pretrain.
"""

import argparse
from pathlib import Path

from sprc.data import DATASETS, DATASETS_METAVAR, PROTOCOLS
from sprc.errors import run_script
from sprc.flags import add_scoring_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, type=str.lower, choices=tuple(DATASETS), metavar=DATASETS_METAVAR)
    add(
        "--fiq-protocol",
        default="original",
        choices=PROTOCOLS,
        help="FashionIQ's gallery; default: %(default)s",
    )
    add(
        "--split",
        default="val",
        choices=("val", "test1", "test"),
        metavar="{val,test1}",
        help="test1: only of the built-in data in CIRR's format; default: %(default)s",
    )
    add("--save-ranks", type=Path, default=None, metavar="FILE", help="CSV: the rank of each target, from 0")
    add("--save-rankings", type=Path, default=None, metavar="FILE", help="JSON: each query's top 50")
    add_scoring_flags(parser)
    arguments = parser.parse_args()
    from sprc.distributed import process_group
    from sprc.scoring.validation import run_validation

    with process_group(arguments.timeout):
        run_validation(arguments)


if __name__ == "__main__":
    run_script(main)
