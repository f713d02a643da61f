"""Search a folder of pictures with a picture and a sentence.

    python src/search.py index FOLDER --model-path FILE
    python src/search.py query --image PICTURE --text "make it red" --top 10 --sheet results.png
Run index again after the folder has changed: it computes what is new, and goes on after a kill.
"""

import argparse

from sprc.errors import run_script
from sprc.search.settings import IndexSettings, QuerySettings
from sprc.settings import add_flags
from sprc.start_up import no_collection


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{index,query}")
    index = commands.add_parser("index", help="index a folder, or bring its index up to date")
    query = commands.add_parser("query", help="print the best pictures for a picture and a text")
    add_flags(index, IndexSettings)
    add_flags(query, QuerySettings)
    flags = vars(parser.parse_args())
    with no_collection():
        from sprc.search.commands import run_index, run_query

    if flags.pop("command") == "index":
        run_index(IndexSettings(**flags))
    else:
        run_query(QuerySettings(**flags))


if __name__ == "__main__":
    run_script(main)
