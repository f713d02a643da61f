"""The checks in their order, and their run. One that fails or breaks stops no other."""

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

from sprc.errors import InputError, OutOfResources, explained
from sprc.files import write_atomically
from sprc.self_check.attention import check_attention
from sprc.self_check.machine import check_machine, facts, find_device
from sprc.self_check.numerics import check_gradients, check_vit
from sprc.self_check.report import FAIL, Line, markdown, summary
from sprc.self_check.scoring import check_scoring
from sprc.self_check.setting import SHAPES, Setting
from sprc.self_check.speed import check_speed
from sprc.self_check.training import check_grad_cache, check_resume, check_steps, check_waits

Check = Callable[[Setting], Iterator[Line]]
CHECKS: dict[str, Check] = {
    "machine": check_machine,
    "vit": check_vit,
    "gradients": check_gradients,
    "steps": check_steps,
    "grad-cache": check_grad_cache,
    "resume": check_resume,
    "waits": check_waits,
    "attention": check_attention,
    "scoring": check_scoring,
    "speed": check_speed,
}


def list_checks() -> None:
    """Print each check's name and what it looks at."""
    for name, check in CHECKS.items():
        print(f"{name:<12}{(check.__doc__ or '').splitlines()[0]}")


def self_check(
    device: str | None = None,
    only: Sequence[str] | None = None,
    shapes: str | None = None,
    report: Path | None = None,
    verbose: bool = False,
) -> int:
    """Run the checks and print a line for each thing that was looked at; 1 if one fails, else 0.

    Args:
        device: "cuda", "cpu", ...; None is a GPU if there is one.
        only: names of ``CHECKS``; None is all of them.
        shapes: a name of ``SHAPES``; None is true ones on a GPU, and a quarter of the widths on a CPU.
        report: a file for the report in Markdown.
        verbose: print the traceback of a check that breaks.

    Raises:
        InputError: an unknown check, a device that is none, a report that cannot be written.
    """
    if unknown := [name for name in only or () if name not in CHECKS]:
        raise InputError(f"--only {unknown[0]!r} is unknown; choose from {', '.join(CHECKS)}")
    if report is not None and not report.absolute().parent.is_dir():
        raise InputError(f"--report {report}: its folder is missing; make it")
    start = time.perf_counter()
    found, line = find_device(device)
    lines: list[Line] = []

    def say(line: Line) -> None:
        lines.append(line)
        print(line, flush=True)

    if line is not None:
        say(line)
    with tempfile.TemporaryDirectory() as folder:
        name = shapes or ("true" if found.type == "cuda" else "quarter")
        setting = Setting(found, SHAPES[name], Path(folder))
        print(f"shapes: {setting.shapes.told}", flush=True)
        for name in only or CHECKS:
            for line in guarded(name, setting, verbose):
                say(line)
            setting.free()
        seconds = time.perf_counter() - start
        print(summary(lines, seconds))
        if report is not None:
            text = markdown(f"Self check, {date.today()}", facts(setting), lines, seconds)
            write_atomically(report, lambda file: file.write(text.encode()))
    return int(any(line.status == FAIL for line in lines))


def guarded(name: str, setting: Setting, verbose: bool) -> Iterator[Line]:
    """A check's lines; where it breaks, one that says so."""
    try:
        yield from CHECKS[name](setting)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        reason = explained(error)
        if isinstance(reason, OutOfResources):
            yield Line(FAIL, name, str(reason))
        else:
            remedy = f"run it with --only {name} --verbose, and report what that prints"
            yield Line(FAIL, name, f"it broke: {first_line(error)}", remedy)


def first_line(error: Exception) -> str:
    """An error's kind and the first line of what it tells."""
    return " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
