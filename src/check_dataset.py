"""Check a data set before a run: layout, every annotation, every image, the published sizes.

    python src/check_dataset.py --dataset CIRR --decode
Exit code 0 if all is well, 2 if there are problems.
"""

import sys
from dataclasses import dataclass

from sprc.errors import run_script
from sprc.scoring.settings import DatasetSettings, DataSettings
from sprc.settings import flag_parser, given_flags, setting

MOST_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class CheckSettings(DataSettings, DatasetSettings):
    """What is checked, and how closely."""

    decode: bool = setting(False, help="decode every image; by default only both ends are read")


def main() -> None:
    """Parse the flags, check, and print the report: counts, notes, the first problems and their number."""
    settings = CheckSettings(**given_flags(flag_parser(__doc__, CheckSettings)))
    from sprc.data.check import check_dataset

    findings = check_dataset(settings.dataset, settings.data_path, settings.decode, settings.missing_images)
    looked = "decoded" if settings.decode else "looked at without decoding (--decode decodes them)"
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
