"""How a run ends that cannot go on: what the user gave is wrong, or the user asked it to stop."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


class InputError(ValueError):
    """Bad input from the user: a flag, a file, an entry of a file.

    The message is one line that names the file and the entry (or the flag and its value) and says
    what to do. Scripts print it and exit with code 2; see :func:`run_script`.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker hands its exception over as the text of a whole traceback, inside a
        # new exception of the same class. The user wants the last line of it, the message itself.
        if message.startswith("Caught InputError in DataLoader worker"):
            message = message.rsplit("InputError: ", 1)[-1].strip()
        super().__init__(" ".join(message.splitlines()))


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved its state."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class OutOfResources(Exception):
    """The machine has too little of something: memory, shared memory, open files. The message is one line."""


# What a user can act on; anything else is a bug.
EXPECTED = (InputError, FloatingPointError, OSError, OutOfResources)

# What torch says where a resource is spent, and what that means to a user. The first that fits holds.
SPENT = (
    (
        ("Too many open files", "ancdata"),
        "too many files are open at once; allow more (ulimit -n 65536), or give --num-workers 0",
    ),
    (
        (
            "killed by signal: Bus error",
            "unable to write to file </torch_",
            "unable to open shared memory object",
            "unable to mmap",
            "unable to resize file </torch_",
            "unable to allocate shared memory",
            "Couldn't allocate shared memory",
        ),
        "the processes that read images have used up the shared memory (/dev/shm); give more of it (docker "
        "run --shm-size 8g), or give --num-workers 0",
    ),
    (
        ("killed by signal: Killed", "DataLoader worker (pid(s)"),
        "a process that reads images was killed, most likely because main memory ran out; give fewer "
        "--num-workers, or a smaller --batch-size",
    ),
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of memory: Python's own, or torch's of the CPU or of a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    signs = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def explained(error: Exception) -> Exception:
    """An :class:`OutOfResources` in place of what Python and torch raise where a resource is spent.

    Any other error is returned as it is.
    """
    if isinstance(error, (RuntimeError, OSError)):
        told = f"{error} {error.__cause__}"  # how a reader died is in the cause
        for signs, message in SPENT:
            if any(sign in told for sign in signs):
                return OutOfResources(message)
    if ran_out_of_memory(error):
        reason = " ".join(str(error).splitlines()[:1]) or "no more is told"
        return OutOfResources(f"memory ran out ({reason}); end what else uses it, or give another --device")
    return error


def print_error(error: Exception) -> int:
    """Print one of ``EXPECTED`` as one line on stderr; return the exit code that it has."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, InputError) else 1


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; what a user can act on ends it with one line on stderr, no traceback.

    Exit code 2 for an :class:`InputError`, and for a name that the system's encoding lacks; 1 for a
    ``FloatingPointError`` (a loss or a score that is not finite), an ``OSError`` (a full disk) and an
    :class:`OutOfResources`; 128 and the signal's number for Ctrl-C and :class:`Interrupted`. Anything else is
    a bug and keeps its traceback. Of several ranks 0 alone speaks of Ctrl-C, which all of them are sent.

    Waiting threads of a CPU soon sleep, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.
    """
    # Before torch loads OpenMP, which looks once. A thread that spins may hold the core that the other needs.
    # To sleep at once would slow a quiet machine; see docs/machines.md.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for stream in (sys.stdout, sys.stderr):
        # A terminal may lack a letter of a path or a caption: it is shown by its number then.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not _is_first_rank():
        os.environ["TQDM_DISABLE"] = "1"  # tqdm looks when it is imported; rank 0 alone draws bars
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the clean-up, without a traceback
        sys.unraisablehook = lambda _: None  # a bar that was being made complains when it is cleaned up
        sys.exit(_print_interrupt())
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower() == "utf8":
            raise
        told = f"the name {error.object!a} has letters that this system's encoding ({error.encoding}) lacks"
        sys.exit(print_error(InputError(f"{told}; set PYTHONUTF8=1 in the environment")))
    except Exception as error:
        error = explained(error)
        if not isinstance(error, EXPECTED):
            raise
        sys.exit(print_error(error))


def _is_first_rank() -> bool:
    """Whether this process speaks for all ranks, which may not have found each other yet."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def _print_interrupt() -> int:
    if _is_first_rank():
        print("stopped by SIGINT", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


def _interrupt(_signum: int, frame: FrameType | None) -> None:
    """Ctrl-C raises ``KeyboardInterrupt``; while a module is imported it ends the process.

    A library's import may swallow the exception, torch's among them, and there is nothing to clean up yet.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(_print_interrupt())
        frame = frame.f_back
    raise KeyboardInterrupt
