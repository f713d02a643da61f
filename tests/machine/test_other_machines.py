"""Other machines: Windows' Python, disks without locks or read-only, terminals without UTF-8, no compiler."""

import ast
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from threading import Event, Thread

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, assert_one_clear_line, run, train
from helpers.searching import make_index, query
from helpers.small_models import small_config
from packaging.requirements import Requirement
from PIL import Image

from sprc import errors
from sprc import files as locks
from sprc.data.datasets import ImageDataset, TripletDataset, leave_signals_to_parent
from sprc.data.images import image_loader
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.files import append_csv, hold_lock, write_json
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.scoring.feature_cache import open_images
from sprc.search.indexing import PictureDataset
from sprc.training import compilation

# --- which packages go where


def pins():
    return [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]


def environment(system, machine):
    names = {"Linux": ("posix", "linux"), "Darwin": ("posix", "darwin"), "Windows": ("nt", "win32")}
    found = {"platform_system": system, "platform_machine": machine, "python_full_version": "3.11.7"}
    return {**found, "os_name": names[system][0], "sys_platform": names[system][1], "python_version": "3.11"}


ELSEWHERE = (("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64"))


def test_lavis_and_what_has_no_wheels_elsewhere_are_for_linux_on_x86_alone():
    markers = {pin.name: pin.marker for pin in pins()}
    for name in (
        "salesforce-lavis",
        "decord",
        "opencv-python-headless",
        "contexttimer",
        "spacy",
        "fairscale",
    ):
        assert markers[name].evaluate(environment("Linux", "x86_64")), name
        assert not any(markers[name].evaluate(environment(*machine)) for machine in ELSEWHERE), name
    for name in (
        "torch",
        "torchvision",
        "transformers",
        "tokenizers",
        "numpy",
        "pandas",
        "streamlit",
        "pytest",
    ):
        assert markers[name] is None, name


def test_the_extra_of_the_project_has_the_same_marker():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if '"salesforce-lavis' in line]
    marker = Requirement(line.strip().rstrip(",").strip('"')).marker
    assert marker.evaluate(environment("Linux", "x86_64"))
    assert not any(marker.evaluate(environment(*machine)) for machine in ELSEWHERE)


# --- a Python as Windows has it

POOR = f"""
import pkgutil, runpy, signal, sys
import pandas, torch, torch._dynamo, torch.utils.data, transformers.models.bert.tokenization_bert, tqdm, yaml
import matplotlib.pyplot, PIL.Image, os
sys.modules["fcntl"] = None
for name in ("pread", "fork", "getuid", "geteuid", "sched_getaffinity", "getpgid", "killpg"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "sigwaitinfo", "pthread_sigmask", "pause"):
    delattr(signal, name)
sys.path.insert(0, {str(ROOT / "src")!r})
import sprc
for module in pkgutil.walk_packages(sprc.__path__, "sprc."):
    if module.name not in ("sprc.lavis_registration", "sprc.search.page", "sprc.search.app"):
        __import__(module.name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# A terminal and a system whose encoding is ASCII.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def run_in_ascii(*command):
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, env={**ENVIRONMENT, **ASCII}, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.decode("ascii")


@pytest.mark.slow
def test_everything_imports_and_trains_without_what_windows_lacks_and_without_utf_8(data, tmp_path):
    root = tmp_path / "dätä 日本"
    root.mkdir()
    (root / "demo").symlink_to(data)
    stdout = run_in_ascii(
        *("-c", POOR, ROOT / "src" / "blip_fine_tune_2.py"),
        *("--dataset", "CIRR", "--backbone", "tiny", "--freeze-vit", "--data-path", root / "demo"),
        *("--num-epochs", 1, "--batch-size", 48, "--num-workers", 0, "--feature-cache", root / "cache"),
        *("--models-path", root / "models", "--save-training", "--save-best"),
    )
    assert "108 images, 108 of them new" in stdout
    assert not list(root.glob("cache/*/lock.held"))
    (folder,) = (root / "models").iterdir()
    settings = json.loads((folder / "training_hyperparameters.json").read_text())
    assert os.fsencode(settings["models_path"]) == os.fsencode(root / "models")
    assert (folder / "saved_models" / "tuned_clip_arithmetic.pt").exists()


def test_what_reading_processes_are_given_can_be_sent_to_them(tmp_path):
    """Linux forks them; macOS and Windows pickle what they work on."""
    load = image_loader(make_transform("targetpad", 12, 1.25))
    for work in (
        ImageDataset(["a"], {"a": tmp_path / "a.png"}, load),
        TripletDataset([], {}, load, 0),
        PictureDataset({"digest": tmp_path / "a.png"}, make_transform("squarepad", 12)),
    ):
        assert type(pickle.loads(pickle.dumps(work))) is type(work)


def read_until_told(started):
    """What a reading process does: it leaves signals to the process that it reads for."""
    leave_signals_to_parent(0)
    started.set()
    time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_reading_process_ends_when_its_own_process_says_so_and_for_no_other(method):
    context = multiprocessing.get_context(method)
    started = context.Event()
    reader = context.Process(target=read_until_told, args=(started,))
    # As the loader does: what starts threads in a forked process starts them with the signal blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    reader.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    started.wait()
    subprocess.run(["kill", "-TERM", str(reader.pid)], check=True)
    reader.join(0.3)
    assert reader.is_alive()
    reader.terminate()
    reader.join(10)
    assert reader.exitcode == 0


# --- disks without file locks


def no_flock(monkeypatch, number):
    if number is None:
        monkeypatch.setattr(locks, "fcntl", None)
        return

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)


@pytest.mark.parametrize("number", ["flock", None, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_one_at_a_time_holds_a_lock_whatever_the_disk_offers(tmp_path, monkeypatch, capsys, number):
    if number != "flock":
        no_flock(monkeypatch, number)
    told = {"waiting": "waiting for another", "unwritable": ""}
    begun, events = Event(), []

    def second():
        begun.set()
        with hold_lock(tmp_path / "lock", **told):
            events.append("second")

    thread = Thread(target=second)
    with suppress(KeyboardInterrupt), hold_lock(tmp_path / "lock", **told) as inherited:
        assert (inherited is None) == (number != "flock")
        thread.start()
        begun.wait()
        thread.join(0.5)
        events.append("first")
        raise KeyboardInterrupt
    thread.join(30)
    assert events == ["first", "second"]
    printed = capsys.readouterr().out
    assert printed.count("waiting for another") == 1
    if number != "flock":
        assert f"process {os.getpid()} on" in printed
        assert f"if it is gone, delete {tmp_path / 'lock.held'}" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_wait_for_a_lock_can_be_stopped(tmp_path, monkeypatch):
    no_flock(monkeypatch, errno.ENOLCK)
    (tmp_path / "lock.held").write_text("process 7 on elsewhere")
    with hold_lock(tmp_path / "lock", waiting="", unwritable="", stop=["SIGTERM"]) as inherited:
        assert inherited is None or isinstance(inherited, int)
    assert (tmp_path / "lock.held").exists()


def test_a_cache_and_an_index_are_filled_on_a_disk_without_locks(
    tmp_path, monkeypatch, pictures, checkpoint, capsys
):
    no_flock(monkeypatch, errno.ENOLCK)
    make_index(tmp_path / "index", pictures, checkpoint)
    make_index(tmp_path / "index", pictures, checkpoint, rebuild=True)
    assert "36 pictures (0 new" in capsys.readouterr().out
    assert not (tmp_path / "index" / "lock.held").exists()


# --- terminals and names


def test_a_query_needs_no_utf_8_terminal(data, tmp_path, picture_index):
    picture = tmp_path / "reférence.png"
    shutil.copy(data / "cirr_dataset/dev/dev-0-0-img0.png", picture)
    stdout = run_in_ascii(
        *(ROOT / "src" / "search.py", "query", "--index", picture_index, "--image", picture, "--json"),
        *("--text", "make the cïrcle blue", "--sheet", tmp_path / "größe.png"),
    )
    assert json.loads(stdout)["text"] == "make the cïrcle blue"
    assert (tmp_path / "größe.png").exists()


def test_a_name_that_the_system_s_encoding_lacks_is_one_line(capsys):
    def main():
        raise UnicodeEncodeError("ascii", "bé.png", 1, 2, "ordinal not in range(128)")

    with pytest.raises(SystemExit) as stop:
        errors.run_script(main)
    assert stop.value.code == 2
    assert_one_clear_line(
        capsys.readouterr().err, "'b\\xe9.png' has letters that this system's encoding (ascii)"
    )


def test_every_text_file_is_opened_as_utf_8():
    """Without it Python takes the system's encoding, which is another on Windows."""
    text_methods = {"read_text", "write_text"}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name == "open" and ast.unparse(node.func).split(".")[0] in ("Image", "Searcher", "os", "cls"):
                continue
            mode = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            mode += [k.value.value for k in node.keywords if k.arg == "mode"]
            conditional = any(isinstance(a, ast.IfExp) for a in node.args)  # "r+b" or "w+b"
            is_binary = name == "open" and (conditional or any("b" in m for m in mode))
            if name in text_methods or (name == "open" and not is_binary):
                given = {keyword.arg for keyword in node.keywords}
                assert "encoding" in given, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


# --- writes that fail, and folders that cannot be written

FAILURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.ENOENT: "its folder is gone; make it again",
    errno.EACCES: "it is not writable for you",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk fails",
}


@pytest.mark.parametrize("number", FAILURES)
def test_a_failed_write_is_told_with_what_helps(tmp_path, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    write_json(tmp_path / "a.json", [1])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="cannot write") as caught:
        write_json(tmp_path / "a.json", [2])
    assert FAILURES[number] in str(caught.value)
    assert ("free some space" in str(caught.value)) == (FAILURES[number] == "free some space")
    assert caught.value.errno == number
    assert json.loads((tmp_path / "a.json").read_text()) == [1]


def test_where_results_go_is_looked_at_before_the_work(data, checkpoint, tmp_path):
    (tmp_path / "file").touch()
    scoring = ("--model-path", checkpoint, "--data-path", data)
    _, stderr = run("cirr_test_submission.py", *scoring, "--out", tmp_path / "file" / "out", code=2)
    assert_one_clear_line(stderr, "cannot be made (Not a directory); give another folder")
    assert "encode" not in stderr
    for flag in ("--save-ranks", "--save-rankings"):
        flags = ("--dataset", "CIRR", *scoring, flag, tmp_path / "gone" / "a")
        _, stderr = run("blip_validate.py", *flags, code=2)
        assert_one_clear_line(stderr, f"{flag} {tmp_path / 'gone' / 'a'}: its folder does not exist")
        assert "encode" not in stderr
        _, stderr = run("blip_validate.py", "--dataset", "CIRR", *scoring, flag, tmp_path, code=2)
        assert_one_clear_line(stderr, f"{flag} {tmp_path} is a folder; give a file")
        assert "encode" not in stderr
    _, stderr = run("cirr_test_submission.py", *scoring, "--out", tmp_path, "--name", "a/b", code=2)
    assert_one_clear_line(stderr, "--name a/b names a folder, too; give --out for the folder")
    assert "encode" not in stderr


def test_a_folder_that_is_gone_or_read_only_is_told_as_that(tmp_path, read_only):
    for write in (write_json, append_csv):
        with pytest.raises(OSError, match="its folder is gone"):
            write(tmp_path / "gone" / "a", {"b": 1})
    read_only(tmp_path)
    for write in (write_json, append_csv):
        with pytest.raises(OSError, match="the disk is read-only"):
            write(tmp_path / "a", {"b": 1})


@pytest.fixture
def filled(tokenizer, tmp_path):
    """A frozen model, some images, and a function that opens them through a cache."""
    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer).eval()
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (20 + number, 30), (50 * number, 90, 7)).save(paths[-1])

    def open_cache(paths, transform="targetpad"):
        preprocessing = {"transform": transform, "target_ratio": 1.25}
        sizes = {"batch_size": 2, "num_workers": 0}
        folder = tmp_path / "cache"
        return open_images(model, preprocessing, paths, feature_cache=folder, cache_dtype="float32", **sizes)

    return open_cache, paths


def test_a_complete_cache_is_read_from_a_read_only_disk(filled, tmp_path, monkeypatch, read_only, capsys):
    open_cache, paths = filled
    monkeypatch.setattr(locks, "SETTLED_NS", -(10**18))  # files so new are not written down else
    before = [open_cache(paths)(path) for path in paths]
    (files,) = tmp_path.glob("cache/*/files.json")
    files.write_text("{}")
    capsys.readouterr()
    read_only(tmp_path / "cache")
    load = open_cache(paths)
    assert all(torch.equal(load(path), old) for path, old in zip(paths, before, strict=True))
    printed = capsys.readouterr().out
    assert "4 images, 0 of them new" in printed
    assert "cannot be written: images are read at every start to know them" in printed
    assert files.read_text() == "{}"


def test_what_a_read_only_cache_lacks_is_one_clear_line(filled, tmp_path, read_only):
    open_cache, paths = filled
    open_cache(paths[:3])
    read_only(tmp_path / "cache")
    with pytest.raises(InputError, match=r"cannot be written .*; 1 images are missing in it: fill it where"):
        open_cache(paths)
    with pytest.raises(InputError, match=r"holds nothing for this model and preprocessing, and cannot be"):
        open_cache(paths, "squarepad")


def test_an_index_is_searched_on_a_read_only_disk_and_not_changed_there(
    picture_index, pictures, checkpoint, read_only, capsys
):
    read_only(picture_index)
    query(picture_index)
    assert len(capsys.readouterr().out.splitlines()) == 5
    with pytest.raises(InputError, match=r"cannot be written .*; give an --index that can be written"):
        make_index(picture_index, pictures, checkpoint)


# --- torch.compile


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compile_asks_for_a_compiler_before_the_run(tmp_path, monkeypatch, device):
    variable = {"cpu": "CXX", "cuda": "CC"}[device]
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"--compile needs a compiler, and .* is not in PATH; install one"):
        compilation.require_compiler(torch.device(device))
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(InputError, match=f"{variable}=no-such-compiler is none"):
        compilation.require_compiler(torch.device(device))
    monkeypatch.setenv(variable, sys.executable)
    compilation.require_compiler(torch.device(device))
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    if device == "cuda":
        with pytest.raises(InputError, match="needs the package triton"):
            compilation.require_compiler(torch.device(device))


def test_a_run_that_cannot_compile_ends_in_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "CXX", "no-such-compiler")
    folder, _, stderr = train(data, tmp_path / "none", "--compile", code=2)
    assert folder is None
    assert_one_clear_line(stderr, "--compile needs a compiler, and CXX=no-such-compiler is none")


def test_what_torch_compile_cannot_build_is_one_line_and_other_errors_are_left_alone():
    def broken(*_):
        raise ValueError("no such operator\nand a page more")

    compiled = torch.compile(lambda x: x + 1, backend=broken)
    message = r"--compile: torch.compile failed \(.*no such operator\); leave the flag out"
    with pytest.raises(InputError, match=message), compilation.told_compile_errors():
        compiled(torch.ones(2))
    with pytest.raises(RuntimeError, match="another"), compilation.told_compile_errors():
        raise RuntimeError("another")
