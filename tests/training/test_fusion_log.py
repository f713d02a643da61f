"""What is logged of the fusion while it trains: against formulas, by the script, after a resume."""

import json
import math
import re

import pytest
import torch
from helpers.runner import ENVIRONMENT, assert_one_clear_line, read_csv, train
from helpers.small_models import CAPTIONS, random_images, randomise, small_config
from helpers.tracked import mlflow_metric, mlflow_runs, wandb_config, wandb_history
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.training.fusion_log import FusionLog

SECRET = "0123456789abcdef0123456789abcdef01234567"


def build(tokenizer, **changes):
    model = Blip2QformerCirAlignPrompt(small_config(fusion_dropout=0.0, dropout=0.0, **changes), tokenizer)
    randomise(model)
    return model.train()


def train_step(model, log):
    image, target = random_images(3, model.config, seed=1), random_images(3, model.config, seed=2)
    model.zero_grad()
    sum(model({"image": image, "target": target, "text_input": CAPTIONS}).values()).backward()
    log.after_backward()


def flat(tensor):
    return tensor.detach().flatten().tolist()


def test_a_row_is_what_the_formulas_say(tokenizer, tmp_path):
    model = build(tokenizer)
    log = FusionLog(model.gated_fusion, tmp_path, every=2)
    seen = []
    model.gated_fusion.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    for _ in range(3):
        train_step(model, log)
    rows = read_csv(tmp_path / "fusion_metrics.csv")
    assert [row["step"] for row in rows] == ["0", "2"]
    image, output = seen[2]
    gate = flat(output.gate)
    mean = sum(gate) / len(gate)
    deltas = [math.sqrt(sum(v * v for v in flat(one))) for one in output.delta]
    gradients = {name: flat(p.grad) for name, p in model.gated_fusion.named_parameters()}
    expected = {
        "gate_mean": mean,
        "gate_std": math.sqrt(sum((v - mean) ** 2 for v in gate) / (len(gate) - 1)),
        "gate_near_0": sum(v < 0.05 for v in gate) / len(gate),
        "gate_near_1": sum(v > 0.95 for v in gate) / len(gate),
        "delta_norm": sum(deltas) / len(deltas),
        "alpha": 0.8,
        "mean_change": sum(abs(v) for v in flat(output.fused - image)) / len(gate),
        "gradient_norm": math.sqrt(sum(v * v for values in gradients.values() for v in values)),
    }
    for part in ("text_proj", "delta_mlp", "gate_mlp"):
        of_part = [v for name, values in gradients.items() if name.startswith(part) for v in values]
        expected[f"gradient_norm_{part}"] = math.sqrt(sum(v * v for v in of_part))
    assert set(rows[1]) == {"step", *expected}
    for name, value in expected.items():
        assert float(rows[1][name]) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("strategy", ["additive", "film", "tirg", "gmu"])
def test_a_strategy_without_gate_delta_or_alpha_has_no_such_column(tokenizer, tmp_path, strategy):
    model = build(tokenizer, fusion_strategy=strategy)
    train_step(model, FusionLog(model.gated_fusion, tmp_path, every=1))
    (row,) = read_csv(tmp_path / "fusion_metrics.csv")
    assert ("gate_mean" in row) == (strategy in ("tirg", "gmu"))
    assert ("delta_norm" in row) == (strategy == "additive")
    assert {"mean_change", "gradient_norm"} <= set(row)


@pytest.mark.parametrize(("strategy", "part"), [("cross", "query"), ("select", "relevance")])
def test_a_direction_for_each_token_is_logged_by_its_mean_norm(tokenizer, tmp_path, capsys, strategy, part):
    model = build(tokenizer, fusion_strategy=strategy, fusion_top_k=3)
    log, seen = FusionLog(model.gated_fusion, tmp_path, every=1), []
    model.gated_fusion.register_forward_hook(lambda _, inputs, output: seen.append(output))
    train_step(model, log)
    (row,) = read_csv(tmp_path / "fusion_metrics.csv")
    norms = [math.sqrt(sum(v * v for v in token)) for one in seen[0].delta.tolist() for token in one]
    assert len(norms) == 3 * (3 if strategy == "select" else model.config.num_patches**2 + 1)
    assert float(row["delta_norm"]) == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    gate = flat(seen[0].gate)
    assert float(row["gate_mean"]) == pytest.approx(sum(gate) / len(gate), rel=1e-4)
    assert float(row["gate_near_0"]) < 0.9  # a token that is not chosen is no closed gate
    assert float(row["alpha"]) == pytest.approx(0.8)
    assert float(row[f"gradient_norm_{part}"]) > 0
    assert "has stopped" not in capsys.readouterr().err


def test_a_saturated_gate_and_a_missing_gradient_are_warned_of_once(tokenizer, tmp_path, capsys):
    model = build(tokenizer)
    with torch.no_grad():
        model.gated_fusion.gate_mlp[-1].bias.fill_(50.0)
        model.gated_fusion.alpha.zero_()
        for parameter in model.gated_fusion.parameters():
            parameter.requires_grad_(False)
    log = FusionLog(model.gated_fusion, tmp_path, every=1)
    for _ in range(3):
        train_step(model, log)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "100 % of the gate's values" in warnings[0]
    assert "no gradient" in warnings[1]


def test_a_step_that_the_scaler_skips_has_no_gradient_to_tell_and_no_warning(tokenizer, tmp_path, capsys):
    """float16's scaler finds its scale by steps that overflow; here it starts where float32 overflows."""
    model = build(tokenizer)
    told = Told()
    log = FusionLog(model.gated_fusion, tmp_path, every=1, trackers=told)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    samples = {"image": random_images(3, model.config, 1), "target": random_images(3, model.config, 2)}
    skipped = []
    while not skipped or skipped[-1]:
        scale = scaler.get_scale()
        model.zero_grad()
        total = 1000 * sum(model({**samples, "text_input": CAPTIONS}).values())
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        log.after_backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scale)
    rows = read_csv(tmp_path / "fusion_metrics.csv")
    assert rows[0]["gradient_norm"] == rows[0]["gradient_norm_gate_mlp"] == ""
    assert float(rows[0]["gate_mean"]) > 0
    assert float(rows[-1]["gradient_norm"]) > 0
    found = [step for step, values in told.rows if "gradient_norm" in values]
    assert found == [step for step, row in enumerate(rows) if row["gradient_norm"]] != []
    assert "warning" not in capsys.readouterr().err


class Told:
    """Keeps what trackers are told; infinity and what is no number would be drawn there."""

    def __init__(self):
        self.rows = []

    def log(self, group, values, *, step):
        assert group == "fusion"
        assert all(map(math.isfinite, values.values()))
        self.rows.append((step, values))


def test_a_healthy_module_and_validation_say_nothing(tokenizer, tmp_path, capsys):
    model = build(tokenizer)
    log = FusionLog(model.gated_fusion, tmp_path, every=1)
    model.eval()
    model.inference(torch.randn(3, 10, 24), torch.randn(2, 5, 8), CAPTIONS)
    log.after_backward()
    assert not (tmp_path / "fusion_metrics.csv").exists()
    train_step(model.train(), log)
    assert len(read_csv(tmp_path / "fusion_metrics.csv")) == 1
    assert "warning" not in capsys.readouterr().err


def test_a_resumed_run_writes_the_rows_from_its_step_anew(tokenizer, tmp_path):
    model = build(tokenizer)
    log = FusionLog(model.gated_fusion, tmp_path, every=1)
    for _ in range(4):
        train_step(model, log)
    before = read_csv(tmp_path / "fusion_metrics.csv")
    again = build(tokenizer)
    log = FusionLog(again.gated_fusion, tmp_path, every=1, step=2)
    assert read_csv(tmp_path / "fusion_metrics.csv") == before[:2]
    train_step(again, log)
    assert [row["step"] for row in read_csv(tmp_path / "fusion_metrics.csv")] == ["0", "1", "2"]
    FusionLog(build(tokenizer).gated_fusion, tmp_path, every=1)
    assert not (tmp_path / "fusion_metrics.csv").exists()


@pytest.mark.slow
def test_the_script_logs_and_its_flags_reach_the_module(data, tmp_path, monkeypatch):
    flags = ("--log-fusion-every", 4, "--fusion-lr", 1e-2, "--fusion-text", "contextual", "--tensorboard")
    monkeypatch.setitem(ENVIRONMENT, "WANDB_API_KEY", SECRET)
    run_folder, _, _ = train(data, tmp_path, *flags, "--report-to", "wandb", "mlflow")
    rows = read_csv(run_folder / "fusion_metrics.csv")
    assert_other_trackers_have(run_folder, "fusion", "step", rows)
    assert_tensorboard_has(run_folder, "fusion", "step", rows)
    for name in ("train_metrics", "validation_metrics"):
        assert_tensorboard_has(run_folder, name, "epoch", read_csv(run_folder / f"{name}.csv"))
        assert_other_trackers_have(run_folder, name, "epoch", read_csv(run_folder / f"{name}.csv"))
    settings = json.loads((run_folder / "training_hyperparameters.json").read_text())
    assert (settings["report_to"], settings["tensorboard"]) == (["wandb", "mlflow"], True)
    assert wandb_config(run_folder / "wandb") == settings
    (run,) = mlflow_runs(run_folder / "mlruns")
    assert json.loads((run / "artifacts/settings.json").read_text()) == settings
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert [row["step"] for row in rows] == ["0", "4", "8"]
    assert all(float(row["gradient_norm"]) > 0 for row in rows)
    slow, _, _ = train(data, tmp_path / "slow", "--log-fusion-every", 4, "--fusion-text", "contextual")
    moves = [abs(float(found[-1]["alpha"]) - 0.5) for found in (rows, read_csv(slow / "fusion_metrics.csv"))]
    assert moves[0] > 3 * moves[1] > 0


def assert_other_trackers_have(run_folder, group, key, rows):
    """So do the files of wandb's offline run and MLflow's store, read by hand."""
    (run,) = mlflow_runs(run_folder / "mlruns")
    for name in set(rows[0]) - {key}:
        expected = {int(row[key]): pytest.approx(float(row[name]), rel=1e-12) for row in rows}
        assert wandb_history(run_folder / "wandb", f"{group}/{name}", key) == expected
        assert mlflow_metric(run, re.sub("[()@+]", "_", f"{group}/{name}")) == expected


def assert_tensorboard_has(run_folder, group, key, rows):
    """TensorBoard's own reader finds the numbers of a CSV file, at its steps."""
    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    for name in set(rows[0]) - {key}:
        found = [(event.step, event.value) for event in events.Scalars(f"{group}/{name}")]
        assert [step for step, _ in found] == [int(row[key]) for row in rows]
        assert [value for _, value in found] == pytest.approx([float(row[name]) for row in rows], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--log-fusion-every", -1), "--log-fusion-every -1"),
        (("--fusion-lr", 0), "the learning rate of gated_fusion.* 0.0 must be a positive number"),
        (("--fusion-lr", 1e-3, "--no-use-gated-fusion"), "--fusion-lr 0.001: fusion is off"),
        (("--fusion-text", "contextual", "--pool", "all"), "pool='all'"),
    ],
)
def test_flags_that_do_not_fit_are_one_clear_line(data, tmp_path, flags, message):
    _, _, stderr = train(data, tmp_path, *flags, code=2)
    assert_one_clear_line(stderr, message)
    assert not list(tmp_path.iterdir())
