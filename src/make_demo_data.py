"""Make the built-in benchmark (scenes of colored shapes) in CIRR's format: no download, seconds to run."""

import argparse
from pathlib import Path

from sprc.errors import run_script


def main() -> None:
    """Parse the flags and write ``OUT/cirr_dataset``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to hold cirr_dataset/")
    parser.add_argument("--seed", type=int, default=0, help="same seed and sizes: same files")
    parser.add_argument("--image-size", type=int, default=96, help="side of the square images in pixels")
    parser.add_argument(
        "--train-families", type=int, default=60, help="a family is 36 images in 6 image sets"
    )
    parser.add_argument("--val-families", type=int, default=7, help="the same for val")
    parser.add_argument("--test-families", type=int, default=7, help="the same for test1")
    parser.add_argument(
        "--train-queries-per-set", type=int, default=12, help="queries an image set, at most 18"
    )
    parser.add_argument("--eval-queries-per-set", type=int, default=6, help="the same for val and test1")
    flags = vars(parser.parse_args())

    from sprc.data.synthetic import SyntheticConfig, make_cirr

    make_cirr(flags.pop("out"), SyntheticConfig(**flags))


if __name__ == "__main__":
    run_script(main)
