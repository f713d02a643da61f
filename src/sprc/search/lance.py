"""LanceDB's table of an index of pictures, in the index's folder, for `--engine lancedb`.

    lance-N/    a row for each picture: its number in the index's order, and the mean of its features, float32

It is made from `pooled-N.bin`, so it holds what that generation of the index holds, and nothing else is ever
put into it: a new generation has a table of its own. A query reads the codes of the means, and then of the
features those of its candidates alone. So neither needs to fit into memory.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sprc.errors import InputError
from sprc.search.index import PictureIndex

TABLE = "pictures"
NUMBER, MEAN = "number", "mean"  # its columns
ROWS = 2**14  # written at once
# Fewer pictures are compared one by one. As many are split into lists, as long as these on the average.
LISTED, A_LIST = 10_000, 4096
# Bits that a code has for each channel. With one bit the 1,000 candidates lack more of the best than with
# FAISS; with four, and all lists read, they were as good on made features (benchmarks/gallery.py).
BITS = 4
READ = 1.0  # the share of the lists that a query reads
ROUNDS = 20  # of k-means, for the lists
CACHE = 2**28  # bytes that LanceDB keeps of its index, and as many of what describes its files


def import_lancedb() -> Any:
    """The module; where it is missing an :class:`InputError` says how to get it."""
    try:
        import lancedb
        import lancedb.index
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(
            "LanceDB's engine needs the package lancedb: pip install -e '.[lancedb]', or leave --engine "
            "lancedb and --lancedb out"
        ) from error
    return lancedb


def folder_of(path: Path, generation: int) -> Path:
    """Where the table of a generation of the index at ``path`` is."""
    return path / f"lance-{generation}"


def make_table(path: Path, generation: int, pooled: np.ndarray) -> None:
    """Write the table of a generation, unless a whole one is there.

    Args:
        path: of the index.
        generation: of its files.
        pooled: (G, E) float16, the mean over each picture's features.

    Raises:
        InputError: LanceDB is not installed, or cannot write the table.
    """
    folder = folder_of(path, generation)
    if _is_whole(folder, len(pooled)):
        return
    lancedb = import_lancedb()
    new = path / "new-lance"
    remove(new)
    try:
        table = _connect(new).create_table(TABLE, _batches(pooled), schema=_schema(pooled.shape[1]))
        if len(pooled) >= LISTED:
            # k-means on float16 takes LanceDB some ten times as long.
            config = lancedb.index.IvfRq(
                distance_type="dot",
                num_partitions=len(pooled) // A_LIST,
                num_bits=BITS,
                max_iterations=ROUNDS,
            )
            table.create_index(MEAN, config=config)
        for file in new.rglob("*"):  # the name comes last: what has it is on the disk
            if file.is_file():
                _to_disk(file)
        remove(folder)
        new.rename(folder)
    except (OSError, RuntimeError, ValueError) as error:
        remove(new)
        raise InputError(
            f"--lancedb: the table cannot be written in {path} ({_first_line(error)}); free some disk, or "
            "give --no-lancedb"
        ) from error


def remove_tables(path: Path, keep: int | None) -> None:
    """Remove the tables of the index at ``path``, a killed run's too, but for that of generation ``keep``."""
    for folder in (*path.glob("lance-*"), path / "new-lance"):
        if keep is None or folder != folder_of(path, keep):
            remove(folder)


def remove(path: Path) -> None:
    """Remove a folder or a file, or nothing if it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_table(index: PictureIndex) -> None:
    """Raise :class:`InputError` if ``index`` has no table."""
    if not folder_of(index.path, index.generation).is_dir():
        raise InputError(
            f"the index {index.path} has no table of LanceDB's; run `search.py index` again with --lancedb, "
            "or leave --engine lancedb out"
        )


def open_table(index: PictureIndex) -> Any:
    """The table of ``index``, None if it is gone; raises :class:`InputError` if it is damaged."""
    folder = folder_of(index.path, index.generation)
    try:
        table = _connect(folder).open_table(TABLE) if folder.is_dir() else None
        count = len(index.pictures) if table is None else table.count_rows()
    except (OSError, RuntimeError, ValueError) as error:
        if not folder.is_dir():
            return None
        raise _damaged(folder, error) from error
    if count != len(index.pictures):
        raise _damaged(folder, ValueError(f"{count} pictures, not {len(index.pictures)}"))
    return table


def nearest(index: PictureIndex, table: Any, query: Tensor, count: int) -> Tensor | None:
    """Gallery indices, in the gallery's order, of the ``count`` pictures with the nearest mean features.

    By their codes, so some may be missing. None if another process has replaced the index and removed the
    table since it was opened.

    Args:
        index: of the pictures.
        table: from :func:`open_table`.
        query: (E,).
        count: of candidates.

    Raises:
        InputError: the table is damaged.
    """
    if table is None:
        return None
    lists = max(1, round(READ * (len(index.pictures) // A_LIST)))
    try:
        found = (
            table.search(query.float().numpy(), vector_column_name=MEAN)
            .distance_type("dot")
            .nprobes(lists)
            .limit(min(count, len(index.pictures)))
            .select([NUMBER, "_distance"])
            .to_arrow()
        )
    except (OSError, RuntimeError, ValueError) as error:
        folder = folder_of(index.path, index.generation)
        if not folder.is_dir():
            return None
        raise _damaged(folder, error) from error
    return torch.from_numpy(found[NUMBER].to_numpy().astype(np.int64)).sort().values


def _connect(folder: Path) -> Any:
    lancedb = import_lancedb()
    session = lancedb.Session(index_cache_size_bytes=CACHE, metadata_cache_size_bytes=CACHE)
    return lancedb.connect(str(folder), session=session)


def _is_whole(folder: Path, count: int) -> bool:
    if not folder.is_dir():
        return False
    try:
        table = _connect(folder).open_table(TABLE)
        return table.count_rows() == count and bool(table.list_indices()) == (count >= LISTED)
    except (OSError, RuntimeError, ValueError):
        return False


def _schema(width: int) -> Any:
    import pyarrow as pa

    return pa.schema({NUMBER: pa.int64(), MEAN: pa.list_(pa.float32(), width)})


def _batches(pooled: np.ndarray) -> Iterator[Any]:
    import pyarrow as pa

    schema = _schema(pooled.shape[1])
    for start in range(0, len(pooled), ROWS):
        part = pooled[start : start + ROWS].astype(np.float32)
        means = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), pooled.shape[1])
        yield pa.record_batch([pa.array(np.arange(start, start + len(part))), means], schema=schema)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:  # Windows wants it open to write
        os.fsync(file.fileno())


def _damaged(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder} is damaged ({_first_line(error)}); remove it, and run `search.py index` with --lancedb"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
