"""What makes scripts start sooner. Imports nothing slow."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """For imports: Python's garbage collector rests.

    torch makes 180,000 objects that live as long as the process, and looking through them again and again
    finds nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
