"""Records of one size that are computed once and kept: each found by a digest and checked by a checksum.

Two files hold them: the records back to back, and a line a record. Lines follow their records, so a process
that is killed loses what it was at, and no more. Any number may read while one appends.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from sprc.files import named_write_errors


class Entry(NamedTuple):
    """Where a record is, and the CRC-32 of its bytes."""

    number: int
    crc: int


def read_record(path: Path, number: int, size: int) -> bytes:
    """The bytes of record ``number`` of ``path``, whose records have ``size``; fewer where it ends."""
    with path.open("rb", buffering=0) as file:  # opened for each: threads would share a position
        file.seek(number * size)
        return file.read(size)


def intact(path: Path, size: int, entries: dict[str, Entry], unit: str) -> dict[str, Entry]:
    """Those of ``entries`` whose records are in ``path`` as their checksums say; ``unit`` is the bar's."""

    def is_right(entry: Entry) -> bool:
        values = read_record(path, entry.number, size)
        return len(values) == size and zlib.crc32(values) == entry.crc

    if not entries or not path.exists():
        return {}
    with ThreadPoolExecutor() as pool:
        checks = pool.map(is_right, entries.values())
        bar = tqdm(checks, "Verifying features", len(entries), delay=1, unit=unit)
        return {digest: entry for (digest, entry), ok in zip(entries.items(), bar, strict=True) if ok}


class RecordStore:
    """Records in a file, and their lines in another: digest, number, checksum.

    Args:
        values: the records.
        lines: their lines; the later of two lines of one digest holds.
        size: bytes a record.
        unit: of the bar that verifying draws.
        hexadecimal: how the lines write the checksums: with eight hexadecimal digits, or as numbers.
    """

    def __init__(self, values: Path, lines: Path, size: int, *, unit: str, hexadecimal: bool) -> None:
        self.values, self.lines, self.size, self.unit = values, lines, size, unit
        self.base, self.form = (16, "08x") if hexadecimal else (10, "d")

    def entries(self) -> dict[str, Entry]:
        """What the lines tell of; one that a kill cut short, or that is damaged, tells of nothing."""
        try:
            text = self.lines.read_bytes().decode("ascii", "replace")
        except FileNotFoundError:
            return {}
        found = {}
        for line in text.splitlines(keepends=True):
            fields = line.split(" ")
            if len(fields) == 3 and line.endswith("\n") and fields[1].isdecimal():
                try:
                    found[fields[0]] = Entry(int(fields[1]), int(fields[2], self.base))
                except ValueError:
                    continue
        return found

    def intact(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """Those of ``entries`` whose records are there as their checksums say."""
        return intact(self.values, self.size, entries, self.unit)

    def next_number(self) -> int:
        """The number behind the last line's."""
        return 1 + max((entry.number for entry in self.entries().values()), default=-1)

    @contextmanager
    def append(self, first: int) -> Iterator[Callable[[Iterable[tuple[str, bytes]]], list[Entry]]]:
        """Yield a function that appends a batch of (digest, record), from number ``first`` on.

        Only one process at a time may append. Raises ``OSError`` that names the file, on a full disk for one.
        """
        told = "What was computed is kept: the same command goes on from there"
        with (
            named_write_errors(self.values, told),
            self.values.open("r+b" if self.values.exists() else "w+b") as values,
            self.lines.open("a+b") as lines,
        ):
            cut_torn_line(lines)
            number = first

            def put(batch: Iterable[tuple[str, bytes]]) -> list[Entry]:
                nonlocal number
                entries, text = [], []
                for digest, record in batch:
                    entry = Entry(number, zlib.crc32(record))
                    values.seek(number * self.size)
                    values.write(record)
                    entries.append(entry)
                    text.append(f"{digest} {entry.number} {entry.crc:{self.form}}\n")
                    number += 1
                values.flush()  # before their lines
                lines.write("".join(text).encode())
                lines.flush()
                return entries

            yield put
            for file in (values, lines):
                os.fsync(file.fileno())


def cut_torn_line(file: BinaryIO) -> None:
    """Cut what a killed process left behind the last line's end of ``file``, open to read and append."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
