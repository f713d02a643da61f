"""The commands of ``search.py``: index a folder, and query it."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sprc.data.images import own_formats
from sprc.data.reading import require_words
from sprc.errors import InputError, Interrupted
from sprc.files import absolute, require_file_place
from sprc.models.device import default_workers, memory_explained, place, start_device
from sprc.models.model_path import with_files
from sprc.scoring.retriever import Retriever
from sprc.scoring.scorer import batch_size_of
from sprc.search.folder import check_folder
from sprc.search.index import PictureIndex, Result, identity_of, open_index, printable
from sprc.search.indexing import update_index
from sprc.search.pictures import draw_results, open_thumbnail, thumbnail
from sprc.search.searcher import Searcher, check_settings, find_reference, load_model
from sprc.search.settings import IndexSettings, QuerySettings

SHOWN = 20  # of the pictures left out
SIDE = 256  # of a picture on a sheet


def run_index(settings: IndexSettings) -> None:
    """Index a folder of pictures and print what was done; see :func:`sprc.search.indexing.update_index`."""
    device = start_device(settings.device)
    check_folder(settings.folder)
    settings = with_files(settings)
    called: dict[str, Any] = {"blip_model_name": settings.blip_model_name, "backbone": settings.backbone}
    retriever = load_model(
        settings.model_path,
        **called,
        vocab=settings.vocab,
        transform=settings.transform,
        target_ratio=settings.target_ratio,
    )
    # A published checkpoint does not say what it is: remember what it was called.
    scored_as = {**called, "model_path": str(absolute(settings.model_path))}
    if settings.vocab is not None:
        scored_as["vocab"] = str(settings.vocab.resolve())
    index_pictures(
        settings.index,
        settings.folder,
        retriever,
        device,
        scored_as,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        rebuild=settings.rebuild,
        lancedb=settings.lancedb,
    )


def index_pictures(
    path: Path,
    folder: Path,
    retriever: Retriever,
    device: torch.device,
    scored_as: dict[str, Any],
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    rebuild: bool,
    lancedb: bool | None = None,
) -> None:
    """Bring the index at ``path`` up to date with ``folder`` and print what was done.

    ``lancedb`` is that of :func:`sprc.search.indexing.update_index`. The batch size is by default the
    training's own, the number of processes that read by the cores.
    """
    identity = identity_of(retriever.model, retriever.transform_name, retriever.target_ratio)
    place(retriever.model, device)
    if batch_size is None:
        batch_size = batch_size_of(retriever.checkpoint)
    if num_workers is None:
        num_workers = default_workers(device)
    options: dict[str, Any] = {"rebuild": rebuild, "lancedb": lancedb}
    options |= {"batch_size": batch_size, "num_workers": num_workers}
    try:
        with memory_explained(device, batch_size, ["a smaller --batch-size"]):
            update = update_index(path, folder, retriever, identity, scored_as, **options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None
    index = update.index
    print(
        f"{path}: {len(index.pictures)} pictures ({update.added} new, {update.changed} changed, "
        f"{update.removed} removed since the last run; {update.computed} computed)"
    )
    if index.left_out:
        print(f"left out: {len(index.left_out)} (all of them, with reasons, in {path / 'pictures.json'})")
        for name, reason in list(index.left_out.items())[:SHOWN]:
            print(f"  {printable(name)}: {printable(reason)}")


def run_query(settings: QuerySettings) -> None:
    """Print the best pictures for a reference and a text; draw them too, with ``sheet``."""
    device = start_device(settings.device, file=sys.stderr)  # stdout is the results' alone
    require_words(settings.text, "--text")
    for said in settings.history[1::2]:
        require_words(said, "--history")
    if settings.top < 1:
        raise InputError(f"--top {settings.top}: give a whole number of at least 1")
    check_settings(settings)
    sheet = settings.sheet
    if sheet is not None:
        require_file_place("--sheet", sheet)
    index = open_index(settings.index)
    path, _ = find_reference(index, settings.image, "--image")
    pairs = zip(settings.history[::2], settings.history[1::2], strict=True)
    history = [(find_reference(index, picture, "--history")[0], said) for picture, said in pairs]
    searcher = Searcher.of(index, replace(settings, device=str(device)))
    answer = searcher.ask(
        path, settings.text, history=history, top=settings.top, keep_reference=settings.keep_reference
    )
    results, is_reranked = answer.results, searcher.second is not None
    if is_reranked:
        print(f"found in {answer.time}", file=sys.stderr)
    for note in searcher.notes(settings.text):
        print(f"note: {note}", file=sys.stderr)
    if sheet is not None:
        draw_sheet(sheet, index, path, settings.text, results)
    if settings.json:
        print_json(path, settings.text, results, is_reranked)
        return
    for rank, result in enumerate(results, start=1):
        match = "-" if result.match is None else f"{result.match:.4f}"
        scores = f"{result.score:.4f}  {match:>8}" if is_reranked else f"{result.score:.4f}"
        print(f"{rank:>3}  {scores}  {printable(str(result.path))}")


def draw_sheet(sheet: Path, index: PictureIndex, path: Path, text: str, results: list[Result]) -> None:
    """Write a PNG of the reference at ``path``, the text and the results."""
    with Image.open(path, formats=own_formats()) as image:
        reference = thumbnail(image, SIDE)
    drawn = [(result, open_thumbnail(index.path_of(result.name), SIDE)) for result in results]
    draw_results(sheet, reference, text, drawn)
    print(f"wrote {sheet}", file=sys.stderr)


def print_json(path: Path, text: str, results: list[Result], is_reranked: bool) -> None:
    """Print the results as JSON, with what a re-ranker says of each if there is one."""
    rows = [
        {"rank": rank, "score": result.score}
        | ({"match": result.match} if is_reranked else {})
        | {"path": str(result.path)}
        for rank, result in enumerate(results, start=1)
    ]
    print(json.dumps({"image": str(path), "text": text, "results": rows}, indent=1))
