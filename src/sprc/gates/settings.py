"""The settings of ``visualize_gates.py`` and ``report_run.py``. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sprc.data import TYPES
from sprc.scoring.settings import DatasetSettings, DeviceSettings, ProtocolSettings, ScoringSettings
from sprc.settings import like, setting, text
from sprc.training.settings import TrackerSettings


@dataclass(frozen=True, kw_only=True)
class GateSettings(ScoringSettings, ProtocolSettings, DatasetSettings):
    """Which queries are drawn, and what is measured."""

    split: str = setting("val", help="train, val, or test1 (FashionIQ, CIRCO: test); default: %(default)s")
    fiq_type: str = setting(TYPES[0], choices=TYPES, help="FashionIQ's type; default: %(default)s")
    queries: int = setting(16, help="how many random ones are drawn; default: %(default)s")
    seed: int = setting(0, help="which ones; default: %(default)s")
    pairs: Sequence[int] | None = setting(
        None,
        metavar="ID",
        help="these queries instead: CIRR's and CIRCO's ids, FashionIQ's places in the captions file, from 0",
    )
    same_image: Sequence[str] | None = setting(
        None,
        nargs="*",
        metavar="NAME",
        help="references under all their captions side by side: these, or random ones with several captions",
    )
    captions: Sequence[str] | None = setting(
        None, parse=text, metavar="TEXT", help="with --same-image NAME: under these captions"
    )
    per_word: bool = setting(
        False, help="also which word edits which patch: a sheet of maps a word, and the same on the page"
    )
    localisation: bool = setting(
        False, help="built-in data only: the share of gate, change and gradients on the edited place"
    )
    off_model_path: Path | None = setting(
        None, metavar="FILE", help="with --localisation: a checkpoint of plain SPRC to compare with"
    )
    probe: bool = setting(
        False,
        help="recall without the edit, with the same edit for all tokens, and with another caption's edit",
    )
    out: Path | None = setting(None, metavar="FOLDER", help="default: gate_maps beside the checkpoint")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(DeviceSettings):
    """Which run is reported, and how much of it is shown."""

    run_folder: Path | None = setting(
        None, positional=True, nargs="?", help="by default the newest in models/"
    )
    data_path: Path | None = setting(None, help="where the data are, by default where they were")
    queries: int = setting(8, help="rows of the gate-map sheet; default: %(default)s")
    seed: int = setting(0, help="which queries the sheet shows; default: %(default)s")
    report_to: Sequence[str] | None = like(
        TrackerSettings,
        "report_to",
        None,
        help="add figures and tables to the run in these trackers; default: its own",
    )
