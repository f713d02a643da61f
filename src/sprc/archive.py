"""The checksums inside a torch file, which torch itself does not look at."""

from __future__ import annotations

import zipfile
from pathlib import Path


def verify_archive(path: Path) -> None:
    """Check the checksums of the torch file at ``path``; raises ``BadZipFile`` if it is damaged.

    A flipped bit in a weight would else be a wrong number in a table. A file of torch's format before 2020 is
    no archive and has no checksums: it passes.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        # A tensor marked as a folder would be skipped by the check, and read as noise by torch.
        folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
        if damaged := archive.testzip() or "".join(folders[:1]):
            raise zipfile.BadZipFile(f"{damaged} is damaged")
