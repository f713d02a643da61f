"""The exception that means "what you gave me is wrong", and how a script reports it."""

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
        super().__init__(message.rsplit("InputError: ", 1)[-1].strip())


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; what a user can act on ends it with one line on stderr, no traceback.

    Exit code 2 for an :class:`InputError`, 1 for a ``FloatingPointError`` (a loss or a score that is not
    finite). Anything else is a bug and keeps its traceback.
    """
    try:
        main()
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
