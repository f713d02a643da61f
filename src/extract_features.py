"""Fill a feature cache ahead of training and scoring: the frozen vision transformer's tokens, once an image.

    python src/extract_features.py --dataset CIRR --backbone pretrain --feature-cache DIR
    python src/blip_fine_tune_2.py --dataset CIRR --backbone pretrain --feature-cache DIR ...
At ViT-g an image takes 0.72 MB in float16. Training and scoring fill what is missing themselves; what is
there is only verified, and a killed filling goes on where it was.
"""

import argparse
from pathlib import Path

from sprc.config import BACKBONES
from sprc.data import DATASETS, DATASETS_METAVAR, PROTOCOLS, TRANSFORMS
from sprc.errors import run_script
from sprc.flags import ROOT, add_cache_flags, add_missing_flag, add_timeout_flag, add_vocab_flag

SPLITS = ("train", "val", "test")
SPELLINGS = (*SPLITS, "test1")  # CIRR's own name of its test split


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, type=str.lower, choices=tuple(DATASETS), metavar=DATASETS_METAVAR)
    add_cache_flags(parser, required=True)
    add("--splits", nargs="+", default=SPLITS, choices=SPELLINGS, help="default: train val test")
    add("--blip-model-name", default="blip2_cir_align_prompt", metavar="NAME", help="default: %(default)s")
    add(
        "--backbone", default="pretrain", metavar="NAME", help=f"{', '.join(BACKBONES)}; default: %(default)s"
    )
    add("--model-path", type=Path, default=None, metavar="FILE", help="this checkpoint's vision transformer")
    add_vocab_flag(parser)
    add("--data-path", type=Path, default=ROOT, help="the folder that holds the data set's; default: here")
    add_missing_flag(parser)
    add(
        "--fiq-protocol",
        default="original",
        choices=PROTOCOLS,
        help="FashionIQ's galleries of val and test; default: %(default)s",
    )
    add("--transform", default="targetpad", choices=TRANSFORMS, help="default: %(default)s")
    add("--target-ratio", type=float, default=1.25, help="targetpad's ratio; default: %(default)s")
    add("--image-size", type=int, default=None, help="pixels; default: the backbone's")
    add("--freeze-vit", action=argparse.BooleanOptionalAction, default=None, help="default: the backbone's")
    add("--batch-size", type=int, default=64, help="images at once; default: %(default)s")
    add("--num-workers", type=int, default=None, help="processes that read images; default: by the cores")
    add("--seed", type=int, default=0, help="of weights that start at random (tiny); default: %(default)s")
    add("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add_timeout_flag(parser)
    arguments = parser.parse_args()
    from sprc.distributed import process_group
    from sprc.scoring.feature_extraction import extract_features

    with process_group(arguments.timeout):
        extract_features(arguments)


if __name__ == "__main__":
    run_script(main)
