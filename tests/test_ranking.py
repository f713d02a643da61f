"""Ranks and recall against brute force: sorted lists, loops, ties and the reference's removal included."""

import random

import pytest
import torch

from sprc.ranking import (
    BLOCK,
    cirr_metrics,
    recall,
    similarities,
    subset_order,
    subset_ranks,
    target_ranks,
    top_k,
)


def brute_force_order(scores, reference=None):
    """Gallery indices, best first, equal scores by index, without the reference."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return [index for index in order if index != reference]


def random_case(seed, queries=40, gallery=15, levels=4):
    """Scores of few distinct values, so that ties are everywhere."""
    rng = random.Random(seed)
    scores = [[rng.randrange(levels) / levels for _ in range(gallery)] for _ in range(queries)]
    references, targets, members = [], [], []
    for _ in range(queries):
        chosen = rng.sample(range(gallery), 6)
        members.append(chosen)
        references.append(chosen[2])
        targets.append(chosen[4])
    return scores, references, targets, members


@pytest.mark.parametrize("seed", range(5))
def test_target_rank_is_its_place_in_the_sorted_gallery_without_the_reference(seed):
    scores, references, targets, _ = random_case(seed)
    expected = [
        brute_force_order(row, reference).index(target)
        for row, reference, target in zip(scores, references, targets, strict=True)
    ]
    ranks = target_ranks(torch.tensor(scores), torch.tensor(targets), torch.tensor(references))
    assert ranks.tolist() == expected


def test_target_rank_keeps_the_reference_where_the_benchmark_does():
    scores, _, targets, _ = random_case(7)
    expected = [brute_force_order(row).index(target) for row, target in zip(scores, targets, strict=True)]
    assert target_ranks(torch.tensor(scores), torch.tensor(targets)).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_subset_rank_is_the_place_among_the_members_without_the_reference(seed):
    scores, references, targets, members = random_case(seed)
    expected = []
    for row, reference, target, group in zip(scores, references, targets, members, strict=True):
        order = [index for index in brute_force_order(row, reference) if index in group]
        expected.append(order.index(target))
    ranks = subset_ranks(
        torch.tensor(scores), torch.tensor(targets), torch.tensor(references), torch.tensor(members)
    )
    assert ranks.tolist() == expected


def test_a_set_filled_up_with_its_reference_ranks_the_same():
    scores, references, targets, members = random_case(3)
    arguments = torch.tensor(scores), torch.tensor(targets), torch.tensor(references)
    filled = [[*group, reference, reference] for group, reference in zip(members, references, strict=True)]
    assert torch.equal(
        subset_ranks(*arguments, torch.tensor(members)), subset_ranks(*arguments, torch.tensor(filled))
    )


def test_top_k_is_the_head_of_the_sorted_gallery():
    scores, references, _, _ = random_case(11)
    expected = [
        brute_force_order(row, reference)[:5] for row, reference in zip(scores, references, strict=True)
    ]
    assert top_k(torch.tensor(scores), 5, torch.tensor(references)).tolist() == expected


def test_top_k_of_a_small_gallery_is_all_of_it_but_the_reference():
    scores, references, _, _ = random_case(12)
    best = top_k(torch.tensor(scores), 50, torch.tensor(references))
    expected = [brute_force_order(row, reference) for row, reference in zip(scores, references, strict=True)]
    assert best.tolist() == expected


def test_subset_order_is_the_sorted_set_with_the_reference_last():
    scores, references, _, members = random_case(13)
    order = subset_order(torch.tensor(scores), torch.tensor(references), torch.tensor(members))
    for row, reference, group, got in zip(scores, references, members, order.tolist(), strict=True):
        expected = [index for index in brute_force_order(row, reference) if index in group]
        assert got == [*expected, reference]


def test_similarity_is_the_maximum_over_the_tokens_in_more_than_one_block():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(BLOCK + 3, 4, generator=generator, dtype=torch.float64)
    gallery = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    scores = similarities(queries, gallery)
    assert scores.shape == (BLOCK + 3, 5)
    for i in range(BLOCK + 3):
        for j in range(5):
            best = max(
                sum(queries[i, c].item() * gallery[j, q, c].item() for c in range(4)) for q in range(3)
            )
            assert scores[i, j].item() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_similarity_that_is_not_finite_is_an_error_and_not_a_perfect_rank(value):
    gallery = torch.ones(3, 2, 4)
    gallery[1, 0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        similarities(torch.ones(2, 4), gallery)


def test_recall_counts_targets_among_the_first_k_in_percent():
    ranks = torch.tensor([0, 1, 4, 5, 9, 10, 49, 50])
    for k in (1, 5, 10, 50):
        assert recall(ranks, k) == pytest.approx(100 * sum(r < k for r in ranks.tolist()) / 8)


def test_cirr_metrics_have_the_published_names_order_and_means():
    ranks, set_ranks = torch.tensor([0, 3, 7, 60]), torch.tensor([0, 0, 1, 2])
    metrics = cirr_metrics(ranks, set_ranks)
    seven = [25.0, 50.0, 75.0, 75.0, 50.0, 75.0, 100.0]
    assert list(metrics) == [
        *("recall_at1", "recall_at5", "recall_at10", "recall_at50"),
        *("group_recall_at1", "group_recall_at2", "group_recall_at3"),
        *("mean(R@5+R_s@1)", "arithmetic_mean", "harmonic_mean", "geometric_mean"),
    ]
    product = 1.0
    for value in seven:
        product *= value
    expected = [*seven, 50.0, sum(seven) / 7, 7 / sum(1 / value for value in seven), product ** (1 / 7)]
    assert list(metrics.values()) == pytest.approx(expected)


def test_the_means_are_zero_where_a_recall_is():
    metrics = cirr_metrics(torch.tensor([3]), torch.tensor([0]))
    assert metrics["recall_at1"] == metrics["harmonic_mean"] == metrics["geometric_mean"] == 0.0
