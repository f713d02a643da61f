"""Write the two files that CIRR's evaluation server takes, for its test1 split, and say where to send them.

    python src/cirr_test_submission.py --model-path FILE
For CIRCO's server: --dataset CIRCO, two files as well, without and with the shared concept in the query.
A published SPRC checkpoint does not say what it is: add --backbone pretrain.
"""

from sprc.errors import run_script
from sprc.scoring.settings import SubmissionSettings
from sprc.settings import flag_parser, given_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = SubmissionSettings(**given_flags(flag_parser(__doc__, SubmissionSettings)))
    from sprc.distributed import process_group
    from sprc.scoring.submission import run_submission

    with process_group(settings.timeout):
        run_submission(settings)


if __name__ == "__main__":
    run_script(main)
