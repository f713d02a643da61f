"""The benchmarks run, their table holds together, what they measure with is right. No figure is judged."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT
from torch import nn

from sprc.config import ModelConfig
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.splits import SyntheticConfig

sys.path.insert(0, str(ROOT / "benchmarks"))

import estimate
import fusion
import grad_cache
import measure
import memory
import products
import quality
import run as bench
import scaling
import steps
from published import HAS_LAVIS

MEGABYTE = 10**6
QUICK = measure.Settings(device="cpu", repeats=1, quick=True)


@pytest.mark.slow
def test_a_quick_run_prints_and_saves_its_table(tmp_path) -> None:
    out = tmp_path / "results.md"
    names = ("epoch", "fusion", "overhead", "ranking")
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "--repeats", "2", "--device", "cpu"]
    command = [*map(str, command), "--out", str(out), "--only", *names]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert result.returncode == 0, result.stderr
    assert out.read_text() == result.stdout

    head, rule, *rows = (
        [cell.strip() for cell in line[1:-2].split("|")] for line in result.stdout.splitlines()
    )
    assert head[:2] == ["measured", "wanted"]
    assert re.search(r"cores, 1 threads, torch \d.*, quick, \d{4}-\d\d-\d\d$", head[2])
    assert rule == ["---"] * 3
    for name in ("epoch", "fusion, naive", "fusion on against off", "ranking, published"):
        assert any(row[0].startswith(name) for row in rows), name
    ratios = 0
    for name, wanted, cell in rows:
        judged = cell.endswith(("; reached", "; **not reached**"))
        assert judged == (wanted != "") or cell.startswith(measure.NOT_MEASURED), name
        if found := re.match(r"([\d.]+) x \(([\d.]+) to ([\d.]+), \d turn", cell):
            median, least, most = map(float, found.groups())
            assert least <= median <= most, name
            ratios += 1
    assert ratios >= (6 if HAS_LAVIS else 4)
    (figures,) = json.loads(out.with_suffix(".json").read_text()).values()
    assert [row[0] for row in rows] == list(figures)


def test_a_column_of_another_machine_stays_and_gaps_are_empty() -> None:
    def cells(**found: str) -> dict:
        return {
            name: {"wanted": "2 x", "cell": cell, "date": f"2026-01-0{day}"}
            for day, (name, cell) in enumerate(found.items(), start=1)
        }

    lines = bench.table({"one": cells(a="1", b="2"), "other": cells(b="3")}).splitlines()
    assert lines[0] == "| measured | wanted | one, 2026-01-01 to 2026-01-02 | other, 2026-01-01 |"
    assert lines[2:] == ["| a | 2 x | 1 |  |", "| b | 2 x | 2 | 3 |"]


def test_ratios_are_taken_turn_by_turn() -> None:
    row = measure.ratio_row("name", "3 x or more", [2.0, 9.0, 4.0], [1.0, 3.0, 1.0], least=3)
    assert row.cell == "3.00 x (2.00 to 4.00, 3 turns, noisy); 4.00 s against 1.00 s; reached"
    row = measure.ratio_row("name", "1.1 x or less", [0.002, 0.009, 0.004], [0.001] * 3, most=1.1)
    assert row.cell == "4.00 x (2.00 to 9.00, 3 turns, noisy); 4 ms against 1 ms; **not reached**"


def test_sides_take_turns_after_a_warm_up() -> None:
    done = []
    sides = {name: lambda name=name: done.append(name) for name in "AB"}
    times = measure.side_by_side(sides, QUICK._replace(repeats=2), before=lambda: done.append("-"))
    assert "".join(done) == "AB" + "-A-B-A-B"
    assert {name: len(seconds) for name, seconds in times.items()} == {"A": 2, "B": 2}


@pytest.mark.parametrize(
    ("slow", "limit", "turns"),
    [
        ({}, math.inf, 3),  # steady from the start
        ({0: 9.0}, math.inf, 5),  # until the middle half agrees
        ({turn: 2.0 + turn for turn in range(9)}, math.inf, 9),  # never
        ({turn: 2.0 + turn for turn in range(9)}, 6.0, 2),  # the time is up within the second turn
        ({}, 0.5, 1),
    ],
)
def test_turns_go_on_until_they_are_steady_or_the_time_is_up(monkeypatch, slow, limit, turns) -> None:
    clock, done = [0.0], []

    def work() -> None:
        clock[0] += slow.get(len(done) - 1, 1.0)
        done.append(clock[0])

    def other() -> None:
        clock[0] += 1.0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    settings = measure.Settings("cpu", 9, quick=True, seconds=limit)
    times = measure.side_by_side({"other": other, "work": work}, settings)
    assert len(times["work"]) == turns
    assert times["work"] == [slow.get(turn, 1.0) for turn in range(turns)]


def test_products_of_a_step_are_counted_and_made_again() -> None:
    layer = torch.nn.Linear(5, 7)
    rows = torch.randn(3, 5)
    found = products.products_of(lambda: (layer(rows).sum() + layer(rows[:0]).sum()).backward())
    # Forward, and the gradient of the weight; none goes to the rows.
    assert found.flop == 2 * (2 * 3 * 5 * 7)
    pairs = products.products_of(lambda: [torch.randn(4, 3, 5) @ torch.randn(4, 5, 2) for _ in range(3)])
    assert pairs.flop == 3 * (2 * 4 * 3 * 5 * 2)
    for step in (found, pairs):
        assert products.products_of(step.alone()).counts == step.counts


def allocate(megabytes: int, pieces: int):
    """Work that holds ``megabytes`` at once, in equal pieces, after as much again was freed."""

    def work() -> None:
        for _ in range(2):
            held = [torch.ones(megabytes * MEGABYTE // 4 // pieces) for _ in range(pieces)]
            assert len(held) == pieces
            del held

    return work


def test_peak_memory_of_a_known_allocation() -> None:
    peak = measure.peak_memory(allocate, 200, 100, device="cpu")
    assert peak.extra == pytest.approx(200 * MEGABYTE, rel=0.05)
    assert peak.whole > peak.extra


def test_what_lives_at_once_is_added_up() -> None:
    with estimate.Peak() as peak:
        first = torch.empty(1024)  # 4,096 bytes
        first.view(32, 32).add_(1)  # no new ones
        second = first * 2
        del first
        third = second + 1
        del second, third
    assert (peak.now, peak.most) == (0, 8192)


class TwoProducts(nn.Module):
    """(1024, 256) to (1024, 512) to (1024, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)

    def forward(self, samples: dict) -> dict:
        return {"loss": self.down(self.up(samples["x"])).sum()}


def test_a_step_takes_the_bytes_that_are_summed_by_hand() -> None:
    wide, narrow, weights = 4 * 1024 * 512, 4 * 1024 * 256, 4 * 512 * 256
    before = 2 * weights + 2 * 2 * weights + narrow  # both matrices, two moments of each, the batch
    # The most is at the second product's backward: the wide rows, their gradient, and the matrix's own.
    with estimate.FakeTensorMode(), estimate.Peak() as peak:
        model = TwoProducts()
        optimizer = estimate.stepped_once(model)
        samples = {"x": torch.empty(1024, 256)}
        few = 16 * estimate.BLOCK  # scalars: the loss, AdamW's counts of steps
        assert before <= peak.now <= before + few
        estimate.take_step(model, optimizer, samples, None, nullcontext)
    assert before + 2 * wide + weights <= peak.most <= before + 2 * wide + weights + few


def test_the_estimate_of_fake_tensors_is_that_of_real_ones(monkeypatch) -> None:
    config = ModelConfig(**{**steps.SMALL, "dropout": 0.0, "fusion_dropout": 0.0})
    found = {}
    for kind in ("fake", "real"):
        found[kind] = [
            estimate.use_of_steps(config, [batch], chunk, cached=cached)[batch].most
            for batch, chunk, cached in ((4, 0, True), (8, 0, False), (8, 2, False))
        ]
        monkeypatch.setattr(estimate, "FakeTensorMode", lambda **_: nullcontext())
    assert found["fake"] == pytest.approx(found["real"], rel=0.02)
    _, whole, in_chunks = found["fake"]
    assert in_chunks < whole


def test_the_estimate_is_what_is_measured() -> None:
    """Of `tiny` in chunks: 54 MB, beside which the 2 MB that libraries keep are little."""
    row = memory.against_measured(memory.TRIALS[-1], "cpu", 0)
    assert float(row.value.removesuffix(" x")) == pytest.approx(1, abs=0.15), row.cell


def test_the_largest_batch_leaves_a_gigabyte_and_a_tenth() -> None:
    known = {16: 2 * 10**9, 128: 9 * 10**9, 1024: 65 * 10**9}  # 1 GB, and a sixteenth for each triplet
    assert [memory.peak_at(batch, known) for batch in (16, 32, 512, 2048)] == [2, 3, 33, 129]
    assert memory.largest_batch(16, known, 8) == 192  # 13.0 GB of 13.4
    assert memory.largest_batch(2, known, 8) == 0
    assert memory.largest_batch(80, known, 8) == 1024  # 65 GB; nothing larger is said


def test_memory_that_runs_out_is_a_row_and_no_crash(capsys) -> None:
    with pytest.raises(MemoryError, match="killed"):
        measure.in_fresh_process(os._exit, 1)
    case = bench.Case("what was to be measured", __name__, "too_large")
    (row,) = bench.measure(case, QUICK)
    assert row.name == "what was to be measured"
    assert row.cell.startswith("not measured; not enough memory (needs 9999999 GB of memory")


def too_large(_: measure.Settings) -> None:
    measure.require_memory(9999999)


def test_the_fusion_benchmark_sees_a_difference_from_the_formula(monkeypatch) -> None:
    module, inputs = fusion.make_inputs(2, 24, True, "cpu")
    fusion.assert_equal(module, inputs)

    def without_alpha(module, image, text, mask):
        return image + (fusion.naive_fusion(module, image, text, mask) - image) / module.alpha.detach()

    monkeypatch.setitem(fusion.SIDES, "naive", without_alpha)
    with pytest.raises(AssertionError, match="differs from the formula"):
        fusion.assert_equal(module, inputs)


def test_captions_are_of_cirrs_length() -> None:
    lengths = [len(caption.split()) for caption in steps.make_captions(2000)]
    assert 10.5 < sum(lengths) / len(lengths) < 12.5
    assert min(lengths) >= 3
    assert max(lengths) <= 28


def test_the_cached_step_is_held_against_the_plain_one(monkeypatch) -> None:
    grad_cache.assert_equal(QUICK)
    monkeypatch.setattr(grad_cache.GradCache, "backward", lambda self: None)
    with pytest.raises((AssertionError, TypeError)):
        grad_cache.assert_equal(QUICK)


def test_bytes_of_a_ring_are_those_of_its_steps() -> None:
    """R - 1 steps that add up parts of 1 / R, and R - 1 that hand the sums round."""
    for ranks in (2, 8):
        sent = sum(4_000 / ranks for _ in range(2) for _ in range(ranks - 1))
        assert scaling.ring_bytes(4_000, ranks) == pytest.approx(sent)
    moved = scaling.step_bytes(parameters=1_000, ranks=2, batch=1)
    assert moved == {"gradients": 4_000, "features": 32_768, "their gradients": 65_536}
    low, high = scaling.efficiency(1.0, {"gradients": 1e9, "features": 5e8}, gigabytes=1)
    assert (low, high) == pytest.approx((1 / 2.5, 1 / (1 + 1 / 3 + 0.5)))


def test_the_step_on_lavis_equals_ours() -> None:
    pytest.importorskip("lavis", reason="LAVIS is not installed")
    from published import LavisStep

    model = steps.make_model(steps.make_config(True, use_gated_fusion=False), "cpu")
    theirs = LavisStep(model)
    samples = steps.make_samples(model.config, 3, "cpu")
    steps.assert_equal(model, theirs, samples)
    theirs.bert.encoder.layer[1].output.dense.weight.data = torch.zeros(24, 48)
    with pytest.raises(AssertionError):
        steps.assert_equal(model, theirs, samples)


def curve(*points: tuple[float, float], filling: float = 0.0) -> quality.Curve:
    """Of (minutes, validation) after each epoch; the test split is a point below."""
    minutes, values = zip(*points, strict=True)
    below = [value - 1 for value in values]
    return quality.Curve([60 * one for one in minutes], list(values), below, [], filling, validation=3.0)


def test_time_to_quality_is_the_first_epoch_at_the_line() -> None:
    """The line is 63.5: half a point below plain SPRC's best."""
    assert quality.first_epoch([50, 60, 70, 65], line=60) == 1
    assert quality.first_epoch([50, 59.9, 70, 65], line=60) == 2  # and not somewhere between the two
    assert quality.first_epoch([50, 60, 70, 65], line=70.1) is None
    plain = [curve((10, 50), (20, 64), (30, 62))]
    ours = [curve((2, 50), (3, 63.4), (4, 63.5), filling=60.0)]
    worse = [curve((2, 50), (3, 55), (4, 61))]
    rows = quality.rows_of({"plain": plain, "off": ours, "bank": worse})
    assert [row.value for row in rows] == ["20.00 min", "4.00 min", "not reached in 3 epochs"]
    assert "; at the best itself after epoch 2; 600.0 s an epoch; a validation" in rows[0].detail
    assert (
        "; after epoch 3 of 3 with 63.5; test split 62.5; 5.00 x as fast; at the best itself never; "
        in rows[1].detail
    )
    assert "; 60.0 s an epoch; cache filled in 60.0 s" in rows[1].detail
    assert quality.seconds_an_epoch(ours) == [60, 60, 60]
    assert "; best 61.0; at the best itself never; " in rows[2].detail


def test_over_seeds_the_mean_curve_reaches_the_line() -> None:
    """The best is 65, after epoch 2: a seed's own best, 70, is none."""
    plain = [curve((10, 50), (20, 70)), curve((12, 52), (24, 60))]
    ours = [curve((1, 68), (2, 60)), curve((2, 62), (3, 66))]
    first, second = quality.rows_of({"plain": plain, "off": ours})
    assert first.detail.startswith("line 64.5, 0.5 below the best of plain SPRC")
    assert second.value == "1.50 min (1.00 min to 2.00 min)"
    assert "16.00 x (12.00 x to 20.00 x) as fast" in second.detail
    assert "of its own seed, after epoch never, 1" in second.detail
    without = quality.rows_of({"off": plain, "gated": ours})
    assert [row.value for row in without][::2] == ["not measured", "1.50 min (1.00 min to 2.00 min)"]


def test_plain_sprc_trains_on_lavis_as_ours_does(tmp_path) -> None:
    """`tiny` has no dropout: two epochs of both differ by rounding alone, so gradients reach the weights."""
    pytest.importorskip("lavis", reason="LAVIS is not installed")
    make_cirr(tmp_path, SyntheticConfig(train_families=1, val_families=1, test_families=1))
    theirs, ours = (
        quality.train(way._replace(flags={"batch_size": 20}), tmp_path, 2, 0, "cpu")
        for way in (quality.WAYS["plain"], quality.WAYS["off"])
    )
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-4)
    assert theirs.losses[1] < 0.99 * theirs.losses[0]
    assert (theirs.filling, len(theirs.test)) == (0.0, 2)
    assert 0 < ours.filling < ours.seconds[0] < ours.seconds[1]
