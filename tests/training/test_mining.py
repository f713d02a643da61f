"""Mined negatives: the rule against a plain statement, what is never drawn, seeds, and the loss."""

import math
import random

import pytest
import torch
from helpers.runner import read_csv, train
from helpers.wider import IMAGES, TRIPLETS, batch_of, make_model, make_negatives, make_triplets, ready

from sprc.errors import InputError
from sprc.models.losses import pairwise_loss
from sprc.scoring.encoding import EncodedSplit
from sprc.training.mining import Miner, pools
from sprc.training.true_targets import true_targets


def between_the_drops(candidates, target_score, target):
    """QuRe's set in plain Python: names of (name, score) that lie between the two largest drops."""
    ranked = sorted(candidates, key=lambda pair: (-pair[1], pair[0]))
    after = [pair for pair in ranked if (pair[1], -pair[0]) < (target_score, -target)]
    if not after:
        return [name for name, _ in ranked]
    if len(after) < 3:
        return [name for name, _ in after]
    drops = [(after[j][1] - after[j + 1][1], -j) for j in range(len(after) - 1)]
    first, second = sorted(-place for _, place in sorted(drops)[-2:])
    return [name for name, _ in after[first + 1 : second + 1]]


def encoded(scores, references, targets):
    """What makes the miner see these scores, (T, K): one token an image, and one dimension each."""
    count = scores.shape[1]
    return EncodedSplit(
        gallery=torch.eye(count)[:, None],
        composed=scores,
        text_only=scores,
        references=torch.tensor(references),
        targets=torch.tensor(targets),
        members=torch.empty(len(targets), 0, dtype=torch.int64),
    )


def miner(tmp_path, triplets=TRIPLETS, rule="qure", per_query=1, every=1, seed=0, ranks_reference=False):
    make_triplets(tmp_path, make_model().config)
    targets = true_targets(triplets, {name: tmp_path / name for name in IMAGES})
    return Miner(targets, rule, per_query, every, seed, ranks_reference)


@pytest.mark.parametrize("scores", ["spread", "ties"])
@pytest.mark.parametrize("ranks_reference", [True, False])
def test_the_rule_is_its_plain_statement(tmp_path, scores, ranks_reference):
    rng = random.Random(7)
    found = miner(tmp_path, ranks_reference=ranks_reference)
    references = [IMAGES.index(triplet.reference) for triplet in TRIPLETS]
    own = [IMAGES.index(triplet.target) for triplet in TRIPLETS]
    step = 0.25 if scores == "ties" else 2**-10  # exact in float32
    for _ in range(40):
        values = [[rng.randrange(int(1 / step)) * step for _ in IMAGES] for _ in TRIPLETS]
        pool = dict(found._pools(encoded(torch.tensor(values), references, own)))
        for query, row in enumerate(values):
            gone = {own[query]} if ranks_reference else {own[query], references[query]}
            candidates = [(image, score) for image, score in enumerate(row) if image not in gone]
            assert pool[query].tolist() == between_the_drops(candidates, row[own[query]], own[query])


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([0.9, 0.8, 0.4, 0.3, 0.29, 0.1], [0.4, 0.3, 0.29]),  # drops of 0.4 and 0.19
        ([0.9, 0.5, 0.1, 0.1], [0.5]),  # neighbouring drops leave one
        ([0.5, 0.5, 0.5, 0.5], [0.5]),  # of equal drops the first two
        ([0.5, 0.4], [0.5, 0.4]),
        ([0.3], [0.3]),
    ],
)
def test_the_pool_lies_between_the_two_largest_drops(after, expected):
    scores = torch.tensor([0.99, 0.95, *after])
    pool = scores[pools("qure", scores, 2)]
    torch.testing.assert_close(pool, torch.tensor(expected))


def test_where_nothing_comes_after_the_target_all_candidates_are_the_pool():
    scores = torch.tensor([0.9, 0.5, 0.1])
    assert pools("qure", scores, 3) == slice(0, 3)
    assert pools("top", scores, 1) == pools("random", scores, 1) == slice(0, 3)


@pytest.mark.parametrize("rule", ["qure", "top", "random"])
def test_no_true_target_copy_or_reference_is_drawn(tmp_path, rule):
    scores = torch.rand(16, 8, generator=torch.Generator().manual_seed(1))
    references = [IMAGES.index(triplet.reference) for triplet in TRIPLETS]
    own = [IMAGES.index(triplet.target) for triplet in TRIPLETS]
    make_triplets(tmp_path, make_model().config)
    (tmp_path / "image5").write_text("image2")
    targets = true_targets(TRIPLETS, {name: tmp_path / name for name in IMAGES})
    drawn = Miner(targets, rule, 3, 5, 0, ranks_reference=False).draw(encoded(scores, references, own), 4)
    assert drawn.shape == (5, 16, 3)
    assert drawn.dtype == torch.int32
    for query in range(16):
        seen = set(drawn[:, query].flatten().tolist())
        assert not seen & {own[query], references[query]}
        if own[query] in (2, 5):
            assert not seen & {2, 5}
        if rule == "top":
            allowed = scores[query].clone()
            allowed[[row for row in targets.all[query].tolist() if row < 8] + [references[query]]] = -1
            assert drawn[0, query].tolist() == allowed.argsort(descending=True)[:3].tolist()
            assert torch.equal(drawn[0], drawn[4])
        if rule == "random":
            assert all(len(set(row)) == 3 for row in drawn[:, query].tolist())


def test_draws_depend_on_seed_epoch_and_query_alone(tmp_path):
    scores = torch.rand(16, 8, generator=torch.Generator().manual_seed(1))
    references = [IMAGES.index(triplet.reference) for triplet in TRIPLETS]
    own = [IMAGES.index(triplet.target) for triplet in TRIPLETS]
    one = encoded(scores, references, own)
    three = miner(tmp_path, rule="random", every=3).draw(one, 6)
    assert torch.equal(miner(tmp_path, rule="random", every=3).draw(one, 6), three)
    later = miner(tmp_path, rule="random", every=1).draw(one, 7)
    assert torch.equal(later[0], three[1])
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(miner(tmp_path, rule="random", seed=1).draw(one, 6)[0], three[0])
    assert len({tuple(column) for column in three[:, :, 0].T.tolist()}) > 8  # queries draw for themselves


def test_a_query_that_has_no_negative_at_all_is_one_clear_line(tmp_path):
    for name in IMAGES:
        (tmp_path / name).write_text("the same")
    targets = true_targets(TRIPLETS, {name: tmp_path / name for name in IMAGES})
    lonely = Miner(targets, "qure", 1, 1, 0, ranks_reference=False)
    with pytest.raises(InputError, match=r"of the 8 training images none is a negative of query 0"):
        lonely.draw(encoded(torch.rand(16, 8), [0] * 16, targets.own.tolist()), 0)


@pytest.mark.numeric
def test_the_loss_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    queries, positives, negatives = (
        torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
        for shape in ((4, 6), (4, 3, 6), (4, 2, 3, 6))
    )
    expected = 0.0
    for b in range(4):
        for p in range(2):
            better = max((token @ queries[b]).item() for token in positives[b])
            worse = max((token @ queries[b]).item() for token in negatives[b, p])
            expected -= math.log(1 / (1 + math.exp(-(better - worse) / 0.07))) / 8
    temp = torch.tensor(0.07, dtype=torch.float64)
    assert pairwise_loss(queries, positives, negatives, temp).item() == pytest.approx(expected, rel=1e-10)


def test_the_step_sees_the_images_that_were_drawn_and_learns_through_them(tmp_path):
    model = make_model(dropout=0.0, fusion_dropout=0.0)
    negatives = ready(make_negatives(tmp_path, model, negatives="mined", negatives_per_query=2))
    samples = batch_of(negatives, [3, 11])
    assert samples["negative"].shape[:2] == (2, 2)
    for row, number in enumerate((3, 11)):
        paths = [negatives.items.paths[place] for place in negatives.drawn[0, number].tolist()]
        expected = torch.stack([negatives.triplets.load(path) for path in paths])
        assert torch.equal(samples["negative"][row], expected)
    model.train()
    losses = negatives.objective(samples)
    assert list(losses) == ["loss_itc", "loss_rtc", "loss_align", "loss_mined"]
    plain = model(samples)
    assert losses["loss_itc"].item() == pytest.approx(plain["loss_itc"].item(), rel=1e-6)
    embedded = negatives.objective.embed(samples)
    features, _ = model.extract_target_features(samples["negative"].flatten(0, 1))
    torch.testing.assert_close(embedded["negatives"].flatten(0, 1), features)
    gradient = torch.autograd.grad(losses["loss_mined"], model.vision_proj.weight)[0]
    fixed = {**embedded, "negatives": embedded["negatives"].detach()}
    of_targets = torch.autograd.grad(
        negatives.objective.losses_of(fixed)["loss_mined"], model.vision_proj.weight
    )[0]
    assert not torch.allclose(gradient, of_targets, atol=1e-6)


def test_cached_tokens_and_pixels_are_mined_alike(tmp_path):
    model = make_model(dropout=0.0, fusion_dropout=0.0)
    negatives = ready(make_negatives(tmp_path, model, negatives="mined"))
    samples = batch_of(negatives, [0, 1, 2])
    tokens = negatives.objective.read_images(samples)
    assert tokens["negative"].dim() == 4
    mine, theirs = negatives.objective(tokens), negatives.objective(samples)
    assert mine["loss_mined"].item() == pytest.approx(theirs["loss_mined"].item(), rel=1e-5)


def test_a_run_with_mined_negatives_is_the_same_twice_and_with_workers(data, tmp_path):
    flags = ("--negatives", "mined", "--mine-every", 2, "--num-epochs", 1, "--loss-mined", 0.5)
    folder, _, _ = train(data, tmp_path / "a", *flags)
    other, _, _ = train(data, tmp_path / "b", *flags, "--num-workers", 1)
    (row,) = read_csv(folder / "train_metrics.csv")
    total = float(row["loss_itc"]) + 0.4 * (float(row["loss_rtc"]) + float(row["loss_align"]))
    assert float(row["train_loss"]) == pytest.approx(total + 0.5 * float(row["loss_mined"]), rel=1e-5)
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert (folder / "saved_models" / "mined.safetensors").exists()
