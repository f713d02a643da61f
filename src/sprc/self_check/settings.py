"""The settings of the self check, and their flags. Imports no torch, so that `--help` is quick."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sprc.scoring.settings import DeviceSettings
from sprc.settings import setting


@dataclass(frozen=True, kw_only=True)
class SelfCheckSettings(DeviceSettings):
    """What is checked, and how it is told."""

    only: Sequence[str] | None = setting(None, metavar="NAME", help="these checks alone, see --list")
    list: bool = setting(False, help="print the checks' names and end")
    shapes: str | None = setting(
        None,
        choices=("true", "quarter", "small"),
        help="of models and batches; default: true on a GPU, a quarter of the widths on a CPU",
    )
    report: Path | None = setting(None, metavar="FILE", help="write the report as Markdown, too")
    verbose: bool = setting(False, help="print the traceback of a check that breaks")
