"""The ablation's recall by kind of edit, where the data that the cells were scored on tell the kinds."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch

from sprc.ablation.text import spread_figure
from sprc.data.edits import read_kinds
from sprc.scoring.benchmarks import Benchmark
from sprc.scoring.kinds import recall_by_kind
from sprc.scoring.ranking import Ranking
from sprc.tables import metric_label

KIND = "kind"  # the column that a cell's ranks get


def as_ranking(ranks: pd.DataFrame) -> Ranking:
    """The rows of a file of ranks as the ranking that they came from."""
    columns = {"ranks": "rank", "set_ranks": "subset_rank"}
    return Ranking(
        **{
            name: torch.from_numpy(ranks[column].to_numpy())
            for name, column in columns.items()
            if column in ranks
        }
    )


def with_kinds(ranks: pd.DataFrame, benchmark: type[Benchmark], data_path: Path, split: str) -> pd.DataFrame:
    """The ranks with the kind of each query's edit beside them; as they are where the data tell none.

    Raises :class:`InputError` if a file of edits is broken, or lacks a query.
    """
    column = benchmark.part_column
    parts = np.zeros(len(ranks)) if column is None else ranks[column]
    kinds = pd.Series("", index=ranks.index)
    for part, rows in ranks.groupby(parts):
        file = benchmark.edits_file(data_path, split, "" if column is None else str(part))
        if not file.exists():
            return ranks
        kinds[rows.index] = read_kinds(file, rows[benchmark.id_column])
    return ranks.assign(**{KIND: kinds})


def table_by_kind(
    runs: Mapping[str, list[pd.DataFrame]], names: tuple[str, ...]
) -> list[dict[str, float | int | str | None]]:
    """A row a variant and kind of edit, the seeds summed up; no row where the ranks have no kinds.

    `queries` is their number, `METRIC_mean` and `METRIC_std` are over seeds: None where no seed, or a single
    one, has finished. A recall is that of all queries of the kind, FashionIQ's each ranked within its type.

    Args:
        runs: of each variant the finished cells' ranks from :func:`with_kinds`, one of each seed.
        names: of :data:`sprc.scoring.kinds.CUTS`.
    """
    found = {
        variant: [recall_by_kind(list(ranks[KIND]), as_ranking(ranks), names) for ranks in members]
        for variant, members in runs.items()
        if all(KIND in ranks for ranks in members)
    }
    first = next((members[0] for members in found.values() if members), [])
    rows = []
    for variant, members in found.items():
        for like in first:
            own = [row for member in members for row in member if row[KIND] == like[KIND]]
            row: dict[str, Any] = {"variant": variant, KIND: like[KIND], "queries": like["queries"]}
            row["seeds"] = len(own)
            for name in names:
                values = [float(one[name]) for one in own]
                row[f"{name}_mean"] = fmean(values) if values else None
                row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            rows.append(row)
    return rows


def shown_by_kind(rows: list[dict[str, Any]], pm: str) -> dict[str, list[list[str]]]:
    """A table to print for each metric of :func:`table_by_kind`: a row a variant, a column a kind.

    They are under the metrics' labels; ``pm`` is plus-minus.
    """
    tables = {}
    names = [key.removesuffix("_mean") for key in rows[0] if key.endswith("_mean")] if rows else []
    for name in names:
        header = {f"{row[KIND]} ({row['queries']})": None for row in rows}
        lines: dict[str, list[str]] = {}
        for row in rows:
            cells = lines.setdefault(row["variant"], [row["variant"]])
            cells.append(spread_figure(row[f"{name}_mean"], row[f"{name}_std"], pm))
        tables[metric_label(name)] = [["variant", *header], *lines.values()]
    return tables
