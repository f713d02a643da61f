"""Ranks and recall against brute force: sorted lists, loops, ties and the reference's removal included."""

import random
import subprocess
import sys

import pytest
import torch
from helpers.runner import ROOT
from helpers.small_models import CAPTIONS, VOCABULARY, random_images, small_config

import sprc.scoring.ranking
import sprc.scoring.recall
from sprc.data.split import Split, Triplet
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.tokenizer import WordPiece
from sprc.scoring.benchmarks import CIRR
from sprc.scoring.encoding import EncodedSplit, encode_split
from sprc.scoring.ranking import (
    QUERY_BLOCK,
    Ranking,
    rank,
    recall,
    score_blocks,
    subset_order,
    subset_ranks,
    target_ranks,
    top_k,
)
from sprc.scoring.recall import image_score_blocks, rank_modalities
from sprc.scoring.screening import screened_blocks


@pytest.fixture(params=[(128, 128), (7, 3), (1, 1)], ids=str)
def small_blocks(request, monkeypatch):
    """The blocks as they are, and so small that everything crosses their borders."""
    queries, images = request.param
    for module in (sprc.scoring.ranking, sprc.scoring.recall):
        monkeypatch.setattr(module, "QUERY_BLOCK", queries)
    monkeypatch.setattr(sprc.scoring.ranking, "GALLERY_CHUNK", {"cpu": images})


def all_scores(queries, gallery):
    """(T, G), put together from the blocks."""
    rows = {}
    for numbers, block in score_blocks(queries, gallery):
        rows |= dict(zip(numbers.tolist(), block, strict=True))
    return torch.stack([rows[number] for number in range(len(queries))])


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


def test_top_k_equals_the_sorted_gallery_where_nearly_all_scores_are_equal():
    for seed in range(5):
        scores, references, _, _ = random_case(seed, gallery=30, levels=2)
        for k in (1, 2, 9, 29):
            best = top_k(torch.tensor(scores), k, torch.tensor(references))
            expected = [
                brute_force_order(row, reference)[:k]
                for row, reference in zip(scores, references, strict=True)
            ]
            assert best.tolist() == expected


@pytest.mark.parametrize("k", [0, 1, 4, 5, 9])
def test_top_k_takes_any_k_and_may_keep_the_reference(k):
    rows = [row[:5] for row in random_case(21, levels=2)[0]]
    assert top_k(torch.tensor(rows), k).tolist() == [brute_force_order(row)[:k] for row in rows]


def test_a_gallery_of_the_reference_alone_has_no_candidates():
    assert top_k(torch.ones(2, 1), 5, torch.zeros(2, dtype=torch.int64)).tolist() == [[], []]


def late_interaction(query, tokens):
    """The largest of the products with an image's tokens, number by number."""
    return max(sum(a * b for a, b in zip(query, token, strict=True)) for token in tokens)


def vectors(seed, *shape):
    """Of small whole numbers over 8: sums are exact in any order, and ties are many."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float() / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_similarity_is_the_maximum_over_the_tokens(small_blocks, dtype):
    queries, gallery = vectors(0, QUERY_BLOCK + 3, 4), vectors(1, 5, 3, 4)
    scores = all_scores(queries, gallery.to(dtype))
    assert scores.dtype == torch.float32
    expected = [[late_interaction(q, image) for image in gallery.tolist()] for q in queries.tolist()]
    assert scores.tolist() == expected


def test_a_float16_gallery_is_rounded_once_and_its_scores_are_not(small_blocks):
    generator = torch.Generator().manual_seed(8)
    queries = torch.randn(9, 16, generator=generator)
    gallery = torch.randn(11, 3, 16, generator=generator).half()
    scores = all_scores(queries, gallery)
    expected = [[late_interaction(q, image) for image in gallery.tolist()] for q in queries.tolist()]
    # float16 has steps of 2e-3 and more at these values, which are up to 10
    assert torch.allclose(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_ranking_in_blocks_equals_brute_force(small_blocks):
    queries, gallery = vectors(2, 23, 4), vectors(3, 17, 3, 4)
    rng = random.Random(0)
    sets = [rng.sample(range(17), 6) for _ in range(23)]
    references, targets = [group[1] for group in sets], [group[3] for group in sets]
    orders = []
    for query, reference in zip(queries.tolist(), references, strict=True):
        orders.append(
            brute_force_order([late_interaction(query, image) for image in gallery.tolist()], reference)
        )
    in_set = [[i for i in order if i in group] for order, group in zip(orders, sets, strict=True)]
    ranking = rank(
        score_blocks(queries, gallery),
        targets=torch.tensor(targets),
        references=torch.tensor(references),
        members=torch.tensor(sets),
        k=5,
    )
    assert ranking.ranks.tolist() == [order.index(t) for order, t in zip(orders, targets, strict=True)]
    assert ranking.set_ranks.tolist() == [order.index(t) for order, t in zip(in_set, targets, strict=True)]
    assert ranking.top.tolist() == [order[:5] for order in orders]
    assert ranking.set_order.tolist() == [[*o, r] for o, r in zip(in_set, references, strict=True)]


def test_secret_targets_and_plain_galleries_leave_out_what_they_cannot_have(small_blocks):
    queries, gallery, members = vectors(4, 9, 4), vectors(5, 8, 3, 4), torch.arange(8).repeat(9, 1)
    references, targets = torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.int64)
    blocks = list(score_blocks(queries, gallery))
    secret = rank(blocks, targets=None, references=references, members=members, k=2)
    assert secret.ranks is None
    assert secret.set_ranks is None
    assert secret.top.shape == (9, 2)
    plain = rank(blocks, targets=targets, references=None, members=None)
    assert plain.set_ranks is plain.set_order is plain.top is None
    expected = [
        brute_force_order([late_interaction(q, image) for image in gallery.tolist()]).index(1)
        for q in queries.tolist()
    ]
    assert plain.ranks.tolist() == expected


def test_the_image_alone_is_ranked_by_the_mean_over_its_tokens(small_blocks):
    gallery, references = vectors(6, 7, 3, 4), torch.tensor([4, 0, 4, 6, 1, 4, 0])
    encoded = EncodedSplit(gallery, gallery[:, 0], gallery[:, 0], references, None, torch.empty(7, 0))
    rows = {}
    for numbers, block in image_score_blocks(encoded):
        rows |= dict(zip(numbers.tolist(), block.tolist(), strict=True))
    for number, reference in enumerate(references.tolist()):
        tokens = gallery[reference].tolist()
        expected = [sum(late_interaction(token, image) for token in tokens) / 3 for image in gallery.tolist()]
        assert rows[number] == pytest.approx(expected, abs=1e-7)


def test_the_table_of_modalities_scores_each_of_them_once(monkeypatch):
    passes = []

    def counted(queries, *rest):
        passes.append(queries)
        return screened_blocks(queries, *rest)

    monkeypatch.setattr(sprc.scoring.recall, "screened_blocks", counted)
    gallery, composed, text_only = vectors(9, 4, 3, 4), vectors(10, 2, 4), vectors(11, 2, 4)
    index = torch.tensor([0, 1])
    encoded = EncodedSplit(gallery, composed, text_only, index, index + 1, torch.arange(4).repeat(2, 1))
    rankings = rank_modalities(Split("val", [], {}), encoded)
    assert list(rankings) == ["reference and text", "text only", "image only"]
    assert [id(queries) for queries in passes] == [id(composed), id(text_only)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_image_of_many_triplets_is_encoded_once(dtype, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Blip2QformerCirAlignPrompt(small_config(), WordPiece(VOCABULARY))
    images = dict(zip("abcd", random_images(4, model.config), strict=True))
    paths = {name: tmp_path / name for name in images}
    pairs = [("a", "b"), ("a", "c"), ("b", "a"), ("a", "d"), ("d", "b"), ("a", "b")]
    triplets = [Triplet(n, *pair, CAPTIONS[n // 2], tuple("abcd")) for n, pair in enumerate(pairs)]
    encoded_images, encode_image = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda x: encoded_images.extend(x) or encode_image(x))
    split = Split("val", triplets, paths)
    settings = {"batch_size": 3, "num_workers": 0, "gallery_dtype": dtype}
    encoded = encode_split(model, split, lambda path: images[path.name], **settings)
    assert torch.equal(torch.stack(encoded_images), torch.stack(list(images.values())))
    assert encoded.gallery.dtype == getattr(torch, dtype)
    assert encoded.references.tolist() == [0, 0, 1, 0, 3, 0]
    # The same caption of the same image is the same query, whatever comes between.
    for number, (reference, _) in enumerate(pairs):
        alone = Split("val", [Triplet(9, reference, "b", CAPTIONS[number // 2], tuple("abcd"))], paths)
        other = encode_split(model, alone, lambda path: images[path.name], **settings)
        assert torch.allclose(encoded.composed[number], other.composed[0], atol=1e-5)


MEMORY = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from sprc.scoring.ranking import rank, score_blocks
torch.set_num_threads(1)
queries, gallery = torch.randn(int(sys.argv[2]), 64), torch.randn(3000, 8, 64)
index = torch.zeros(len(queries), dtype=torch.int64)
rank(score_blocks(queries, gallery), targets=index, references=index + 1, members=index[:, None], k=50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_queries():
    def peak(queries):
        command = [sys.executable, "-c", MEMORY, str(ROOT / "src"), str(queries)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # A (queries x gallery) matrix of the larger would be 240 MB; the queries and their top 50 are 13 MB.
    assert peak(20_000) - peak(500) < 120_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_similarity_that_is_not_finite_is_an_error_and_not_a_perfect_rank(value):
    gallery = torch.ones(3, 2, 4)
    gallery[1, 0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        list(score_blocks(torch.ones(2, 4), gallery))


def test_recall_counts_targets_among_the_first_k_in_percent():
    ranks = torch.tensor([0, 1, 4, 5, 9, 10, 49, 50])
    for k in (1, 5, 10, 50):
        assert recall(ranks, k) == pytest.approx(100 * sum(r < k for r in ranks.tolist()) / 8)


def test_cirr_metrics_have_the_published_names_order_and_means():
    ranks, set_ranks = torch.tensor([0, 3, 7, 60]), torch.tensor([0, 0, 1, 2])
    metrics = CIRR.metrics_of({"": Ranking(ranks, set_ranks)})
    seven = [50.0, 75.0, 100.0, 25.0, 50.0, 75.0, 75.0]
    assert list(metrics) == [
        *("group_recall_at1", "group_recall_at2", "group_recall_at3"),
        *("recall_at1", "recall_at5", "recall_at10", "recall_at50"),
        *("mean(R@5+R_s@1)", "arithmetic_mean", "harmonic_mean", "geometric_mean"),
    ]
    product = 1.0
    for value in seven:
        product *= value
    expected = [*seven, 50.0, sum(seven) / 7, 7 / sum(1 / value for value in seven), product ** (1 / 7)]
    assert list(metrics.values()) == pytest.approx(expected)


def test_the_means_are_zero_where_a_recall_is():
    metrics = CIRR.metrics_of({"": Ranking(torch.tensor([3]), torch.tensor([0]))})
    assert metrics["recall_at1"] == metrics["harmonic_mean"] == metrics["geometric_mean"] == 0.0
