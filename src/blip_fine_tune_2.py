"""Train SPRC, with gated fusion or without.

CIRR, as published, with fusion:
    python src/blip_fine_tune_2.py --dataset CIRR --blip-model-name blip2_cir_align_prompt \\
        --backbone pretrain --num-epochs 10 --batch-size 64 --learning-rate 1e-5 --loss-align 0.4 \\
        --loss-rtc 0.4 --validation-frequency 1 --save-training --save-best --target-ratio 1.25 \\
        --transform targetpad
Plain SPRC: the same with --no-use-gated-fusion.
"""

import argparse
from pathlib import Path

from sprc.config import BACKBONES, FUSION_STARTS, POOLS
from sprc.data import TRANSFORMS
from sprc.errors import run_script

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    """The command line. Defaults of the model's switches are the backbone's own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, type=str.lower, choices=["cirr"], metavar="CIRR", help="CIRR")
    add("--blip-model-name", default="blip2_cir_align_prompt", metavar="NAME", help="default: %(default)s")
    add(
        "--backbone", default="pretrain", metavar="NAME", help=f"{', '.join(BACKBONES)}; default: %(default)s"
    )
    add(
        "--data-path",
        type=Path,
        default=ROOT,
        help="the folder that holds cirr_dataset/; default: this project",
    )
    add(
        "--models-path",
        type=Path,
        default=ROOT / "models",
        help="where the run's folder goes; default: models/",
    )
    add("--num-epochs", type=int, default=10, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="triplets a step; default: %(default)s")
    add("--learning-rate", type=float, default=1e-5, help="peak of the schedule; default: %(default)s")
    add("--loss-align", type=float, default=0.4, help="weight of the alignment loss; default: %(default)s")
    add("--loss-rtc", type=float, default=0.4, help="weight of the text-only loss; default: %(default)s")
    add("--loss-itm", type=float, default=1.0, help="weight of a matching loss; this model has none")
    add(
        "--validation-frequency", type=int, default=1, help="epochs between validations; default: %(default)s"
    )
    add(
        "--target-ratio",
        type=float,
        default=1.25,
        help="targetpad's longest side ratio; default: %(default)s",
    )
    add("--transform", default="targetpad", choices=TRANSFORMS, help="default: %(default)s")
    add("--save-training", action="store_true", help="save the model after validations")
    add("--save-best", action="store_true", help="with --save-training: keep only the best one")
    add("--save-memory", action="store_true", help="keep the gallery's features in main memory")
    add("--num-workers", type=int, default=2, help="processes that read images; default: %(default)s")
    add("--seed", type=int, default=0, help="of weights, data order and dropout; default: %(default)s")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add(
        "--image-size",
        type=int,
        default=None,
        help="pixels, a multiple of the patch; default: the backbone's",
    )
    fusion = parser.add_argument_group("fusion of the text into the reference's image tokens")
    add = fusion.add_argument
    add("--use-gated-fusion", action=argparse.BooleanOptionalAction, default=True, help="off is plain SPRC")
    add("--fusion-strategy", default=None, metavar="NAME", help="gated (default), additive, weighted")
    add("--alpha-init", type=float, default=None, help="start of the learned strength; default: 0.5")
    add("--fusion-dropout", type=float, default=None, help="default: 0.1")
    add(
        "--pool",
        default=None,
        choices=POOLS,
        help="the text's mean: without padding (masked, default) or with",
    )
    add("--fusion-start", default=None, choices=FUSION_STARTS, help="identity: step 0 is plain SPRC")
    return parser.parse_args()


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    arguments = parse_arguments()
    from sprc.fine_tuning import fine_tune

    fine_tune(arguments)


if __name__ == "__main__":
    run_script(main)
