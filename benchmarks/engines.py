"""The engines that search an index of pictures, on features that are made up; see picture_search.py.

python benchmarks/engines.py --pictures 1000000 --folder DIR   # candidates of FAISS and LanceDB against exact
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from measure import (
    Row,
    Settings,
    in_bytes,
    in_fresh_process,
    in_seconds,
    machine,
    not_measured,
    peak_memory,
    ratio_row,
    require_memory,
    side_by_side,
)
from picture_search import QUERIES, SHAPES, TOP, queries_near, write_index
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
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            make_index(path, pictures, shape)
            exact = Searcher(open_index(path), None)
            queries = queries_near(exact)
            wanted = [{result.name for result in exact.best(query, TOP)} for query in queries]
            label = f"{name}'s shape {shape[0]} x {shape[1]}, {pictures} pictures"
            for engine, count in (
                (engine, count)
                for engine in PACKAGES
                for count in ((50, 100) if settings.quick else (100, 1000, 10_000))
            ):
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


# --- one large gallery


class Looked(NamedTuple):
    """Of some queries: the rows that they found, and their times."""

    rows: list[list[str]]
    wall: list[float]
    cpu: list[float]
    peak: int  # bytes of the process, mapped features among them
    own: int  # the same without what is mapped from files


def look(path: Path, engine: str, count: int, share: float, queries: int) -> Looked:
    """Search with queries of one process, the first of them before the clock runs."""
    lance.READ = share
    searcher = Searcher(open_index(path), None, engine, count)
    vectors = queries_near(searcher)[:queries]
    searcher.best(vectors[0], TOP)
    found = Looked([], [], [], 0, 0)
    for vector in vectors:
        start, busy = time.perf_counter(), time.process_time()
        found.rows.append([result.name for result in searcher.best(vector, TOP)])
        found.wall.append(time.perf_counter() - start)
        found.cpu.append(time.process_time() - busy)
    status = Path("/proc/self/status").read_text()
    sizes = [1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1]) for field in ("VmHWM", "RssAnon")]
    return found._replace(peak=sizes[0], own=sizes[1])


def exact_names(path: Path) -> list[list[str]]:
    """All queries at once, so that the features are read once."""
    index = open_index(path)
    queries = queries_near(Searcher(index, None))
    return [
        [index.names[i] for i in row] for row in top_k(block_scores(queries, index.gallery), TOP).tolist()
    ]


def main() -> None:
    """Print a Markdown table of the engines over one gallery, at the shape of ViT-g."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, required=True, help="for the index; it stays there")
    parser.add_argument("--exact", type=int, default=3, help="exact queries to time; default: %(default)s")
    arguments = parser.parse_args()
    path = arguments.folder
    if not (path / "pictures.json").exists():
        write_index(path, arguments.pictures, SHAPES["ViT-g"])
    if not lance.folder_of(path, 1).exists():
        start, busy = time.perf_counter(), time.process_time()
        lance.make_table(path, 1, open_index(path).pooled.numpy())
        took = f"{in_seconds(time.perf_counter() - start)}, {in_seconds(time.process_time() - busy)} of CPU"
        print(f"LanceDB's table made in {took}")
    print(
        f"{machine('cpu')}; load {os.getloadavg()[0]:.1f}; {arguments.pictures} pictures; features", end=" "
    )
    print(
        f"{in_bytes((path / 'vectors-1.bin').stat().st_size)}, table {in_bytes(bytes_of(path / 'lance-1'))}\n"
    )
    wanted = in_fresh_process(exact_names, path)
    print("| engine | candidates | lists read | recall at 10 | a query | CPU | peak, of it not mapped |")
    print("|---|---|---|---|---|---|---|")
    sides = [("exact", 0, 1.0, arguments.exact)]
    sides += [("faiss", count, 1.0, QUERIES) for count in (100, 1000)]
    sides += [
        ("lancedb", 100, 1.0, QUERIES),
        *(("lancedb", 1000, s, QUERIES) for s in (0.125, 0.25, 0.5, 1.0)),
    ]
    for engine, count, share, queries in sides:
        found = in_fresh_process(look, path, engine, count, share, queries)
        hits = sum(len(set(a) & set(b)) for a, b in zip(wanted, found.rows, strict=False))
        cells = [engine, "all" if engine == "exact" else str(count), f"{100 * share:.3g} %"]
        cells += [f"{100 * hits / (TOP * len(found.rows)):.1f} %"]
        cells += [f"{in_seconds(median(found.wall))} (to {in_seconds(max(found.wall))})"]
        cells += [in_seconds(median(found.cpu)), f"{in_bytes(found.peak)}, {in_bytes(found.own)}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
