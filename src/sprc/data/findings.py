"""What a check of a data set tells. Imports nothing of the package."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Findings:
    """Lines for the user: what is there, what is worth knowing, what is wrong."""

    counts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    image_paths: dict[Path, None] = field(default_factory=dict)  # a set that keeps its order


# What looks at a benchmark's annotations in a folder, notes its findings, and takes --missing-images.
Examine = Callable[[Path, Findings, str], None]
