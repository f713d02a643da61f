"""How an image file is read and checked."""

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from PIL import Image, ImageFile, UnidentifiedImageError
from tqdm import tqdm

from sprc.errors import InputError
from sprc.processes import objects_of_all_ranks, rank, world_size

if TYPE_CHECKING:  # a check of files needs no torch
    from torch import Tensor

T = TypeVar("T")
Transform = Callable[[Image.Image], "Tensor"]
Loader = Callable[[Path], "Tensor"]  # see image_loader; a feature cache is another
# The bytes that close a complete file of the format; a few bytes of garbage after them do no harm.
_END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_TAIL_BYTES = 4096
# Every image is padded to a square at most, which for longer ones would take gigabytes.
LONGEST_SIDE = 16_384
_EXIF_ORIENTATION = 0x0112


@cache
def own_formats() -> tuple[str, ...]:
    """What Pillow decodes by itself. An EPS, for one, it hands to another program."""
    Image.preinit()
    for plugin in ("Avif", "Tiff", "WebP"):  # Image.init would import thirty more
        with suppress(ImportError):  # an older Pillow's
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(sorted({"AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN)))


def image_loader(transform: Transform, formats: tuple[str, ...] | None = None) -> Loader:
    """What reads an image file into (3, S, S) pixels, see :func:`load_image`."""
    return partial(load_image, transform=transform, formats=formats)


def load_image(
    path: Path, transform: Callable[[Image.Image], T], formats: tuple[str, ...] | None = None
) -> T:
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


def prepare_image(image: Image.Image, transform: Transform, what: str) -> "Tensor":
    """``transform`` of a picture that is open already; an error calls it ``what``.

    Raises :class:`InputError` if it is too long, see :func:`require_short`, or cannot be decoded.
    """
    require_short(image, what)
    try:
        return transform(image)
    except Exception as error:  # of almost any kind, out of what Pillow opened and cannot decode
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} cannot be prepared ({reason})") from error


def require_short(image: Image.Image, what: str) -> None:
    """Raise :class:`InputError` for a picture longer than padding to a square allows."""
    if max(image.size) > LONGEST_SIDE:
        width, height = image.size
        raise InputError(
            f"{what} has {width} x {height} pixels; give a copy of at most {LONGEST_SIDE} on a side"
        )


def check_images(image_paths: Mapping[T, Path], names: Iterable[T]) -> None:
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


class _Strictness:
    """Pillow's switches, which belong to the whole process, and the number of blocks that want them set.

    The first to enter sets them and the last to leave puts them back, in whatever order threads do.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.inside = 0
        self.before = ExitStack()
        if hasattr(os, "register_at_fork"):  # a child must not find the lock held by a thread it lacks
            release = self.lock.release
            os.register_at_fork(before=self.lock.acquire, after_in_parent=release, after_in_child=release)

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                # Importing LAVIS's data sets switches it on for everyone.
                before = ImageFile.LOAD_TRUNCATED_IMAGES
                self.before.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", before)
                self.before.enter_context(warnings.catch_warnings())
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.before.close()


_STRICTNESS = _Strictness()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow refuse what it would fill with grey or only warn of, in all threads of the process."""
    _STRICTNESS.enter()
    try:
        yield
    finally:
        _STRICTNESS.leave()


def _inspect_image(path: Path, decode: bool) -> ImageFinding:
    try:
        with Image.open(path) as image:
            _refuse_long(image)
            marker = _END_MARKERS.get(image.format or "")
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
    if max(image.size) > LONGEST_SIDE:
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
        reason = f"has more than {Image.MAX_IMAGE_PIXELS} pixels or more than {LONGEST_SIDE} on a side"
        remedy = "replace it with a smaller copy"
    elif isinstance(error, UnidentifiedImageError):
        reason = "is not an image in a format that Pillow reads" if path.stat().st_size else "is empty"
    else:
        reason = f"cannot be read ({str(error) or type(error).__name__})"
    return " ".join(f"{path} {reason}; {remedy}".split())
