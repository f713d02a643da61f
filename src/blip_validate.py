"""Score a checkpoint on a benchmark's validation split, or on the test split of the built-in data.

    python src/blip_validate.py --dataset CIRR --model-path FILE
A published SPRC checkpoint does not say what it is: add --backbone pretrain.
"""

from sprc.errors import run_script
from sprc.scoring.settings import ValidationSettings
from sprc.settings import flag_parser, given_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = ValidationSettings(**given_flags(flag_parser(__doc__, ValidationSettings)))
    from sprc.distributed import process_group
    from sprc.scoring.validation import run_validation

    with process_group(settings.timeout):
        run_validation(settings)


if __name__ == "__main__":
    run_script(main)
