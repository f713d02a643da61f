"""The second stage's order: against a loop over all pairs, and where it must not change the first's."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.reranking import IMAGES, Pixels, make_first_stage, make_reranker, make_split
from torch.nn import functional as F

from sprc.data.split import Split, Triplet
from sprc.scoring.encoding import EncodedSplit, encode_split
from sprc.scoring.ranking import score_blocks
from sprc.scoring.recall import rank_split
from sprc.scoring.reranking import Matches, Stages, match_split, pairs_to_look_at, rank_again

TEMP = 0.07
WEIGHTS = [0.0, 0.3, 0.5, 1.0]


def best_first(rows, score):
    """Gallery indices by their scores, the lower index first of equal ones."""
    return sorted(rows, key=lambda row: (-score[row], row))


def similarities(encoded):
    """(T, G), in blocks as ranking makes them: ties depend on the last bit."""
    return torch.cat([scores for _, scores in score_blocks(encoded.composed, encoded.gallery)])


def in_order(encoded, score, top, *, ranks_reference=False):
    """Each query's gallery: its ``top`` first candidates by ``score``, a (T, G) list, then the first stage's.

    And its set by the score, what is no candidate at the end.
    """
    galleries, sets = [], []
    for number, own in enumerate(similarities(encoded).tolist()):
        reference = encoded.references[number].item()
        candidates = [row for row in range(len(own)) if ranks_reference or row != reference]
        first = best_first(candidates, own)
        galleries.append(best_first(first[:top], score[number]) + first[top:])
        members = encoded.members[number].tolist()
        known = [row for row in members if row != reference]
        sets.append(best_first(known, score[number]) + [reference] * (len(members) - len(known)))
    return galleries, sets


def assert_is(ranking, encoded, galleries, sets, k):
    targets = encoded.targets.tolist()
    assert ranking.ranks.tolist() == [row.index(t) for row, t in zip(galleries, targets, strict=True)]
    assert ranking.top.tolist() == [row[:k] for row in galleries]
    if encoded.members.shape[1]:
        assert ranking.set_order.tolist() == sets
        assert ranking.set_ranks.tolist() == [row.index(t) for row, t in zip(sets, targets, strict=True)]
    else:
        assert ranking.set_ranks is None
        assert ranking.set_order is None


def make_encoded(queries=150, images=40, seed=0, with_sets=True):
    """Two blocks of queries; every fourth image is there twice, so that there are ties. Sets of 3 to 5."""
    generator = torch.Generator().manual_seed(seed)
    gallery = F.normalize(torch.randn(images, 2, 6, generator=generator), dim=-1)
    gallery[1::4] = gallery[::4]
    rows = torch.stack([torch.randperm(images, generator=generator) for _ in range(queries)])
    members = rows[:, [1, 3, 0, 4, 2]]  # the target first, the reference in the middle
    members[::3, 3] = rows[::3, 0]
    members[::6, 4] = rows[::6, 0]  # filled up with the reference
    return EncodedSplit(
        gallery=gallery,
        composed=F.normalize(torch.randn(queries, 6, generator=generator), dim=-1),
        text_only=torch.zeros(queries, 6),
        references=rows[:, 0],
        targets=rows[:, 1],
        members=members if with_sets else torch.empty(queries, 0, dtype=torch.int64),
    )


def split_of(encoded, ranks_reference=False):
    """A split of the same images; nothing but its kind is looked at."""
    paths = {str(number): Path(str(number)) for number in range(len(encoded.gallery))}
    return Split("val", [], paths, ranks_reference=ranks_reference)


def looked_at(encoded, score, top, ranks_reference=False):
    """What a model that gives the (T, G) scores would have said."""
    first = rank_split(split_of(encoded, ranks_reference), encoded, k=top).top
    pairs = pairs_to_look_at(first, encoded, score.shape[1])
    return Matches(first, pairs, score.flatten()[pairs])


def fields_of(ranking):
    return {name: value for name, value in ranking._asdict().items() if value is not None}


def assert_same(ranking, other):
    mine, theirs = fields_of(ranking), fields_of(other)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", ["cirr", "fashioniq", "circo"])
@pytest.mark.parametrize("top", [1, 7, 100])
def test_a_re_ranker_that_says_what_the_first_stage_says_changes_nothing(kind, top, weight):
    encoded = make_encoded(with_sets=kind == "cirr")
    if kind == "circo":
        others = encoded.targets[:, None] + torch.tensor([1, 2]) - len(encoded.gallery)
        encoded = dataclasses.replace(encoded, also_targets=others.where(others >= 0, -1))
    split = split_of(encoded, ranks_reference=kind != "cirr")
    matches = looked_at(encoded, similarities(encoded), top, split.ranks_reference)
    mine = rank_again(split, encoded, matches, temp=TEMP, weight=weight, k=20)
    assert_same(mine, rank_split(split, encoded, k=20))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_scores_that_differ_in_their_last_bit_keep_their_order(weight):
    """Divided by the temperature in single precision some of them would be equal."""
    steps = torch.arange(60, 0, -1, dtype=torch.int32)
    near = (torch.tensor([0.98]).view(torch.int32) + steps).view(torch.float32).flip(0)
    assert len((near / TEMP).unique()) < len(near.unique()) == 60
    encoded = EncodedSplit(
        gallery=near[:, None, None],
        composed=torch.ones(1, 1),
        text_only=torch.ones(1, 1),
        references=torch.tensor([0]),
        targets=torch.tensor([30]),
        members=torch.tensor([[20, 21, 22, 23, 30, 0]]),
    )
    split = split_of(encoded)
    plain = rank_split(split, encoded, k=60)
    assert plain.top[0].tolist() == list(range(59, 0, -1))
    matches = looked_at(encoded, similarities(encoded), 50)
    assert_same(rank_again(split, encoded, matches, temp=TEMP, weight=weight, k=60), plain)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", ["cirr", "fashioniq"])
@pytest.mark.parametrize("top", [1, 7, 39, 100])
def test_the_order_is_that_of_its_plain_statement(kind, top, weight):
    """Scores from a few values, so that there are ties; sets whose members are outside the top."""
    encoded = make_encoded(with_sets=kind == "cirr")
    split = split_of(encoded, ranks_reference=kind == "fashioniq")
    generator = torch.Generator().manual_seed(3)
    score = torch.randint(-4, 4, (150, 40), generator=generator) * 0.5
    matches = looked_at(encoded, score, top, split.ranks_reference)
    own = similarities(encoded).double() / TEMP
    both = (weight * score.double() + (1 - weight) * own).tolist()
    ranking = rank_again(split, encoded, matches, temp=TEMP, weight=weight, k=20)
    ordered = in_order(encoded, both, top, ranks_reference=split.ranks_reference)
    assert_is(ranking, encoded, *ordered, 20)


def test_of_equal_scores_the_lower_gallery_index_comes_first():
    encoded = make_encoded()
    matches = looked_at(encoded, torch.zeros(150, 40), 7)
    ranking = rank_again(split_of(encoded), encoded, matches, temp=TEMP, k=7)
    plain = rank_split(split_of(encoded), encoded, k=7)
    assert torch.equal(ranking.top, plain.top.sort(dim=1).values)
    assert not torch.equal(ranking.top, plain.top)


def test_what_is_looked_at_is_the_top_and_the_set_without_its_reference():
    encoded = make_encoded()
    top = rank_split(split_of(encoded), encoded, k=7).top
    pairs = pairs_to_look_at(top, encoded, 40).tolist()
    assert pairs == sorted(set(pairs))
    for number in range(150):
        reference = encoded.references[number].item()
        wanted = {*top[number].tolist(), *encoded.members[number].tolist()} - {reference}
        assert {pair - 40 * number for pair in pairs if pair // 40 == number} == wanted


def test_without_targets_there_is_an_order_and_no_rank():
    encoded = make_encoded()
    score = torch.rand(150, 40, generator=torch.Generator().manual_seed(4))
    matches = looked_at(encoded, score, 7)
    secret = dataclasses.replace(encoded, targets=None)
    ranking = rank_again(split_of(encoded), secret, matches, temp=TEMP, k=50)
    assert ranking.ranks is None
    assert ranking.set_ranks is None
    galleries, sets = in_order(encoded, score.tolist(), 7)
    assert ranking.top.tolist() == galleries  # 39 of them
    assert ranking.set_order.tolist() == sets


# --- with models

LOOK = {"batch_size": 4, "num_workers": 0}


@pytest.fixture(scope="module", params=["cirr", "fashioniq"])
def scene(request):
    """Split, its encoding, a re-ranker, what reads images, and each pair's score by itself, (T, G)."""
    first = make_first_stage()
    split, load = make_split(ranks_reference=request.param == "fashioniq"), Pixels(first.config)
    encoded = encode_split(first, split, load, with_prompts=True, **LOOK)
    model = make_reranker(first)
    alone = []
    for number, triplet in enumerate(split.triplets):
        prompts = encoded.prompts[number][None]
        row = []
        for name in IMAGES:
            one = {"prompts": prompts, "text_input": [triplet.caption]}
            with torch.no_grad():
                found = model.embed({**one, "candidates": load.images[name][None, None]})
            row.append(found["scores"].item())
        alone.append(row)
    return split, encoded, model, load, alone


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("top", [2, 99])
def test_the_result_is_that_of_a_loop_over_all_pairs(scene, top, batch_size):
    split, encoded, model, load, alone = scene
    matches = match_split(model, split, encoded, load, top=top, batch_size=batch_size, num_workers=0)
    assert matches.top.shape == (10, 2 if top == 2 else 10 + split.ranks_reference)
    one_by_one = torch.tensor(alone).flatten()[matches.pairs]
    torch.testing.assert_close(matches.scores, one_by_one, rtol=1e-4, atol=1e-4)
    assert one_by_one.std() > 0.1
    for weight in (1.0, 0.5):
        both = weight * torch.tensor(alone) + (1 - weight) * similarities(encoded) / 0.3
        ordered = in_order(encoded, both.tolist(), top, ranks_reference=split.ranks_reference)
        ranking = rank_again(split, encoded, matches, temp=0.3, weight=weight, k=11)
        assert_is(ranking, encoded, *ordered, 11)


def test_members_outside_the_top_are_looked_at(scene):
    split, encoded, model, load, _ = scene
    if split.ranks_reference:
        assert encoded.members.shape[1] == 0
        return
    top = rank_split(split, encoded, k=1).top
    outside = sum(
        len(set(m.tolist()) - {r.item(), *t.tolist()})
        for m, r, t in zip(encoded.members, encoded.references, top, strict=True)
    )
    assert outside > 10
    assert (encoded.members == encoded.references[:, None]).sum(dim=1).max() == 2  # one is filled up
    matches = match_split(model, split, encoded, load, top=1, **LOOK)
    assert len(matches.pairs) == 10 + outside


def test_each_image_that_is_needed_is_read_once_and_the_model_s_mode_is_put_back(scene):
    split, encoded, model, _, _ = scene
    load, batches = Pixels(model.config), []
    model.train()
    matches = match_split(model, split, encoded, load, top=1, on_batch=lambda: batches.append(0), **LOOK)
    assert model.training
    needed = {IMAGES[image] for image in (matches.pairs % 11).tolist()}
    assert sorted(load.read) == sorted(needed)
    assert len(batches) == -(-len(needed) // 4)
    model.eval()
    assert torch.equal(match_split(model, split, encoded, load, top=1, **LOOK).scores, matches.scores)
    assert not model.training


def test_what_on_batch_raises_ends_it(scene):
    split, encoded, model, load, _ = scene
    model.train()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match_split(model, split, encoded, load, top=1, on_batch=stop, **LOOK)
    assert model.training
    model.eval()


def test_scores_that_are_not_finite_are_no_ranking(scene):
    split, encoded, _, load, _ = scene
    broken = make_reranker(make_first_stage())
    with torch.no_grad():
        broken.itm_head.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the re-ranker's scores are not finite"):
        match_split(broken, split, encoded, load, top=1, **LOOK)


def test_stages_rank_by_both_or_by_the_first_alone(scene):
    split, encoded, model, load, _ = scene
    plain = rank_split(split, encoded, k=4)
    (alone,) = Stages([split], [encoded], None, 0.3).rankings(k=4)
    assert_same(alone, plain)
    matches = match_split(model, split, encoded, load, top=5, **LOOK)
    both = Stages([split], [encoded], [matches], 0.3)
    assert_same(both.first_rankings(4)[0], plain)
    assert_same(both.rankings(0.0, 4)[0], plain)
    again = rank_again(split, encoded, matches, temp=0.3, weight=0.4, k=4)
    assert_same(both.rankings(0.4, 4)[0], again)
    assert not torch.equal(both.rankings(k=4)[0].top, plain.top)


def test_a_set_whose_triplet_is_short_has_its_reference_last(scene):
    split, encoded, model, load, _ = scene
    if split.ranks_reference:
        return
    matches = match_split(model, split, encoded, load, top=3, **LOOK)
    order = rank_again(split, encoded, matches, temp=0.3, k=1).set_order
    assert torch.equal(order[:, -1], encoded.references)
    for number, triplet in enumerate(split.triplets):
        assert {IMAGES[row] for row in order[number].tolist()} == set(triplet.members)


def test_a_triplet_of_the_helper_is_what_this_file_takes_it_for():
    assert all(isinstance(one, Triplet) and one.target in one.members for one in make_split().triplets)
