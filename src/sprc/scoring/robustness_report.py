"""The robustness report as files: a table as CSV and in Markdown, and a plot against clean."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprc.data.missing import left_out_text
from sprc.figures import RIGHT, plt, save_figure
from sprc.files import write_atomically, write_csv
from sprc.models.checkpoint import Checkpoint
from sprc.scoring.benchmarks import TrainingBenchmark
from sprc.scoring.settings import RobustnessSettings
from sprc.tables import markdown_table, metric_label

STEM = "robustness"
GROUPS = {"query": "Of the query", "text": "The text changed", "picture": "The reference picture changed"}
COLORS = {"query": "#555555", "text": "#1f77b4", "picture": "#ff7f0e"}


@dataclass(frozen=True)
class Row:
    """A line of the report: what was changed, the metrics in percent, and the difference to clean.

    The difference is of the benchmark's headline metric, with its 95 % bootstrap interval over queries; None
    of the clean queries.
    """

    group: str  # "query", "text" or "picture"
    change: str
    level: float
    told: str  # the level in words
    metrics: Mapping[str, float | str]
    difference: tuple[float, float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """The row of the CSV file."""
        names = ("difference", "difference_low", "difference_high")
        found = dict(zip(names, self.difference or (None,) * 3, strict=True))
        return {"group": self.group, "change": self.change, "level": self.told, **self.metrics, **found}


def write_report(
    out: Path,
    rows: list[Row],
    benchmark: TrainingBenchmark,
    checkpoint: Checkpoint,
    settings: RobustnessSettings,
) -> None:
    """Write `robustness.csv`, `.md` and `.png` into the folder ``out``, and print the table."""
    write_csv(out / f"{STEM}.csv", [row.as_dict() for row in rows])
    text = markdown(rows, benchmark, title(benchmark, checkpoint, settings))
    write_atomically(out / f"{STEM}.md", lambda file: file.write(text.encode()))
    plot(rows, benchmark, out / f"{STEM}.png")
    print(text)
    print(f"wrote {out / STEM}.csv, .md and .png")


def title(benchmark: TrainingBenchmark, checkpoint: Checkpoint, settings: RobustnessSettings) -> str:
    """What the figures are of, in words."""
    split, gallery = benchmark.splits[0], f" ({benchmark.protocol} gallery)" if benchmark.protocol else ""
    fusion = checkpoint.model.gated_fusion is not None
    kind = f"{checkpoint.model.config.fusion_strategy} fusion" if fusion else "plain SPRC"
    queries = sum(len(one.triplets) for one in benchmark.splits)
    where = f"{benchmark.name}'s format{gallery}, split {split.name}, {queries:,} queries"
    return (
        f"{where}{left_out_text(benchmark.splits)}: {kind}, epoch {checkpoint.epoch}; seed {settings.seed}. "
        f"Percent. The difference is that of {benchmark.headline} to the clean queries, paired by query, "
        "with its 95 % bootstrap interval. The gallery is clean."
    )


def markdown(rows: list[Row], benchmark: TrainingBenchmark, heading: str) -> str:
    """The table in Markdown under its heading."""
    names = shown_metrics(benchmark)
    header = ["change", "level", *map(metric_label, names), "difference (95 %)"]
    lines = [header]
    for row in rows:
        values = [f"{row.metrics[name]:.1f}" for name in names]
        lines.append([row.change, row.told, *values, in_words(row.difference)])
    return "\n".join([heading, "", *markdown_table(lines)]) + "\n"


def shown_metrics(benchmark: TrainingBenchmark) -> list[str]:
    """The metrics of the table: those that an ablation plots, and the headline metric, which comes last."""
    names = [name for name in benchmark.plotted if name not in (*benchmark.unprinted, benchmark.headline)]
    return [*names, benchmark.headline]


def in_words(difference: tuple[float, float, float] | None) -> str:
    """A difference with its interval; nothing of the clean queries."""
    if difference is None:
        return ""
    value, low, high = (round(one, 1) + 0.0 for one in difference)  # no minus before a zero
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def plot(rows: list[Row], benchmark: TrainingBenchmark, path: Path) -> None:
    """Draw each row's headline metric as a bar, with the difference's interval, and clean as a line."""
    clean, *others = rows
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.24 * len(others)), layout="constrained")
    base = float(clean.metrics[benchmark.headline])
    for place, row in enumerate(others):
        value = float(row.metrics[benchmark.headline])
        axis.barh(place, value, color=COLORS[row.group], alpha=0.8)
        if row.difference is not None:
            low, high = (base + one for one in row.difference[1:])
            axis.plot([low, high], [place, place], color="black", linewidth=1)
    axis.axvline(base, color=RIGHT, linewidth=1.5, label=f"clean {base:.1f}")
    axis.set_yticks(range(len(others)), [f"{row.change} {row.told}".strip() for row in others], fontsize=8)
    axis.set_ylim(len(others) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{benchmark.headline}, percent")
    for group, color in COLORS.items():
        if any(row.group == group for row in others):
            axis.barh(0, 0, color=color, alpha=0.8, label=GROUPS[group])
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    axis.grid(visible=True, axis="x")
    save_figure(figure, path)
