"""Write the two files that CIRR's evaluation server takes, for its test1 split.

    python src/cirr_test_submission.py --model-path FILE
A published SPRC checkpoint does not say what it is: add --backbone pretrain.
"""

import argparse
from pathlib import Path

from sprc.data import TRANSFORMS
from sprc.errors import run_script

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-path", type=Path, required=True, metavar="FILE", help="the checkpoint")
    add("--blip-model-name", default=None, metavar="NAME", help="default: what the checkpoint says")
    add("--backbone", default=None, metavar="NAME", help="default: what the checkpoint says")
    add("--data-path", type=Path, default=ROOT, help="folder of cirr_dataset/; default: here")
    add("--out", type=Path, default=ROOT / "submission", help="folder of the files; default: submission/")
    add("--name", default=None, help="end of the files' names; default: the checkpoint's run folder or name")
    add("--transform", default=None, choices=TRANSFORMS, help="default: the training's own, else targetpad")
    add("--target-ratio", type=float, default=None, help="default: the training's own, else 1.25")
    add("--batch-size", type=int, default=None, help="default: the training's own, else 32")
    add(
        "--num-workers",
        type=int,
        default=None,
        help="processes that read images; default: the training's own",
    )
    add("--save-memory", action="store_true", help="keep the gallery's features in main memory")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    arguments = parser.parse_args()
    if arguments.name is None:
        folder = arguments.model_path.resolve().parent
        arguments.name = folder.parent.name if folder.name == "saved_models" else arguments.model_path.stem
    from sprc.evaluation import run_submission

    run_submission(arguments)


if __name__ == "__main__":
    run_script(main)
