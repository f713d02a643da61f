"""What an ablation can see: the least difference that its seeds tell from none, and the seeds that one needs.

Of a paired t test over seeds, two-sided at 5 %, with a power of 80 %: seed for seed, a variant's headline
metric less off's. The queries are taken as given; how much they add, the bootstrap interval shows. With n
seeds whose differences have the standard deviation s, the least difference is z s / sqrt(n - c), by
Guenther's approximation of the t distribution (1981, The American Statistician 35(4)); z = 1.960 + 0.842, c
= 1.960^2 / 2.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, stdev

TEST = NormalDist().inv_cdf(0.975)
Z = TEST + NormalDist().inv_cdf(0.8)
CORRECTION = TEST**2 / 2
EFFECT = 2.0  # points: what the ablation on the built-in data is made to see


def spread(differences: Sequence[float]) -> float | None:
    """Their standard deviation; None of a single seed."""
    return stdev(differences) if len(differences) > 1 else None


def least_seen(differences: Sequence[float]) -> float | None:
    """The least difference that as many seeds with this spread would see; None of two or fewer."""
    effective = len(differences) - CORRECTION
    return Z * stdev(differences) / math.sqrt(effective) if effective > 0 and len(differences) > 2 else None


def seeds_needed(differences: Sequence[float], effect: float = EFFECT) -> int | None:
    """How many seeds with this spread would see ``effect``, in points; None of a single seed."""
    if len(differences) < 2:
        return None
    return math.ceil((Z * stdev(differences) / effect) ** 2 + CORRECTION)
