"""Which device a script takes, what it says of it, and where it stops. GPUs are pretended: none is needed."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.runner import assert_one_clear_line, run

from sprc.ablation.run import check_devices
from sprc.distributed import read_environment
from sprc.errors import InputError, OutOfResources
from sprc.models import device as rules
from sprc.models.device import choose_device, device_line, find_driver, runs_on, start_device, why_no_gpu
from sprc.training.grad_cache import random_state

A100 = ("NVIDIA A100-SXM4-80GB", (8, 0))
# What PyTorch 2.12's wheel for CUDA 13.0 was built for.
KERNELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def gpus(monkeypatch):
    """``gpus(A100, A100)`` pretends these; returns the devices that were made the current one."""

    def pretend(*them, kernels=KERNELS, dies=None):
        made_current = []

        def properties(index):
            number = torch.device("cuda", index).index if isinstance(index, int) else index.index
            return SimpleNamespace(name=them[number][0], total_memory=79.2 * 2**30, uuid=f"GPU-{number}")

        def ones(*shape, device, dtype):
            assert made_current == [device]  # or the context of another GPU would be made
            if dies is not None:
                raise dies
            return torch.full(shape, 1, dtype=dtype)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in {
            "is_available": lambda: bool(them),
            "device_count": lambda: len(them),
            "get_device_properties": properties,
            "get_device_name": lambda device: properties(device).name,
            "get_device_capability": lambda device: them[device.index][1],
            "get_arch_list": lambda: kernels,
            "set_device": made_current.append,
            "is_bf16_supported": lambda including_emulation: them[0][1] >= (8, 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "ones", ones)
        return made_current

    return pretend


def refused(*arguments):
    with pytest.raises(InputError) as caught:
        choose_device(*arguments)
    return str(caught.value)


# --- the line


@pytest.mark.parametrize(
    ("amp", "capability", "expected"),
    [("auto", (8, 0), "bf16"), ("auto", (7, 5), "fp16"), ("off", (8, 0), "float32")],
)
def test_the_line_names_device_memory_and_precision(gpus, capsys, amp, capability, expected):
    gpus((A100[0], capability))
    assert start_device(None, amp) == torch.device("cuda", 0)
    assert capsys.readouterr().out == f"device: cuda:0, NVIDIA A100-SXM4-80GB, 79.2 GiB, {expected}\n"


def test_the_line_of_a_cpu_and_of_several_ranks(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device_line(torch.device("cpu")) == "device: cpu, 2 threads, float32"
    monkeypatch.setattr(rules, "world_size", lambda: 8)
    assert device_line(torch.device("cpu"), "bf16") == "device: cpu, 2 threads, bf16, 8 ranks"


SCRIPTS = {
    "blip_fine_tune_2.py": ("--dataset", "CIRR", "--data-path", "nowhere"),
    "blip_validate.py": ("--dataset", "CIRR", "--model-path", "nothing.pt"),
    "check_robustness.py": ("--dataset", "CIRR", "--model-path", "nothing.pt", "--data-path", "nowhere"),
    "cirr_test_submission.py": ("--model-path", "nothing.pt", "--data-path", "nowhere"),
    "extract_features.py": ("--dataset", "CIRR", "--feature-cache", "cache", "--data-path", "nowhere"),
    "visualize_gates.py": ("--dataset", "CIRR", "--model-path", "nothing.pt", "--data-path", "nowhere"),
    "report_run.py": ("nowhere",),
    "search.py": ("index", "nowhere", "--model-path", "nothing.pt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_first_what_it_computes_on(script):
    """Before it finds that its files are missing. The tests' scripts see no GPU, and say so."""
    stdout, _ = run(script, *SCRIPTS[script], code=2)
    assert stdout == "device: cpu, 1 thread, float32 (CUDA_VISIBLE_DEVICES hides all GPUs)\n"


def test_a_query_has_only_its_results_on_stdout(picture_index):
    name = next(iter(json.loads((picture_index / "pictures.json").read_text())["pictures"]))[0]
    flags = ("--image", name, "--text", "make it red", "--index", picture_index, "--top", 1)
    stdout, stderr = run("search.py", "query", *flags, "--json")
    assert len(json.loads(stdout)["results"]) == 1
    assert stderr.count("device: cpu") == 1
    stdout, stderr = run("search.py", "query", *flags)
    assert "device" not in stdout
    assert stderr.count("device: cpu") == 1


# --- which names are taken


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:", "cuda:-1", "abacus", "", "hip:0"])
def test_only_cpu_and_cuda_are_devices(name):
    assert refused(name) == f"--device {name!r} cannot be used: give cpu or cuda (cuda:1, ...)"
    with pytest.raises(InputError, match=f"--devices '{name}' cannot be used: give cpu or cuda"):
        check_devices([name])


def test_gradient_caching_refuses_a_device_whose_random_numbers_it_would_not_repeat():
    with pytest.raises(InputError, match="--grad-cache works on cpu and cuda, and the model is on mps"):
        random_state(torch.device("mps"))


def test_a_numbered_gpu_is_made_the_current_one(gpus):
    made_current = gpus(A100, A100)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert made_current == [torch.device("cuda", 1)]
    assert "this machine shows 2 GPUs, numbered from 0; give cuda:0 to cuda:1, or cpu" in refused("cuda:2")


def test_the_cpu_may_always_be_asked_for(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(rules, "why_no_gpu", lambda: "the driver is old")
    assert choose_device("cpu") == choose_device("cpu:0") == torch.device("cpu")
    assert refused(None) == "the driver is old, or give --device cpu to compute without the GPU"
    with pytest.raises(InputError, match="the driver is old"):
        check_devices(None)
    assert refused("cuda") == "--device 'cuda' cannot be used: the driver is old, or give --device cpu"
    for hidden in ("", "-1", "NoDevFiles"):  # is the user's wish
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device(None) == torch.device("cpu")
        assert check_devices(None) == ["cpu"]
        assert "CUDA_VISIBLE_DEVICES hides all GPUs; unset it" in refused("cuda")


def test_an_ablation_takes_every_gpu(gpus):
    gpus(A100, A100)
    assert check_devices(None) == ["cuda:0", "cuda:1"]


# --- GPUs that torch does not reach

VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U16)\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04.2)\n"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """``machine("535.104.05")`` makes the files that its driver shows, and torch's wheel another."""

    def make(version, nodes=("nvidia0", "nvidiactl"), *, cuda="13.0"):
        (tmp_path / "dev").mkdir()
        for name in nodes:
            (tmp_path / "dev" / name).touch()
        if version:
            (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
            (tmp_path / "proc/driver/nvidia/version").write_text(VERSION.format(version))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
        return tmp_path

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(rules, "ask_nvidia_smi", lambda: None)
    return make


HERE = "this machine has an NVIDIA GPU (driver {}), but "
OTHER_WHEEL = "install a PyTorch wheel for CUDA 12.6 (https://pytorch.org/get-started/locally/)"


@pytest.mark.parametrize(
    ("version", "cuda", "needed", "remedy"),
    [
        ("535.104.05", "13.0", 580, f"update the driver, or {OTHER_WHEEL}"),
        ("570.86", "13.0", 580, f"update the driver, or {OTHER_WHEEL}"),
        ("470.256.02", "12.6", 525, "update the driver"),
        ("418.40.04", "11.8", 450, "update the driver"),
    ],
)
def test_a_driver_too_old_for_the_wheel(machine, version, cuda, needed, remedy):
    assert why_no_gpu(machine(version, cuda=cuda)) == (
        f"{HERE.format(version)}PyTorch 2.12.1+cu130 is built for CUDA {cuda}, which needs driver {needed} "
        f"or newer; {remedy}"
    )


def test_a_wheel_without_cuda(machine):
    assert "PyTorch 2.12.1+cu130 is built without CUDA; install a wheel with it" in why_no_gpu(
        machine("580.65.06", cuda=None)
    )


def test_a_container_that_is_given_no_gpu(machine):
    told = why_no_gpu(machine("580.65.06", nodes=()))
    assert told.startswith(HERE.format("580.65.06") + "no device file of it is here")
    assert "--gpus all (docker run)" in told


def test_a_device_file_that_may_not_be_opened(machine, monkeypatch):
    root = machine("580.65.06")
    monkeypatch.setattr(rules, "can_open", lambda node: node.name != "nvidia0")
    assert f"{root}/dev/nvidia0 may not be opened here; ask the scheduler" in why_no_gpu(root)


def test_a_gpu_that_is_not_among_the_visible_ones(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES=7 names no GPU of it" in why_no_gpu(machine("580.65.06"))


def test_torch_s_own_reason_where_nothing_else_explains_it(machine, monkeypatch):
    def init():
        raise RuntimeError("CUDA unknown error - this may be due to your environment\nmore lines")

    monkeypatch.setattr(torch.cuda, "init", init)
    told = why_no_gpu(machine("580.65.06"))
    assert "does not reach it (CUDA unknown error - this may be due to your environment); see whether" in told


def test_nvidia_smi_is_asked_where_no_file_tells(machine, monkeypatch):
    root = machine(None, nodes=())
    assert why_no_gpu(root) is None
    monkeypatch.setattr(rules, "ask_nvidia_smi", lambda: "535.104.05\n535.104.05\n")
    assert find_driver(root).version == "535.104.05"


def test_windows_linux_has_an_nvidia_gpu_only_with_its_library(machine, tmp_path):
    root = machine(None, nodes=("dxg",))
    assert find_driver(root) is None  # the device is there for every maker's GPU
    (tmp_path / "usr/lib/wsl/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/wsl/lib/libcuda.so.1").touch()
    assert [node.name for node in find_driver(root).nodes] == ["dxg"]


def test_nvidia_smi_that_does_not_answer_tells_nothing(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rules.ask_nvidia_smi() is None
    for text, expected in (("exit 9", None), ("echo 580.65.06", "580.65.06\n")):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert rules.ask_nvidia_smi() == expected


# --- GPUs that the wheel has no kernels for


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((7, 5), KERNELS, True),
        ((8, 9), KERNELS, True),  # on sm_86's code
        ((7, 0), KERNELS, False),
        ((6, 1), KERNELS, False),
        ((11, 0), KERNELS, False),
        ((11, 0), [*KERNELS, "compute_100"], True),  # compiled on the GPU
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
    ],
)
def test_which_kernels_run_on_which_gpu(capability, kernels, runs):
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)(\w?)", kernel) for kernel in kernels]
    assert any(runs_on(match, capability) for match in matches) == runs


@pytest.mark.parametrize(
    ("name", "capability", "remedy"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), OTHER_WHEEL),
        ("Tesla P100-PCIE-16GB", (6, 0), OTHER_WHEEL),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), OTHER_WHEEL),
        ("Tesla K80", (3, 7), "take a newer GPU"),
        ("NVIDIA Next", (13, 0), "install a newer PyTorch"),
    ],
)
@pytest.mark.parametrize("given", [None, "cuda"])
def test_a_gpu_without_kernels_is_named_with_the_wheel_that_has_them(gpus, given, name, capability, remedy):
    gpus((name, capability))
    told = refused(given)
    number = ".".join(map(str, capability))
    assert told.startswith(f"cuda:0 ({name}, compute capability {number}) cannot be used")
    assert "begin at 7.5" in told
    assert remedy in told
    assert told.endswith("or give --device cpu")


def test_a_kernel_that_dies_is_met_at_the_start(gpus):
    gpus(A100, dies=RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be"))
    told = refused(None)
    assert told.startswith(f"cuda:0 ({A100[0]}, compute capability 8.0) cannot compute with PyTorch")
    assert "(CUDA error: no kernel image is available)" in told


def test_a_gpu_that_others_have_filled_is_said(gpus, monkeypatch):
    gpus(A100, dies=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**27, 80 * 2**30))
    with pytest.raises(
        OutOfResources, match=r"has no memory left \(0.1 of 80.0 GiB are free\); end what else"
    ):
        choose_device(None)


# --- ranks and Slurm


@pytest.fixture
def ranks(monkeypatch, gpus):
    """``ranks(number, shown, of_others)``: be this rank of several, that is shown these GPUs."""

    def be(number, shown, seen_by_others):
        made_current = gpus(*shown)
        monkeypatch.setattr(rules, "world_size", lambda: 2)
        for name in ("rank", "local_rank"):
            monkeypatch.setattr(rules, name, lambda: number)
        monkeypatch.setattr(rules, "objects_of_all_ranks", lambda own: seen_by_others(own))
        return made_current

    return be


def test_a_rank_takes_the_gpu_of_its_number(ranks):
    made_current = ranks(1, (A100, A100), lambda own: [("host", "GPU-0"), own])
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert made_current == [torch.device("cuda", 1)]
    assert "--device 'cuda:1' would be that of all ranks" in refused("cuda:1")


def test_a_rank_that_is_shown_one_gpu_of_its_own_takes_it(ranks):
    """Slurm's --gpus-per-task=1: number 0 on each rank, and another GPU on each."""
    ranks(1, (A100,), lambda own: [(own[0], "GPU-of-another-task"), own])
    assert choose_device(None) == torch.device("cuda", 0)


def test_ranks_that_would_share_a_gpu_are_refused(ranks):
    ranks(1, (A100,), lambda own: [own, own])
    assert refused(None).startswith("local rank 1 has no GPU of its own: 1 is shown to it; give torchrun")
    ranks(0, (A100,), lambda own: [own, own])
    assert choose_device(None) == torch.device("cuda", 0)  # the other one says it
    ranks(2, (A100, A100), lambda own: [("host", "GPU-0"), ("host", "GPU-1"), own])
    assert refused(None).startswith("local rank 2 has no GPU of its own: 2 are shown to it")


@pytest.mark.parametrize(("tasks", "starts"), [("1", True), ("4", False), (None, True)])
def test_srun_without_torchrun_is_refused_where_it_starts_several(monkeypatch, tasks, starts):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the job: in a batch script this process is the only one
    if tasks:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    if starts:
        assert read_environment() == (0, 1)
    else:
        with pytest.raises(InputError, match=r"srun started 4 tasks of this script.*srun start torchrun"):
            read_environment()


def test_a_device_that_cannot_be_used_is_one_clear_line(tmp_path):
    flags = ("--dataset", "CIRR", "--data-path", tmp_path, "--feature-cache", tmp_path)
    _, stderr = run("extract_features.py", *flags, "--device", "cuda", code=2)
    assert_one_clear_line(stderr, "--device 'cuda' cannot be used: CUDA_VISIBLE_DEVICES hides all GPUs")
