"""Keep other processes out of a folder while one changes it, on any system and any disk."""

import errno
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sprc.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What a disk says that has no file locks: some network disks, some that a program provides.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
POLL_SECONDS = 0.1


@contextmanager
def hold_lock(
    path: Path, *, waiting: str, unwritable: str, stop: Sequence[object] = ()
) -> Iterator[int | None]:
    """Hold the lock of the file ``path``; a process that dies gives it back.

    Where the system or the disk has no file locks, a second file that only one process can make stands for
    it. A killed process leaves that one behind, and who waits is told which to delete.

    Args:
        path: of the lock's file; made if it is not there.
        waiting: printed once if another process holds it.
        unwritable: what the user is told, after the reason, if the file cannot be made.
        stop: once this is not empty, wait no longer and go on without the lock.

    Yields the descriptor of the lock, which a child process may inherit to hold it too; None where there is
    none to inherit.

    Raises:
        InputError: the file cannot be made.
    """
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written ({error.strerror}); {unwritable}") from error
    with file:
        if fcntl is not None and _take(file, waiting, stop):
            yield file.fileno()
        else:
            with _hold_file(path.with_name(f"{path.name}.held"), waiting, stop):
                yield None


def _take(file: IO[str], waiting: str, stop: Sequence[object]) -> bool:
    """Lock ``file``, or wait until ``stop`` says so; False on a disk that has no locks."""
    told = False
    while not stop:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not told:
                print(waiting, flush=True)
                told = True
            time.sleep(POLL_SECONDS)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
    return True


@contextmanager
def _hold_file(path: Path, waiting: str, stop: Sequence[object]) -> Iterator[None]:
    """Hold ``path`` by having made it."""
    told = False
    while not stop:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        except FileExistsError:
            if not told:
                print(f"{waiting}: {_holder(path)}; if it is gone, delete {path}", flush=True)
                told = True
            time.sleep(POLL_SECONDS)
            continue
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
        return
    yield


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "a process"
    except OSError:
        return "a process"
