"""Train SPRC, with gated fusion or without, on CIRR or FashionIQ.

CIRR with fusion, the short way, ten epochs of batch 64:
    python src/blip_fine_tune_2.py --dataset CIRR --blip-model-name blip2_cir_align_prompt \\
        --backbone pretrain --num-epochs 10 --batch-size 64 --learning-rate 1e-5 --loss-align 0.4 \\
        --loss-rtc 0.4 --validation-frequency 1 --save-training --save-best --target-ratio 1.25 \\
        --transform targetpad
Plain SPRC: the same with --no-use-gated-fusion. As published it trains longer, in float16; on FashionIQ with
--num-epochs 30 --learning-rate 2e-5:
    python src/blip_fine_tune_2.py --dataset CIRR --no-use-gated-fusion --amp fp16 --num-epochs 50 \\
        --batch-size 128 --learning-rate 1e-5 --save-training --save-best
After a crash or Ctrl-C:
    python src/blip_fine_tune_2.py --resume RUN_FOLDER
On N GPUs: torchrun --nproc-per-node N in place of python.
"""

import argparse
from pathlib import Path
from typing import Any

from sprc.config import AMP, BACKBONES, FUSION_STARTS, FUSION_TEXTS, GALLERY_DTYPES, POOLS
from sprc.data import PROTOCOLS, TRANSFORMS
from sprc.errors import run_script
from sprc.flags import ROOT, add_cache_flags, add_missing_flag, add_timeout_flag, add_vocab_flag
from sprc.start_up import no_collection


def parse_arguments() -> tuple[dict[str, Any], dict[str, Any]]:
    """The defaults of all flags, and the flags that are given: a resumed run has flags of its own.

    A default of None, for a switch of the model, is the backbone's own.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", type=str.lower, choices=("cirr", "fashioniq"), metavar="{CIRR,FashionIQ}")
    add("--blip-model-name", default="blip2_cir_align_prompt", metavar="NAME", help="default: %(default)s")
    add(
        "--backbone", default="pretrain", metavar="NAME", help=f"{', '.join(BACKBONES)}; default: %(default)s"
    )
    add("--model-path", type=Path, default=None, metavar="FILE", help="start from this checkpoint's weights")
    add_vocab_flag(parser)
    add(
        "--resume",
        type=Path,
        default=None,
        metavar="RUN_FOLDER",
        help="go on with a run, with its own flags; README.md says which may be given anew",
    )
    add(
        "--data-path",
        type=Path,
        default=ROOT,
        help="folder of cirr_dataset/, fashionIQ_dataset/; default: here",
    )
    add(
        "--models-path",
        type=Path,
        default=ROOT / "models",
        help="where the run's folder goes; default: models/",
    )
    add_missing_flag(parser)
    add("--num-epochs", type=int, default=10, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="triplets a step, of all GPUs; default: %(default)s")
    add("--learning-rate", type=float, default=1e-5, help="peak of the schedule; default: %(default)s")
    add(
        "--loss-align",
        type=float,
        default=None,
        help="alignment loss's weight; default: CIRR 0.4, FashionIQ 1",
    )
    add(
        "--loss-rtc", type=float, default=None, help="text-only loss's weight; default: CIRR 0.4, FashionIQ 1"
    )
    add("--loss-itm", type=float, default=1.0, help="weight of a matching loss; this model has none")
    add(
        "--fiq-protocol",
        default="original",
        choices=PROTOCOLS,
        help="FashionIQ's gallery; default: %(default)s",
    )
    add(
        "--validation-frequency", type=int, default=1, help="epochs between validations; default: %(default)s"
    )
    add("--checkpoint-every", type=int, default=0, metavar="STEPS", help="save the state also within epochs")
    add(
        "--target-ratio",
        type=float,
        default=1.25,
        help="targetpad's longest side ratio; default: %(default)s",
    )
    add("--transform", default="targetpad", choices=TRANSFORMS, help="default: %(default)s")
    add("--save-training", action="store_true", help="save the model after each validation")
    add("--save-best", action="store_true", help="with --save-training: keep only the best one")
    add("--save-full", action="store_true", help="save the frozen vision transformer, too")
    add(
        "--save-memory",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep the gallery's features in main memory",
    )
    add(
        "--num-workers",
        type=int,
        default=None,
        help="processes a GPU that read images; default: by the cores",
    )
    add("--seed", type=int, default=0, help="of weights, data order and dropout; default: %(default)s")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add(
        "--image-size",
        type=int,
        default=None,
        help="pixels, a multiple of the patch; default: the backbone's",
    )
    add("--freeze-vit", action=argparse.BooleanOptionalAction, default=None, help="default: the backbone's")
    add(
        "--gallery-dtype",
        default="float32",
        choices=GALLERY_DTYPES,
        help="of the gallery's features in validation; default: %(default)s",
    )
    add_timeout_flag(parser)
    speed = parser.add_argument_group("speed and memory")
    add_cache_flags(speed)
    speed.add_argument(
        "--no-feature-cache",
        dest="feature_cache",
        action="store_const",
        const=None,
        help="with --resume: read the images again",
    )
    speed.add_argument(
        "--amp",
        default="auto",
        choices=AMP,
        help="mixed precision; auto (default): bf16 where the GPU has it, else fp16, off on a CPU; "
        "fp16 is plain SPRC's",
    )
    speed.add_argument("--compile", action="store_true", help="torch.compile what is trained")
    speed.add_argument(
        "--grad-cache",
        type=int,
        default=None,
        metavar="CHUNK",
        help="larger batches than memory holds: embed CHUNK triplets at once, twice; the result is the same",
    )
    speed.add_argument(
        "--no-grad-cache",
        dest="grad_cache",
        action="store_const",
        const=None,
        help="with --resume: embed whole batches again",
    )
    fusion = parser.add_argument_group("fusion of the text into the reference's image tokens")
    add = fusion.add_argument
    add("--use-gated-fusion", action=argparse.BooleanOptionalAction, default=None, help="off is plain SPRC")
    add(
        "--fusion-strategy",
        default=None,
        metavar="NAME",
        help="gated (default), additive, weighted, film, tirg, gmu",
    )
    add(
        "--alpha-init",
        type=float,
        default=None,
        help="start of the learned strength, in gated and additive; default: 0.5",
    )
    add("--fusion-dropout", type=float, default=None, help="default: 0.1")
    add(
        "--pool",
        default=None,
        choices=POOLS,
        help="the text's mean: without padding (masked, default) or with",
    )
    add(
        "--fusion-start",
        default=None,
        choices=FUSION_STARTS,
        help="identity: step 0 is plain SPRC; gmu has none",
    )
    add(
        "--fusion-text",
        default=None,
        choices=FUSION_TEXTS,
        help="what is averaged: word embeddings (default), or these after the Q-Former's layers",
    )
    add("--fusion-lr", type=float, default=None, help="the module's own peak rate; default: --learning-rate")
    add(
        "--log-fusion-every",
        type=int,
        default=50,
        metavar="STEPS",
        help="steps between rows of fusion_metrics.csv; 0: none; default: %(default)s",
    )
    add = parser.add_argument
    add(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write what goes to CSV files for TensorBoard, too",
    )
    defaults = vars(parser.parse_args([]))
    absent = object()  # what argparse finds set already it does not set to the default
    found = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, absent))))
    given = {name: value for name, value in found.items() if value is not absent}
    if "dataset" not in given and "resume" not in given:
        parser.error("give --dataset to start a run, or --resume to go on with one")
    return defaults, given


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    defaults, given = parse_arguments()
    with no_collection():
        from sprc.distributed import process_group
        from sprc.training.fine_tuning import fine_tune
        from sprc.training.resume import own_timeout

    timeout = given.get("timeout", defaults["timeout"])
    if "resume" in given and "timeout" not in given:
        timeout = own_timeout(given["resume"], timeout)
    with process_group(timeout):
        fine_tune(defaults, given)


if __name__ == "__main__":
    run_script(main)
