"""Curves, gate maps and the recall table of a finished run: python src/report_run.py [RUN_FOLDER]"""

import argparse
from pathlib import Path

from sprc.errors import InputError, run_script
from sprc.flags import ROOT

MODELS = ROOT / "models"


def main() -> None:
    """Parse the flags, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run_folder", type=Path, nargs="?", help="by default the newest in models/")
    parser.add_argument("--data-path", type=Path, help="where the data are, by default where they were")
    parser.add_argument("--queries", type=int, default=8, help="rows of the gate-map sheet")
    parser.add_argument("--seed", type=int, default=0, help="which queries the sheet shows")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; by default cuda if there is one")
    arguments = parser.parse_args()
    run_folder = arguments.run_folder
    if run_folder is None:
        runs = sorted(MODELS.glob("clip_finetuned_on_*"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise InputError(f"there is no run in {MODELS}; train one first, for example with make demo")
        run_folder = runs[-1]
    from sprc.gates.report import report_run

    report_run(
        run_folder,
        data_path=arguments.data_path,
        queries=arguments.queries,
        seed=arguments.seed,
        device=arguments.device,
    )


if __name__ == "__main__":
    run_script(main)
