"""Ranks from screened products against float64, where candidates lie nearer than the products can tell."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sprc.scoring.screening as screening
from sprc.data.split import Split
from sprc.scoring.encoding import EncodedSplit
from sprc.scoring.ranking import rank, score_blocks
from sprc.scoring.recall import rank_modalities, rank_split
from sprc.scoring.screening import ErrorBound, screened_blocks

HERE = screening.product_type()
IN_HALF = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(HERE is torch.float32, reason="no instructions for bfloat16")
)


@pytest.fixture(params=[torch.float32, IN_HALF], ids=str)
def dtype(request, monkeypatch):
    """The products' type; blocks are so small that everything crosses their borders."""
    monkeypatch.setattr(screening, "product_type", lambda: request.param)
    monkeypatch.setattr(screening, "QUERY_BLOCK", 11)
    monkeypatch.setattr(screening, "GALLERY_CHUNK", 70)
    return request.param


def crowded_case(gallery_dtype=torch.float32, queries=40, images=300, tokens=3, width=64):
    """Queries whose target has near and equal neighbours: 1e-2 to 1e-7 of it away, and twins."""
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(images, tokens, width, generator=generator), dim=-1)
    targets = torch.arange(queries)
    for number in range(queries):
        near = torch.randint(queries, images, (3,), generator=generator)
        steps = 10.0 ** -torch.randint(2, 8, (3, 1, 1), generator=generator)
        noise = torch.randn(3, tokens, width, generator=generator)
        gallery[near] = gallery[number] + steps * noise
    gallery[-queries:] = gallery[:queries].flip(0)
    noise = 0.3 * torch.randn(queries, width, generator=generator)
    composed = F.normalize(gallery[targets, 1] + noise, dim=-1)
    # Of two twins the one behind is the target in every other query, so that ties count too.
    targets = torch.where(targets % 2 == 0, targets, images - 1 - targets)
    members = torch.stack([torch.randperm(images, generator=generator)[:6] for _ in range(queries)])
    members[:, 1] = targets
    return EncodedSplit(
        gallery.to(gallery_dtype), composed, composed.flip(0), members[:, 0], targets, members
    )


def exact_order(encoded, queries, number, among):
    """The gallery indices of ``among`` without the reference, best first: float64, rounded to float32."""
    products = encoded.gallery.double().numpy() @ queries[number].double().numpy()
    scores = products.max(axis=1).astype(np.float32)
    kept = [index for index in among if index != encoded.references[number]]
    return sorted(kept, key=lambda index: (-scores[index], index))


def assert_exact(ranking, encoded, queries):
    for number, target in enumerate(encoded.targets.tolist()):
        gallery = range(len(encoded.gallery))
        assert ranking.ranks[number] == exact_order(encoded, queries, number, gallery).index(target)
        members = encoded.members[number].tolist()
        assert ranking.set_ranks[number] == exact_order(encoded, queries, number, members).index(target)


@pytest.mark.parametrize("gallery_dtype", [torch.float32, torch.float16])
def test_ranks_are_those_of_exact_similarities(dtype, gallery_dtype):
    encoded = crowded_case(gallery_dtype)
    split = Split("val", [], {})
    assert_exact(rank_split(split, encoded), encoded, encoded.composed)
    by = rank_modalities(split, encoded)
    assert_exact(by["reference and text"], encoded, encoded.composed)
    assert_exact(by["text only"], encoded, encoded.text_only)


def test_products_in_half_precision_alone_would_rank_otherwise(dtype):
    """The case is one that the screening is needed for."""
    if dtype == torch.float32:
        return
    encoded = crowded_case()
    products = encoded.gallery.bfloat16() @ encoded.composed.bfloat16().T
    scores = products.amax(dim=1).T.float()
    given = {"references": encoded.references, "members": None}
    plain = rank([(torch.arange(40), scores)], targets=encoded.targets, **given)
    assert (plain.ranks != rank_split(Split("val", [], {}), encoded).ranks).sum() > 10


@pytest.mark.parametrize("already_rounded", ["neither", "queries", "gallery", "both"])
def test_no_product_is_farther_from_its_score_than_the_bound(dtype, already_rounded):
    generator = torch.Generator().manual_seed(1)
    # Of all lengths: nothing here rests on normalised features.
    gallery = torch.randn(200, 4, 48, generator=generator) * torch.rand(200, 1, 1, generator=generator)
    queries = 3 * torch.randn(50, 48, generator=generator)
    if already_rounded in ("gallery", "both"):
        gallery = gallery.to(dtype).float()
    if already_rounded in ("queries", "both"):
        queries = queries.to(dtype).float()
    products = (gallery.to(dtype).flatten(0, 1) @ queries.to(dtype).T).double()
    exact = gallery.flatten(0, 1).double() @ queries.double().T
    error = ErrorBound.of(gallery, dtype)
    margins = torch.stack([error.around(queries, scores) for scores in exact.float()])
    assert ((products - exact).abs() <= margins).all()
    # A bound far too large would score most candidates again.
    assert (products - exact).abs().max() > margins.max() / (20 if dtype == torch.bfloat16 else 1000)


def test_a_gallery_of_images_that_look_alike_is_scored_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(screening, "MOST_IN_DOUBT", 60)
    gallery = torch.full((90, 2, 16), 0.25)
    queries, targets = torch.full((30, 16), 0.25), torch.arange(30) * 3
    again = []
    scored = screening.exact
    monkeypatch.setattr(screening, "exact", lambda *given: again.append(given) or scored(*given))
    blocks = list(screened_blocks(queries, gallery, targets))
    assert again == []
    ranking = rank(blocks, targets=targets, references=None, members=None)
    assert ranking.ranks.tolist() == targets.tolist()  # all are equal, so that the index decides


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 2])  # the target, and another
def test_a_similarity_that_is_not_finite_is_an_error(dtype, value, place):
    gallery = torch.eye(4).repeat(20, 1)[:, None]
    gallery[place, 0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        list(screened_blocks(torch.ones(2, 4), gallery, torch.zeros(2, dtype=torch.int64)))


def test_the_order_of_the_first_candidates_is_that_of_plain_scores():
    encoded = crowded_case()
    ranking = rank_split(Split("val", [], {}), encoded, k=7)
    plain = rank(
        score_blocks(encoded.composed, encoded.gallery),
        targets=encoded.targets,
        references=encoded.references,
        members=encoded.members,
        k=7,
    )
    assert ranking.top.equal(plain.top)
    assert ranking.set_order.equal(plain.set_order)
