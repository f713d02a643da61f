"""The power of an ablation, against t tests of drawn seeds."""

import numpy as np
import pytest

from sprc.ablation.power import least_seen, seeds_needed, spread

T_975 = {3: 4.3027, 5: 2.7764, 8: 2.3646, 12: 2.2010}  # of n - 1 degrees of freedom, from a table


def share_found(effect: float, deviation: float, seeds: int) -> float:
    """How many of 40,000 paired t tests find a difference of ``effect``."""
    drawn = np.random.default_rng(0).normal(effect, deviation, (40_000, seeds))
    t = drawn.mean(axis=1) / (drawn.std(axis=1, ddof=1) / np.sqrt(seeds))
    return float((np.abs(t) > T_975[seeds]).mean())


def with_spread(deviation: float, count: int) -> list[float]:
    values = np.random.default_rng(1).normal(size=count)
    return list(7 + deviation * (values - values.mean()) / values.std(ddof=1))


@pytest.mark.parametrize("seeds", [5, 8, 12])
def test_the_least_difference_is_found_by_four_of_five_t_tests(seeds):
    differences = with_spread(3.0, seeds)
    assert spread(differences) == pytest.approx(3.0)
    # The approximation is a few points off where there are few seeds.
    assert share_found(least_seen(differences), 3.0, seeds) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(("deviation", "seeds"), [(1.2, 5), (1.7, 8), (2.2, 12)])
def test_as_many_seeds_as_needed_find_two_points(deviation, seeds):
    assert seeds_needed(with_spread(deviation, 6)) == seeds
    assert share_found(2.0, deviation, seeds) > 0.76
    assert share_found(2.0, deviation, {5: 3, 8: 5, 12: 8}[seeds]) < 0.7


def test_too_few_seeds_say_nothing():
    assert spread([1.0]) is least_seen([1.0]) is seeds_needed([1.0]) is None
    assert least_seen([1.0, 2.0]) is None
    assert least_seen([]) is None
