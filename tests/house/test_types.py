"""The types of the package are checked: mypy, with the configuration in pyproject.toml."""

import subprocess
import sys

import pytest
from helpers.runner import ROOT

# Where mypy is told to look away, and why. Nowhere else.
EXEMPTIONS = {
    # Windows has no such module.
    "files.py": ["fcntl = None"],
    # The self check puts watchers in functions' places.
    "self_check/attention.py": ["F.scaled_dot_product_attention = watched"],
    "self_check/training.py": ["model.embed = watched", "warnings.showwarning = note"],
    # A method of one model is put in its compiled form's place, so that parameters keep their names.
    # A flag that argparse refuses is told with the recipe's file and stage.
    "training/recipe_file.py": ["parser.error = refuse"],
}


@pytest.mark.slow
def test_the_types_fit():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-error-summary"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_exemptions_are_listed():
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "type: ignore" in line:
                found.setdefault(str(path.relative_to(ROOT / "src" / "sprc")), []).append(
                    line.split("#")[0].strip()
                )
    assert found == EXEMPTIONS
