"""Search an index of pictures with a picture and a sentence (``search.py``)."""

import argparse
import contextlib
import io
import json
import signal
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sprc.data.captions import process_caption
from sprc.data.datasets import load_image, require_text, strict_pillow
from sprc.data.transforms import to_eight_bits
from sprc.errors import InputError, Interrupted
from sprc.evaluation import Scorer
from sprc.figures import plt, save_figure
from sprc.gate_maps import Cell, draw_cell
from sprc.indexing import FORMATS, check_folder, file_digest, search_transform, update_index, upright
from sprc.models.device import choose_device, memory_explained, place, start_device
from sprc.picture_index import (
    PictureIndex,
    identity_of,
    open_index,
    printable,
    read_description,
    refuse_other_model,
)
from sprc.ranking import block_scores, top_k

CANDIDATES = 1000  # that FAISS gives, and the exact score ranks
SHOWN = 20  # of the pictures left out
COLUMNS = 6  # of a sheet


class Result(NamedTuple):
    """A picture found."""

    name: str
    score: float


@dataclass(frozen=True, eq=False)
class Searcher:
    """An index and its model."""

    index: PictureIndex
    scorer: Scorer
    engine: str = "exact"  # or "faiss"
    candidates: int = CANDIDATES

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        model_path: Path | None = None,
        vocab: Path | None = None,
        device: str | None = None,
        engine: str = "exact",
        candidates: int = CANDIDATES,
    ) -> "Searcher":
        """The index at ``path`` with the model that made it.

        Args:
            path: of the index.
            model_path: where the model is now, if not where it was.
            vocab: where the vocabulary is that it was indexed with, likewise.
            device: by default a GPU, if there is one. The features stay in main memory.
            engine: "exact" compares the query with every picture. "faiss" takes ``candidates`` pictures by
                their mean features first and compares it with those alone, which may miss some.
            candidates: see ``engine``.

        Raises:
            InputError: there is no index, its model is gone, or ``model_path`` holds another.
        """
        require_engine(engine, candidates)
        index = open_index(path)
        _ = index.gallery  # mapped now: another process may replace the index at any time
        told = index.scored_as
        if model_path is None and not Path(told["model_path"]).exists():
            raise InputError(
                f"{told['model_path']}, the model of the index {path}, is gone; give --model-path FILE if it "
                "was moved, or index again with another"
            )
        on = choose_device(device)
        scorer = load_model(
            model_path or Path(told["model_path"]),
            blip_model_name=told["blip_model_name"],
            backbone=told["backbone"],
            vocab=vocab or (Path(told["vocab"]) if told.get("vocab") else None),
            transform=index.identity.transform,
            target_ratio=index.identity.target_ratio,
        )
        given = str(model_path or told["model_path"])
        refuse_other_model(path, read_description(path), identity_of(scorer), given)
        place(scorer.checkpoint.model, on)
        return cls(index, scorer, engine, candidates)

    @property
    def has_fusion(self) -> bool:
        """Whether the model edits the reference."""
        return self.scorer.checkpoint.model.gated_fusion is not None

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, S, S) as the model takes it."""
        return search_transform(self.scorer.transform)(image)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(3, S, S) pixels to image tokens (1, N, D)."""
        model = self.scorer.checkpoint.model
        return model.encode_image(pixels[None].to(model.device))

    def copies(self, *, digest: str | None = None, name: str | None = None) -> list[int]:
        """Gallery indices of the pictures with these bytes, or this name."""
        found = set(self.index.by_digest.get(digest, ()))
        if name in self.index.number:
            number = self.index.number[name]
            found |= {number, *self.index.by_digest[self.index.pictures[number].digest]}
        return sorted(found)

    @torch.no_grad()
    def compose(self, tokens: Tensor, text: str, strength: float = 1.0) -> Tensor:
        """The query (E,) of (1, N, D) image tokens and a text; ``strength`` as in the model's ``compose``."""
        model = self.scorer.checkpoint.model
        return model.compose(tokens, model.tokenize([process_caption(text)]), strength=strength)[0].cpu()

    def best(self, query: Tensor, top: int, leave_out: list[int] | None = None) -> list[Result]:
        """The ``top`` pictures for a query (E,), best first, without the gallery indices ``leave_out``."""
        leave_out = leave_out or []
        wanted = top + len(leave_out)
        if self.engine == "faiss":
            numbers = self._candidates(query, max(wanted, self.candidates))
            scores = block_scores(query[None], self.index.gallery[numbers])
        else:
            numbers = None
            scores = block_scores(query[None], self.index.gallery)
        places = top_k(scores, wanted)[0]
        rows = places if numbers is None else numbers[places]
        values = scores[0, places].tolist()
        found = [
            Result(self.index.names[row], value)
            for row, value in zip(rows.tolist(), values, strict=True)
            if row not in leave_out
        ]
        return found[:top]

    def _candidates(self, query: Tensor, count: int) -> Tensor:
        """Gallery indices, in the gallery's order, of the pictures whose mean features are nearest."""
        _, numbers = self._faiss.search(query[None].numpy(), min(count, len(self.index.pictures)))
        return torch.from_numpy(numbers[0]).sort().values

    @cached_property
    def _faiss(self) -> Any:
        flat = import_faiss().IndexFlatIP(self.index.shape[1])
        for part in self.index.pooled.split(2**14):
            flat.add(part.float().numpy())
        return flat

    def notes(self, text: str) -> list[str]:
        """What of ``text`` the model does not read, in sentences."""
        model = self.scorer.checkpoint.model
        tokenizer, most = model.tokenizer, model.config.max_txt_len
        caption = process_caption(text)
        notes = []
        unknown = [
            word for word in dict.fromkeys(caption.split()) if tokenizer.unk_token in tokenizer.tokenize(word)
        ]
        if unknown:
            notes.append(f"the model does not know: {', '.join(unknown)}")
        if len(tokenizer(caption).input_ids) > most or len(text.split()) > len(caption.split()):
            notes.append(f"the text is long: the model reads its first {most - 2} word pieces")
        return notes


def require_engine(engine: str, candidates: int) -> None:
    """Raise :class:`InputError` if there can be no such search."""
    if candidates < 1:
        raise InputError(f"--candidates {candidates}: give a whole number of at least 1")
    if engine == "faiss":
        import_faiss()


def import_faiss() -> Any:
    """The module; where it is missing an :class:`InputError` says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "--engine faiss needs the package faiss-cpu: pip install -e '.[search]', or leave --engine out"
        ) from error
    return faiss


def load_model(path: Path, **settings: Any) -> Scorer:
    """The checkpoint on the CPU; what it holds is told on stderr, so that results are alone on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        return Scorer.load(path, device=torch.device("cpu"), **settings)


def require_search_text(text: str, what: str) -> None:
    """Raise :class:`InputError` if ``text`` holds no word; ``what`` names it."""
    require_text(text, what)
    if not process_caption(text):
        raise InputError(f"{what} {text!r} holds no word; say what to change, such as 'make it red'")


# --- pictures to be looked at


def read_picture(data: bytes, most_pixels: int) -> Image.Image:
    """Decode a picture that somebody sent; nothing is decoded before its size is known.

    Raises :class:`InputError`, which does not name it, if it is no picture, broken, or larger than
    ``most_pixels``.
    """
    try:
        with strict_pillow():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > most_pixels:
                raise InputError(
                    f"the picture has {width} x {height} pixels; the most is {most_pixels // 10**6} million"
                )
            image.load()
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"the picture is too large; the most is {most_pixels // 10**6} million pixels"
        ) from error
    except Exception as error:  # broken bytes come out of Pillow's decoders as almost any exception
        raise InputError(
            "the file is no picture that can be read: it is broken, or of another format than "
            f"{', '.join(FORMATS)}"
        ) from error
    return image


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy at most ``side`` pixels wide and high, upright, in RGB."""
    image.draft("RGB", (2 * side, 2 * side))  # of a JPEG that is not decoded yet, only the detail needed
    small = upright(to_eight_bits(image))
    small.thumbnail((side, side))
    return small.convert("RGB")


def open_thumbnail(index: PictureIndex, name: str, side: int) -> Image.Image:
    """The picture ``name`` of an index, small; raises :class:`InputError` if it is gone or broken by now."""
    path = index.path_of(name)
    try:
        with strict_pillow(), Image.open(path, formats=FORMATS) as image:
            return thumbnail(image, side)
    except Exception as error:
        raise InputError(f"{printable(path)} cannot be read any more; run `search.py index` again") from error


def draw_results(
    path: Path, reference: Image.Image, text: str, results: list[tuple[Result, Image.Image]]
) -> None:
    """Write a PNG: the reference, the text, and the results with their scores and names, best first."""
    cells = [("reference", "", reference)]
    cells += [
        (f"{place}: {result.score:.4f}", result.name, image)
        for place, (result, image) in enumerate(results, start=1)
    ]
    wide = min(len(cells), COLUMNS)
    high = -(-len(cells) // wide)
    # In inches, fixed: a layout that is computed takes seconds.
    side, across, between, left, bottom, top = 1.5, 0.15, 0.5, 0.1, 0.35, 0.6
    width = 2 * left + wide * side + (wide - 1) * across
    height = bottom + high * side + (high - 1) * between + top
    figure, axes = plt.subplots(high, wide, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - left / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=across / side,
        hspace=between / side,
    )
    for axis in axes.flat[len(cells) :]:
        axis.axis("off")
    for (title, name, image), axis in zip(cells, axes.flat, strict=False):
        draw_cell(axis, Cell(title, name), np.asarray(image))
        axis.set_anchor("N")
        shown = printable(name)
        shown = shown if len(shown) <= 26 else f"...{shown[-23:]}"
        # Names and captions are the users' words: never read them as math markup.
        axis.text(0, -0.04, shown, fontsize=6, va="top", parse_math=False, transform=axis.transAxes)
    words = " ".join(text.split())
    most = 14 * wide
    words = words if len(words) <= most else words[: most - 4] + " ..."
    figure.text(left / width, 1 - 0.08 / height, words, fontsize=10, va="top", parse_math=False)
    save_figure(figure, path)


# --- the two commands


def run_index(arguments: argparse.Namespace) -> None:
    """Index a folder of pictures and print what was done; see :func:`sprc.indexing.update_index`."""
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
