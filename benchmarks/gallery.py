"""One gallery of any size: exact search against the candidates of FAISS and of LanceDB, ranked exactly.

python benchmarks/gallery.py --pictures 1000000 --folder DIR

The index is of pictures that do not exist, at the shape of ViT-g; see picture_search.py. It stays there.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from measure import in_bytes, in_fresh_process, in_seconds, machine


class Looked(NamedTuple):
    """Of some queries: the rows that they found, and their times."""

    rows: list[list[str]]
    wall: list[float]
    cpu: list[float]
    peak: int  # bytes of the process, mapped features among them
    own: int  # the same without what is mapped from files


def look(path: Path, engine: str, count: int, share: float, queries: int) -> Looked:
    """Search with queries in one process, with the first before the clock runs too."""
    from picture_search import TOP, queries_near

    from sprc.search import lance
    from sprc.search.index import open_index
    from sprc.search.searcher import Searcher, map_features

    lance.READ = share
    searcher = Searcher(open_index(path), None, engine, count)
    map_features(searcher.index, engine)
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
    from picture_search import TOP, queries_near

    from sprc.scoring.ranking import block_scores, top_k
    from sprc.search.index import open_index
    from sprc.search.searcher import Searcher

    index = open_index(path)
    queries = queries_near(Searcher(index, None))
    return [
        [index.names[i] for i in row] for row in top_k(block_scores(queries, index.gallery), TOP).tolist()
    ]


def make_table(path: Path) -> tuple[float, float]:
    """Make LanceDB's table; how long it took, and of the CPU."""
    from sprc.search import lance
    from sprc.search.index import open_index

    pooled = open_index(path).pooled.numpy()
    start, busy = time.perf_counter(), time.process_time()
    lance.make_table(path, 1, pooled)
    return time.perf_counter() - start, time.process_time() - busy


def make_features(path: Path, pictures: int) -> None:
    """Make the index."""
    from picture_search import SHAPES, write_index

    write_index(path, pictures, SHAPES["ViT-g"])


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, required=True, help="for the index; it stays there")
    parser.add_argument("--exact", type=int, default=3, help="exact queries to time; default: %(default)s")
    arguments = parser.parse_args()
    path = arguments.folder
    if not (path / "pictures.json").exists():
        in_fresh_process(make_features, path, arguments.pictures)
    table = path / "lance-1"
    took = [] if table.exists() else in_fresh_process(make_table, path)
    files = [(path / "vectors-1.bin").stat().st_size]
    files += [sum(file.stat().st_size for file in table.rglob("*") if file.is_file())]
    print(f"{in_fresh_process(machine, 'cpu')}; load {os.getloadavg()[0]:.1f}; {arguments.pictures} pictures")
    print(f"features {in_bytes(files[0])}, LanceDB's table {in_bytes(files[1])}", end="")
    print(f", made in {in_seconds(took[0])}, {in_seconds(took[1])} of the CPU" if took else "", end="\n\n")
    wanted = in_fresh_process(exact_names, path)
    print("| engine | candidates | lists read | recall at 10 | a query | CPU | peak memory, not mapped |")
    print("|---|---|---|---|---|---|---|")
    sides = [("exact", 0, 1.0, arguments.exact), ("faiss", 100, 1.0, 50), ("faiss", 1000, 1.0, 50)]
    sides += [("lancedb", 100, 1.0, 50), *(("lancedb", 1000, share, 50) for share in (0.125, 0.25, 0.5, 1.0))]
    for engine, count, share, queries in sides:
        found = in_fresh_process(look, path, engine, count, share, queries)
        pairs = list(zip(wanted, found.rows, strict=False))  # of exact search, some alone are timed
        recall = sum(len({*a} & {*b}) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        cells = [engine, "all" if engine == "exact" else str(count), f"{100 * share:.3g} %"]
        cells += [
            f"{100 * recall:.1f} %",
            f"{in_seconds(median(found.wall))} (to {in_seconds(max(found.wall))})",
        ]
        cells += [in_seconds(median(found.cpu)), f"{in_bytes(found.peak)}, {in_bytes(found.own)}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
