"""A bootstrap of paired differences: what a mean over queries, and over seeds, may be by chance."""

from statistics import fmean
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Difference(NamedTuple):
    """A mean paired difference in percentage points, its bootstrap interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    differences: np.ndarray,
    strata: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Bootstrap a mean paired difference over seeds and queries, both taken as drawn at random.

    With d[s, q] the score of query q under one variant minus that under another, both of seed s, the
    statistic is the mean of d over seeds and queries: over a stratum's queries first, then over the strata. A
    resample draws S seeds and, within each stratum, as many queries as it has, with replacement and
    independently of each other; every drawn seed meets every drawn query (the pigeonhole bootstrap, Owen
    2007, The Annals of Applied Statistics 1(2)). The interval is between percentiles. p is twice the smaller
    share of resamples on either side of zero, those at zero on both, with one added to share and total. With
    few seeds their spread is known badly: read the interval as a lower limit of the uncertainty.

    Args:
        differences: d, (S, Q).
        strata: (Q,) from 0: FashionIQ's types; all 0 where a benchmark has one gallery.
        resamples: how many.
        level: of the interval.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    num_seeds, num_queries = differences.shape
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    means = np.empty(resamples)
    block = max(1, 2_000_000 // num_queries)  # bounds the memory
    for begin in range(0, resamples, block):
        count = min(block, resamples - begin)
        seed_counts = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count)
        over_seeds = seed_counts @ differences / num_seeds  # (count, Q)
        total = np.zeros(count)
        for group in groups:
            counts = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=count)
            total += (over_seeds[:, group] * counts).sum(axis=1) / len(group)
        means[begin : begin + count] = total / len(groups)
    observed = fmean(differences[:, group].mean() for group in groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # Sums in another order may miss zero by a rounding error.
    near = 1e-9
    sides = [(means <= near).sum(), (means >= -near).sum()]
    p = min(1.0, 2 * (1 + min(sides)) / (1 + resamples))
    return Difference(float(observed), float(low), float(high), float(p))
