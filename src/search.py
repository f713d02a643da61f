"""Search a folder of pictures with a picture and a sentence.

    python src/search.py index FOLDER --model-path FILE
    python src/search.py query --image PICTURE --text "make it red" --top 10 --sheet results.png
Run index again after the folder has changed: it computes what is new, and goes on after a kill.
"""

import argparse
from pathlib import Path

from sprc.data import TRANSFORMS
from sprc.errors import run_script
from sprc.flags import INDEX, add_engine_flags, add_vocab_flag, text
from sprc.start_up import no_collection


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{index,query}")
    add_index_command(commands.add_parser("index", help="index a folder, or bring its index up to date"))
    add_query_command(commands.add_parser("query", help="print the best pictures for a picture and a text"))
    arguments = parser.parse_args()
    with no_collection():
        from sprc.search.commands import run_index, run_query

    flags = vars(arguments)
    (run_index if flags.pop("command") == "index" else run_query)(**flags)


def add_index_command(parser: argparse.ArgumentParser) -> None:
    """The flags of `index`."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="pictures, at any depth; hidden files are left out")
    add("--model-path", type=Path, required=True, metavar="FILE", help="the checkpoint")
    add("--index", type=Path, default=INDEX, metavar="DIR", help="where the index is; default: %(default)s")
    add("--rebuild", action="store_true", help="replace an index of another folder or model")
    add("--blip-model-name", default=None, metavar="NAME", help="default: what the checkpoint says")
    add("--backbone", default=None, metavar="NAME", help="default: what the checkpoint says")
    add_vocab_flag(parser)
    add("--transform", default=None, choices=TRANSFORMS, help="default: the training's own, else targetpad")
    add("--target-ratio", type=float, default=None, help="default: the training's own, else 1.25")
    add("--batch-size", type=int, default=None, help="default: the training's own, else 32")
    add("--num-workers", type=int, default=None, help="processes that read pictures; default: by the cores")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")


def add_query_command(parser: argparse.ArgumentParser) -> None:
    """The flags of `query`."""
    add = parser.add_argument
    add("--image", required=True, metavar="PICTURE", help="the reference: a file, or a name in the index")
    add("--text", type=text, required=True, help="what to change, such as 'make it red'")
    add("--top", type=int, default=10, metavar="N", help="how many pictures to print; default: %(default)s")
    add("--keep-reference", action="store_true", help="let the reference, and copies of it, be results too")
    add("--sheet", type=Path, default=None, metavar="FILE", help="PNG: the reference, the text, the results")
    add("--json", action="store_true", help="print JSON: image, text, results (rank, score, path)")
    add("--index", type=Path, default=INDEX, metavar="DIR", help="where the index is; default: %(default)s")
    add("--model-path", type=Path, default=None, metavar="FILE", help="default: where it was when indexed")
    add_vocab_flag(parser)
    add_engine_flags(parser)
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")


if __name__ == "__main__":
    run_script(main)
