"""Run the benchmarks, print a Markdown table and save it; see README.md beside this file.

make bench
python benchmarks/run.py --only fusion ranking --minutes 5
"""

import argparse
import json
import math
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from measure import Row, Settings, in_fresh_process, machine, not_measured  # noqa: E402

# Those that take longest come last: they get the time that the others have left.
NAMES = (
    "fusion",
    "ranking",
    "made-data",
    "search",
    "startup",
    "memory",
    "growth",
    "overhead",
    "qformer",
    "epoch",
)
# What is not measured unless it is named: questions of their own, and `quality` trains five models.
BY_NAME = ("engines", "grad-cache", "bank", "rerank", "quality")
# A model too small for a GPU to matter; an index that stays in main memory.
ON_A_CPU = ("startup", "search", "engines", "made-data")
# Of a case's time, what its turns may take; the rest is for making models and for peak memory.
TURNS_SHARE = 0.6


class Case(NamedTuple):
    """A benchmark's part, run in a process of its own."""

    title: str  # names its row where it cannot be measured
    module: str
    function: str
    arguments: tuple = ()


def cases_of(name: str, quick: bool) -> list[Case]:
    """The parts of a benchmark."""
    if name == "fusion":
        shapes = [(2, 24)] if quick else [(8, 1408), (64, 1408), (8, 768), (64, 768)]
        return [Case(f"fusion, B {b}, D {d}", "fusion", "run", (b, d)) for b, d in shapes]
    return {
        "epoch": [Case("epoch with and without the cache", "steps", "epoch")],
        "qformer": [Case("Q-Former's four calls", "steps", "qformer")],
        "ranking": [
            Case("ranking against the published way", "rank", "against_published"),
            Case("ranking of all of CIRR's images", "rank", "whole_of_cirr"),
        ],
        "overhead": [Case("fusion on against off", "steps", "overhead")],
        "startup": [Case("start-up", "startup", "run")],
        "grad-cache": [Case("gradient caching", "grad_cache", "run")],
        "memory": [Case("a step's peak memory, estimated against measured", "memory", "check")],
        "bank": [Case("a bank of negatives", "bank", "growing_bank")],
        "rerank": [
            Case("a query's second stage", "rerank", "query"),
            Case("a re-ranker's step", "rerank", "step"),
        ],
        "made-data": [Case("built-in data", "made_data", "run")],
        "quality": [Case("time to plain SPRC's best validation", "quality", "run")],
        "growth": [
            Case("growth with the batch", "steps", "growing_batch"),
            Case("growth with the gallery", "rank", "growing_gallery"),
        ],
        "search": [
            Case("growth of a picture search", "picture_search", "growth"),
            Case("the page", "picture_search", "page"),
        ],
        "engines": [
            Case("FAISS and LanceDB against exact", "engines", "candidates"),
            Case("LanceDB's store against ours", "engines", "store"),
        ],
    }[name]


def call(case: Case, settings: Settings) -> list[Row]:
    """Run a case here. Its module is imported now, so that the parent of all processes stays small."""
    module = __import__(case.module)
    return getattr(module, case.function)(settings, *case.arguments)


def measure(case: Case, settings: Settings) -> list[Row]:
    """Run a case in a process of its own; what memory does not allow is said in its row."""
    try:
        return in_fresh_process(call, case, settings)
    except (MemoryError, RuntimeError) as error:
        # torch says so in a RuntimeError, on a CPU and on a GPU.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        traceback.print_exception(error, limit=0)
        return [not_measured(case.title, "", f"not enough memory ({str(error).splitlines()[0]})")]


def table(columns: dict[str, dict[str, dict]]) -> str:
    """The Markdown table: a row a measurement, a column a machine."""
    rows: dict[str, str] = {}
    for cells in columns.values():
        rows |= {name: cell["wanted"] for name, cell in cells.items()}
    heads = []
    for name, cells in columns.items():
        dates = sorted({cell["date"] for cell in cells.values()})
        heads.append(f"{name}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}")
    lines = [["measured", "wanted", *heads], ["---"] * (2 + len(heads))]
    for name, wanted in rows.items():
        found = [cells.get(name, {"cell": ""})["cell"] for cells in columns.values()]
        lines.append([name, wanted, *found])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save(text: str, file: Path) -> None:
    """Write ``text`` to ``file`` at once."""
    from sprc.files import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda opened: opened.write(text.encode()))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    told = f"of {', '.join(NAMES)}, which is the default, and {', '.join(BY_NAME)}"
    add("--only", nargs="+", choices=NAMES + BY_NAME, default=NAMES, metavar="NAME", help=told)
    add("--device", nargs="+", choices=("cpu", "cuda"), help="default: cpu, and cuda if there is one")
    add("--repeats", type=int, default=9, help="turns at most, until a row is steady; default: %(default)s")
    add(
        "--minutes",
        type=float,
        default=20.0,
        help="shared out among what is left to measure; a row is measured once in any case; default: "
        "%(default)s",
    )
    add("--quick", action="store_true", help="small shapes: a test that all runs, the figures mean nothing")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the table, with its figures in a .json beside it; default: benchmarks/results.md, "
        "with --quick none",
    )
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} is too small; the least is 1")
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes {arguments.minutes:g} must be above 0")
    if arguments.out is None and not arguments.quick:
        arguments.out = HERE / "results.md"
    return arguments


def devices_here() -> list[str]:
    """What there is to measure on."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def main() -> None:
    """Measure, print, save after each case, so that what is measured is not lost."""
    arguments = parse_arguments()
    out, columns = arguments.out, {}
    figures = out.with_suffix(".json") if out else None
    if figures and figures.exists():
        columns = json.loads(figures.read_text())
    end = time.perf_counter() + 60 * arguments.minutes
    todo = [
        (device, case)
        for device in arguments.device or in_fresh_process(devices_here)
        for name in arguments.only
        if device == "cpu" or name not in ON_A_CPU
        for case in cases_of(name, arguments.quick)
    ]
    names = {device: in_fresh_process(machine, device) for device in {device for device, _ in todo}}
    for number, (device, case) in enumerate(todo):
        start = time.perf_counter()
        share = TURNS_SHARE * max(end - start, 0) / (len(todo) - number)
        rows = measure(case, Settings(device, arguments.repeats, arguments.quick, share))
        took = time.perf_counter() - start
        print(f"{number + 1}/{len(todo)} {case.title}: {took:.0f} s", file=sys.stderr, flush=True)
        cells = columns.setdefault(names[device] + (", quick" if arguments.quick else ""), {})
        for row in rows:
            today = date.today().isoformat()
            cells[row.name] = {"wanted": row.wanted, "cell": row.cell, "date": today}
        if out:
            save(json.dumps(columns, indent=1) + "\n", figures)
            save(table(columns), out)
    print(table(columns), end="")


if __name__ == "__main__":
    main()
