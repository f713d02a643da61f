"""The self check as users run it, with small shapes; and with faults planted, which it must find."""

import subprocess
import sys
import warnings

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, assert_one_clear_line

from sprc.errors import InputError
from sprc.self_check import machine, numerics, run, speed, training
from sprc.self_check.report import FAIL, NOTE, OK, SKIP
from sprc.self_check.setting import SHAPES, Setting

SCRIPT = ROOT / "test_gated_fusion.py"


def script(*arguments, code=0):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def setting(tmp_path):
    return Setting(torch.device("cpu"), SHAPES["small"], tmp_path)


def statuses(lines):
    return {line.name: line.status for line in lines}


@pytest.mark.slow
def test_the_self_check_passes_on_a_cpu_and_writes_its_report(tmp_path):
    report = tmp_path / "report.md"
    out, err = script("--device", "cpu", "--shapes", "small", "--report", report)
    assert err == ""
    lines = [line.split(maxsplit=1) for line in out.splitlines()[2:-1]]
    assert {status for status, _ in lines} <= {OK, SKIP, NOTE}
    for check in ("machine", "vit", "gradients", "steps", "grad cache", "resume", "attention", "scoring"):
        assert any(status == OK and text.startswith(check) for status, text in lines), check
    assert sum(text.startswith("gradients, ") for _, text in lines) == 3
    assert "skip waits" in out
    assert "0 failed" in out.splitlines()[-1]
    text = report.read_text()
    assert text.startswith("# Self check, 20")
    assert f"torch: {torch.__version__}" in text
    assert text.count("\n| ") == len(lines) + 1


def test_without_a_gpu_it_says_so_in_one_line_and_goes_on(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run.self_check("cuda", only=["attention"], shapes="small") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("note device")
    assert "on the CPU" in first


def test_a_gpu_that_torch_does_not_reach_fails_with_the_reason(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reason = "this machine has an NVIDIA GPU, but the driver is too old; update it"
    monkeypatch.setattr("sprc.models.device.why_no_gpu", lambda: reason)
    monkeypatch.setattr(machine, "why_no_gpu", lambda: reason)
    assert run.self_check("cuda", only=["attention"], shapes="small") == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL device")
    assert reason in out
    assert "ok   attention, call 1" in out


def test_a_check_that_breaks_fails_in_one_line_and_stops_no_other(monkeypatch, capsys):
    def broken(setting):
        yield from training.check_waits(setting)
        raise ZeroDivisionError("what\nhappened")

    monkeypatch.setitem(run.CHECKS, "waits", broken)
    assert run.self_check("cpu", only=["waits", "attention"], shapes="small") == 1
    out = capsys.readouterr()
    (line,) = [line for line in out.out.splitlines() if line.startswith(FAIL)]
    assert "ZeroDivisionError: what; run it with --only waits --verbose" in line
    assert "ok   attention, ViT" in out.out
    assert "Traceback" not in out.err
    run.self_check("cpu", only=["waits"], shapes="small", verbose=True)
    assert "Traceback" in capsys.readouterr().err


def test_gradient_caching_that_draws_other_numbers_is_found(monkeypatch, setting):
    monkeypatch.setattr("sprc.training.grad_cache.set_random_state", lambda state, device: None)
    lines = list(training.check_grad_cache(setting))
    assert statuses(lines) == {"grad cache, with dropout": FAIL, "grad cache, without dropout": OK}
    assert "without --grad-cache" in lines[0].remedy


def test_a_resume_with_other_random_numbers_is_found(monkeypatch, setting):
    load = training.Trainer.load_state

    def loses_them(self):
        note = load(self)
        torch.manual_seed(7)
        return note

    assert statuses(training.check_resume(setting)) == {"resume": OK}
    monkeypatch.setattr(training.Trainer, "load_state", loses_them)
    assert statuses(training.check_resume(setting)) == {"resume": FAIL}


@pytest.mark.parametrize("fault", ["lost", "wrong"])
def test_a_wrong_gradient_of_one_small_part_is_found(monkeypatch, setting, fault):
    take = numerics.take_gradients

    def spoilt(model, scale=1.0):
        found = take(model, scale)
        if "gated_fusion.alpha" in found and model.query_tokens.dtype == torch.float32:
            found["gated_fusion.alpha"] *= -1
            if fault == "lost":
                del found["gated_fusion.alpha"]
        return found

    monkeypatch.setattr(numerics, "FUSION_STRATEGIES", ["gated"])
    monkeypatch.setattr(numerics, "take_gradients", spoilt)
    lines = list(numerics.check_gradients(setting))
    assert [line.status for line in lines] == [FAIL] * 3
    assert all("gated_fusion.alpha" in line.figures and line.remedy for line in lines)


def warn_of_waits(times):
    for _ in range(times):
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_a_second_wait_is_counted(monkeypatch, setting):
    """With a CPU that warns of its transfers as torch does of a GPU's."""
    mode = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    monkeypatch.setattr(Setting, "on_gpu", True)
    monkeypatch.setattr(Setting, "free", lambda self: None)
    assert statuses(training.check_waits(setting)) == {"waits": SKIP}  # a CPU tells of none
    item, agree = torch.Tensor.item, training.Trainer.agree
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (warn_of_waits(1), item(self))[1])
    for times, status in ((1, OK), (2, FAIL)):

        def watched(self, *told, times=times):
            warn_of_waits(times)
            return agree(self, *told)

        monkeypatch.setattr(training.Trainer, "agree", watched)
        found = statuses(training.check_waits(setting))
        assert found == dict.fromkeys(("waits, float32", "waits, bf16", "waits, fp16"), status)
    assert mode[-1] == "default"


def test_what_does_not_fit_is_halved_and_said(monkeypatch, setting):
    step_of = speed.step_of

    def on_a_small_card(setting, model, source, batch, chunk):
        if (chunk or batch) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step_of(setting, model, source, batch, chunk)

    monkeypatch.setattr(speed, "step_of", on_a_small_card)
    monkeypatch.setattr(speed, "BATCH", setting.shapes.large_batch)
    monkeypatch.setattr(speed, "VOCABULARY", 300)
    monkeypatch.setattr(speed, "LOADER_SECONDS", 0.01)
    lines = {line.name: line for line in speed.check_speed(setting)}
    assert "memory ran out at 4; give --grad-cache 2" in str(lines["speed, cache, fusion on"])
    for source in ("pixels", "cache"):
        assert f"--batch-size {setting.shapes.large_batch} --grad-cache 2 --num-workers" in str(
            lines[f"advice, {source}"]
        )


def test_shared_memory_that_is_too_small_fails_with_the_flag(monkeypatch):
    monkeypatch.setattr(machine, "BATCH_BYTES", 10**15)
    line = machine.check_shm()
    assert line.status == FAIL
    assert "--shm-size" in line.remedy


def test_list_names_every_check(capsys):
    run.list_checks()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(run.CHECKS)


@pytest.mark.slow
def test_bad_input_is_one_clear_line(tmp_path):
    _, err = script("--only", "vit", "speeed", code=2)
    assert_one_clear_line(err, "--only 'speeed' is unknown; choose from machine, vit")
    with pytest.raises(InputError, match="--device 'tpu' cannot be used"):
        run.self_check("tpu")
    with pytest.raises(InputError, match="its folder is missing"):
        run.self_check("cpu", report=tmp_path / "none" / "report.md")


def test_help_imports_nothing_slow():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['test_gated_fusion.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--only" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
