"""Start the page of ``app.py``: an index, its model, a server that this machine alone can reach.

Streamlit runs this file anew at every click, with the settings of the page as JSON. The page itself is in a
module, which is imported once, so that what it keeps is kept.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

import torch

from sprc.errors import InputError, Interrupted
from sprc.flags import INDEX
from sprc.models.device import start_device
from sprc.search.commands import index_pictures
from sprc.search.searcher import load_model, require_engine


def run_app(arguments: argparse.Namespace) -> None:
    """Serve the page until it is stopped, which raises :class:`Interrupted`.

    An index of the built-in data, with the newest model of ``make demo``, is made where there is no index.

    Raises :class:`InputError` if there is neither, or the index cannot be used.
    """
    try:
        from streamlit.web import cli
    except ImportError as error:
        raise InputError("the page needs the package streamlit: pip install -e '.[search]'") from error
    require_engine(arguments.engine, arguments.candidates)
    if not 1 <= arguments.port <= 65535:
        raise InputError(f"--port {arguments.port}: give a number from 1 to 65535")
    device = start_device(arguments.device)
    demo = arguments.data_path / "cirr_dataset" / "dev"
    index = arguments.index or INDEX
    if arguments.index is None and not (INDEX / "index.json").exists():
        index = arguments.data_path / "picture_index"
        index_demo(demo, arguments.models_path, index, device)
    # Here and not at the first visit, which then has its answer at once. The page finds them loaded.
    from sprc.search.page import MOST_BYTES, current_searcher, warm_up

    given = arguments.model_path
    settings = {
        "index": str(index.resolve()),
        "model_path": given and str(given.resolve()),
        "vocab": arguments.vocab and str(arguments.vocab.resolve()),
        "engine": arguments.engine,
        "candidates": arguments.candidates,
        "device": str(device),
    }
    searcher = current_searcher(**settings)
    inside = demo.resolve().is_relative_to(searcher.index.folder)
    samples = str(arguments.data_path.resolve()) if inside else None
    warm_up(searcher, samples and Path(samples))
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
    try:
        cli.main(["run", __file__, *flags, "--", json.dumps({"samples": samples, **settings})])
    except SystemExit as end:
        if end.code:
            raise
        raise Interrupted(signal.SIGINT) from None  # without an error it ends when it is told to stop


def index_demo(pictures: Path, models: Path, path: Path, device: torch.device) -> None:
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
    scored_as = {"model_path": str(newest.resolve()), "blip_model_name": None, "backbone": None}
    index_pictures(path, pictures, load_model(newest), device, scored_as, rebuild=True)


if __name__ == "__main__":
    from sprc.search.page import show

    show(**json.loads(sys.argv[1]))
