"""How a JSON file of annotations is read and checked, entry by entry."""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from sprc.data.captions import process_caption
from sprc.errors import InputError

Report = Callable[[str], None]  # is told what is wrong with the data, in one line
# JSON's escapes can give half of a surrogate pair, which neither UTF-8 nor a tokenizer can hold.
_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
# An entry may hold anything, nested a thousand deep, and a message is to stay one line that one can read.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


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


def require_words(text: str, what: str) -> None:
    """Raise :class:`InputError` if ``text`` is no text or holds no word; ``what`` names it."""
    require_text(text, what)
    if not process_caption(text):
        raise InputError(f"{what} {text!r} holds no word; say what to change, such as 'make it red'")
