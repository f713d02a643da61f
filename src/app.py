"""A page to search a folder of pictures with a picture and a sentence.

    python src/app.py                  # the index of `search.py index`; without one, the data of `make demo`
    python src/app.py --index DIR --port 8600
Only this machine can reach it. Ctrl-C stops it.
"""

from sprc.errors import run_script
from sprc.search.settings import AppSettings
from sprc.settings import flag_parser, given_flags
from sprc.start_up import no_collection


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = AppSettings(**given_flags(flag_parser(__doc__, AppSettings)))
    with no_collection():
        from sprc.search.app import run_app

    run_app(settings)


if __name__ == "__main__":
    run_script(main)
