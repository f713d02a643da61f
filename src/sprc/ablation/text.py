"""The ablation's tables as text: figures, and rows of cells, the first of them the header, in LaTeX."""

LATEX_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX_SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def figure(value: float | None, form: str) -> str:
    """``value`` in ``form``, or a dash for None."""
    return "-" if value is None else format(value, form)


def spread_figure(mean: float | None, std: float | None, pm: str) -> str:
    """Mean and standard deviation; ``pm`` is plus-minus."""
    return figure(mean, ".1f") + ("" if std is None else f" {pm} {std:.1f}")


def latex_text(text: str) -> str:
    """``text`` with LaTeX's special characters escaped."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def latex_table(rows_of_text: list[list[str]], title: str) -> list[str]:
    """The lines of a `table` in LaTeX with the rules of `booktabs`; "+-" in a cell becomes plus-minus."""
    header, *body = [
        " & ".join(latex_text(text).replace("+-", r"$\pm$").replace("R\\_s@", "R$_s$@") for text in cells)
        + r" \\"
        for cells in rows_of_text
    ]
    columns = "l" + "r" * (len(rows_of_text[0]) - 1)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{latex_text(title)}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return [*lines, r"\end{tabular}", r"\end{table}"]
