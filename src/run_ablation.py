"""Compare fusion strategies and their settings: a grid of trainings, a table, plots.

    python src/run_ablation.py --out ablation --fusion off gated film --alpha 0.1 0.5 --seeds 0 1 2 \\
        -- --dataset CIRR --backbone tiny --data-path demo --num-epochs 12 --learning-rate 5e-4
What stands after -- goes to src/blip_fine_tune_2.py. A switch that does not touch a strategy does not repeat
it: alpha acts in gated and additive, and gmu has no identity start. The same command goes on after a kill.
Each run keeps the epoch that is best on the validation split. The table is of the test split of the built-in
data in CIRR's format; other data have no test targets, and it is of the validation split.
"""

import argparse
import sys
from pathlib import Path

from sprc.config import FUSION_STARTS, FUSION_TEXTS, POOLS
from sprc.errors import run_script
from sprc.flags import ROOT

GRID = ("fusion", "alpha", "start", "pool", "text", "rate", "seeds", "training")


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "ablation", help="the ablation's folder; default: ablation/")
    add(
        "--config",
        type=Path,
        default=None,
        metavar="YAML",
        help=f"the grid: lists under {', '.join(GRID)}; flags win over it. Several grids: changes to these "
        "lists, as a list of mappings under `grids`",
    )
    add(
        "--fusion",
        nargs="+",
        metavar="NAME",
        help="off, gated, additive, weighted, film, tirg, gmu; default: off gated",
    )
    add("--alpha", nargs="+", type=float, help="starts of alpha; default: 0.5")
    add("--start", nargs="+", help=f"{', '.join(FUSION_STARTS)}; default: random")
    add("--pool", nargs="+", help=f"{', '.join(POOLS)}; default: masked")
    add("--text", nargs="+", help=f"{', '.join(FUSION_TEXTS)}; default: embeddings")
    add("--rate", nargs="+", type=float, help="the fusion's own learning rates; default: the training's")
    add("--seeds", nargs="+", type=int, help="default: 0 1 2")
    add(
        "--devices",
        nargs="+",
        default=None,
        metavar="DEVICE",
        help="one running cell each, the cores shared out (OMP_NUM_THREADS wins): cuda:0 cuda:1, or cpu cpu; "
        "default: every GPU, or cpu",
    )
    add("training", nargs="*", metavar="-- FLAG", help="of src/blip_fine_tune_2.py")
    arguments = parser.parse_args()
    given = {name: value for name in GRID if (value := getattr(arguments, name))}
    from sprc.ablation.report import report_ablation
    from sprc.ablation.run import AblationConfig, check_devices, run_cells

    config = AblationConfig.read(arguments.config, given)
    failures = run_cells(config, arguments.out, check_devices(arguments.devices))
    print(f"\n{report_ablation(arguments.out, config.cells(), failures)}")
    if failures:
        sys.exit(
            f"error: {len(failures)} of {len(config.cells())} cells failed; the same command tries them again"
        )


if __name__ == "__main__":
    run_script(main)
