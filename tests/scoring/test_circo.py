"""Scoring on CIRCO: average precision over several targets, its files of ranks, and what its server takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.runner import read_csv, run
from helpers.searching import save_model
from torch.nn import functional as F

from sprc.data.circo import ASPECTS, load_circo
from sprc.data.split import Split, Triplet
from sprc.data.synthetic.circo import CIRCOConfig, make_circo
from sprc.errors import InputError
from sprc.scoring.benchmarks import CIRCO
from sprc.scoring.encoding import EncodedSplit, other_target_indices, target_indices
from sprc.scoring.feature_extraction import image_paths
from sprc.scoring.ranking import Ranking, average_precision
from sprc.scoring.recall import rank_split
from sprc.scoring.scorer import Scorer
from sprc.scoring.settings import ExtractionSettings, SubmissionSettings, ValidationSettings
from sprc.scoring.submission import run_submission, write_circo_submission
from sprc.scoring.validation import run_validation

CUTS = (5, 10, 25, 50)


@pytest.mark.parametrize(
    ("ranks", "k", "expected"),
    [
        ([0], 5, 1),
        ([4], 5, 1 / 5),
        ([5], 5, 0),
        ([0, 2, 7], 5, (1 / 1 + 2 / 3) / 3),
        ([7, 0, 2], 10, (1 / 1 + 2 / 3 + 3 / 8) / 3),
        ([0, 1, 2, 3, 4, 5, 6], 5, 1),  # of seven targets no more than five can be there
        ([1, 3, 5, 60, 70, 80], 5, (1 / 2 + 2 / 4) / 5),
        ([1, 3, 5, 60, 70, 80], 10, (1 / 2 + 2 / 4 + 3 / 6) / 6),
    ],
)
def test_average_precision_by_hand(ranks, k, expected):
    filled = torch.tensor([[*ranks[1:], -1, -1], [-1] * (len(ranks) + 1)])  # and a query with one target
    found = average_precision(torch.tensor([ranks[0], 0]), filled, k)
    assert found.tolist() == pytest.approx([expected, 1])


def make_case(seed=0, queries=150, images=60):
    """A split of random features, with ties, whose queries have one to seven targets, and aspects."""
    generator = torch.Generator().manual_seed(seed)
    gallery = F.normalize(torch.randn(images, 2, 6, generator=generator), dim=-1)
    gallery[1::4] = gallery[::4]
    names = [str(1000 - number) for number in range(images)]
    index = {name: number for number, name in enumerate(names)}
    triplets = []
    for number in range(queries):
        reference, *targets = (
            names[i] for i in torch.randperm(images, generator=generator)[: 2 + number % 7]
        )
        aspects = [aspect for place, aspect in enumerate(ASPECTS[:8]) if number % (place + 2) == 0]
        own = (number, reference, targets[0], "")
        triplets.append(Triplet(*own, also_targets=tuple(targets[1:]), aspects=tuple(aspects)))
    paths = {name: Path(name) for name in names}
    split = Split("val", triplets, paths, ranks_reference=True, several_targets=True)
    encoded = EncodedSplit(
        gallery=gallery,
        composed=F.normalize(torch.randn(queries, 6, generator=generator), dim=-1),
        text_only=torch.zeros(queries, 6),
        references=torch.tensor([index[triplet.reference] for triplet in triplets]),
        targets=target_indices(split, index),
        members=torch.empty(queries, 0, dtype=torch.int64),
        also_targets=other_target_indices(split, index),
    )
    return split, encoded


def ranked_names(split, encoded):
    """Each query's whole gallery, best first, equal ones in the order of the split's file."""
    names = list(split.image_paths)
    rows = []
    for query in encoded.composed.tolist():
        scores = [
            max(sum(a * b for a, b in zip(query, token, strict=True)) for token in image)
            for image in encoded.gallery.tolist()
        ]
        rows.append([names[i] for i in sorted(range(len(names)), key=lambda i: (-scores[i], i))])
    return rows


def plain_precision(ranking, targets, k):
    """Average precision as CIRCO's paper defines it, position by position."""
    total, found = 0.0, 0
    for place, name in enumerate(ranking[:k], start=1):
        if name in targets:
            found += 1
            total += found / place
    return total / min(len(targets), k)


def plain_metrics(split, rankings):
    pairs = list(zip(split.triplets, rankings, strict=True))
    targets = [{t.target, *t.also_targets} for t in split.triplets]

    def mean(values):
        values = list(values)
        return 100 * sum(values) / len(values)

    found = {
        f"map_at{k}": mean(plain_precision(row, own, k) for (_, row), own in zip(pairs, targets, strict=True))
        for k in CUTS
    }
    found |= {f"recall_at{k}": mean(t.target in row[:k] for t, row in pairs) for k in CUTS}
    for aspect in ASPECTS:
        chosen = [(r, own) for (t, r), own in zip(pairs, targets, strict=True) if aspect in t.aspects]
        if chosen:
            found[f"map_at10_{aspect}"] = mean(plain_precision(row, own, 10) for row, own in chosen)
    return found


@pytest.mark.parametrize("block", [128, 7])
def test_the_metrics_are_those_of_a_plain_restatement(block, monkeypatch):
    monkeypatch.setattr("sprc.scoring.ranking.QUERY_BLOCK", block)
    split, encoded = make_case()
    ranking = rank_split(split, encoded, k=50)
    benchmark = CIRCO([split], "caption")
    metrics = benchmark.metrics([ranking])
    assert metrics.pop("protocol") == "caption"
    expected = plain_metrics(split, ranked_names(split, encoded))
    assert list(metrics) == list(expected)
    assert f"map_at10_{ASPECTS[7]}" in metrics
    assert f"map_at10_{ASPECTS[8]}" not in metrics  # of which there is no query
    assert metrics == pytest.approx(expected)
    assert benchmark.shown(metrics) == (
        f"mAP@5 {expected['map_at5']:.2f}, mAP@10 {expected['map_at10']:.2f}, "
        f"R@10 {expected['recall_at10']:.2f} (caption query)"
    )


def test_the_reference_is_a_candidate_as_in_the_authors_evaluation():
    split, encoded = make_case(queries=20)
    names = list(split.image_paths)
    # A query that looks for its own reference finds it.
    encoded = replace(encoded, composed=encoded.gallery[encoded.references][:, 0])
    top = rank_split(split, encoded, k=2).top
    firsts = [[names[i] for i in row] for row in top.tolist()]
    assert all(t.reference in row for t, row in zip(split.triplets, firsts, strict=True))


def test_secret_targets_have_no_ranks():
    split, encoded = make_case(queries=8)
    index = {name: number for number, name in enumerate(split.image_paths)}
    secret = replace(split, triplets=[replace(t, target=None, also_targets=()) for t in split.triplets])
    assert other_target_indices(secret, index) is None
    ranking = rank_split(secret, replace(encoded, targets=None, also_targets=None), k=3)
    assert (ranking.ranks, ranking.also_ranks) == (None, None)
    with pytest.raises(ValueError, match="whose targets are known"):
        CIRCO.metrics_of({"": ranking})


def test_a_benchmark_of_one_target_has_no_others():
    split, _ = make_case(queries=8)
    index = {name: number for number, name in enumerate(split.image_paths)}
    assert other_target_indices(replace(split, several_targets=False), index) is None
    assert other_target_indices(replace(split, triplets=split.triplets[:1]), index).shape == (1, 0)


def test_one_target_a_query_is_mean_reciprocal_rank():
    ranks = torch.tensor([0, 3, 9, 10])
    metrics = CIRCO.metrics_of({"": Ranking(ranks, also_ranks=torch.empty(4, 0, dtype=torch.int64))})
    assert metrics["map_at10"] == pytest.approx(100 * (1 + 1 / 4 + 1 / 10) / 4)
    assert metrics["recall_at5"] == 50


def test_a_submission_holds_fifty_different_ids_a_query_or_is_not_written(tmp_path):
    split, encoded = make_case(queries=16)
    # Both texts' queries: the same ids again.
    split = replace(split, triplets=[replace(t, pair_id=n % 8) for n, t in enumerate(split.triplets)])
    ranking = rank_split(split, encoded, k=50)
    for place, path in enumerate(write_circo_submission(split, ranking, tmp_path, "x")):
        expected = ranked_names(split, encoded)[8 * place : 8 * place + 8]
        found = json.loads(path.read_text())
        assert found == {str(n): [int(name) for name in row[:50]] for n, row in enumerate(expected)}
    twice = ranking._replace(top=ranking.top[:, [0, *range(49)]])
    with pytest.raises(InputError, match="the caption submission is not 50 different images"):
        write_circo_submission(split, twice, tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("circo")
    make_circo(out, CIRCOConfig(image_size=24, val_families=1, test_families=1, eval_queries_per_set=3))
    return out


@pytest.fixture(scope="module")
def validated(made, checkpoint, tmp_path_factory):
    """blip_validate.py with both texts, each from one feature cache; the files and the printed metrics."""
    out = tmp_path_factory.mktemp("validated")
    found = {}
    for query in ("caption", "concept"):
        settings = ValidationSettings(
            dataset="circo",
            data_path=made,
            model_path=checkpoint,
            circo_query=query,
            feature_cache=out / "cache",
            save_ranks=out / f"{query}.csv",
            save_rankings=out / f"{query}.json",
        )
        found[query] = run_validation(settings)
    return out, found


@pytest.mark.parametrize("query", ["caption", "concept"])
def test_a_validation_s_figures_are_those_of_its_rankings_and_of_its_ranks(made, validated, query):
    out, found = validated
    split = load_circo(made, "val", query)
    entries = json.loads((out / f"{query}.json").read_text())
    assert [entry["id"] for entry in entries] == [triplet.pair_id for triplet in split.triplets]
    assert [entry["caption"] for entry in entries] == [triplet.caption for triplet in split.triplets]
    metrics = dict(found[query])
    assert metrics.pop("protocol") == query
    assert metrics == pytest.approx(plain_metrics(split, [entry["ranking"] for entry in entries]))
    for row, entry, triplet in zip(read_csv(out / f"{query}.csv"), entries, split.triplets, strict=True):
        ranks = [int(row["rank"]), *map(int, row["also_ranks"].split())]
        names = (triplet.target, *triplet.also_targets)
        assert list(row) == ["id", "rank", "also_ranks"]
        for name, rank in zip(names, ranks, strict=True):
            assert entry["ranking"].index(name) == rank if rank < 50 else name not in entry["ranking"]


def test_the_shared_concept_makes_another_query(validated):
    out, _ = validated
    assert (out / "caption.csv").read_bytes() != (out / "concept.csv").read_bytes()


def test_the_submission_ranks_the_gallery_by_both_texts(made, checkpoint, tmp_path, capsys):
    settings = SubmissionSettings(
        dataset="circo", data_path=made, model_path=checkpoint, out=tmp_path, name="test", batch_size=7
    )
    paths = run_submission(settings)
    assert [path.name for path in paths] == [
        f"circo_submission_{query}_test.json" for query in ("caption", "concept")
    ]
    assert capsys.readouterr().out.endswith("evaluation server, https://circo.micc.unifi.it/\n")
    scorer = Scorer.from_settings(settings, torch.device("cpu"))
    for path, query in zip(paths, ("caption", "concept"), strict=True):
        split = load_circo(made, "test", query)
        (encoded,) = scorer.encode([split])
        expected = ranked_names(split, encoded)
        text = path.read_text()
        assert " " not in text
        found = json.loads(text)
        assert list(found) == [str(triplet.pair_id) for triplet in split.triplets]
        # Rounding may swap equal ones of the plain sums.
        same = sum(found[str(n)] == [int(name) for name in row[:50]] for n, row in enumerate(expected))
        assert same >= len(expected) - 1
        assert all(len(set(row)) == 50 for row in found.values())
    with pytest.raises(InputError, match="--missing-images skip: the server wants every query"):
        run_submission(replace(settings, missing_images="skip"))


def test_features_are_computed_of_the_one_gallery_of_both_splits(made):
    settings = ExtractionSettings(dataset="circo", data_path=made, feature_cache=Path("cache"))
    assert image_paths(settings) == list(load_circo(made, "val").image_paths.values())
    assert len(image_paths(settings)) == 72


def test_the_scripts_take_circo_and_its_query_s_text(made, data, tmp_path):
    model = save_model(tmp_path / "model.pt", data, 1)
    given = ("--dataset", "CIRCO", "--data-path", made, "--model-path", model, "--circo-query", "concept")
    stdout, _ = run("blip_validate.py", *given)
    assert "protocol: concept" in stdout
    assert "map_at10_negation: " in stdout
