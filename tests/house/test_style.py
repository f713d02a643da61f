"""The code is formatted, linted, and free of LAVIS where it must be."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_the_registration_imports_lavis():
    importers = [
        path.name
        for path in (ROOT / "src").rglob("*.py")
        if any(line.startswith(("import lavis", "from lavis")) for line in path.read_text().splitlines())
    ]
    assert importers == ["lavis_registration.py"]
