"""Trackers: what each is told, what one does that fails, and who goes on in which run."""

import json
import sys
import types

import pytest
import torch
from helpers.tracked import mlflow_metric, mlflow_runs
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset

from sprc.distributed import rank
from sprc.errors import InputError, Interrupted
from sprc.gates.report import choose_trackers
from sprc.run_folder import RunFolder
from sprc.training import trackers
from sprc.training.loop import Trainer
from sprc.training.optimisation import TrainingConfig
from sprc.training.settings import PretrainingSettings, TrainingSettings
from sprc.training.trackers import Trackers, require_trackers, trackers_of


class Kept(trackers.Tracker):
    """Keeps what it is told; ``fails`` names the call that raises, and from which one on."""

    packages = ("json", "kept")
    fails = None

    def __init__(self, folder, known):
        super().__init__(folder, known)
        self.calls = []

    def note(self, *call):
        self.calls.append(call)
        same = [one for one in self.calls if one[0] == call[0]]
        if self.fails == (call[0], len(same)):
            raise RuntimeError("https://user:word@host\ncannot be reached")

    def start(self):
        self.note("start", self.known)
        return self.known or "an id"

    def begin(self, settings):
        self.note("begin", dict(settings))

    def log(self, group, values, step, epoch):
        self.note("log", group, dict(values), step, epoch)

    def add(self, file):
        self.note("add", file.name)

    def close(self, ending):
        self.note("close", ending)


class Failing(Kept):
    """One that fails at its second row."""

    fails = ("log", 2)


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(trackers, "KINDS", {"kept": Kept, "failing": Failing})


class Items(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index))}

    def set_epoch(self, epoch):
        pass


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.device, self.diagnostics = torch.device("cpu"), {}

    def forward(self, samples):
        return {"loss_first": self.weight * samples["x"].mean()}


def train(folder, names, epochs=2):
    """A training of two steps an epoch; what its trackers are told."""
    (folder / "saved_models").mkdir(exist_ok=True)
    trainer = Trainer(
        OneWeight(), Items(), TrainingConfig(batch_size=4, num_workers=0, num_epochs=epochs), folder
    )
    with Trackers.start(names, RunFolder(folder), {"seed": 3}) as trainer.trackers:
        active = dict(trainer.trackers.active)
        trainer.train(lambda _: {"recall": 40.0, "images": 5}, lambda *_: None)
    return active


def test_a_run_tells_its_settings_curves_rates_and_times_and_how_it_ended(kinds, tmp_path):
    calls = train(tmp_path, ["kept"])["kept"].calls
    assert calls[:2] == [("start", None), ("begin", {"seed": 3})]
    assert calls[-1] == ("close", "finished")
    rows = calls[2:-1]
    assert [(group, step, epoch) for _, group, _, step, epoch in rows] == [
        (group, step, epoch)
        for step, epoch in ((1, 0), (3, 1))
        for group in ("step_times", "train_metrics", "learning_rate", "validation_metrics")
    ]
    told = {group: values for _, group, values, _, epoch in rows if epoch == 1}
    assert told["validation_metrics"] == {"recall": 40.0}
    assert set(told["train_metrics"]) == {"train_loss", "loss_first"}
    assert set(told["step_times"]) == {"median_step_seconds", "data_wait_share"}
    assert list(told["learning_rate"]) == ["base"]
    assert 0 < told["learning_rate"]["base"] <= 1e-5


def test_one_that_fails_is_told_of_once_and_put_aside_and_the_training_goes_on(kinds, tmp_path, capsys):
    active = train(tmp_path, ["failing", "kept"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "warning: failing failed (https://host cannot be reached) and is told no more; "
        "the run goes on without it"
    ]
    assert [call[0] for call in active["failing"].calls] == ["start", "begin", "log", "log"]
    assert active["kept"].calls[-1] == ("close", "finished")
    assert len((tmp_path / "train_metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("call", ["start", "begin", "close"])
def test_one_that_fails_at_its_beginning_or_end_ends_no_run_either(
    kinds, tmp_path, capsys, monkeypatch, call
):
    monkeypatch.setattr(Failing, "fails", (call, 1))
    train(tmp_path, ["failing"], epochs=1)
    assert capsys.readouterr().err.count("warning: failing failed") == 1
    assert (tmp_path / "validation_metrics.csv").exists()


@pytest.mark.parametrize(
    ("error", "ending"),
    [(Interrupted(15), "stopped"), (KeyboardInterrupt(), "stopped"), (FloatingPointError("nan"), "failed")],
)
def test_a_run_that_ends_early_says_so_and_its_error_stays(kinds, tmp_path, error, ending):
    opened = Trackers.start(["kept"], RunFolder(tmp_path), {})
    (one,) = opened.active.values()
    with pytest.raises(type(error)), opened:
        raise error
    assert one.calls[-1] == ("close", ending)


def test_a_resumed_run_and_a_report_go_on_in_the_same_run(kinds, tmp_path):
    train(tmp_path, ["kept"], epochs=1)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"kept": "an id"}
    with Trackers.start(["kept"], RunFolder(tmp_path)) as report:
        (one,) = report.active.values()
        report.add(tmp_path / "curves.png")
    assert one.calls == [("start", "an id"), ("add", "curves.png"), ("close", None)]
    (tmp_path / "trackers.json").write_text("[")
    assert train(tmp_path, ["kept"], epochs=1)["kept"].calls[0] == ("start", None)


def test_ranks_above_0_have_none(kinds, tmp_path, monkeypatch):
    assert rank() == 0
    monkeypatch.setattr(trackers, "rank", lambda: 1)
    assert train(tmp_path, ["kept"], epochs=1) == {}
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ()),
        ({"report_to": ["none"]}, ()),
        ({"tensorboard": True}, ("tensorboard",)),
        ({"tensorboard": True, "report_to": ["wandb", "tensorboard", "wandb"]}, ("tensorboard", "wandb")),
        ({"report_to": ["mlflow", "wandb"]}, ("mlflow", "wandb")),
    ],
)
def test_both_flags_name_trackers_each_once(flags, expected):
    settings = TrainingSettings(**flags)
    settings.check_trackers()
    assert settings.trackers == expected == trackers_of(json.loads(json.dumps(flags)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"report_to": ["comet"]}, "--report-to 'comet' is unknown; choose from none, tensorboard, wandb"),
        ({"report_to": ["none", "wandb"]}, "--report-to none and wandb do not go together"),
        ({"report_to": ["none"], "tensorboard": True}, "--report-to none and --tensorboard do not go"),
    ],
)
def test_trackers_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        TrainingSettings(**flags).check_trackers()


def test_a_pretraining_has_them_too_and_its_weights_do_not_depend_on_them(tmp_path):
    from sprc.training.pretraining import what_decides

    told, untold = (PretrainingSettings(out=tmp_path, report_to=names) for names in (["wandb"], []))
    assert told.trackers == ("wandb",)
    assert what_decides(told) == what_decides(untold)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "--report-to wandb needs the package wandb .*pip install wandb"),
        ("mlflow", "--report-to mlflow needs the package mlflow-skinny .*pip install mlflow-skinny"),
        ("tensorboard", r"--report-to tensorboard \(--tensorboard\) needs the package tensorboard"),
    ],
)
def test_a_missing_package_is_one_clear_line_before_any_work(monkeypatch, name, message):
    require_trackers([])
    monkeypatch.setitem(sys.modules, trackers.KINDS[name].packages[0], None)
    with pytest.raises(InputError, match=message):
        require_trackers([name])


def test_a_folder_of_a_package_s_name_is_not_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(InputError, match="which is not installed"):
        require_trackers(["wandb"])


def test_a_report_goes_to_the_run_s_own_trackers_unless_others_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    assert choose_trackers(folder, None) == ()
    told = {"tensorboard": True, "report_to": ["mlflow", "unknown"]}
    folder.hyperparameters.write_text(json.dumps(told))
    assert choose_trackers(folder, None) == ("tensorboard", "mlflow")
    assert choose_trackers(folder, ["none"]) == ()
    assert choose_trackers(folder, ["tensorboard"]) == ("tensorboard",)


class FakeWandb(types.ModuleType):
    """What of wandb is called, kept; ``refuse`` is how often `init` fails, ``key`` whether there is one."""

    def __init__(self, mode=None, refuse=0, key=True):
        super().__init__("wandb")
        self.__file__ = "wandb.py"
        self.mode, self.refuse, self.key, self.begun, self.ended = mode, refuse, key, [], 0

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, prompt, verify):
        assert (prompt, verify) == (False, False)  # asks neither the user nor the server
        return self.key

    def teardown(self):
        self.ended += 1

    def init(self, **named):
        self.begun.append(named)
        if len(self.begun) <= self.refuse:
            raise OSError("no network")
        return types.SimpleNamespace(finish=lambda exit_code: None)

    class Settings(types.SimpleNamespace):
        """Keeps its keywords."""


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Call it with what the fake is like: then a tracker has begun a run by it."""

    def begin(**fake):
        found = FakeWandb(**fake)
        monkeypatch.setitem(sys.modules, "wandb", found)
        opened = Trackers.start(["wandb"], RunFolder(tmp_path))
        assert list(opened.active) == ["wandb"]
        return found

    return begin


@pytest.mark.parametrize(
    ("fake", "modes", "warning"),
    [
        ({}, [None], ""),
        ({"mode": "offline"}, ["offline"], ""),
        ({"mode": "disabled"}, [None], ""),
        ({"key": False}, ["offline"], "wandb has no key (wandb login): its files stay in"),
        ({"refuse": 1}, [None, "offline"], "wandb cannot be reached (no network): its files stay in"),
    ],
)
def test_wandb_stays_offline_where_it_must_and_says_why(wandb, capsys, fake, modes, warning):
    begun = wandb(**fake)
    assert [one.get("mode") for one in begun.begun] == modes
    assert begun.ended == len(modes) - 1  # what was begun lets go of the run's id
    err = capsys.readouterr().err
    assert warning in err
    assert bool(err) == bool(warning)


def test_wandb_goes_on_in_one_run_and_is_told_of_no_repository(wandb, tmp_path):
    calls = [wandb().begun[0], wandb().begun[0], *wandb(refuse=1).begun]
    assert len({one["id"] for one in calls}) == 1
    for one in calls:
        assert (one["dir"], one["name"], one["project"]) == (str(tmp_path), tmp_path.name, "sprc")
        assert one["settings"].disable_git
        assert one["settings"].console == "off"
    assert [one.get("resume") for one in calls] == ["allow", "allow", "allow", None]


@pytest.fixture
def store(monkeypatch, tmp_path):
    """MLflow's file store of a run; nothing of it is left in the environment."""
    for name in (*trackers.MLFLOW_PATIENCE, "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true" if "MLFLOW_D" in name else "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return RunFolder(tmp_path / "run")


def test_mlflow_s_file_store_holds_the_run_which_goes_on_and_is_reported(store):
    store.path.mkdir()
    metric = "mean(R@5+R_s@1)"
    with Trackers.start(["mlflow"], store, {"seed": 3, "model_config": {"width": 5}, "epochs": 1}) as first:
        first.log("validation_metrics", {metric: 40.5}, step=7, epoch=0)
        first.log("fusion", {"alpha": 0.25}, step=4)
    (run,) = mlflow_runs(store.mlflow)
    assert (run / "params/seed").read_text() == "3"
    assert (run / "params/model_config.width").read_text() == "5"
    assert json.loads((run / "artifacts/settings.json").read_text())["model_config"] == {"width": 5}
    assert (run / "tags/mlflow.runName").read_text() == "run"
    assert "status: 3" in (run / "meta.yaml").read_text()  # finished

    again = Trackers.start(["mlflow"], store, {"seed": 3, "epochs": 2})
    assert "status: 1" in (run / "meta.yaml").read_text()  # goes on
    again.log("validation_metrics", {metric: 41.5}, step=15, epoch=1)
    with pytest.raises(FloatingPointError), again:
        raise FloatingPointError
    assert mlflow_runs(store.mlflow) == [run]
    assert mlflow_metric(run, "validation_metrics/mean_R_5_R_s_1_") == {0: 40.5, 1: 41.5}
    assert mlflow_metric(run, "fusion/alpha") == {4: 0.25}
    assert (run / "params/epochs").read_text() == "1"
    assert (run / "tags/now.epochs").read_text() == "2"
    assert "status: 4" in (run / "meta.yaml").read_text()  # failed

    store.recall_table.write_text("query,R@1\ntext only,5.0\n")
    with Trackers.start(["mlflow"], store) as report:
        report.add(store.recall_table)
    assert (run / "artifacts/report/recall_table.csv").read_bytes() == store.recall_table.read_bytes()
    assert "status: 4" in (run / "meta.yaml").read_text()  # a report does not end a run


def test_mlflow_begins_anew_where_the_store_is_another(store, capsys):
    store.path.mkdir()
    store.trackers.write_text(json.dumps({"mlflow": "0" * 32, "wandb": "other"}))
    with Trackers.start(["mlflow"], store, {}) as opened:
        assert list(opened.active) == ["mlflow"]
    assert f"mlflow has no run {'0' * 32}" in capsys.readouterr().err
    (run,) = mlflow_runs(store.mlflow)
    assert json.loads(store.trackers.read_text()) == {"mlflow": run.name, "wandb": "other"}


def test_tensorboard_has_settings_figures_and_tables(tmp_path):
    folder = RunFolder(tmp_path)
    Image.new("RGB", (6, 4), (200, 10, 20)).save(folder.curves)
    folder.recall_table.write_text("query,R@1\ntext only,5.0\n")
    with Trackers.start(["tensorboard"], folder, {"seed": 3}) as opened:
        opened.add(folder.curves)
        opened.add(folder.recall_table)
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    (image,) = events.Images("report/curves")
    assert (image.width, image.height) == (6, 4)
    text = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert '"seed": 3' in text["settings"]
    assert text["report/recall_table"] == "| query | R@1 |\n| --- | --- |\n| text only | 5.0 |"
