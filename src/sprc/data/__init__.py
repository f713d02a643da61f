"""The data of the benchmarks. This file imports nothing, so that `--help` names the choices at once."""

# What --dataset takes, and the benchmark's name; their classes are in sprc.scoring.benchmarks.
TRAINED_ON = {"cirr": "CIRR", "fashioniq": "FashionIQ"}
DATASETS = {**TRAINED_ON, "circo": "CIRCO"}
TRAINED_ON_METAVAR, DATASETS_METAVAR = (f"{{{','.join(one.values())}}}" for one in (TRAINED_ON, DATASETS))
TRANSFORMS = ("targetpad", "squarepad")
# FashionIQ's kinds of clothing, in the order of SPRC's training and CSV files, and its galleries; see
# sprc.data.fashioniq.
TYPES = ("dress", "toptee", "shirt")
PROTOCOLS = ("original", "val-split")
# What of a query of CIRCO the model reads; see sprc.data.circo.
CIRCO_QUERIES = ("caption", "concept")
# What is done about an image that has no file; see sprc.data.missing.
MISSING_IMAGES = ("error", "skip")
# What --noise-ratio changes of a triplet; see sprc.data.noise.
NOISE_KINDS = ("target", "mix")
# What a robustness report changes of a query; see sprc.data.perturbations.
TEXT_PERTURBATIONS = (
    *("typos", "swapped-words", "dropped-words"),
    *("lower-case", "upper-case", "no-punctuation", "stops", "commas"),
)
PICTURE_PERTURBATIONS = ("blur", "noise", "cut-out", "jpeg", "small", "rotated")
