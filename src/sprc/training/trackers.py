"""Where a run can be watched beside its CSV files: TensorBoard, Weights & Biases, MLflow.

A class a tracker, and :class:`Trackers` around those of a run, of which rank 0 alone has any. A tracker's
package is imported where the tracker is asked for. What a tracker raises ends no run: the user is told once,
and the tracker nothing more.

A run's folder keeps by what name each tracker knows the run, so that a resumed run and a report go on there.
What gives access (a key, the address of a server) is in the environment alone.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from tqdm import tqdm

from sprc.distributed import rank
from sprc.errors import InputError, Interrupted
from sprc.files import write_json
from sprc.run_folder import RunFolder
from sprc.tables import number

PROJECT = "sprc"  # at wandb, and MLflow's experiment, where the environment names none
REPORT = "report"  # the group of figures and tables
# Seconds that wandb may upload for at the end of a run whose network is gone; `wandb sync` does the rest.
FINISH_SECONDS = 300
# MLflow's own are 7 and 120: a server that is gone would hold a run for up to half an hour.
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
MLFLOW_AT_ONCE = 100  # settings a request
MLFLOW_LONGEST = 500  # letters of one


class Tracker(ABC):
    """A run as one tracker shows it. Any method may raise what its package raises.

    Args:
        folder: the run's.
        known: by what :meth:`start` returned of the same run earlier, or None.
    """

    packages: ClassVar[tuple[str, ...]]  # the module to import, and what to install

    def __init__(self, folder: RunFolder, known: str | None) -> None:
        self.folder, self.known = folder, known

    @abstractmethod
    def start(self) -> str | None:
        """Find the run or make it; return by what it is found again, if it has to be."""

    @abstractmethod
    def begin(self, settings: Mapping[str, Any]) -> None:
        """The training begins or goes on, with these settings."""

    @abstractmethod
    def log(self, group: str, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        """The values of a group at a step of the run, or at the end of an epoch."""

    @abstractmethod
    def add(self, file: Path) -> None:
        """A figure (PNG) or a table (CSV)."""

    @abstractmethod
    def close(self, ending: str | None) -> None:
        """The process is done with the run: an ending of :data:`ENDINGS`, None where it was not trained."""


ENDINGS = ("finished", "stopped", "failed")


class TensorBoard(Tracker):
    """Event files in the run's folder."""

    packages = ("torch.utils.tensorboard", "tensorboard")

    def start(self) -> None:
        """A writer adds to what earlier ones wrote."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder.tensorboard))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """As a text."""
        text = json.dumps(settings, indent=4, default=str)
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, group: str, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        """A scalar each, over epochs or steps."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step if epoch is None else epoch)

    def add(self, file: Path) -> None:
        """A figure as an image, a table as a text in Markdown."""
        name = f"{REPORT}/{file.stem}"
        if file.suffix == ".png":
            import numpy as np
            from PIL import Image

            with Image.open(file) as image:
                self.writer.add_image(name, np.asarray(image.convert("RGB")), dataformats="HWC")
        else:
            header, *rows = read_table(file)
            lines = [header, ["---"] * len(header), *rows]
            self.writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))

    def close(self, ending: str | None) -> None:
        """Write what is left."""
        self.writer.close()


class Wandb(Tracker):
    """Weights & Biases: its server, or without a key or a network its files in the run's folder."""

    packages = ("wandb", "wandb")

    def start(self) -> str:
        """The id is ours, so that it is known before anything is sent."""
        self.wandb = importlib.import_module("wandb")
        name = self.known or uuid.uuid4().hex[:12]
        settings: dict[str, Any] = {
            "console": "off",  # it would put its own streams in the place of this process's
            "disable_git": True,  # an address of a repository may hold a password
            "disable_code": True,
        }
        if hasattr(self.wandb.Settings(), "finish_timeout") and "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings["finish_timeout"] = FINISH_SECONDS
        named: dict[str, Any] = {
            "id": name,
            "name": self.folder.path.absolute().name,
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "dir": os.environ.get("WANDB_DIR", str(self.folder)),
            "settings": self.wandb.Settings(**settings),
        }
        if self.must_stay_offline():
            self.run = self.wandb.init(**named, mode="offline")
            return name
        try:
            self.run = self.wandb.init(**named, resume="allow")
        except Exception as error:
            tell(f"wandb cannot be reached ({one_line(error)}): its files stay in {self.folder}")
            self.wandb.teardown()  # what was begun would hold the run's id
            self.run = self.wandb.init(**named, mode="offline")
        return name

    def must_stay_offline(self) -> bool:
        """Whether the user wants that, or has no key: a training asks nobody for one."""
        if (mode := self.wandb.setup().settings.mode) not in (None, "online"):
            return bool(mode in ("offline", "dryrun"))
        with suppress(TypeError):  # an older version's has no such arguments, and asks
            if not self.wandb.login(prompt=False, verify=False):
                tell(f"wandb has no key (wandb login): its files stay in {self.folder}, for wandb sync")
                return True
        return False

    def begin(self, settings: Mapping[str, Any]) -> None:
        """As the run's config. What is of an epoch is drawn over epochs."""
        self.run.config.update(json.loads(json.dumps(settings, default=str)), allow_val_change=True)
        for axis, groups in (("epoch", EPOCH_GROUPS), ("step", STEP_GROUPS)):
            for group in groups:
                self.run.define_metric(f"{group}/*", step_metric=axis)

    def log(self, group: str, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        """Under the step of the run, which wandb wants to grow."""
        axis = {"step": step} if epoch is None else {"epoch": epoch}
        self.run.log({**{f"{group}/{name}": value for name, value in values.items()}, **axis}, step=step)

    def add(self, file: Path) -> None:
        """As an image or a table."""
        if file.suffix == ".png":
            shown = self.wandb.Image(str(file))
        else:
            header, *rows = read_table(file)
            shown = self.wandb.Table(columns=header, data=rows)
        self.run.log({f"{REPORT}/{file.stem}": shown})

    def close(self, ending: str | None) -> None:
        """Wait until all is sent."""
        self.run.finish(exit_code=0 if ending in (None, "finished") else 1)


class MLflow(Tracker):
    """MLflow: what MLFLOW_TRACKING_URI names, by default a file store in the run's folder."""

    packages = ("mlflow", "mlflow-skinny")

    def start(self) -> str:
        """A run of the experiment that the environment names, by default "sprc"."""
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if address is None:
            address = self.folder.mlflow.absolute().as_uri()
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow 3 wants it said
        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training tells nobody else that it runs
        self.entities = importlib.import_module("mlflow.entities")
        self.client = importlib.import_module("mlflow").MlflowClient(tracking_uri=address)
        missing = importlib.import_module("mlflow.exceptions").MlflowException
        if self.known is not None:
            try:
                self.client.get_run(self.known)
            except missing as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                tell(f"mlflow has no run {self.known} where it is now looked for; a new one begins")
            else:
                self.run: str = self.known
                return self.run
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if found is None else found.experiment_id
        self.run = self.client.create_run(experiment, run_name=self.folder.path.absolute().name).info.run_id
        return self.run

    def begin(self, settings: Mapping[str, Any]) -> None:
        """As parameters, which cannot change: what a resumed run has anew is a tag, "now.NAME"."""
        told = {plain(name): str(value)[:MLFLOW_LONGEST] for name, value in flat(settings)}
        before = self.client.get_run(self.run).data.params
        new = [self.entities.Param(name, value) for name, value in told.items() if name not in before]
        for start in range(0, len(new), MLFLOW_AT_ONCE):
            self.client.log_batch(self.run, params=new[start : start + MLFLOW_AT_ONCE])
        for name, value in told.items():
            if before.get(name, value) != value:
                self.client.set_tag(self.run, f"now.{name}", value)
        self.client.log_dict(self.run, json.loads(json.dumps(settings, default=str)), "settings.json")
        self.client.update_run(self.run, status="RUNNING")

    def log(self, group: str, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        """A metric each, over epochs or steps."""
        now, place = int(1000 * time.time()), step if epoch is None else epoch
        named = {plain(f"{group}/{name}"): value for name, value in values.items()}
        metrics = [self.entities.Metric(name, value, now, place) for name, value in named.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def add(self, file: Path) -> None:
        """As an artifact."""
        self.client.log_artifact(self.run, str(file), REPORT)

    def close(self, ending: str | None) -> None:
        """Say how the run ended."""
        if ending is not None:
            statuses = dict(zip(ENDINGS, ("FINISHED", "KILLED", "FAILED"), strict=True))
            self.client.set_terminated(self.run, statuses[ending])


KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
# Of wandb's charts: what is drawn over which axis.
EPOCH_GROUPS = ("train_metrics", "validation_metrics", "step_times", "learning_rate")
STEP_GROUPS = ("fusion",)


class Trackers:
    """The trackers of a run; without any, all of this does nothing. As a context it says how the run ended.

    Args:
        active: open trackers by name.
        trains: whether the run is trained now, and not only reported.
    """

    def __init__(self, active: Mapping[str, Tracker] | None = None, *, trains: bool = True) -> None:
        self.active, self.trains = dict(active or {}), trains

    @classmethod
    def start(
        cls, names: Iterable[str], folder: RunFolder, settings: Mapping[str, Any] | None = None
    ) -> Self:
        """Those of ``names`` that can be had, for the run in ``folder``; on ranks above 0 none.

        ``settings`` are told to all; None where the run is not trained, but reported.
        """
        found = cls(trains=settings is not None)
        if rank() == 0:
            found.active = {name: KINDS[name](folder, read_ids(folder).get(name)) for name in names}
            found.each(lambda name, one: keep_id(folder, name, one.start()))
        if settings is not None:
            found.each(lambda _, one: one.begin(settings))
        return found

    def log(self, group: str, values: Mapping[str, float], *, step: int, epoch: int | None = None) -> None:
        """Tell finite ``values`` of the run's step ``step``, or of the epoch that it ends."""
        self.each(lambda _, one: one.log(group, values, step, epoch))

    def add(self, file: Path) -> None:
        """Add a figure (PNG) or a table (CSV)."""
        self.each(lambda _, one: one.add(file))

    def each(self, tell_it: Callable[[str, Tracker], object]) -> None:
        """Tell each tracker; one that fails is put aside."""
        for name, one in list(self.active.items()):
            try:
                tell_it(name, one)
            except Exception as error:
                del self.active[name]
                tell(f"{name} failed ({one_line(error)}) and is told no more; the run goes on without it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = "finished"
        if kind is not None:
            ending = "stopped" if issubclass(kind, (Interrupted, KeyboardInterrupt)) else "failed"
        self.each(lambda _, one: one.close(ending if self.trains else None))
        self.active = {}


def require_trackers(names: Iterable[str]) -> None:
    """Raise :class:`InputError` for a tracker whose package is missing or broken. All ranks call it."""
    for name in names:
        module, package = KINDS[name].packages
        flag = f"--report-to {name}{' (--tensorboard)' if name == 'tensorboard' else ''}"
        advice = f"pip install {package}, or leave the flag out"
        try:
            found = importlib.import_module(module)
        except Exception as error:  # of almost any kind, where its own needs do not fit together
            raise InputError(f"{flag} needs the package {package} ({one_line(error)}); {advice}") from error
        if getattr(found, "__file__", None) is None:  # a folder of that name, as wandb leaves where it ran
            raise InputError(f"{flag} needs the package {package}, which is not installed; {advice}")


def trackers_of(run: Mapping[str, Any]) -> tuple[str, ...]:
    """The trackers that a run's hyperparameters name, each once; those that are unknown are left out."""
    told = run.get("report_to")
    names = ["tensorboard"] * bool(run.get("tensorboard")) + list(told if isinstance(told, list) else ())
    return tuple(name for name in dict.fromkeys(names) if name in KINDS)


def read_ids(folder: RunFolder) -> dict[str, str]:
    """By what each tracker knows the run in ``folder``; a broken file says nothing."""
    try:
        found = json.loads(folder.trackers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, str)}


def keep_id(folder: RunFolder, name: str, value: str | None) -> None:
    """Keep by what a tracker knows the run."""
    known = read_ids(folder)
    if value is not None and known.get(name) != value:
        write_json(folder.trackers, {**known, name: value})


def read_table(file: Path) -> list[list[Any]]:
    """The rows of a CSV file under their header, what is a number as a number."""
    with file.open(encoding="utf-8", newline="") as opened:
        header, *rows = csv.reader(opened)
    return [header, *([number(value) for value in row] for row in rows)]


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a mapping of mappings, the names with dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def plain(name: str) -> str:
    """``name`` with the letters that MLflow takes: "mean(R@5+R_s@1)" has others."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def one_line(error: Exception) -> str:
    """What an error says, in one line of some length, without what an address holds before its @."""
    said = re.sub(r"://[^/@\s]*@", "://", " ".join(str(error).split()))
    return said[:200] or type(error).__name__


def tell(message: str) -> None:
    """Say what is no error, beside the bars."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
