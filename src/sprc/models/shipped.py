"""The files of a backbone that comes with this package: as they were shipped, or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sprc.config import MODEL_DIR
from sprc.errors import InputError


def shipped_bytes(name: str, sha256: str) -> bytes:
    """The contents of a file.

    Args:
        name: beside the backbones' YAML files; an absolute path is taken as it is.
        sha256: what the YAML says of it, in hexadecimal.

    Raises:
        InputError: it is missing, cannot be read, or is another file.
    """
    path = Path(MODEL_DIR, name)
    again = "install the package anew, or take the file from the repository again: git checkout -- FILE"
    try:
        contents = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing, and comes with this package; {again}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check it, or {again}") from error
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise InputError(
            f"{path} is not the file that its backbone names by SHA-256: it was altered or is cut short; "
            f"{again}. If you made it yourself, write its SHA-256 into the backbone's YAML"
        )
    return contents
