"""What makes scripts start sooner. Imports nothing slow."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """For imports: Python's garbage collector rests, and never looks at what they made.

    torch makes 180,000 objects that live as long as the process. Looking through them again and again, the
    last time at its end, takes a fifth of a short one.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(thaw)


def thaw() -> None:
    """At the end, let the collector look at all: else triton complains of its functions, as leaked ones."""
    if "triton" in sys.modules:
        gc.unfreeze()
