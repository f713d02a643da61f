"""Start the page of ``app.py``: an index, its model, a server that this machine alone can reach.

Streamlit runs this file anew at every click, with the settings of the page as JSON. The page itself is in a
module, which is imported once, so that what it keeps is kept.
"""

import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from sprc.data.split import triplets_of
from sprc.errors import InputError, Interrupted
from sprc.files import absolute
from sprc.models.checkpoint import read_contents
from sprc.models.device import start_device
from sprc.models.model_path import with_files
from sprc.run_folder import RunFolder
from sprc.scoring.benchmarks import training_benchmark
from sprc.search.commands import index_pictures
from sprc.search.searcher import check_settings, load_model
from sprc.search.settings import AppSettings
from sprc.settings import INDEX
from sprc.training.resume import digest_of_data


def run_app(settings: AppSettings) -> None:
    """Serve the page until it is stopped, which raises :class:`Interrupted`.

    An index of the built-in data, with the newest model of ``make demo``, is made where there is no index.

    Raises :class:`InputError` if there is neither, or the index cannot be used.
    """
    try:
        from streamlit.web import cli
    except ImportError as error:
        raise InputError("the page needs the package streamlit: pip install -e '.[search]'") from error
    check_settings(settings)
    if not 1 <= settings.port <= 65535:
        raise InputError(f"--port {settings.port}: give a number from 1 to 65535")
    device = start_device(settings.device)
    settings = with_files(settings)
    demo = settings.data_path / "cirr_dataset" / "dev"
    index = settings.index or INDEX
    if settings.index is None and not (INDEX / "index.json").exists():
        index = settings.data_path / "picture_index"
        lancedb = True if settings.engine == "lancedb" else None
        index_demo(settings.data_path, demo, settings.models_path, index, device, lancedb)
    # Here and not at the first visit, which then has its answer at once. The page finds them loaded.
    from sprc.search.page import MOST_BYTES, current_searcher, warm_up

    of_page: dict[str, Any] = {
        "index": str(index.resolve()),
        **{name: resolved(getattr(settings, name)) for name in ("model_path", "vocab", "rerank")},
        **{n: getattr(settings, n) for n in ("engine", "candidates", "rerank_top", "rerank_any")},
        "rerank_weight": next(iter(settings.rerank_weight), None),
        "device": str(device),
    }
    searcher = current_searcher(**of_page)
    inside = demo.resolve().is_relative_to(searcher.index.folder)
    samples = settings.data_path.resolve() if inside else None
    warm_up(searcher, samples)
    of_page["samples"] = None if samples is None else str(samples)
    options = {
        "server.address": settings.address,
        "server.port": settings.port,
        "server.headless": "true",
        "server.maxUploadSize": MOST_BYTES // 2**20,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",  # a traceback tells of this machine's folders
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    sys.addaudithook(send_at_once)
    try:
        cli.main(["run", __file__, *flags, "--", json.dumps(of_page)])
    except SystemExit as end:
        if end.code:
            raise
        raise Interrupted(signal.SIGINT) from None  # without an error it ends when it is told to stop


def send_at_once(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: what is written to a connection of a server's socket leaves without delay.

    Streamlit binds a socket without that. Its answers are written in two parts, head and body, and the body
    then waits for the browser to acknowledge the head: 40 ms for each of a page's 140 files.
    """
    if event == "socket.bind" and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
        arguments[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def resolved(path: Path | None) -> str | None:
    """The whole path, as text."""
    return None if path is None else str(absolute(path))


def index_demo(
    data_path: Path,
    pictures: Path,
    models: Path,
    path: Path,
    device: torch.device,
    lancedb: bool | None = None,
) -> None:
    """Index the built-in data's validation pictures with the newest model that was trained on these data."""
    found = sorted(
        (file for run in RunFolder.all_in(models) for file in run.checkpoints.glob("tuned_clip_*.pt")),
        key=lambda file: file.stat().st_mtime,
        reverse=True,
    )
    missing = None if pictures.is_dir() else str(pictures)
    if missing is None and not found:
        missing = f"a checkpoint in {models}"
    own = None
    if missing is None:
        benchmark = training_benchmark("CIRR").load(data_path, None)
        triplets, _ = triplets_of(benchmark.train_splits(data_path))
        data = digest_of_data(benchmark.splits, triplets)
        own = next((file for file in found if is_tiny_of(data, file)), None)
    if own is None:
        missing = missing or f"a checkpoint in {models} that was trained with --backbone tiny on {data_path}"
        raise InputError(
            f"there is no index yet, and no demo to make one of ({missing} is missing); run `make demo`, or "
            "index a folder of your own: search.py index FOLDER --model-path FILE"
        )
    others = found.index(own)
    told = f"; newer ones are of other data or backbones: {others}" if others else ""
    print(f"indexing {pictures} with {own}{told}", flush=True)
    scored_as = {"model_path": str(own.resolve()), "blip_model_name": None, "backbone": None}
    names = ("blip_model_name", "backbone", "vocab", "transform", "target_ratio")
    retriever = load_model(own, **dict.fromkeys(names))
    index_pictures(path, pictures, retriever, device, scored_as, rebuild=True, lancedb=lancedb)


def is_tiny_of(data: str, checkpoint: Path) -> bool:
    """Whether a checkpoint is of the backbone `tiny`, trained on the data of this digest."""
    try:
        told = read_contents(checkpoint).get("hyperparameters", {})
    except InputError:
        return False
    return told.get("backbone") == "tiny" and told.get("digests", {}).get("data_path") == data


if __name__ == "__main__":
    from sprc.search.page import show

    show(**json.loads(sys.argv[1]))
