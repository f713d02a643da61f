"""Make the built-in benchmark, scenes of colored shapes: no download.

In the format of CIRR, FashionIQ or CIRCO.
"""

import argparse
from pathlib import Path

from sprc.data import DATASETS, DATASETS_METAVAR
from sprc.data.synthetic.circo import CIRCOConfig, make_circo
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.fashioniq import FashionIQConfig, make_fashioniq
from sprc.data.synthetic.splits import SyntheticConfig
from sprc.errors import InputError, run_script

SIZES = {
    "seed": "same seed and sizes: same files",
    "image_size": "side of the square images in pixels",
    "train_families": "a family is 36 images in 6 image sets; FashionIQ: for each of the three types",
    "val_families": "the same for val",
    "test_families": "the same for test",
    "train_queries_per_set": "queries an image set, at most 18; FashionIQ: 12",
    "eval_queries_per_set": "the same for val and test",
}


CONFIGS = {"CIRR": SyntheticConfig, "FashionIQ": FashionIQConfig, "CIRCO": CIRCOConfig}


def defaults_of(name: str) -> str:
    """The defaults of a size, as the help says them: CIRR's, and those that are others."""
    first, *others = ((dataset, getattr(config, name)) for dataset, config in CONFIGS.items())
    differing = [f"{dataset} {default}" for dataset, default in others if default != first[1]]
    if name.startswith("train"):
        differing = [one for one in differing if not one.startswith("CIRCO")]  # it has no training split
    return ", ".join([str(first[1]), *differing])


def main() -> None:
    """Parse the flags and write ``OUT/cirr_dataset``, ``fashionIQ_dataset`` or ``circo_dataset``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dataset",
        type=str.lower,
        choices=tuple(DATASETS),
        default="cirr",
        metavar=DATASETS_METAVAR,
        help="default: CIRR",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where it goes; default: demo")
    for name, meaning in SIZES.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, metavar="N", help=f"{meaning}; default: {defaults_of(name)}")
    parser.add_argument(
        "--png", action="store_true", help="FashionIQ: all images as PNG, for SPRC's own scripts; CIRR's are"
    )
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
    if arguments.dataset == "cirr":
        make_cirr(arguments.out, SyntheticConfig(**sizes))
    elif arguments.dataset == "circo":
        for name in sizes:
            if name.startswith("train"):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: CIRCO has no training split; leave the flag out")
        make_circo(arguments.out, CIRCOConfig(**sizes))
    else:
        make_fashioniq(arguments.out, FashionIQConfig(**sizes, png=arguments.png))


if __name__ == "__main__":
    run_script(main)
