"""Recall of a checkpoint where queries are mistyped, their words swapped, their pictures blurred.

    python src/check_robustness.py --dataset CIRR --model-path FILE
A table (CSV, Markdown) and a plot go into `robustness` beside the checkpoint; docs/robustness.md says how to
read them.
"""

from sprc.errors import run_script
from sprc.scoring.settings import RobustnessSettings
from sprc.settings import flag_parser, given_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = RobustnessSettings(**given_flags(flag_parser(__doc__, RobustnessSettings)))
    from sprc.distributed import process_group
    from sprc.scoring.robustness import run_robustness

    with process_group(settings.timeout):
        run_robustness(settings)


if __name__ == "__main__":
    run_script(main)
