"""The commands of ``search.py``: index a folder, and query it."""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sprc.data.images import load_image
from sprc.errors import InputError, Interrupted
from sprc.models.device import memory_explained, place, start_device
from sprc.scoring.scorer import Scorer
from sprc.search.index import (
    PictureIndex,
    identity_of,
    open_index,
    printable,
)
from sprc.search.indexing import FORMATS, check_folder, file_digest, search_transform, update_index
from sprc.search.pictures import draw_results, open_thumbnail, thumbnail
from sprc.search.searcher import Searcher, load_model, require_engine, require_search_text

SHOWN = 20  # of the pictures left out


def run_index(arguments: argparse.Namespace) -> None:
    """Index a folder of pictures and print what was done; see :func:`sprc.search.indexing.update_index`."""
    device = start_device(arguments.device)
    folder = arguments.folder
    check_folder(folder)
    names = ("blip_model_name", "backbone", "transform", "target_ratio", "batch_size", "num_workers", "vocab")
    scorer = load_model(arguments.model_path, **{name: getattr(arguments, name) for name in names})
    # A published checkpoint does not say what it is: remember what it was called.
    scored_as = {name: getattr(arguments, name) for name in ("blip_model_name", "backbone")}
    scored_as["model_path"] = str(arguments.model_path.resolve())
    if arguments.vocab is not None:
        scored_as["vocab"] = str(arguments.vocab.resolve())
    index_pictures(arguments.index, folder, scorer, device, scored_as, rebuild=arguments.rebuild)


def index_pictures(
    path: Path,
    folder: Path,
    scorer: Scorer,
    device: torch.device,
    scored_as: dict[str, Any],
    *,
    rebuild: bool,
) -> None:
    """Bring the index at ``path`` up to date with ``folder`` and print what was done."""
    identity = identity_of(scorer)
    place(scorer.checkpoint.model, device)
    try:
        with memory_explained(device, scorer.settings["batch_size"], ["a smaller --batch-size"]):
            update = update_index(path, folder, scorer, identity, scored_as, rebuild=rebuild)
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


def run_query(arguments: argparse.Namespace) -> None:
    """Print the best pictures for a reference and a text; draw them too, with ``sheet``."""
    device = start_device(arguments.device, file=sys.stderr)  # stdout is the results' alone
    require_search_text(arguments.text, "--text")
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: give a whole number of at least 1")
    require_engine(arguments.engine, arguments.candidates)
    if arguments.sheet is not None and not arguments.sheet.absolute().parent.is_dir():
        raise InputError(f"--sheet {arguments.sheet}: its folder does not exist; make it, or give another")
    path, name = find_reference(open_index(arguments.index), arguments.image)
    searcher = Searcher.open(
        arguments.index,
        model_path=arguments.model_path,
        vocab=arguments.vocab,
        device=str(device),
        engine=arguments.engine,
        candidates=arguments.candidates,
    )
    index = searcher.index
    pixels = load_image(path, search_transform(searcher.scorer.transform), FORMATS)
    leave_out = [] if arguments.keep_reference else searcher.copies(digest=file_digest(path), name=name)
    query = searcher.compose(searcher.encode(pixels), arguments.text)
    results = searcher.best(query, arguments.top, leave_out)
    for note in searcher.notes(arguments.text):
        print(f"note: {note}", file=sys.stderr)
    if arguments.sheet is not None:
        side = 256
        with Image.open(path, formats=FORMATS) as image:
            reference = thumbnail(image, side)
        drawn = [(result, open_thumbnail(index, result.name, side)) for result in results]
        draw_results(arguments.sheet, reference, arguments.text, drawn)
        print(f"wrote {arguments.sheet}", file=sys.stderr)
    rows = [
        {"rank": rank, "score": result.score, "path": str(index.folder / result.name)}
        for rank, result in enumerate(results, start=1)
    ]
    if arguments.json:
        print(json.dumps({"image": str(path), "text": arguments.text, "results": rows}, indent=1))
    else:
        for row in rows:
            print(f"{row['rank']:>3}  {row['score']:.4f}  {printable(row['path'])}")


def find_reference(index: PictureIndex, given: str) -> tuple[Path, str | None]:
    """The file that ``--image`` names, and its name in the index if it is one of its pictures.

    A file, or else the name of a picture of the index. Raises :class:`InputError` if it is neither.
    """
    path = Path(given)
    if not path.is_file():
        if path.is_dir():
            raise InputError(f"--image {given} is a folder; give a picture")
        if given not in index.number:
            raise InputError(
                f"--image {given} is neither a file nor a picture of the index {index.path}; "
                f"its pictures have names such as {printable(index.names[0])}"
            )
        path = index.path_of(given)
    resolved = path.resolve()
    if resolved.is_relative_to(index.folder):
        return path, str(resolved.relative_to(index.folder))
    return path, None
