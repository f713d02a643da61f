"""The data of the benchmarks. This file imports nothing, so that `--help` names the choices at once."""

TRANSFORMS = ("targetpad", "squarepad")
# FashionIQ's kinds of clothing, and its galleries; see sprc.data.fashioniq.
TYPES = ("dress", "shirt", "toptee")
PROTOCOLS = ("original", "val-split")
