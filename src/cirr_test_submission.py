"""Write the two files that CIRR's evaluation server takes, for its test1 split, and say where to send them.

    python src/cirr_test_submission.py --model-path FILE
A published SPRC checkpoint does not say what it is: add --backbone pretrain.
"""

import argparse
from pathlib import Path

from sprc.errors import run_script
from sprc.flags import ROOT, add_scoring_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "submission", help="folder of the files; default: submission/")
    add("--name", default=None, help="end of the files' names; default: the checkpoint's run folder or name")
    add_scoring_flags(parser)
    arguments = parser.parse_args()
    if arguments.name is None:
        folder = arguments.model_path.resolve().parent
        arguments.name = folder.parent.name if folder.name == "saved_models" else arguments.model_path.stem
    from sprc.distributed import process_group
    from sprc.scoring.submission import run_submission

    with process_group(arguments.timeout):
        run_submission(arguments)


if __name__ == "__main__":
    run_script(main)
