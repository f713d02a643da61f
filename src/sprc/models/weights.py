"""A backbone's files: looked at before anything is taken from them.

One that comes with this package is hashed at every load. The others are fetched, once, into torch's cache.
Beside a file `NAME` that loaded well lies `NAME.sprc.json` with its size and SHA-256. What is another file at
a later load was damaged or replaced, and is refused. Torch's newer format has checksums of its own, which are
verified at every load; such a file is hashed again only where its times changed. One of the older format
is hashed at every load.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from sprc.config import MODEL_DIR
from sprc.distributed import rank
from sprc.errors import InputError
from sprc.files import READ_ONLY, hash_file, verify_archive, write_json
from sprc.models.shipped import shipped_bytes


def weights_path(address: str) -> Path:
    """Where a backbone's file is: in torch's cache what is fetched, else beside the backbones' YAML files."""
    if "://" not in address:
        return MODEL_DIR / address
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(address).path).name


def read_shipped_weights(name: str, sha256: str) -> dict[str, Any]:
    """The contents of a backbone's safetensors file, arranged as in BLIP-2's files: weights under `model`.

    Raises :class:`InputError`, see :func:`shipped_bytes`, and where the package safetensors is missing.
    """
    contents = shipped_bytes(name, sha256)
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise InputError(f"reading {name} needs the package safetensors: pip install safetensors") from error
    return {"model": load(contents)}


def read_weights(url: str, *, verify: bool = True) -> dict[str, Any]:
    """The contents of a backbone's file on the CPU, fetched if torch's cache has none.

    Args:
        url: its address.
        verify: False where another process of this machine has just verified it.

    Raises:
        InputError: it cannot be fetched; or what is there is empty, a web page, damaged, cut short, not the
            file that loaded here before, or holds more than tensors.
    """
    path = weights_path(url)
    again = f"delete it, and it is fetched again; or put {url} there by hand"
    with _explained(path, again):
        if not path.exists():
            _fetch(url, path)
        if path.is_dir():
            raise InputError(f"{path} is a folder, and should be the file from {url}; remove it")
        looks = _verified(path, again) if verify else None
        contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds no dictionary of weights; {again}")
    if looks is not None:
        _record(path, looks)
    return contents


def state_of(contents: dict[str, Any], url: str, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors by name in a file's ``contents``, below ``entry`` if it is given.

    Raises :class:`InputError` for anything else there.
    """
    path = weights_path(url)
    state = contents if entry is None else contents.get(entry)
    again = f"is it another file under that name? Delete it, and it is fetched again from {url}"
    if not isinstance(state, dict):
        found = ", ".join(map(str, list(contents)[:5]))
        raise InputError(f"{path} has no entry {entry!r} with weights (it has: {found}); {again}")
    wrong = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise InputError(f"{path} holds entries that are no tensors ({', '.join(wrong[:5])}); {again}")
    return state


@contextmanager
def _explained(path: Path, again: str) -> Iterator[None]:
    """Make one line of what reading a file can raise: out of broken bytes, almost any exception."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); check it and its disk"
        ) from error
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise InputError(f"{path} does not fit into main memory; free some, or use more") from error
        raise InputError(
            f"{path} cannot be loaded safely: it is no file of weights, is cut short, or holds more than "
            f"tensors, which could run code; {again}"
        ) from error


def _fetch(url: str, path: Path) -> None:
    """Put what ``url`` gives at ``path``, at once and only if it is whole."""
    by_hand = f"download it by hand to {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            fetched = Path(folder) / path.name
            torch.hub.download_url_to_file(url, str(fetched), progress=rank() == 0)
            if problem := _problem(fetched):
                raise InputError(f"what {url} gives {problem}; try again, or {by_hand}")
            _record_of(path).unlink(missing_ok=True)  # of a file that was there before
            fetched.replace(path)
    except (OSError, http.client.HTTPException) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            by_hand = "free some space there, or set TORCH_HOME to a folder on another disk"
        elif number in READ_ONLY:
            by_hand = f"let it be written, set TORCH_HOME to another folder, or {by_hand}"
        raise InputError(f"cannot fetch {url} into {path.parent} ({error}); {by_hand}") from error


def _problem(path: Path) -> str | None:
    """What is wrong with a file of weights, as far as its beginning and its checksums tell."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty"
    if head.lstrip().startswith(b"<"):
        return "is a web page and no weights: the answer of a proxy, or of a login"
    try:
        verify_archive(path)
    except OSError:
        raise
    except Exception:  # of almost any kind, out of broken bytes
        return "is damaged or cut short"
    return None


def _verified(path: Path, again: str) -> dict[str, Any]:
    """What to record of ``path``, a whole file and the one that loaded before; else :class:`InputError`."""
    if problem := _problem(path):
        raise InputError(f"{path} {problem}; {again}")
    record = _record_of(path)
    before = _read_record(record)
    status = path.stat()
    looks: dict[str, Any] = {
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }
    if zipfile.is_zipfile(path) and before and looks == {key: before[key] for key in looks}:
        return before
    if not before or before["size"] == looks["size"]:
        looks["sha256"] = hash_file(path, hashlib.sha256())
    if before and before["sha256"] != looks.get("sha256"):
        raise InputError(
            f"{path} is not the file that loaded here before ({record.name} has its size and SHA-256): it "
            f"was damaged or replaced; {again}. If you replaced it yourself, delete {record.name}"
        )
    return looks


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sprc.json")


def _read_record(record: Path) -> dict[str, Any] | None:
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        return {
            **{key: int(before[key]) for key in ("size", "modified_ns", "changed_ns", "inode")},
            "sha256": str(before["sha256"]),
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record} is damaged; delete it, and it is made anew") from error


def _record(path: Path, looks: dict[str, Any]) -> None:
    record = _record_of(path)
    if _read_record(record) == looks:
        return
    try:
        write_json(record, looks)
    except OSError:
        print(f"{path.parent} cannot be written: the checksum of {path.name} is not recorded", flush=True)
