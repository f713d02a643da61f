"""What a check says, a line at a time, and how the lines are written: as aligned text, or as Markdown."""

from collections.abc import Sequence
from typing import NamedTuple

OK, FAIL, SKIP, NOTE = "ok", "FAIL", "skip", "note"
NAME_WIDTH = 30


class Line(NamedTuple):
    """One line of the report."""

    status: str  # OK, FAIL, SKIP or NOTE
    name: str  # of the check, and after a comma what of it
    figures: str  # what was measured
    remedy: str = ""  # what to install, to change or which flag to give

    def __str__(self) -> str:
        told = f"{self.figures}; {self.remedy}" if self.remedy else self.figures
        return f"{self.status:<5}{self.name:<{NAME_WIDTH}}{' '.join(told.split())}"


def bounded(name: str, what: str, value: float, bound: float, because: str, remedy: str) -> Line:
    """OK where a measured error is within its bound, which has a reason; else FAIL and what to do."""
    passed = value <= bound  # not so for a NaN
    figures = f"{what} {value:.1e}, bound {bound:.1e} ({because})"
    return Line(OK, name, figures) if passed else Line(FAIL, name, figures, remedy)


def summary(lines: Sequence[Line], seconds: float) -> str:
    """How many lines there are of each status, and how long they took."""
    counts = [sum(line.status == status for line in lines) for status in (OK, FAIL, SKIP, NOTE)]
    return "{} ok, {} failed, {} skipped, {} notes in {:.0f} s".format(*counts, seconds)


def markdown(title: str, facts: dict[str, str], lines: Sequence[Line], seconds: float) -> str:
    """The report as a document: what it was made on, a table, the summary."""
    rows = [f"| {line.status} | {line.name} | {cell(line.figures)} | {cell(line.remedy)} |" for line in lines]
    return "\n".join(
        [
            f"# {title}",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            "| | check | measured | what to do |",
            "|---|---|---|---|",
            *rows,
            "",
            summary(lines, seconds),
            "",
        ]
    )


def cell(text: str) -> str:
    """A text that does not break a table."""
    return " ".join(text.split()).replace("|", "\\|")
