"""What CIRR and FashionIQ share: triplets, images, and how their files are read and checked."""

import json
import os
import random
import re
import reprlib
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, NoReturn

import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sprc.data.captions import process_caption
from sprc.distributed import objects_of_all_ranks, rank, world_size
from sprc.errors import InputError

Transform = Callable[[Image.Image], Tensor]
Loader = Callable[[Path], Tensor]  # see image_loader; a feature cache is another
Report = Callable[[str], None]  # is told what is wrong with the data, in one line

# The bytes that close a complete file of the format; a few bytes of garbage after them do no harm.
_END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_TAIL_BYTES = 4096
# Every image is padded to a square at most, which for longer ones would take gigabytes.
_LONGEST_SIDE = 16_384
_EXIF_ORIENTATION = 0x0112
# JSON's escapes can give half of a surrogate pair, which neither UTF-8 nor a tokenizer can hold.
_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")

# An entry may hold anything, nested a thousand deep, and a message is to stay one line that one can read.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


@dataclass(frozen=True)
class Triplet:
    """A query (reference and modification text) and its target.

    ``caption`` is raw. ``target`` is None where the benchmark keeps it secret. ``members`` are the names of
    CIRR's image set, reference and target among them; empty for FashionIQ. ``training_captions`` are the
    texts of which training takes one at random, raw; empty where it takes ``caption`` (CIRR).
    """

    pair_id: int
    reference: str
    target: str | None
    caption: str
    members: tuple[str, ...] = ()
    training_captions: tuple[str, ...] = ()


class TripletDataset(Dataset):
    """Triplets as the model takes them.

    An item is ``{"image": reference, "target": target, "text_input": str}``: the two as ``load`` gives them,
    (3, S, S) pixels or (N, D) tokens, the caption as :func:`process_caption` leaves it. The default collate
    makes ``text_input`` a list of B strings.
    Of a triplet's ``training_captions`` each is as likely; which one it is depends on ``seed``, the epoch and
    the index alone, not on the worker or on what was read before.
    Raises :class:`InputError` for an image that cannot be read.
    """

    def __init__(
        self, triplets: list[Triplet], image_paths: dict[str, Path], load: Loader, seed: int = 0
    ) -> None:
        if any(triplet.target is None for triplet in triplets):
            raise ValueError("triplets without a target cannot be trained on; use ImageDataset to score them")
        self.triplets = triplets
        self.image_paths = image_paths
        self.load = load
        self.seed = seed
        # Persistent workers keep the copy of this object that they were started with: only memory that all
        # processes share can tell them of a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw the texts of ``epoch`` from now on. Call it before the epoch's iteration starts."""
        self._epoch.fill_(epoch)

    def text(self, index: int) -> str:
        """The text of triplet ``index`` in the present epoch, raw."""
        triplet = self.triplets[index]
        if not triplet.training_captions:
            return triplet.caption
        return random.Random(f"{self.seed} {self._epoch.item()} {index}").choice(triplet.training_captions)

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        triplet = self.triplets[index]
        return {
            "image": self.load(self.image_paths[triplet.reference]),
            "target": self.load(self.image_paths[triplet.target]),
            "text_input": process_caption(self.text(index)),
        }


class ImageDataset(Dataset):
    """Images in the order of ``names``, a gallery for one.

    An item is ``(index, image)``, the image as ``load`` gives it.
    Raises :class:`InputError` for an image that cannot be read.
    """

    def __init__(self, names: list[str], image_paths: dict[str, Path], load: Loader) -> None:
        self.names = names
        self.image_paths = image_paths
        self.load = load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.load(self.image_paths[self.names[index]])


def batches_of_rank(length: int, batch_size: int) -> list[range]:
    """Which of ``length`` items this rank takes: every batch of them that is its turn.

    Whole batches, so that the tensors are those of a single process, and so is their rounding.
    """
    starts = range(rank() * batch_size, length, world_size() * batch_size)
    return [range(start, min(start + batch_size, length)) for start in starts]


class SteadyLoader(DataLoader):
    """A ``DataLoader`` whose processes no signal ends, see :func:`leave_signals_to_parent`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, worker_init_fn=leave_signals_to_parent, **options)

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        # What comes while the processes start is for this one, which gets it afterwards.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """For a process that reads images: a signal ends it only where the one it reads for sends it.

    A terminal, torchrun and Slurm send SIGINT, SIGHUP and SIGTERM to all processes of a run. Were the readers
    gone at once, there would be no step to stop after.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # a handler would not know who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def image_loader(transform: Transform, formats: tuple[str, ...] | None = None) -> Loader:
    """What reads an image file into (3, S, S) pixels, see :func:`load_image`."""
    return partial(load_image, transform=transform, formats=formats)


def load_image(path: Path, transform: Transform, formats: tuple[str, ...] | None = None) -> Tensor:
    """Open and decode the image at ``path``, of any format or one of ``formats``; return ``transform`` of it.

    Raises :class:`InputError` naming the file if it is missing, cut short, not an image, so large that
    Pillow takes it for a decompression bomb, or longer than padding to a square allows.
    """
    # Broken bytes come out of Pillow's decoders as almost any exception.
    try:
        with strict_pillow(), Image.open(path, formats=formats) as image:
            _refuse_long(image)
            image.load()
    except Exception as error:
        raise InputError(_problem(path, error)) from error
    return transform(image)


def check_images(image_paths: dict[str, Path], names: Iterable[str]) -> None:
    """Look at the images of ``names`` before a run, as :func:`inspect_images` does without decoding.

    The ranks share the work. Raises one :class:`InputError` with the number of bad images and what is wrong
    with the first.
    """
    paths = [image_paths[name] for name in dict.fromkeys(names)]
    own = range(rank(), len(paths), world_size())
    found = zip(own, inspect_images([paths[number] for number in own]), strict=True)
    parts = objects_of_all_ranks([(number, finding.problem) for number, finding in found if finding.problem])
    if problems := sorted(problem for part in parts for problem in part):
        folder = os.path.commonpath([path.parent for path in paths])
        raise InputError(
            f"{folder}: {len(problems)} of {len(paths)} images cannot be used; first: {problems[0][1]}"
        )


class ImageFinding(NamedTuple):
    """What is wrong with an image, if anything, and whether its EXIF data ask viewers to rotate it."""

    problem: str | None = None
    is_rotated: bool = False


def inspect_images(paths: list[Path], decode: bool = False) -> list[ImageFinding]:
    """Look at each image: there, not empty, of a known format, not cut short, not too large.

    Reads the header and the end of each file only; an image whose end looks wrong is decoded to be sure.
    With ``decode`` every image is decoded, and EXIF's rotation is looked at.
    """
    with strict_pillow(), ThreadPoolExecutor() as pool:
        found = pool.map(partial(_inspect_image, decode=decode), paths)
        return list(tqdm(found, "Checking images", total=len(paths), delay=1, unit="image"))


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow refuse what it would fill with grey or only warn of.

    The switches belong to the whole process, so enter this outside of threads.
    """
    # Importing LAVIS's data sets switches it on for everyone.
    load_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = load_truncated


def _inspect_image(path: Path, decode: bool) -> ImageFinding:
    try:
        with Image.open(path) as image:
            _refuse_long(image)
            marker = _END_MARKERS.get(image.format)
            # Decoding settles it, so that this check and load_image never disagree on a file it suspects.
            if decode or (marker and marker not in _read_tail(path)):
                image.load()
            return ImageFinding(is_rotated=decode and _is_rotated(image))
    except Exception as error:
        return ImageFinding(_problem(path, error))


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9)
    except Exception:  # broken EXIF data do no harm: nothing else here reads them
        return False


def _refuse_long(image: Image.Image) -> None:
    if max(image.size) > _LONGEST_SIDE:
        raise Image.DecompressionBombError


def _read_tail(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL_BYTES, 0))
        return file.read()


def _problem(path: Path, error: Exception) -> str:
    """Put ``error``, raised by reading the image at ``path``, into one line that says what to do."""
    remedy = "download it again or restore it from a copy"
    if isinstance(error, FileNotFoundError):
        reason = "is missing"
        remedy += ", or correct --data-path"
    elif isinstance(error, IsADirectoryError):
        reason = "is a folder, not an image"
    elif isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        reason = f"has more than {Image.MAX_IMAGE_PIXELS} pixels or more than {_LONGEST_SIDE} on a side"
        remedy = "replace it with a smaller copy"
    elif isinstance(error, UnidentifiedImageError):
        reason = "is not an image in a format that Pillow reads" if path.stat().st_size else "is empty"
    else:
        reason = f"cannot be read ({str(error) or type(error).__name__})"
    return " ".join(f"{path} {reason}; {remedy}".split())


def stop_at(problem: str) -> NoReturn:
    """The :data:`Report` that ends the reading at the first problem, with an :class:`InputError`."""
    raise InputError(problem)


@contextmanager
def reporting(report: Report, where: str = "", remedy: str = "") -> Iterator[None]:
    """Report an :class:`InputError` from inside, between ``where`` it is and its ``remedy``.

    If ``report`` returns, what follows the block goes on.
    """
    try:
        yield
    except InputError as error:
        report(f"{where}{error}{remedy}")


def quote(value: Any) -> str:
    """``value``, which a file gave, as Python writes it, cut if it is long."""
    return _SHORT.repr(value)


def read_json(path: Path) -> Any:
    """Read the JSON file at ``path``; :class:`InputError` names the line and column where it breaks."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: broken JSON at line {error.lineno} column {error.colno} ({error.msg}); "
            "download the file again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); download the file again") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; json itself would silently keep the last of two."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object holds the key {quote(key)} twice")
    return entries


def require_file(dataset: str, root: Path, path: Path) -> None:
    """Raise :class:`InputError` if ``root``, the data set's folder, or ``path`` in it is missing."""
    for needed in (root, path):
        if not needed.exists():
            raise InputError(
                f"{needed} is missing; put {dataset} there as {root.name}/README.md says, "
                f"or point --data-path at the folder that holds {root.name}/"
            )


def read_list(path: Path) -> list[Any]:
    """Read a JSON file that must hold a list of at least one entry."""
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} is not a list of at least one entry; download the file again")
    return entries


def read_field(entry: Any, key: str, kind: type) -> Any:
    """Return ``entry[key]``, a ``kind``; else the :class:`InputError` says only what is wrong with it."""
    if not isinstance(entry, dict):
        raise InputError(f"is a {type(entry).__name__}, not an object")
    if key not in entry:
        raise InputError(f"{key!r} is missing")
    value = entry[key]
    # isinstance would let true and false pass for integers.
    if type(value) is not kind:
        raise InputError(f"{key!r} is a {type(value).__name__}, not a {kind.__name__}")
    if kind is str:
        require_text(value, repr(key))
    return value


def require_text(value: Any, what: str) -> None:
    """Raise :class:`InputError` if ``value`` is no string, or one that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise InputError(f"{what} holds {quote(value)}, which is not a string")
    if _HALF_A_CHARACTER.search(value):
        raise InputError(f"{what} holds half of a surrogate pair, which is no text")
