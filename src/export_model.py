"""Write a checkpoint as a folder that others load, with a model card, and push it to the model hub.

    python src/export_model.py --model-path FILE --out FOLDER
    python src/export_model.py --model-path FILE --out FOLDER --push-to USER/NAME
The folder has config.json, model.safetensors, vocab.txt and README.md. sprc.load and every --model-path take
it, or USER/NAME once it is pushed. To push, log in with `hf auth login`, or set HF_TOKEN.
"""

from sprc.errors import run_script
from sprc.scoring.settings import ExportSettings
from sprc.settings import flag_parser, given_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = ExportSettings(**given_flags(flag_parser(__doc__, ExportSettings)))
    from sprc.scoring.exporting import export_model

    export_model(settings)


if __name__ == "__main__":
    run_script(main)
