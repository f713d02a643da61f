"""From an ablation's cells to its table (CSV, Markdown, LaTeX) and its plots.

Everything is worked out from the cells' files; metrics are those of the ranks in `ranks.csv`, in percent.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import color_sequences

from sprc.ablation.grid import SWITCHES, Cell
from sprc.ablation.kinds import as_ranking, shown_by_kind, table_by_kind, with_kinds
from sprc.ablation.power import EFFECT, least_seen, seeds_needed, spread
from sprc.ablation.run import find_run, split_to_score
from sprc.ablation.text import figure, latex_table, spread_figure
from sprc.errors import InputError
from sprc.figures import plt, save_figure
from sprc.files import write_atomically, write_csv
from sprc.models.checkpoint import FUSION, STATE
from sprc.models.switches import SWITCHES as STATE_SWITCHES
from sprc.scoring.benchmarks import TrainingBenchmark, training_benchmark
from sprc.scoring.bootstrap import Difference, paired_bootstrap
from sprc.tables import markdown_table, metric_label

LEFT_OUT = ("missing_images", "dropped_triplets")  # columns of validation_metrics.csv


@dataclass(frozen=True)
class CellResult:
    """What a finished cell left behind."""

    cell: Cell
    dataset: str  # "cirr" or "fashioniq"
    split: str  # what `ranks` were scored on
    protocol: str | None  # FashionIQ's gallery
    ranks: pd.DataFrame  # a row a query, with the kind of its edit where the data tell it
    train: pd.DataFrame  # by epoch, from 0
    validation: pd.DataFrame  # by epoch, those that were validated
    step_seconds: float  # median of the epochs' medians
    checkpoint: Path
    # Images and triplets by split, where some were; see sprc.data.missing.
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def benchmark(self) -> type[TrainingBenchmark]:
        """What it was trained and scored on."""
        return training_benchmark(self.dataset)

    @property
    def kept_validation(self) -> float:
        """The headline metric on the validation split at the epoch that was kept, in percent."""
        kept = self.validation[self.benchmark.criterion].idxmax()  # the first of equals, as in training
        return float(self.validation.loc[kept, self.benchmark.headline])

    @property
    def metrics(self) -> dict[str, float]:
        """The benchmark's metrics of ``ranks``, in percent."""
        column = self.benchmark.part_column
        parts = [("", self.ranks)] if column is None else self.ranks.groupby(column, sort=False)
        return self.benchmark.metrics_of({str(part): as_ranking(ranks) for part, ranks in parts})

    @property
    def headline_scores(self) -> np.ndarray:
        """What each query adds to the headline metric, (Q,), in percent."""
        return self.benchmark.headline_scores({name: self.ranks[name].to_numpy() for name in self.ranks})


def read_cell(folder: Path, cell: Cell) -> CellResult:
    """Read a finished cell's files."""
    run = find_run(folder)
    assert run is not None  # a cell that has finished has one
    settings = json.loads(run.hyperparameters.read_text(encoding="utf-8"))
    benchmark, split = training_benchmark(settings["dataset"]), split_to_score(settings)
    ranks = pd.read_csv(folder / "ranks.csv")
    return CellResult(
        cell=cell,
        dataset=settings["dataset"],
        split=split,
        protocol=settings["fiq_protocol"] if benchmark.protocols else None,
        ranks=with_kinds(ranks, benchmark, Path(settings["data_path"]), split),
        train=pd.read_csv(run.train_metrics, index_col="epoch"),
        validation=pd.read_csv(run.validation_metrics, index_col="epoch"),
        step_seconds=pd.read_csv(run.step_times)["median_step_seconds"].median(),
        checkpoint=run.only_checkpoint(),
        left_out={title: found for title, found in settings.get("left_out", {}).items() if found["images"]},
    )


def report_ablation(out: Path, cells: list[Cell], baseline: str, failures: dict[Cell, str]) -> str:
    """Write `ablation.csv`, `.md` and `.tex`, and if any cell has finished `recall.png` and `losses.png`.

    Where the data tell the kinds of their edits, as the built-in ones do, `ablation_by_kind.csv` as well.

    Args:
        out: the ablation's folder, where they go.
        cells: of the grid.
        baseline: the variant that the others are compared with; where no cell is one, nothing is compared.
        failures: those that failed, each with its last line.

    Returns:
        The Markdown text.

    Raises:
        InputError: the cells were scored on different queries, or a file of edits does not fit them.
    """
    results = [read_cell(out / "cells" / cell.name, cell) for cell in cells if cell not in failures]
    rows = table(cells, results, baseline, failures)
    write_csv(out / "ablation.csv", rows)
    runs: dict[str, list[pd.DataFrame]] = {cell.variant: [] for cell in cells}
    for one in results:
        runs[one.cell.variant].append(one.ranks)
    by_kind = table_by_kind(runs, results[0].benchmark.by_kind) if results else []
    if by_kind:
        write_csv(out / "ablation_by_kind.csv", by_kind)
    text = markdown(rows, by_kind, results, baseline, failures)
    write_atomically(out / "ablation.md", lambda file: file.write(text.encode()))
    tex = latex(rows, by_kind, results, baseline, failures)
    write_atomically(out / "ablation.tex", lambda file: file.write(tex.encode()))
    if results:
        names = results[0].benchmark.plotted
        labels = {name: metric_label(name) for name in names}
        validation = [(one.cell.variant, one.validation) for one in results]
        plot_bands(validation, labels, "validation, percent", out / "recall.png")
        losses = {name: name for one in results for name in one.train if "loss" in name}
        plot_bands([(one.cell.variant, one.train) for one in results], losses, "training", out / "losses.png")
    return text


def table(
    cells: list[Cell], results: list[CellResult], baseline: str, failures: dict[Cell, str]
) -> list[dict[str, float | int | str | None]]:
    """A row a variant, its seeds summed up; None where a figure cannot be had.

    - `METRIC_mean`, `METRIC_std`: over seeds; the sample standard deviation, none for a single seed.
    - `validation_mean`, `validation_std`: the headline metric on the validation split at the epochs that were
      kept, where the others are of the test split. Choose between variants by it.
    - `parameters_added`: the fusion's, counted in a checkpoint.
    - `step_seconds`: median over seeds of a step's wall-clock seconds while training; `step_time_ratio` is
      its ratio to that of the ``baseline``. Cells that ran side by side have shared the machine.
    - `epochs_to_baseline_best`: after how many epochs a run's validation criterion first was at least the
      best that the baseline with the same seed ever had; the mean over the `baseline_best_reached` seeds
      where it was.
    - `difference`, `_low`, `_high`, `_p`: see :func:`paired_bootstrap`, over the seeds that the baseline has
      as well.
    - `difference_std`, `least_seen`, `seeds_needed`: the spread of the difference over seeds, the least one
      that they see, and the seeds that 2 points need; see :mod:`sprc.ablation.power`.
    - `missing_images`, `dropped_triplets`: only where image files of the validation split were missing.
    """
    of_variant: dict[str, list[Cell]] = {}
    for cell in cells:
        of_variant.setdefault(cell.variant, []).append(cell)
    by_cell = {one.cell: one for one in results}
    compared = {one.cell.seed: one for one in results if one.cell.variant == baseline}
    metric_names = list(results[0].metrics) if results else []
    validation = results[0].validation if results else pd.DataFrame()
    left_out = {name: int(validation[name].iloc[0]) for name in LEFT_OUT if name in validation}
    if results and results[0].split != "val":
        metric_names.append("validation")
    rows = []
    for variant, members in of_variant.items():
        done = [by_cell[cell] for cell in members if cell in by_cell]
        pairs = [(one, compared[one.cell.seed]) for one in done if one.cell.seed in compared]
        failed = [failures[cell] for cell in members if cell in failures]
        row: dict[str, Any] = {"variant": variant}
        row |= {name: getattr(members[0], name) for name in SWITCHES}
        row |= {"seeds": len(done), "failed": len(failed), "error": failed[-1] if failed else None}
        metrics = [{**one.metrics, "validation": one.kept_validation} for one in done]
        for name in metric_names:
            values = [found[name] for found in metrics]
            row[f"{name}_mean"] = fmean(values) if values else None
            row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        counted = bool(done) and not members[0].reranks  # whose fusion is its first stage's
        row["parameters_added"] = fusion_parameters(done[0].checkpoint) if counted else None
        row["step_seconds"] = median(one.step_seconds for one in done) if done else None
        row["step_time_ratio"] = (
            row["step_seconds"] / median(one.step_seconds for one in compared.values())
            if done and compared
            else None
        )
        epochs = [epochs_to_reach(one, other) for one, other in pairs]
        reached = [value for value in epochs if value is not None]
        row["epochs_to_baseline_best"] = fmean(reached) if reached else None
        row["baseline_best_reached"] = len(reached) if pairs else None
        test = compare(pairs) if pairs and variant != baseline else None
        for name in ("difference", "low", "high", "p"):
            key = name if name == "difference" else f"difference_{name}"
            row[key] = None if test is None else getattr(test, name)
        headline = results[0].benchmark.headline if results else ""
        by_seed = (
            [] if test is None else [one.metrics[headline] - two.metrics[headline] for one, two in pairs]
        )
        row["difference_std"], row["least_seen"] = spread(by_seed), least_seen(by_seed)
        row["seeds_needed"] = seeds_needed(by_seed)
        rows.append(row | left_out)
    return rows


def fusion_parameters(checkpoint: Path) -> int:
    """How many parameters the fusion of a checkpoint has."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)[STATE]
    names = (name for name in state if name.startswith(FUSION) and name != STATE_SWITCHES)
    return sum(state[name].numel() for name in names)


def epochs_to_reach(one: CellResult, baseline: CellResult) -> int | None:
    """Epochs trained when ``one`` first validated at least as well as ``baseline`` ever did, or None."""
    criterion = one.benchmark.criterion
    values = one.validation[criterion]
    reached = values.index[values >= baseline.validation[criterion].max()]
    return int(reached[0]) + 1 if len(reached) else None


def compare(pairs: list[tuple[CellResult, CellResult]]) -> Difference:
    """Test the headline metric of cells against that of others with the same seeds, query by query.

    Raises :class:`InputError` if they were scored on different queries.
    """
    benchmark = pairs[0][0].benchmark
    keys = benchmark.query_columns()
    first = pairs[0][1].ranks[keys]
    for one in (one for pair in pairs for one in pair):
        if not one.ranks[keys].equals(first):
            raise InputError(
                f"{one.cell.name} was scored on other queries; delete its folder and run it again"
            )
    differences = [one.headline_scores - other.headline_scores for one, other in pairs]
    column = benchmark.part_column
    parts = np.zeros(len(first), int) if column is None else pd.factorize(first[column])[0]
    return paired_bootstrap(np.stack(differences), parts)


def caption(results: list[CellResult], baseline: str) -> str:
    """What the table's figures are of, in words."""
    if not results:
        return "No cell has finished."
    one = results[0]
    gallery = f" ({one.protocol} gallery)" if one.protocol else ""
    if one.split == "test1":
        where = (
            "built-in data, held-out test split test1; each run's epoch was chosen on the validation split, "
            f"where its {one.benchmark.headline} is what stands under validation"
        )
    else:
        where = "validation split, on which each run's epoch was chosen as well: no test targets at hand"
    parts = [f"{d['images']} images, {d['triplets']} triplets of {t}" for t, d in one.left_out.items()]
    left_out = f" Left out, because image files are missing: {'; '.join(parts)}." if parts else ""
    return (
        f"{one.benchmark.name}'s format{gallery}: {where}.{left_out} Percent, mean and standard deviation "
        f"over seeds. The difference is that of {one.benchmark.headline} to {baseline}, paired by query and "
        "seed, with its 95 % bootstrap interval. Least seen is the difference that as many seeds would see, "
        "two-sided at 5 %, in four of five repetitions."
    )


def shown_tables(
    rows: list[dict[str, Any]], results: list[CellResult], baseline: str, pm: str
) -> list[list[list[str]]]:
    """The two tables to print, recall and the rest, as rows of text under their headers.

    The CSV file has every metric; these leave out what their benchmark does not print. ``pm`` is plus-minus.
    """
    unprinted = results[0].benchmark.unprinted if results else ()

    names = [key.removesuffix("_mean") for key in rows[0] if key.endswith("_mean")]
    names = [name for name in names if name not in unprinted]
    recall = [["variant", "seeds", *map(metric_label, names)]]
    header = ["variant", "parameters added", f"step time / {baseline}", f"epochs to {baseline}'s best"]
    header += ["difference", "95 %", "p", "least seen", f"seeds for {EFFECT:g} points"]
    rest = [header]
    for row in rows:
        values = [spread_figure(row[f"{name}_mean"], row[f"{name}_std"], pm) for name in names]
        recall.append([row["variant"], str(row["seeds"]), *values])
        epochs = figure(row["epochs_to_baseline_best"], ".1f")
        if row["baseline_best_reached"] is not None:
            epochs += f" ({row['baseline_best_reached']} of {row['seeds']})"
        tested = row["difference"] is not None
        rest.append(
            [
                row["variant"],
                figure(row["parameters_added"], ",d"),
                figure(row["step_time_ratio"], ".2f"),
                epochs,
                figure(row["difference"], "+.1f"),
                f"{row['difference_low']:+.1f} to {row['difference_high']:+.1f}" if tested else "-",
                figure(row["difference_p"], ".4f"),
                figure(row["least_seen"], ".1f"),
                figure(row["seeds_needed"], "d"),
            ]
        )
    return [recall, rest]


def title_by_kind(label: str) -> str:
    """What stands over the table of a metric by kind of edit."""
    return f"{label} by kind of edit, with the number of queries; percent, mean and deviation over seeds."


def markdown(
    rows: list[dict[str, Any]],
    by_kind: list[dict[str, Any]],
    results: list[CellResult],
    baseline: str,
    failures: dict[Cell, str],
) -> str:
    """The tables in Markdown, with the failed cells below."""
    lines = [caption(results, baseline)]
    for rows_of_text in shown_tables(rows, results, baseline, "±"):
        lines += ["", *markdown_table(rows_of_text)]
    for label, rows_of_text in shown_by_kind(by_kind, "±").items():
        lines += ["", title_by_kind(label), "", *markdown_table(rows_of_text)]
    if failures:
        lines += ["", "Failed:", ""]
        lines += [f"- {cell.name}: `{message}`" for cell, message in failures.items()]
    return "\n".join(lines) + "\n"


def latex(
    rows: list[dict[str, Any]],
    by_kind: list[dict[str, Any]],
    results: list[CellResult],
    baseline: str,
    failures: dict[Cell, str],
) -> str:
    """The tables in LaTeX, each a `table` with the rules of `booktabs`; the failed cells as comments."""
    lines = ["% needs \\usepackage{booktabs}"]
    titles = (caption(results, baseline), "Cost and convergence.")
    for rows_of_text, title in zip(shown_tables(rows, results, baseline, "+-"), titles, strict=True):
        lines += latex_table(rows_of_text, title)
    for label, rows_of_text in shown_by_kind(by_kind, "+-").items():
        lines += latex_table(rows_of_text, title_by_kind(label))
    lines += [f"% failed: {cell.name}: {message}" for cell, message in failures.items()]
    return "\n".join(lines) + "\n"


def plot_bands(
    runs: Iterable[tuple[str, pd.DataFrame]], columns: dict[str, str], title: str, path: Path
) -> None:
    """Draw each column over epochs, a line a variant: the mean over its runs, the band a standard deviation.

    A variant that lacks a column is not in its panel.

    Args:
        runs: variant and metrics by epoch, from 0; drawn from 1.
        columns: what is drawn, each in a panel of its own, and what to call it.
        title: of the figure.
        path: of the PNG file.
    """
    frames: dict[str, list[pd.DataFrame]] = {}
    for variant, frame in runs:
        frames.setdefault(variant, []).append(frame)
    figure, axes = plt.subplots(
        1, len(columns), figsize=(4 * len(columns), 3.6), layout="constrained", squeeze=False
    )
    colors = color_sequences["tab10" if len(frames) <= 10 else "tab20"]
    for axis, (column, label) in zip(axes[0], columns.items(), strict=True):
        for number, (variant, members) in enumerate(frames.items()):
            if not all(column in frame for frame in members):
                continue
            values = pd.concat([frame[column] for frame in members], axis=1)
            epochs, mean, spread = values.index + 1, values.mean(axis=1), values.std(axis=1)
            color = colors[number % len(colors)]
            axis.plot(epochs, mean, label=variant, color=color, marker="." if len(values) < 30 else None)
            if len(members) > 1:
                axis.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        axis.set(title=label, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(visible=True)
    figure.suptitle(title)
    shown: dict[str, Any] = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        shown |= zip(labels, handles, strict=True)
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=8)
    save_figure(figure, path)
