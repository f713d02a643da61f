"""Draw where the fusion edits reference images, and measure whether it is the right place.

    python src/visualize_gates.py --dataset CIRR --model-path FILE --queries 16
    python src/visualize_gates.py --dataset CIRR --model-path FILE --pairs 12 57
    python src/visualize_gates.py --dataset CIRR --model-path FILE --same-image NAME --captions TEXT TEXT
    python src/visualize_gates.py --dataset CIRR --model-path FILE --localisation --off-model-path PLAIN
    python src/visualize_gates.py --dataset CIRR --model-path FILE --probe --queries 0
Writes PNG sheets, one HTML page that needs no network, localisation.csv and probe.csv.
"""

import argparse
from pathlib import Path

from sprc.data import DATASETS, DATASETS_METAVAR, PROTOCOLS, TYPES
from sprc.errors import run_script
from sprc.flags import add_scoring_flags, text


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, type=str.lower, choices=tuple(DATASETS), metavar=DATASETS_METAVAR)
    add("--split", default="val", help="train, val, or test1 (FashionIQ: test); default: %(default)s")
    add("--fiq-type", default=TYPES[0], choices=TYPES, help="FashionIQ's type; default: %(default)s")
    add(
        "--fiq-protocol",
        default="original",
        choices=PROTOCOLS,
        help="FashionIQ's gallery; default: %(default)s",
    )
    add("--queries", type=int, default=16, help="how many random ones are drawn; default: %(default)s")
    add("--seed", type=int, default=0, help="which ones; default: %(default)s")
    add(
        "--pairs",
        type=int,
        nargs="+",
        default=None,
        metavar="ID",
        help="these queries instead: CIRR's pair ids, FashionIQ's places in the captions file, from 0",
    )
    add(
        "--same-image",
        nargs="*",
        default=None,
        metavar="NAME",
        help="references under all their captions side by side: these, or random ones with several captions",
    )
    add(
        "--captions",
        type=text,
        nargs="+",
        default=None,
        metavar="TEXT",
        help="with --same-image NAME: under these captions",
    )
    add(
        "--localisation",
        action="store_true",
        help="built-in data only: the share of gate, change and gradients on the edited place",
    )
    add(
        "--off-model-path",
        type=Path,
        default=None,
        metavar="FILE",
        help="with --localisation: a checkpoint of plain SPRC to compare with",
    )
    add(
        "--probe",
        action="store_true",
        help="recall without the edit, with the same edit for all tokens, and with another caption's edit",
    )
    add("--out", type=Path, default=None, metavar="FOLDER", help="default: gate_maps beside the checkpoint")
    add_scoring_flags(parser)
    arguments = parser.parse_args()
    from sprc.gates.visualisation import run_visualisation

    run_visualisation(arguments)


if __name__ == "__main__":
    run_script(main)
