"""What several test files share: a made data set, a run on it, an index."""

import errno
import os
import shutil
import signal
from pathlib import Path

from helpers.runner import run, train  # first: it says how torch's threads wait

# isort: split
import pytest
import torch
from helpers.searching import make_index, save_model
from helpers.small_models import VOCABULARY

from sprc.models.tokenizer import WordPiece


def pytest_configure(config):
    """Hide the GPUs from all tests but those of them (-m gpu). torch looks when it first needs one.

    A shell's background job ignores Ctrl-C, and nohup's SIGHUP; what the tests start would do so as well.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # runner.py has set it


@pytest.fixture
def read_only(monkeypatch):
    """Call it with a folder: from then on it is as on a read-only disk, for root as well."""

    def lock(folder):
        def guard(name, writes):
            plain = getattr(Path, name)

            def guarded(self, *arguments, **named):
                if self.is_relative_to(folder) and writes(self, *arguments, **named):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
                return plain(self, *arguments, **named)

            monkeypatch.setattr(Path, name, guarded)

        guard("open", lambda path, mode="r", *_, **__: set(mode) & set("wax+"))
        guard("mkdir", lambda path, *_, **__: not path.exists())
        for name in ("unlink", "replace", "rename"):
            guard(name, lambda *_, **__: True)

    return lock


@pytest.fixture(scope="session")
def tokenizer():
    return WordPiece(VOCABULARY)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """72 training images with 144 triplets; 36 images and 36 triplets in val and in test1."""
    out = tmp_path_factory.mktemp("data")
    sizes = ("--train-families", 2, "--val-families", 1, "--test-families", 1, "--train-queries-per-set", 12)
    run("make_demo_data.py", "--out", out, *sizes)
    return out


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run of two epochs with the published flags."""
    models = tmp_path_factory.mktemp("models")
    return train(
        data,
        models,
        *("--blip-model-name", "blip2_cir_align_prompt", "--num-epochs", 2, "--validation-frequency", 1),
        *("--loss-align", 0.4, "--loss-rtc", 0.4, "--target-ratio", 1.25, "--transform", "targetpad"),
        *("--save-training", "--save-best"),
    )


@pytest.fixture(scope="session")
def checkpoint(data, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model.pt", data, 0)


@pytest.fixture(scope="session")
def pictures(data, tmp_path_factory):
    """The 36 pictures of val, in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, path in enumerate(sorted((data / "cirr_dataset/dev").iterdir())):
        (folder / "abc"[number % 3]).mkdir(exist_ok=True)
        shutil.copy(path, folder / "abc"[number % 3] / path.name)
    return folder


@pytest.fixture(scope="session")
def picture_index(pictures, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index"
    make_index(path, pictures, checkpoint)
    return path
