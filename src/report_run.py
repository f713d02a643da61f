"""Curves, gate maps and the recall table of a finished run: python src/report_run.py [RUN_FOLDER]"""

from sprc.errors import InputError, run_script
from sprc.gates.settings import ReportSettings
from sprc.run_folder import RunFolder
from sprc.settings import ROOT, flag_parser, given_flags

MODELS = ROOT / "models"


def main() -> None:
    """Parse the flags, then call the library (imported late, so that --help is quick)."""
    settings = ReportSettings(**given_flags(flag_parser(__doc__, ReportSettings)))
    run_folder = settings.run_folder
    if run_folder is None:
        runs = sorted((run.path for run in RunFolder.all_in(MODELS)), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise InputError(f"there is no run in {MODELS}; train one first, for example with make demo")
        run_folder = runs[-1]
    from sprc.gates.report import report_run

    report_run(
        run_folder,
        data_path=settings.data_path,
        queries=settings.queries,
        seed=settings.seed,
        device=settings.device,
        report_to=settings.report_to,
    )


if __name__ == "__main__":
    run_script(main)
