"""The data of the benchmarks. This file imports nothing, so that `--help` names the transforms at once."""

TRANSFORMS = ("targetpad", "squarepad")
