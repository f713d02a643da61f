"""Recall after each round of a dialogue on the built-in data: does it help to average the rounds' queries?

    python src/check_dialogue.py --model-path FILE --rounds 3
In each round after the first the reference is the best picture found, and the text asks for one more edit
toward the target, made from the scenes.
"""

from sprc.errors import run_script
from sprc.scoring.settings import DialogueSettings
from sprc.settings import flag_parser, given_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = DialogueSettings(**given_flags(flag_parser(__doc__, DialogueSettings)))
    from sprc.distributed import process_group
    from sprc.scoring.dialogue import run_dialogue

    with process_group(settings.timeout):
        run_dialogue(settings)


if __name__ == "__main__":
    run_script(main)
