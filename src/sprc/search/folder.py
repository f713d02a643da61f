"""The pictures that a folder holds."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from sprc.errors import InputError
from sprc.files import look_at_file

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)


def check_folder(folder: Path) -> None:
    """Raise :class:`InputError` unless ``folder`` is one."""
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a folder of pictures")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures")


def find_pictures(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the picture files below ``folder``, and those left out with the reason."""
    found, left_out = [], {}

    def unreadable(error: OSError) -> None:
        left_out[os.path.relpath(error.filename, folder)] = f"a folder that cannot be read ({error.strerror})"

    for top, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(top) / name).is_symlink():  # which os.walk does not follow
                left_out[os.path.relpath(Path(top) / name, folder)] = "a link to a folder, not followed"
        for name in files:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = Path(top) / name
            relative = os.path.relpath(path, folder)
            try:
                mode = path.stat().st_mode
            except OSError as error:
                left_out[relative] = f"cannot be read ({error.strerror})"
                continue
            if not stat.S_ISREG(mode):
                left_out[relative] = "not a file"
            elif path.is_symlink() and not path.resolve().is_relative_to(folder):
                left_out[relative] = "a link that leads out of the folder"
            else:
                found.append(relative)
    return found, left_out


def look_at_pictures(
    folder: Path, names: list[str], before: dict[str, tuple[list[int], str]]
) -> tuple[dict[str, tuple[list[int], str]], dict[str, str]]:
    """How each picture's file looks with the digest of its bytes, and why some of them cannot be read.

    Args:
        folder: of the pictures.
        names: of the files.
        before: what this returned earlier; a file that looks as before is not read.
    """

    def look(name: str) -> tuple[list[int], str] | str:
        try:
            return look_at_file(folder / name, before.get(name))
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(look, names), "Looking at pictures", len(names), delay=1, unit="picture")
        seen = dict(zip(names, bar, strict=True))
    unreadable = {name: reason for name, reason in seen.items() if isinstance(reason, str)}
    return {name: found for name, found in seen.items() if not isinstance(found, str)}, unreadable
