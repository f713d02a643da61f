"""Files: written atomically, told clearly when they cannot be, locked, verified.

Of several ranks (torchrun) rank 0 alone writes; the others' calls do nothing.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import socket
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from sprc.errors import InputError
from sprc.processes import rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What a failed write asks of the user. A reason that is not known is taken for a full disk.
ADVICE: dict[int | None, str] = {
    errno.ENOENT: "its folder is gone; make it again",
    errno.ENOTDIR: "its folder is a file; give another folder",
    errno.EACCES: "it is not writable for you; change that, or give another folder",
    errno.EPERM: "it is not writable for you; change that, or give another folder",
    errno.EROFS: "the disk is read-only; give a folder on another",
    errno.EIO: "the disk fails; check it",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
}
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
# A file changed within a clock tick of its reading may keep its times. Two seconds cover any clock.
SETTLED_NS = 2 * 10**9


def write_failure(path: Path, error: Exception, after: str) -> OSError:
    """What a failed write of ``path`` is told as, with the reason's ``errno``; ``after`` ends the message."""
    # torch.save makes a RuntimeError of a failed write.
    cause = error if isinstance(error, OSError) else error.__context__
    number = cause.errno if isinstance(cause, OSError) else None
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    failure = OSError(f"cannot write {path} ({reason}); {ADVICE.get(number, 'free some space')}. {after}")
    failure.errno = number
    return failure


@contextmanager
def named_write_errors(path: Path, after: str) -> Iterator[None]:
    """Tell an ``OSError`` in here as one of writing ``path``, see :func:`write_failure`."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error, after) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then put it in ``path``'s place.

    Raises ``OSError`` with the reason's ``errno`` if that fails, a full disk for one; the file that was there
    is untouched.
    """
    if rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise write_failure(path, error, "What was there is untouched") from error
    finally:
        with suppress(OSError):  # a read-only disk refuses to remove even what is not there
            temporary.unlink()


def absolute(path: Path) -> Path:
    """``path`` from the root on. Names of links are kept, unless a ``..`` makes it matter where they lead."""
    return path.resolve() if ".." in path.parts else path.absolute()


def require_file_place(flag: str, path: Path) -> None:
    """Raise :class:`InputError` if no file can be written at ``path``, which ``flag`` gave."""
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: its folder does not exist; make it, or give another")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=4) + "\n").encode()))


def compact_json(value: Any) -> bytes:
    """``value`` as JSON without a space, for what is large and read by programs."""
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, what one has not left empty. Floats keep all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Add a row; the first one writes the keys before it. A killed run may leave its last line cut short."""
    if rank():
        return
    new = not path.exists()
    with (
        named_write_errors(path, "The rows before are kept"),
        path.open("a", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


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


def verify_archive(path: Path) -> None:
    """Check the checksums of the torch file at ``path``; raises ``BadZipFile`` if it is damaged.

    A flipped bit in a weight would else be a wrong number in a table. A file of torch's format before 2020 is
    no archive and has no checksums: it passes.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        # A tensor marked as a folder would be skipped by the check, and read as noise by torch.
        folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
        if damaged := archive.testzip() or "".join(folders[:1]):
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def file_digest(path: Path) -> str:
    """A hash of the file's bytes; raises ``OSError``."""
    return hash_file(path, hashlib.blake2b(digest_size=16))


def hash_file(path: Path, digest: Any) -> str:
    """What ``digest``, of :mod:`hashlib`, makes of the file's bytes; raises ``OSError``."""
    with path.open("rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
    found: str = digest.hexdigest()
    return found


def look_at_file(path: Path, before: tuple[list[int], str] | None) -> tuple[list[int], str]:
    """How a file looks (size, times, inode) and a hash of its bytes; one that looks as before is not read.

    Args:
        path: of the file.
        before: what this returned of it earlier, or None.

    Returns:
        The looks are empty where the file changed so lately that it may change again and look the same.

    Raises:
        OSError: it cannot be read.
    """
    seen_at = time.time_ns()
    status = path.stat()
    looks = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    if before is not None and before[0] == looks:
        return before
    settled = seen_at - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
    return looks if settled else [], file_digest(path)
