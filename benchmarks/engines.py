"""The engines that search an index of pictures, on features that are made up; see picture_search.py.

For one gallery of any size see gallery.py.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import (
    Row,
    Settings,
    in_bytes,
    in_seconds,
    not_measured,
    peak_memory,
    ratio_row,
    require_memory,
    side_by_side,
)
from picture_search import SHAPES, TOP, queries_near, write_index
from torch import Tensor

from sprc.scoring.ranking import block_scores, top_k
from sprc.search import lance
from sprc.search.index import PictureIndex, open_index
from sprc.search.searcher import Searcher

PACKAGES = {"faiss": "faiss", "lancedb": "lancedb"}
STORES = ("lists of vectors", "flat")


def make_index(path: Path, pictures: int, shape: tuple[int, int]) -> None:
    """A made index with its table."""
    write_index(path, pictures, shape)
    if find_spec("lancedb"):
        lance.make_table(path, 1, open_index(path).pooled.numpy())


def bytes_of(path: Path) -> int:
    """All files below ``path``."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# --- candidates


def one_query(path: Path, engine: str, candidates: int) -> Callable[[], object]:
    """A query of ``path``'s index, ready to run."""
    searcher = Searcher(open_index(path), None, engine, candidates)
    return partial(searcher.best, queries_near(searcher)[0], TOP)


def candidates(settings: Settings) -> list[Row]:
    """Candidates of FAISS and of LanceDB, ranked exactly, against all pictures ranked: time, and recall."""
    pictures = 400 if settings.quick else 100_000
    require_memory(0.5 if settings.quick else 4)
    rows = []
    counts = (50, 100) if settings.quick else (100, 1000, 10_000)
    settings = settings._replace(seconds=settings.seconds / (len(SHAPES) * len(PACKAGES) * len(counts)))
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            make_index(path, pictures, shape)
            exact = Searcher(open_index(path), None)
            queries = queries_near(exact)
            wanted = [{result.name for result in exact.best(query, TOP)} for query in queries]
            label = f"{name}'s shape {shape[0]} x {shape[1]}, {pictures} pictures"
            for engine, count in ((engine, count) for engine in PACKAGES for count in counts):
                title = f"search, exact / {'FAISS' if engine == 'faiss' else 'LanceDB'}"
                if not find_spec(PACKAGES[engine]):
                    rows.append(not_measured(title, "", f"{engine} is not installed"))
                    continue
                searcher = Searcher(exact.index, None, engine, count)
                sides = {
                    "exact": partial(exact.best, queries[0], TOP),
                    engine: partial(searcher.best, queries[0], TOP),
                }
                times = side_by_side(sides, settings)
                told = f"{title}, {label}, {count} candidates: time"
                row = ratio_row(told, "", times["exact"], times[engine])
                recall = f"recall at {TOP} against exact {100 * recall_of(searcher, queries, wanted):.1f} %"
                rows.append(row._replace(detail=f"{row.detail}; {recall}"))
    return rows


def recall_of(searcher: Searcher, queries: Tensor, wanted: list[set[str]]) -> float:
    """The share of the wanted names that it finds."""
    found = [{result.name for result in searcher.best(query, TOP)} for query in queries]
    return sum(len(a & b) for a, b in zip(wanted, found, strict=True)) / sum(map(len, wanted))


# --- LanceDB in the place of our files


def write_store(path: Path, index: PictureIndex, kind: str) -> None:
    """The features of ``index`` in a table: a column of lists of vectors, or of all numbers in one list."""
    import lancedb
    import pyarrow as pa

    tokens, width = index.shape

    def batches() -> Iterator[Any]:
        for start in range(0, len(index.pictures), 1024):
            block = index.gallery[start : start + 1024].numpy()
            values = pa.array(block.reshape(-1))
            if kind == "flat":
                features = pa.FixedSizeListArray.from_arrays(values, tokens * width)
            else:
                ends = np.arange(0, (len(block) + 1) * tokens, tokens, dtype=np.int32)
                vectors = pa.FixedSizeListArray.from_arrays(values, width)
                features = pa.ListArray.from_arrays(ends, vectors)
            number = pa.array(np.arange(start, start + len(block)))
            yield pa.record_batch({"number": number, "features": features})

    schema = next(batches()).schema
    lancedb.connect(str(path)).create_table(
        "pictures", pa.RecordBatchReader.from_batches(schema, batches()), schema=schema
    )


def store_query(path: Path, side: str) -> Callable[[Tensor], list[int]]:
    """From a query (E,) to the gallery indices of the best, by one of three ways."""
    index = open_index(path / "ours")
    if side == "ours":
        return lambda query: top_k(block_scores(query[None], index.gallery), TOP)[0].tolist()
    import lancedb

    table = lancedb.connect(str(path / side)).open_table("pictures")

    def own_search(query: Tensor) -> list[int]:
        search = table.search(query.numpy(), vector_column_name="features").distance_type("dot")
        found = search.bypass_vector_index().limit(TOP).select(["number", "_distance"]).to_arrow()
        return found["number"].to_pylist()

    def our_ranking(query: Tensor) -> list[int]:
        scores = torch.empty(1, len(index.pictures))
        for batch in table.search().select(["number", "features"]).to_batches(512):
            block = torch.from_numpy(batch.column("features").values.to_numpy().reshape(-1, *index.shape))
            scores[:, batch.column("number").to_numpy()] = block_scores(query[None], block)
        return top_k(scores, TOP)[0].tolist()

    return own_search if side == STORES[0] else our_ranking


def one_of_store(path: Path, side: str) -> Callable[[], object]:
    """The same with its query."""
    query = queries_near(Searcher(open_index(path / "ours"), None))[0]
    return partial(store_query(path, side), query)


def store(settings: Settings) -> list[Row]:
    """Exact search: LanceDB's own, and our ranking over LanceDB's columns, against our mapped file."""
    title = "exact search over LanceDB's store / over our file"
    if not find_spec("lancedb"):
        return [not_measured(title, "1.5 x or less", "lancedb is not installed")]
    pictures, shape = (400, SHAPES["tiny"]) if settings.quick else (100_000, SHAPES["ViT-g"])
    require_memory(0.5 if settings.quick else 6)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_index(path / "ours", pictures, shape)
        index = open_index(path / "ours")
        written = {}
        for kind in STORES:
            start = time.perf_counter()
            write_store(path / kind, index, kind)
            written[kind] = time.perf_counter() - start
        queries = queries_near(Searcher(index, None))
        ways = {side: store_query(path, side) for side in ("ours", *STORES)}
        for query in queries[:3]:
            assert len({tuple(way(query)) for way in ways.values()}) == 1, "other pictures, or another order"
        times = side_by_side({side: partial(way, queries[0]) for side, way in ways.items()}, settings)
        peaks = {side: peak_memory(one_of_store, path, side, device="cpu").whole for side in ways}
        told = {STORES[0]: "its own search", STORES[1]: "our ranking over its columns"}
        for kind in STORES:
            name = f"{title}, {told[kind]}, {pictures} pictures of {shape[0]} x {shape[1]}: time"
            row = ratio_row(name, "1.5 x or less", times[kind], times["ours"], most=1.5)
            memory = f"memory of the process {in_bytes(peaks[kind])} against {in_bytes(peaks['ours'])}"
            size = f"written in {in_seconds(written[kind])}, {in_bytes(bytes_of(path / kind))}"
            rows.append(row._replace(detail=f"{row.detail}; {memory}; {size}"))
    return rows
