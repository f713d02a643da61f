"""Too little memory, shared memory or open files: one line says what helps, and what was saved stays."""

import os
import re
import resource
import runpy
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.runner import ROOT
from torch.utils.data import DataLoader

from sprc.data import shared_memory
from sprc.data.shared_memory import check_shared_memory
from sprc.errors import InputError, OutOfResources, explained, ran_out_of_memory
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.device import memory_explained, place, training_helps

GPU = torch.device("cuda", 0)
ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which ..."
)


@pytest.fixture
def script(monkeypatch, capsys):
    """``script("blip_validate.py", *flags)`` runs it in this process: its exit code and its error."""

    def start(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "src" / name), run_name="__main__")
        told = capsys.readouterr()
        errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, told.err
        assert "Traceback" not in told.err
        return stop.value.code, errors[0]

    return start


def training(data, models, *flags):
    return (
        *("--dataset", "CIRR", "--backbone", "tiny", "--data-path", data, "--models-path", models),
        *("--num-epochs", 1, "--batch-size", 16, "--learning-rate", 1e-3, "--num-workers", 0, *flags),
    )


# --- memory


def real_errors():
    for make in (lambda: torch.empty(2**60), lambda: bytearray(2**62)):
        try:
            make()
        except (RuntimeError, MemoryError) as error:
            yield error
    yield torch.OutOfMemoryError(ON_A_GPU)
    yield RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
    yield RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    yield OSError(12, "Cannot allocate memory")  # at the start of a reader


def test_what_is_an_error_of_memory():
    assert all(ran_out_of_memory(error) for error in real_errors())
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError("No space left")):
        assert not ran_out_of_memory(other)
        assert explained(other) is other
    for error in real_errors():
        assert isinstance(explained(error), OutOfResources)
        assert "\n" not in str(explained(error))


def test_the_line_has_batch_memory_and_what_helps_best_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**29, 80 * 2**30))
    helps = training_helps(0, has_cache=False, frozen_vit=True)
    with pytest.raises(OutOfResources) as caught, memory_explained(GPU, 128, helps):
        raise torch.OutOfMemoryError(ON_A_GPU)
    assert str(caught.value) == (
        "memory ran out on cuda:0 with --batch-size 128 (1.5 of 80.0 GiB are free); what helps, best first: "
        "--grad-cache 16, at the same result, --feature-cache DIR, a smaller --batch-size. What was saved "
        "stays"
    )
    with pytest.raises(ValueError, match="no memory"), memory_explained(GPU, 128, helps):
        raise ValueError("no memory")


@pytest.mark.parametrize(
    ("grad_cache", "has_cache", "frozen_vit", "expected"),
    [
        (16, True, True, ["--grad-cache below 16", "a smaller --batch-size"]),
        (0, False, False, ["--grad-cache 16, at the same result", "a smaller --batch-size"]),
    ],
)
def test_what_is_in_use_or_impossible_is_not_advised(grad_cache, has_cache, frozen_vit, expected):
    assert training_helps(grad_cache, has_cache=has_cache, frozen_vit=frozen_vit) == expected


def test_a_model_that_does_not_fit_is_said(monkeypatch):
    def to(device):
        raise torch.OutOfMemoryError(ON_A_GPU)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 8 * 2**30))
    model = SimpleNamespace(config=SimpleNamespace(freeze_vit=False), to=to)
    with pytest.raises(OutOfResources, match=r"does not fit into the memory of cuda:0 \(1.0 of 8.0 GiB"):
        place(model, GPU)


def test_training_that_runs_out_of_memory_keeps_its_state(script, data, tmp_path, monkeypatch):
    forward, steps = Blip2QformerCirAlignPrompt.forward, []

    def spent(self, samples):
        steps.append(0)
        if len(steps) == 4:
            raise torch.OutOfMemoryError(ON_A_GPU)
        return forward(self, samples)

    monkeypatch.setattr(Blip2QformerCirAlignPrompt, "forward", spent)
    code, line = script("blip_fine_tune_2.py", *training(data, tmp_path, "--checkpoint-every", 2))
    assert code == 1
    pattern = (
        r"error: memory ran out on cpu with --batch-size 16 \([\d.]+ of [\d.]+ GiB are free\); what helps"
    )
    assert re.match(pattern, line)
    (folder,) = tmp_path.iterdir()
    state = torch.load(folder / "saved_models" / "training_state.pt", weights_only=True)
    assert state["progress"]["step"] == 2


def test_scoring_and_indexing_that_run_out_of_memory_say_what_helps(
    script, data, checkpoint, pictures, tmp_path, monkeypatch
):
    def spent(self, image):
        raise torch.OutOfMemoryError(ON_A_GPU)

    monkeypatch.setattr(Blip2QformerCirAlignPrompt, "encode_image", spent)
    flags = ("--model-path", checkpoint, "--num-workers", 0, "--batch-size", 8)
    for name, more in (
        ("blip_validate.py", ("--dataset", "CIRR", "--data-path", data, *flags)),
        ("cirr_test_submission.py", ("--data-path", data, *flags, "--save-memory")),
        ("search.py", ("index", pictures, "--index", tmp_path / "index", *flags)),
    ):
        code, line = script(name, *more)
        assert code == 1
        assert line.startswith("error: memory ran out on cpu with --batch-size 8 (")
        helps = line.split("best first: ")[1].split(". What")[0].split(", ")
        assert helps[0] == "a smaller --batch-size"
        assert ("--save-memory" in helps) == (name == "blip_validate.py")
        assert ("--gallery-dtype float16" in helps) == (name != "search.py")


# --- shared memory


def free_shared_memory(monkeypatch, size):
    usage = shutil.disk_usage

    def disk_usage(path):
        if path == shared_memory.SHARED_MEMORY:
            return SimpleNamespace(free=size)
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_what_the_readers_hold_is_compared_with_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64e6))
    batch = 2 * 64 * 3 * 224 * 224 * 4  # pixels of a batch of 64 triplets: 77 MB
    check_shared_memory(batch, 0, tmp_path)
    check_shared_memory(batch, 2, tmp_path / "missing")
    check_shared_memory(12_000_000, 2, tmp_path)  # five of them are 60 MB
    with pytest.raises(InputError) as caught:
        check_shared_memory(batch, 2, tmp_path)
    assert str(caught.value) == (
        "--num-workers 2: the processes that read images hold up to 5 batches of 77.1 MB in "
        f"{tmp_path}, and 64.0 MB are free there; give it more (docker run --shm-size 1g), or give "
        "--num-workers 0"
    )
    monkeypatch.setattr(
        shared_memory, "objects_of_all_ranks", lambda own: [own, own, ("another machine", own[1])]
    )
    with pytest.raises(InputError, match=r"5 batches of 12\.0 MB on each of 2 ranks in"):
        check_shared_memory(12_000_000, 2, tmp_path)


def test_the_check_counts_the_batches_that_torch_s_readers_are_asked_for():
    assert DataLoader(range(4), num_workers=1).prefetch_factor == shared_memory.AHEAD


@pytest.mark.skipif(not shared_memory.SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_scripts_look_at_the_shared_memory_before_they_start(script, data, checkpoint, tmp_path, monkeypatch):
    free_shared_memory(monkeypatch, 200_000)
    cache = ("--feature-cache", tmp_path / "cache")
    frozen = ("--dataset", "CIRR", "--backbone", "tiny", "--freeze-vit", "--data-path", data)
    scored = ("--data-path", data, "--model-path", checkpoint, "--num-workers", 1)
    for name, flags in (
        ("blip_fine_tune_2.py", training(data, tmp_path / "models", "--num-workers", 1)),
        (
            "blip_fine_tune_2.py",
            training(data, tmp_path / "models", "--num-workers", 1, "--freeze-vit", *cache),
        ),
        ("blip_validate.py", ("--dataset", "CIRR", *scored)),
        ("cirr_test_submission.py", scored),
        ("extract_features.py", (*frozen, *cache, "--num-workers", 1)),
        ("search.py", ("index", data / "cirr_dataset/dev", "--index", tmp_path / "index", *scored[2:])),
    ):
        code, line = script(name, *flags)
        assert code == 2
        assert line.startswith("error: --num-workers 1: the processes that read images hold up to 3 batches")
        assert "0.2 MB are free there" in line
        assert "--shm-size" in line
    assert not (tmp_path / "models").exists()


# --- what torch says when its readers have used it up


class Fails(torch.utils.data.Dataset):
    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.fail()
        return torch.zeros(1)


def reading(fail):
    with pytest.raises((RuntimeError, OSError)) as caught:
        list(DataLoader(Fails(fail), num_workers=1))
    return str(explained(caught.value))


def test_a_reader_s_death_tells_what_was_spent():
    def killed_by(signum):
        return lambda: os.kill(os.getpid(), signum)

    assert reading(killed_by(signal.SIGBUS)).startswith(
        "the processes that read images have used up the shared memory"
    )
    assert reading(killed_by(signal.SIGKILL)).startswith(
        "a process that reads images was killed, most likely because main"
    )


def fill_shared_memory():
    raise RuntimeError("unable to write to file </torch_31_882_0>: No space left on device (28)")


def test_a_reader_s_error_tells_what_was_spent():
    assert "(docker run --shm-size 8g), or give --num-workers 0" in reading(fill_shared_memory)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_too_many_open_files_are_said():
    """With a limit that lets the reader start, and the real error of what it then sends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd"))) + 1
    dataset = [torch.zeros(2) for _ in range(400)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 60, hard))
    try:
        with pytest.raises((RuntimeError, OSError)) as caught:
            list(DataLoader(dataset, num_workers=1))  # each that is kept keeps a file open
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    told = str(explained(caught.value))
    assert told.startswith("too many files are open at once; allow more (ulimit -n 65536)"), caught.value
