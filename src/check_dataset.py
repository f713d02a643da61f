"""Check a data set before a run: layout, every annotation, every image, the published sizes.

    python src/check_dataset.py --dataset CIRR --decode
Exit code 0 if all is well, 2 if there are problems.
"""

import argparse
import sys
from pathlib import Path

from sprc.data import DATASETS, DATASETS_METAVAR
from sprc.errors import run_script
from sprc.flags import ROOT, add_missing_flag

MOST_SHOWN = 20


def main() -> None:
    """Parse the flags, check, and print the report: counts, notes, the first problems and their number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, type=str.lower, choices=tuple(DATASETS), metavar=DATASETS_METAVAR)
    add(
        "--data-path",
        type=Path,
        default=ROOT,
        help="folder of cirr_dataset/, fashionIQ_dataset/; default: here",
    )
    add_missing_flag(parser)
    add("--decode", action="store_true", help="decode every image; by default only both ends are read")
    arguments = parser.parse_args()
    from sprc.data.check import check_dataset
    from sprc.scoring.benchmarks import benchmark_class

    examine = benchmark_class(arguments.dataset).examine
    findings = check_dataset(examine, arguments.data_path, arguments.decode, arguments.missing_images)
    looked = "decoded" if arguments.decode else "looked at without decoding (--decode decodes them)"
    for line in findings.counts:
        print(line)
    print(f"{len(findings.image_paths):,} images {looked}")
    for line in findings.notes:
        print(f"note: {line}")
    for line in findings.problems[:MOST_SHOWN]:
        print(f"problem: {line}")
    shown = f" (the first {MOST_SHOWN} are above)" if len(findings.problems) > MOST_SHOWN else ""
    print(f"problems: {len(findings.problems):,}{shown}")
    if findings.problems:
        sys.exit(2)


if __name__ == "__main__":
    run_script(main)
