"""Pre-train the backbone `tiny` as BLIP-2's first stage does, on made scenes with descriptions.

    python src/pretrain_tiny.py --out pretrained
No scene is in a validation or test split of the built-in data, and no edit is shown. The result is
OUT/tiny.safetensors: put it beside src/sprc/models/tiny.yaml, and its SHA-256 into that file. The same
command again goes on where a run was stopped.
"""

from sprc.errors import run_script
from sprc.settings import flag_parser, given_flags
from sprc.start_up import no_collection
from sprc.training.settings import PretrainingSettings


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = PretrainingSettings(**given_flags(flag_parser(__doc__, PretrainingSettings)))
    with no_collection():
        from sprc.training.pretraining import pretrain

    pretrain(settings)


if __name__ == "__main__":
    run_script(main)
