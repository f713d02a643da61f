"""A split of seven images and eight queries."""

from helpers.small_models import CAPTIONS

from sprc.data.split import Triplet

NAMES = [f"image{number}" for number in range(7)]
# One reference several times, in several blocks; captions that differ in length.
REFERENCES = [3, 0, 3, 5, 3, 1, 3, 3]
TRIPLETS = [
    Triplet(number, NAMES[reference], NAMES[6], CAPTIONS[number % 3], (NAMES[reference], NAMES[6], NAMES[2]))
    for number, reference in enumerate(REFERENCES)
]
