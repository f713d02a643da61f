"""Start the page of ``app.py``: an index, its model, a server that this machine alone can reach.

Streamlit runs this file anew at every click: `search_app.py INDEX ENGINE SAMPLES`. The page
itself is in a module, which is imported once, so that what it keeps is kept.
"""

import argparse
import sys
from pathlib import Path

from sprc.errors import InputError
from sprc.flags import INDEX
from sprc.models.factory import choose_device
from sprc.search import import_faiss, index_pictures, load_model


def run_app(arguments: argparse.Namespace) -> None:
    """Serve the page until it is stopped.

    An index of the built-in data, with the newest model of ``make demo``, is made where there is no index.

    Raises :class:`InputError` if there is neither, or the index cannot be used.
    """
    try:
        from streamlit.web import cli
    except ImportError as error:
        raise InputError("the page needs the package streamlit: pip install -e '.[search]'") from error
    if arguments.engine == "faiss":
        import_faiss()
    demo = arguments.data_path / "cirr_dataset" / "dev"
    index = arguments.index or INDEX
    if arguments.index is None and not (INDEX / "index.json").exists():
        index = arguments.data_path / "picture_index"
        index_demo(demo, arguments.models_path, index)
    # Here and not at the first visit, which then has its answer at once. The page finds them loaded.
    from sprc.search_page import MOST_BYTES, current_searcher

    folder = current_searcher(index.resolve(), arguments.engine).index.folder
    samples = [str(arguments.data_path.resolve())] if demo.resolve().is_relative_to(folder) else []
    options = {
        "server.address": arguments.address,
        "server.port": arguments.port,
        "server.headless": "true",
        "server.maxUploadSize": MOST_BYTES // 2**20,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",  # a traceback tells of this machine's folders
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    cli.main(["run", __file__, *flags, "--", str(index.resolve()), arguments.engine, *samples])


def index_demo(pictures: Path, models: Path, path: Path) -> None:
    """Index the built-in data's validation pictures with the newest model."""
    checkpoints = models.glob("clip_finetuned_on_*/saved_models/tuned_clip_*.pt")
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or not pictures.is_dir():
        missing = f"a checkpoint in {models}" if pictures.is_dir() else pictures
        raise InputError(
            f"there is no index yet, and no demo to make one of ({missing} is missing); run `make demo`, or "
            "index a folder of your own: search.py index FOLDER --model-path FILE"
        )
    print(f"indexing {pictures} with {newest}", flush=True)
    index_pictures(path, pictures, load_model(newest), choose_device(None), newest, rebuild=True)


if __name__ == "__main__":
    from sprc.search_page import show

    show(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None)
