"""The registry of benchmarks: its names, and that one class is all that another benchmark takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.runner import run

from sprc.data import DATASETS, DATASETS_METAVAR, TRAINED_ON
from sprc.data.split import Split, Triplet
from sprc.errors import InputError
from sprc.scoring.benchmarks import (
    BENCHMARKS,
    CIRR,
    Benchmark,
    benchmark_class,
    register_benchmark,
    training_benchmark,
)
from sprc.scoring.ranking import Ranking, recall
from sprc.scoring.validation import named_rankings, query_ranks
from sprc.training.loop import TrainingConfig


def test_the_names_that_help_shows_are_those_of_the_registry():
    assert {key: cls.name for key, cls in BENCHMARKS.items()} == DATASETS
    assert DATASETS_METAVAR == "{CIRR,FashionIQ,CIRCO}"


@pytest.mark.parametrize("name", ["cirr", "CIRR"])
def test_a_benchmark_is_found_by_its_name_in_any_case(name):
    assert benchmark_class(name) is CIRR


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="--dataset 'coco' is unknown; choose from cirr, fashioniq"):
        benchmark_class("coco")


def test_a_benchmark_is_trained_on_or_says_what_to_do_instead():
    assert [training_benchmark(name).name for name in ("cirr", "FashionIQ")] == ["CIRR", "FashionIQ"]
    assert list(TRAINED_ON) == ["cirr", "fashioniq"]
    with pytest.raises(
        InputError, match=r"CIRCO has no training split; train on CIRR, then .*--dataset CIRCO"
    ):
        training_benchmark("CIRCO")


def test_a_command_s_settings_name_the_protocol_of_their_benchmark():
    class Given:
        fiq_protocol = "val-split"
        circo_query = "concept"

    found = [benchmark_class(name).protocol_of(Given) for name in DATASETS]
    assert found == [None, "val-split", "concept"]
    assert [benchmark_class(name).protocol_of(None) for name in DATASETS] == [None, "original", "caption"]


def test_the_loop_s_own_schedule_is_cirr_s():
    config = TrainingConfig()
    own = (config.schedule_epochs, config.warm_up, config.start_divisor)
    assert own == (CIRR.schedule_span(config.num_epochs), CIRR.warm_up(80), CIRR.start_divisor)


def test_one_class_makes_another_benchmark(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "colours", Benchmark)  # and is gone afterwards

    @register_benchmark("colours")
    class Colours(Benchmark):
        name = "Colours"
        part_column, id_column = "colour", "row"
        parts = ("red", "blue")

        @classmethod
        def read(cls, data_path, split, *, part, protocol, missing_images="error", with_targets=False):
            triplets = [Triplet(7, "a", "b", "darker")]
            paths = {name: data_path / name for name in "abc"}
            return Split(split, triplets, paths, dress_type=part, ranks_reference=True)

        @classmethod
        def metrics_of(cls, rankings):
            return {f"{part}@1": recall(ranking.ranks, 1) for part, ranking in rankings.items()}

        def shown(self, metrics):
            return f"red {metrics['red@1']:.0f}"

    benchmark = benchmark_class("Colours").load(Path("folder"), None)
    assert [split.title for split in benchmark.splits] == ["val, red", "val, blue"]
    rankings = [Ranking(torch.tensor([rank]), top=torch.tensor([[1, 2]])) for rank in (0, 1)]
    metrics = benchmark.metrics(rankings)
    assert metrics == {"red@1": 100.0, "blue@1": 0.0}
    assert benchmark.summary(metrics) == "red 100"
    assert query_ranks(benchmark, rankings) == [
        {"colour": "red", "row": 7, "rank": 0},
        {"colour": "blue", "row": 7, "rank": 1},
    ]
    assert named_rankings(benchmark, rankings)[0] == {
        "colour": "red",
        "reference": "a",
        "caption": "darker",
        "target": "b",
        "ranking": ["b", "c"],
    }
    with pytest.raises(InputError, match="--split test: Colours's runs are scored on its validation split"):
        benchmark_class("colours").load(Path("folder"), None, "test")


def test_ranks_of_a_split_without_targets_have_no_recall():
    with pytest.raises(ValueError, match="whose targets are known"):
        CIRR.metrics_of({"": Ranking()})


def test_cirr_s_test_split_has_two_names_and_one_spelling(data):
    (split,) = CIRR.load(data, None, "test").splits
    assert split == CIRR.load(data, None, "test1").splits[0]
    assert split.name == "test1"
    assert all(triplet.target for triplet in split.triplets)
    secret = CIRR.read_parts(data, ["test", "test1"], None)
    assert secret == [replace(split, triplets=[replace(t, target=None) for t in split.triplets])]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("blip_validate.py", ("--model-path", "x.pt", "--split", "test")),
        ("extract_features.py", ("--feature-cache", "cache", "--splits", "test1")),
        ("visualize_gates.py", ("--model-path", "x.pt", "--split", "test")),
    ],
)
def test_scripts_take_the_other_name_of_cirr_s_test_split(script, flags, tmp_path):
    _, stderr = run(script, "--dataset", "CIRR", "--data-path", tmp_path, *flags, code=2)
    assert "cirr_dataset" in stderr.splitlines()[-1]  # the flag is taken; the data are what is missing
    assert "usage" not in stderr
