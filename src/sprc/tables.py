"""Tables as text: what a metric is called in one, what a cell holds, and the lines of one in Markdown."""

import re


def metric_label(name: str) -> str:
    """`group_recall_at1` as R_s@1, `dress_recall_at10` as dress R@10; other names as they are."""
    found = re.fullmatch(r"(.*?)_?recall_at(\d+)", name)
    if not found:
        return name
    prefix, k = found.groups()
    return f"R_s@{k}" if prefix == "group" else f"{prefix} R@{k}".strip()


def number(text: str) -> float | str:
    """The number that a CSV file's cell holds, or its text."""
    try:
        return float(text)
    except ValueError:
        return text


def markdown_table(rows_of_text: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown, the first row its header."""
    header, *body = [f"| {' | '.join(cells)} |" for cells in rows_of_text]
    return [header, "|---" * len(rows_of_text[0]) + "|", *body]
