"""How a run ends that cannot go on: what the user gave is wrong, or the user asked it to stop."""

import os
import signal
import sys
from collections.abc import Callable


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


# What a user can act on; anything else is a bug.
EXPECTED = (InputError, FloatingPointError, OSError)


def print_error(error: Exception) -> int:
    """Print one of ``EXPECTED`` as one line on stderr; return the exit code that it has."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, InputError) else 1


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; what a user can act on ends it with one line on stderr, no traceback.

    Exit code 2 for an :class:`InputError`, and for a name that the system's encoding lacks; 1 for a
    ``FloatingPointError`` (a loss or a score that is not finite) and an ``OSError`` (a full disk); 128 and
    the signal's number for :class:`Interrupted`. Anything else is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal may lack a letter of a path or a caption: it is shown by its number then.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # tqdm looks when it is imported; rank 0 alone draws bars
    try:
        main()
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower() == "utf8":
            raise
        told = f"the name {error.object!a} has letters that this system's encoding ({error.encoding}) lacks"
        sys.exit(print_error(InputError(f"{told}; set PYTHONUTF8=1 in the environment")))
    except EXPECTED as error:
        sys.exit(print_error(error))
