"""Compare fusion strategies and their settings: a grid of trainings, a table, plots.

    python src/run_ablation.py --out ablation --fusion off gated film --alpha 0.1 0.5 --seeds 0 1 2 \\
        -- --dataset CIRR --backbone tiny --data-path demo --num-epochs 12 --learning-rate 5e-4
What stands after -- goes to src/blip_fine_tune_2.py. A switch that does not touch a strategy does not repeat
it: alpha acts in gated and additive, and gmu has no identity start. The same command goes on after a kill.
Each run keeps the epoch that is best on the validation split. The table is of the test split of the built-in
data in CIRR's format; other data have no test targets, and it is of the validation split.
"""

import sys

from sprc.ablation.grid import AblationConfig, AblationSettings
from sprc.errors import run_script
from sprc.settings import add_flags, flag_parser, given_flags, settings_of


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = flag_parser(__doc__, AblationSettings)
    add_flags(parser, AblationConfig, may_be_unset=True)
    given = given_flags(parser)
    grid = {one.name: given.pop(one.name) for one in settings_of(AblationConfig) if given.get(one.name)}
    settings = AblationSettings(**{name: value for name, value in given.items() if name != "training"})
    from sprc.ablation.run import check_devices, run_cells

    config = AblationConfig.read(settings.config, grid)
    failures = run_cells(config, settings.out, check_devices(settings.devices))
    from sprc.ablation.report import report_ablation

    print(f"\n{report_ablation(settings.out, config.cells(), config.baseline, failures)}")
    if failures:
        sys.exit(
            f"error: {len(failures)} of {len(config.cells())} cells failed; the same command tries them again"
        )


if __name__ == "__main__":
    run_script(main)
