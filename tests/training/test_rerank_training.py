"""What a re-ranker is trained on, and its training as users run it."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from helpers.reranking import IMAGES, Pixels, make_first_stage, make_reranker, make_task, make_trainer
from helpers.runner import assert_one_clear_line, read_csv, run, train
from helpers.small_models import CAPTIONS
from helpers.stopping import Stop, go_on

from sprc.config import RERANKER
from sprc.data.captions import process_caption
from sprc.data.datasets import SteadyLoader, TripletDataset
from sprc.data.split import Triplet
from sprc.errors import InputError
from sprc.scoring.encoding import EncodedSplit
from sprc.training.loop import EpochOrder
from sprc.training.reranking import RerankItems
from sprc.training.settings import TrainingSettings
from sprc.training.true_targets import true_targets

MANY = [f"image{number}" for number in range(40)]
TEMP = 0.07


def queries(count=36, with_sets=True):
    """Sets of six, which overlap; each image is the target of at most one query."""
    found = []
    for number in range(count):
        target, reference = MANY[number], MANY[(number + 7) % 40]
        others = tuple(MANY[(number + step) % 40] for step in (11, 12, 13, 14))
        members = (*others[:2], reference, target, *others[2:]) if with_sets else ()
        found.append(Triplet(number, reference, target, CAPTIONS[number % 3], members))
    return found


def make_items(
    folder,
    triplets,
    *,
    ranks_reference=False,
    batch_size=8,
    per_query=6,
    seed=0,
    scores=None,
    extra=(),
    extra_weight=None,
):
    """Items whose queries and images are random vectors, or have the (T, G) similarities ``scores``."""
    paths = {name: folder / name for name in MANY}
    for name, path in paths.items():
        if not path.exists():
            path.write_text(name)

    def pixels(path):
        return torch.tensor(float(MANY.index(path.name)))

    dataset = TripletDataset(triplets, paths, pixels, seed, extra, extra_weight)
    triplets = dataset.triplets  # those of --extra-triplets behind the own
    texts = sum(len(one.training_captions or (1,)) for one in triplets)
    generator = torch.Generator().manual_seed(1)
    gallery = torch.nn.functional.normalize(torch.randn(40, 3, 5, generator=generator), dim=-1).half()
    composed = torch.nn.functional.normalize(torch.randn(texts, 5, generator=generator), dim=-1)
    if scores is not None:
        gallery, composed = torch.eye(40)[:, None].half(), scores
    encoded = EncodedSplit(
        gallery=gallery,
        composed=composed,
        text_only=composed,
        references=torch.zeros(texts, dtype=torch.int64),
        targets=None,
        members=torch.empty(texts, 0, dtype=torch.int64),
        prompts=torch.arange(texts).float()[:, None, None].half(),
    )
    counts = [len(one.training_captions or (1,)) for one in triplets]
    items = RerankItems(
        dataset,
        encoded,
        [sum(counts[:number]) for number in range(len(triplets))],
        true_targets(triplets, paths),
        batch_size=batch_size,
        per_query=per_query,
        temp=TEMP,
        ranks_reference=ranks_reference,
    )
    items.set_epoch(0)
    return items


def drawn(items, number):
    """The names of an item's target and of its negatives."""
    target, *others = (MANY[int(row)] for row in items[number]["candidates"].tolist())
    return target, others


def batches(items, epoch, batch_size=8):
    """As the loader makes them."""
    order = EpochOrder(len(items), seed=0, batch_size=batch_size)
    order.epoch = epoch
    numbers = list(order)
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


@pytest.mark.parametrize("ranks_reference", [False, True])
@pytest.mark.parametrize("per_query", [1, 2, 5, 8, 14])
def test_negatives_are_of_the_set_at_most_by_half_then_of_the_batch_then_any(
    tmp_path, per_query, ranks_reference
):
    triplets = queries()
    items = make_items(tmp_path, triplets, per_query=per_query, ranks_reference=ranks_reference)
    references = 0
    for epoch in range(6):
        items.set_epoch(epoch)
        for batch in batches(items, epoch):
            assert len(batch) == 8
            for number in batch:
                triplet = triplets[number]
                target, others = drawn(items, number)
                assert target == triplet.target
                assert len(set(others)) == len(others) == per_query
                assert target not in others
                references += triplet.reference in others
                allowed = {triplet.target} if ranks_reference else {triplet.target, triplet.reference}
                of_set = min(per_query // 2, len(set(triplet.members) - allowed))
                assert set(others[:of_set]) <= set(triplet.members)
                pool = {triplets[mate].target for mate in batch} - allowed - set(others[:of_set])
                of_batch = min(per_query - of_set, len(pool))
                assert set(others[of_set : of_set + of_batch]) <= pool
    assert bool(references) == ranks_reference or per_query == 1


def test_no_true_target_of_a_query_is_its_negative(tmp_path):
    """Not its own target, nor that of the same query elsewhere, nor what `target_soft` counts, nor a copy."""
    triplets = queries()
    triplets[1] = replace(triplets[1], reference=MANY[7], caption=CAPTIONS[0].upper() + "!")  # query 0's
    triplets[2] = replace(triplets[2], also_targets=(MANY[20], "elsewhere"))
    (tmp_path / MANY[39]).write_text(MANY[3])  # no query's target, and a copy of query 3's
    items = make_items(tmp_path, triplets, per_query=14, batch_size=36)
    items.temp = 10.0  # all that may be drawn is drawn soon
    never = {0: {0, 1}, 1: {0, 1}, 2: {2, 20}, 3: {3, 39}}
    seen = {number: Counter() for number in never}
    for epoch in range(40):
        items.set_epoch(epoch)
        for number in never:
            seen[number].update(drawn(items, number)[1])
    for number, rows in never.items():
        assert not {MANY[row] for row in rows} & seen[number].keys()
        assert {MANY[row] for row in (4, 8, 12)} <= seen[number].keys()


def test_members_of_the_set_are_drawn_evenly(tmp_path):
    triplets = queries()
    items = make_items(tmp_path, triplets, per_query=2)
    counts = Counter()
    for epoch in range(1200):
        items.set_epoch(epoch)
        counts[MANY[items.negatives(5, 5, 5)[0]]] += 1
    assert counts.keys() == set(triplets[5].members) - {triplets[5].target, triplets[5].reference}
    assert all(count == pytest.approx(300, abs=60) for count in counts.values())  # four deviations


def test_the_batch_s_images_are_drawn_by_the_first_stage_s_softmax_and_none_twice(tmp_path):
    triplets = queries(4, with_sets=False)
    shares = [0.55, 0.3, 0.15]  # of the targets of queries 1, 2 and 3, for query 0
    scores = torch.zeros(4, 40)
    scores[0, 1:4] = TEMP * torch.tensor(shares).log()
    scores[0, 0] = 1.0  # its own target's
    count = 4000
    for per_query in (1, 2):
        items = make_items(tmp_path, triplets, per_query=per_query, batch_size=4, scores=scores)
        found = Counter()
        for epoch in range(count):
            items.set_epoch(epoch)
            found[frozenset(items.negatives(0, 0, 0))] += 1
        expected = Counter()
        for rows in permutations(range(3), per_query):
            chance, left = 1.0, 1.0
            for row in rows:
                chance, left = chance * shares[row] / left, left - shares[row]
            expected[frozenset(row + 1 for row in rows)] += chance
        assert found.keys() == expected.keys()
        for rows, chance in expected.items():
            slack = 4 * math.sqrt(chance * (1 - chance) / count)
            assert found[rows] / count == pytest.approx(chance, abs=slack)


def test_an_image_s_best_token_decides(tmp_path):
    """As in late interaction: with a small temperature the most similar of the batch is the one drawn."""
    triplets = queries(8, with_sets=False)
    items = make_items(tmp_path, triplets, per_query=1)
    items.temp = 1e-4
    gallery, composed = items.encoded.gallery.float(), items.encoded.composed
    for number in range(8):
        best = {
            row: max((token @ composed[number]).item() for token in gallery[row])
            for row in range(8)
            if row != number and MANY[row] != triplets[number].reference
        }
        assert items.negatives(number, number, number) == [max(best, key=best.get)]


def test_each_epoch_and_seed_draws_anew_and_the_same_one_the_same(tmp_path):
    triplets = queries()

    def draws(seed, epoch):
        items = make_items(tmp_path, triplets, seed=seed, batch_size=36)  # always the same batch
        items.set_epoch(epoch)
        return [drawn(items, number) for number in range(36)]

    assert draws(0, 1) == draws(0, 1)
    for other in ((0, 2), (1, 1)):
        differing = sum(mine != theirs for mine, theirs in zip(draws(0, 1), draws(*other), strict=True))
        assert differing > 30


def test_processes_that_read_and_live_on_draw_the_same(tmp_path):
    triplets = queries()
    found = []
    for workers in (0, 2):
        items = make_items(tmp_path, triplets)
        loader = SteadyLoader(items, batch_size=8, num_workers=workers, persistent_workers=workers > 0)
        rows = []
        for epoch in range(3):
            items.set_epoch(epoch)
            rows += [(batch["candidates"], batch["prompts"], batch["text_input"]) for batch in loader]
        found.append(rows)
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert mine[2] == theirs[2]


def test_two_ranks_share_the_batches_of_one(tmp_path, monkeypatch):
    """Each rank's items, in its order, are those of the single process, with their negatives."""
    triplets = queries()
    whole = make_items(tmp_path, triplets)
    expected = [[drawn(whole, number) for number in batch] for batch in batches(whole, 0)]
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("sprc.training.loop.world_size", lambda: 2)
        monkeypatch.setattr("sprc.training.loop.rank", lambda rank=rank: rank)
        items = make_items(tmp_path, triplets)
        order = list(EpochOrder(36, seed=0, batch_size=8))
        parts.append([drawn(items, number) for number in order])
    for number, batch in enumerate(expected):
        shares = [part[4 * number : 4 * number + 4] for part in parts]
        assert shares[0] + shares[1] == batch


def test_of_several_captions_each_meets_its_own_prompt(tmp_path):
    texts = [("red", "a star", "blue"), ("green", "red"), ("blue", "make", "red", "star")]
    triplets = [
        replace(one, caption="all of them", training_captions=own)
        for one, own in zip(queries(3, with_sets=False), texts, strict=True)
    ]
    items = make_items(tmp_path, triplets, per_query=2, batch_size=3)
    rows = [(number, text) for number, own in enumerate(texts) for text in own]
    seen = set()
    for epoch in range(30):
        items.set_epoch(epoch)
        for number in range(3):
            item = items[number]
            seen.add((number, item["text_input"]))
            assert item["prompts"].item() == rows.index((number, item["text_input"]))
    assert seen == set(rows)


def test_extra_triplets_meet_their_own_prompts_and_know_their_mates(tmp_path):
    own = queries(6, with_sets=False)
    extra = [
        Triplet(number, MANY[20 + number], MANY[30 + number], "", (), (f"add {number}", f"remove {number}"))
        for number in range(4)
    ]
    items = make_items(tmp_path, own, per_query=3, batch_size=8, extra=extra, extra_weight=0.5)
    assert len(items) == 8  # two of the four each epoch
    texts = [one.caption for one in own]
    texts += [text for one in items.triplets.triplets[6:] for text in one.training_captions]
    seen = set()
    for epoch in range(24):
        items.set_epoch(epoch)
        trained = [items.triplets.triplets[items.triplets.number(number)] for number in range(8)]
        for number, triplet in enumerate(trained):
            item = items[number]
            assert process_caption(texts[int(item["prompts"].item())]) == item["text_input"]
            target, others = drawn(items, number)
            assert target == triplet.target
            assert set(others) <= {mate.target for mate in trained} - {triplet.target, triplet.reference}
            seen.add(item["text_input"])
    assert seen >= {text for one in extra for text in one.training_captions}


def test_too_few_images_are_drawn_more_than_once_and_none_is_one_clear_line(tmp_path):
    items = make_items(tmp_path, queries(2, with_sets=False), per_query=50, batch_size=2)
    _, others = drawn(items, 0)
    assert len(others) == 50
    assert set(others) <= set(MANY) - {MANY[0], MANY[7]}
    for name in MANY:
        (tmp_path / name).write_text("the same")
    items = make_items(tmp_path, queries(2, with_sets=False), per_query=3, batch_size=2)
    with pytest.raises(InputError, match="has no other image than its targets"):
        items[0]


# --- with models


def test_an_item_has_what_the_first_stage_makes_of_its_query(tmp_path):
    first = make_first_stage()
    triplets = [
        replace(one, reference=IMAGES[number], target=IMAGES[number + 1], training_captions=own, members=())
        for number, (one, own) in enumerate(zip(queries(3), (("A star.", "red"), (), ("add",)), strict=True))
    ]
    task = make_task(tmp_path, first, make_reranker(first), triplets, batch_size=3, rerank_negatives=2)
    load = Pixels(first.config)
    seen = set()
    for epoch in range(5):
        task.items.set_epoch(epoch)
        for number, triplet in enumerate(triplets):
            item = task.items[number]
            text = task.items.triplets.text(number)
            assert text in (triplet.training_captions or (triplet.caption,))
            assert item["text_input"] == process_caption(text)
            tokens = first.encode_image(load.images[triplet.reference][None])
            with torch.no_grad():
                prompts = first.prompts_of(tokens, first.tokenize([text]))[0]
            torch.testing.assert_close(item["prompts"].float(), prompts, rtol=2e-3, atol=2e-3)
            assert item["candidates"].shape == (3, 3, 12, 12)
            assert torch.equal(item["candidates"][0], load.images[triplet.target])
            seen.add(text)
    assert seen == {"A star.", "red", CAPTIONS[1], "add"}


def test_the_figures_of_validation_are_those_of_both_stages(tmp_path):
    from sprc.scoring.encoding import encode_split
    from sprc.scoring.reranking import match_split, rank_again

    first = make_first_stage()
    model = make_reranker(first)
    task = make_task(tmp_path, first, model)
    (ranked,) = task.rankings(lambda: None)
    encoded = encode_split(first, task.scored[0], task.load, batch_size=4, num_workers=0, with_prompts=True)
    matches = match_split(model, task.scored[0], encoded, task.load, top=3, batch_size=4, num_workers=0)
    expected = rank_again(task.scored[0], encoded, matches, temp=0.3)
    assert torch.equal(ranked().ranks, expected.ranks)
    assert torch.equal(ranked().set_ranks, expected.set_ranks)


def nine_steps(folder, stop_at=None, **config):
    """Three epochs with dropout, from the state in the folder on."""
    folder.mkdir(exist_ok=True)
    first = make_first_stage()
    model = make_reranker(make_first_stage(dropout=0.2))
    torch.manual_seed(5)
    trainer = make_trainer(folder, model, make_task(folder, first, model), checkpoint_every=1, **config)
    go_on(trainer, stop_at)
    return model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, nine_steps(folder)


@pytest.mark.parametrize("stop_at", [(0, 1), (1, 0), (1, 2)])
def test_a_run_that_stops_anywhere_goes_on_to_the_bit(tmp_path, whole, stop_at):
    folder, weights = whole
    with pytest.raises(Stop):
        nine_steps(tmp_path, stop_at)
    ended = nine_steps(tmp_path)
    for name, value in weights.items():
        assert torch.equal(ended[name], value), name
    assert (tmp_path / "train_metrics.csv").read_bytes() == (folder / "train_metrics.csv").read_bytes()


def test_it_learns(whole):
    folder, _ = whole
    losses = [float(row["loss_itm"]) for row in read_csv(folder / "train_metrics.csv")]
    assert losses[-1] < losses[0]


# --- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"negatives": "bank"},
            "--negatives bank does nothing for --blip-model-name blip2_cir_rerank; leave",
        ),
        ({"train": "query"}, "--train query does nothing"),
        ({"contrast": "complementary"}, "--contrast complementary does nothing"),
        ({"loss_rtc": 1.0}, "--loss-rtc 1.0 does nothing"),
        ({"loss_align": 0.0}, "--loss-align 0.0 does nothing"),
        ({"fusion_lr": 1e-3}, "--fusion-lr 0.001 does nothing"),
        ({"warmup_fusion": 1}, "--warmup-fusion 1 does nothing"),
        ({"switches": {"use_gated_fusion": True}}, "--use-gated-fusion True: a re-ranker's model is that of"),
        ({"switches": {"image_size": 64}}, "--image-size 64: a re-ranker's model is that of its first stage"),
        ({"rerank_negatives": 0}, "--rerank-negatives 0 is too small; the least is 1"),
        ({"rerank_top": 0}, "--rerank-top 0 is too small; the least is 1"),
        (
            {"blip_model_name": "blip2_cir_align_prompt", "rerank_negatives": 4},
            "--rerank-negatives 4 is for --blip-model-name blip2_cir_rerank, and this is blip2_cir_align",
        ),
        ({"blip_model_name": "blip2_cir_align_prompt", "rerank_top": 4}, "--rerank-top 4 is for"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message):
    settings = TrainingSettings(dataset="cirr", **{"blip_model_name": RERANKER, **flags})
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        settings.check_reranker()
    assert "\n" not in str(caught.value)


def test_what_means_something_is_not():
    TrainingSettings(dataset="cirr", blip_model_name=RERANKER, loss_itm=2.0).check_reranker()
    switches = {"use_gated_fusion": False}
    given = {"switches": switches, "rerank_negatives": 1, "rerank_top": 1}
    TrainingSettings(dataset="cirr", blip_model_name=RERANKER, **given).check_reranker()
    TrainingSettings(dataset="cirr", negatives="bank").check_reranker()


# --- as users run it

FLAGS = ("--blip-model-name", RERANKER, "--rerank-negatives", 4, "--rerank-top", 12)


@pytest.fixture(scope="module")
def first(trained):
    return trained[0] / "saved_models" / "tuned_clip_arithmetic.pt"


@pytest.fixture(scope="module")
def reranked(data, first, tmp_path_factory):
    """A run of two epochs, of which each is kept."""
    given = ("--model-path", first, "--num-epochs", 2, "--save-training")
    return train(data, tmp_path_factory.mktemp("reranked"), *FLAGS, *given)


def checkpoint_of(folder, epoch):
    return folder / "saved_models" / f"tuned_clip_{epoch}.pt"


def printed(stdout):
    """The figures that validation prints, by name."""
    return dict(line.split(": ", 1) for line in stdout.splitlines() if re.match(r"\S+: [\d.]+$", line))


def validate(data, first, *flags, code=0):
    given = ("--dataset", "CIRR", "--data-path", data, "--model-path", first, "--num-workers", 0)
    return run("blip_validate.py", *given, *flags, code=code)


def test_validation_gives_the_figures_that_training_wrote(data, first, reranked):
    folder, stdout, _ = reranked
    assert "first stage: " in stdout
    assert folder.name.startswith(f"clip_finetuned_on_cirr_{RERANKER}_")
    rows = read_csv(folder / "validation_metrics.csv")
    for epoch in (0, 1):
        given = ("--rerank", checkpoint_of(folder, epoch), "--rerank-top", 12)
        told = printed(validate(data, first, *given)[0])
        assert {"epoch": str(epoch), **told} == rows[epoch]
    (_, row) = read_csv(folder / "train_metrics.csv")
    assert row["train_loss"] == row["loss_itm"]
    assert set(row) == {"epoch", "train_loss", "loss_itm"}
    told = torch.load(checkpoint_of(folder, 1), weights_only=True)["hyperparameters"]
    assert told["first_stage_name"] == first.parents[1].name
    written = json.loads((folder / "training_hyperparameters.json").read_text())
    assert (written["rerank_negatives"], written["rerank_top"]) == (4, 12)
    assert written["first_stage"] == told["first_stage"]


def test_several_weights_are_a_line_each_and_the_best_is_reported(data, first, reranked, tmp_path):
    given = ("--rerank", checkpoint_of(reranked[0], 1), "--rerank-top", 12)
    ranks = tmp_path / "ranks.csv"
    stdout, _ = validate(data, first, *given, "--rerank-weight", 0, 0.5, 1, "--save-ranks", ranks)
    plain = printed(validate(data, first)[0])
    lines = {line.split(":")[0]: line for line in stdout.splitlines() if line.startswith(("both", "first s"))}
    assert list(lines) == ["first stage", *(f"both, --rerank-weight {w}" for w in ("0", "0.5", "1"))]
    shown = {name: line.split(": ", 1)[1] for name, line in lines.items()}
    assert shown["both, --rerank-weight 0"] == shown["first stage"]
    assert f"R@1 {float(plain['recall_at1']):.2f}" in shown["first stage"]
    headline = {
        name.split()[-1]: float(re.search(r"mean\(R@5\+R_s@1\) ([\d.]+)", line)[1])
        for name, line in shown.items()
    }
    (best,) = re.findall(r"^below: --rerank-weight (\S+), which has the best mean", stdout, re.MULTILINE)
    assert headline[best] == max(headline[weight] for weight in ("0", "0.5", "1"))
    told = printed(stdout)
    assert float(told["mean(R@5+R_s@1)"]) == pytest.approx(headline[best], abs=0.006)
    alone = printed(validate(data, first, *given, "--rerank-weight", best)[0])
    assert alone == told
    found = [int(row["rank"]) for row in read_csv(ranks)]
    assert 100 * sum(rank < 5 for rank in found) / len(found) == pytest.approx(float(told["recall_at5"]))


def test_a_submission_is_of_both_stages(data, first, reranked, tmp_path):
    given = ("--data-path", data, "--model-path", first, "--out", tmp_path, "--num-workers", 0)
    given += ("--rerank", checkpoint_of(reranked[0], 1), "--rerank-top", 12)
    stdout, _ = run("cirr_test_submission.py", *given)
    name = reranked[0].name
    files = [tmp_path / f"{metric}_submission_{name}.json" for metric in ("recall", "recall_subset")]
    assert all(f"wrote {file} " in stdout for file in files)
    ranking, subset = (json.loads(file.read_text()) for file in files)
    rankings = tmp_path / "rankings.json"
    flags = ("--split", "test1", "--rerank", checkpoint_of(reranked[0], 1), "--rerank-top", 12)
    validate(data, first, *flags, "--save-rankings", rankings)
    for row in json.loads(rankings.read_text()):
        assert ranking[str(row["pairid"])] == row["ranking"]
    stdout, _ = run("cirr_test_submission.py", *given, "--name", "first", "--rerank-weight", 0)
    run("cirr_test_submission.py", *given[:-4], "--name", "alone")
    for metric in ("recall", "recall_subset"):
        mixed, alone = (tmp_path / f"{metric}_submission_{which}.json" for which in ("first", "alone"))
        assert mixed.read_bytes() == alone.read_bytes()
    assert json.loads((tmp_path / "recall_subset_submission_alone.json").read_text()) != subset


def test_a_finished_run_goes_on_as_if_it_had_been_longer(data, first, reranked, tmp_path):
    folder, _, _ = train(data, tmp_path, *FLAGS, "--model-path", first, "--num-epochs", 1)
    stdout, _ = run("blip_fine_tune_2.py", "--resume", folder, "--num-epochs", 2, "--num-workers", 1)
    assert f"resuming {folder} at epoch 1, step 0" in stdout
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (folder / name).read_bytes() == (reranked[0] / name).read_bytes()
    _, stderr = run("blip_fine_tune_2.py", "--resume", folder, "--num-epochs", 3, "--rerank-top", 5, code=2)
    assert_one_clear_line(stderr, "--rerank-top 5: ")


def test_mixed_precision_a_cache_and_gradient_caching_train(data, first, reranked, tmp_path):
    flags = ("--amp", "bf16", "--feature-cache", tmp_path / "cache", "--grad-cache", 5, "--num-epochs", 1)
    folder, stdout, _ = train(data, tmp_path / "models", *FLAGS, "--model-path", first, *flags)
    assert "device: cpu, 1 thread, bf16" in stdout
    (row,), (theirs, _) = (read_csv(one / "train_metrics.csv") for one in (folder, reranked[0]))
    assert float(row["loss_itm"]) == pytest.approx(float(theirs["loss_itm"]), rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "re-ranks what a first stage finds; give its checkpoint as --model-path"),
        (("--negatives", "bank"), "--negatives bank does nothing for --blip-model-name blip2_cir_rerank"),
        (
            ("--transform", "squarepad", "--model-path", "FIRST"),
            "--transform squarepad: the first stage was trained with targetpad; give --transform targetpad",
        ),
        (
            ("--target-ratio", 1.5, "--model-path", "FIRST"),
            "--target-ratio 1.5: the first stage was trained with 1.25; give --target-ratio 1.25",
        ),
        (("--model-path", "RERANKER"), "holds a re-ranker"),
    ],
)
def test_a_training_that_cannot_be_is_one_clear_line(data, first, reranked, tmp_path, flags, message):
    files = {"FIRST": first, "RERANKER": checkpoint_of(reranked[0], 0)}
    _, _, stderr = train(data, tmp_path, *FLAGS, *(files.get(flag, flag) for flag in flags), code=2)
    assert_one_clear_line(stderr, message)
    assert not list(tmp_path.iterdir())


def test_scoring_that_cannot_be_is_one_clear_line(data, first, reranked, checkpoint, tmp_path):
    reranker = checkpoint_of(reranked[0], 1)
    cases = [
        (("--rerank-weight", 0.5), "--rerank-weight: nothing re-ranks; give --rerank FILE"),
        (("--rerank-any",), "--rerank-any: nothing re-ranks"),
        (("--rerank-top", 5), "--rerank-top: nothing re-ranks"),
        (("--rerank", reranker, "--rerank-weight", 1.5), "--rerank-weight 1.5 must be a number from 0 to 1"),
        (
            ("--rerank", reranker, "--rerank-weight", "nan"),
            "--rerank-weight nan must be a number from 0 to 1",
        ),
        (("--rerank", reranker, "--rerank-top", 0), "--rerank-top 0 is too small; the least is 1"),
        (
            ("--rerank", reranker, "--split", "test1", "--rerank-weight", 0, 1),
            "--rerank-weight: choose it on the validation split; give one for the test split",
        ),
        (("--rerank", first), "holds blip2_cir_align_prompt and no re-ranker"),
    ]
    for flags, message in cases:
        _, stderr = validate(data, first, *flags, code=2)
        assert_one_clear_line(stderr, message)
    _, stderr = validate(data, checkpoint, "--rerank", reranker, code=2)
    assert_one_clear_line(stderr, f"is of another first stage, {first.parents[1].name}; give that as")
    stdout, _ = validate(data, checkpoint, "--rerank", reranker, "--rerank-any", "--rerank-top", 3)
    assert "both, --rerank-weight 1: R@1 " in stdout
    _, stderr = validate(data, reranker, code=2)
    assert_one_clear_line(stderr, "holds a re-ranker")
    given = ("--data-path", data, "--model-path", first, "--out", tmp_path)
    flags = ("--rerank", reranker, "--rerank-weight", 0, 1)
    _, stderr = run("cirr_test_submission.py", *given, *flags, code=2)
    assert_one_clear_line(stderr, "--rerank-weight: give one; blip_validate.py compares several")


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["--use-gated-fusion", "--no-use-gated-fusion"])
def test_fashioniq_is_trained_and_validated_by_both_stages(tmp_path, fusion):
    sizes = ("--train-families", 1, "--val-families", 1, "--test-families", 1)
    run("make_demo_data.py", "--dataset", "FashionIQ", "--out", tmp_path / "data", *sizes)
    common = ("--dataset", "FashionIQ", "--save-training", "--fiq-protocol", "original")
    folder, _, _ = train(tmp_path / "data", tmp_path / "first", *common, fusion)
    first = checkpoint_of(folder, 0)
    folder, _, _ = train(tmp_path / "data", tmp_path / "second", *common, *FLAGS, "--model-path", first)
    (row,) = read_csv(folder / "validation_metrics.csv")
    given = ("--dataset", "FashionIQ", "--data-path", tmp_path / "data", "--model-path", first)
    stdout, _ = run("blip_validate.py", *given, "--rerank", checkpoint_of(folder, 0), "--rerank-top", 12)
    told = printed(stdout)
    assert len(told) == 9
    assert {name: row[name] for name in told} == told
