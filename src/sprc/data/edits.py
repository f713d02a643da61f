"""What the built-in data tell of each triplet beyond the benchmarks' formats: its edit. Imports no torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sprc.data.reading import quote, read_field, read_json
from sprc.data.split import Split
from sprc.data.synthetic.scenes import CELL_NAMES
from sprc.errors import InputError

GRID = len(CELL_NAMES)  # cells on a side of a scene
# The last three are of CIRR's captions alone: what is no more, how many there are, and two edits at once.
KINDS = ("color", "shape", "size", "add", "remove", "move", "negation", "counting", "two")
Found = TypeVar("Found")


class PlacedEdit(NamedTuple):
    """One triplet's edit."""

    kind: str  # one of KINDS
    cells: tuple[tuple[int, int], ...]  # (row, column) from the top left, of GRID x GRID
    target: str  # the image's name, of hidden test splits as well


def read_edits(file: Path, split: Split) -> list[PlacedEdit]:
    """The edits of ``split``'s triplets, in their order, from the benchmark's ``edits_file``.

    Raises :class:`InputError` if an entry is missing, broken, or of another triplet.
    """
    triplets = {triplet.pair_id: triplet for triplet in split.triplets}

    def read(pair_id: int, entry: Any) -> PlacedEdit:
        kind, target, own = _read_kind(entry), read_field(entry, "target", str), triplets[pair_id].target
        cells = _read_cells(entry)
        if target not in split.image_paths:
            raise InputError(f"'target' names {quote(target)}, which is not in the split's list of images")
        if own not in (None, target):
            raise InputError(f"'target' names {quote(target)}, but the triplet's is {quote(own)}")
        return PlacedEdit(kind, cells, target)

    return _read_each(file, triplets, read)


def read_kinds(file: Path, pair_ids: Iterable[int]) -> list[str]:
    """The kinds of the edits of the triplets with these ids, in their order; raises as :func:`read_edits`."""
    return _read_each(file, pair_ids, lambda _, entry: _read_kind(entry))


def _read_each(file: Path, pair_ids: Iterable[int], read: Callable[[int, Any], Found]) -> list[Found]:
    entries = read_json(file)
    if isinstance(entries, list):  # FashionIQ has no pair ids: the place in the file is the id
        entries = {str(number): entry for number, entry in enumerate(entries)}
    if not isinstance(entries, dict):
        raise InputError(f"{file} is not an object of pair ids and edits; make the data again")
    found = []
    for pair_id in pair_ids:
        try:
            if str(pair_id) not in entries:
                raise InputError("is missing")
            found.append(read(pair_id, entries[str(pair_id)]))
        except InputError as error:
            raise InputError(f"{file}: entry {pair_id}: {error}; make the data again") from error
    return found


def _read_kind(entry: Any) -> str:
    kind: str = read_field(entry, "kind", str)
    if kind not in KINDS:
        raise InputError(f"'kind' is {quote(kind)}, not one of {', '.join(KINDS)}")
    return kind


def _read_cells(entry: Any) -> tuple[tuple[int, int], ...]:
    cells = read_field(entry, "cells", list)
    places = [[row, column] for row in range(GRID) for column in range(GRID)]
    if not cells or any(cell not in places for cell in cells):
        raise InputError(f"'cells' holds {quote(cells)}, not [row, column] of a {GRID} x {GRID} grid")
    return tuple((row, column) for row, column in cells)
