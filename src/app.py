"""A page to search a folder of pictures with a picture and a sentence.

    python src/app.py                  # the index of `search.py index`; without one, the data of `make demo`
    python src/app.py --index DIR --port 8600
Only this machine can reach it. Ctrl-C stops it.
"""

import argparse
from pathlib import Path

from sprc.errors import run_script
from sprc.flags import INDEX, ROOT, add_engine_flags, add_vocab_flag
from sprc.start_up import no_collection


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--index", type=Path, default=None, metavar="DIR", help=f"default: {INDEX}, else that of the demo")
    add(
        "--data-path",
        type=Path,
        default=ROOT / "demo",
        metavar="DIR",
        help="built-in data, or CIRR: its validation queries are offered ready-made where the index holds "
        "its pictures; default: %(default)s",
    )
    add("--models-path", type=Path, default=ROOT / "models", metavar="DIR", help="runs; default: %(default)s")
    add("--model-path", type=Path, default=None, metavar="FILE", help="default: where it was when indexed")
    add_vocab_flag(parser)
    add_engine_flags(parser)
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add("--port", type=int, default=8501, help="default: %(default)s")
    add(
        "--address",
        default="127.0.0.1",
        help="another one lets others search and see the indexed pictures; default: %(default)s",
    )
    arguments = parser.parse_args()
    with no_collection():
        from sprc.search.app import run_app

    run_app(**vars(arguments))


if __name__ == "__main__":
    run_script(main)
