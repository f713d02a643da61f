"""The memory through which the processes that read images hand them over, looked at before they start."""

import math
import shutil
import socket
from pathlib import Path

from sprc.errors import InputError
from sprc.processes import objects_of_all_ranks

SHARED_MEMORY = Path("/dev/shm")  # of Linux; other systems keep it where nobody has limited it
# A DataLoader's worker has two batches on their way; the one that is computed on is the last.
AHEAD = 2


def check_shared_memory(batch_bytes: int, num_workers: int, folder: Path = SHARED_MEMORY) -> None:
    """Raise :class:`InputError` where the batches of a DataLoader's workers do not fit into shared memory.

    A container has 64 MB of it if nobody asks for more, and a worker that finds it full is killed in the
    middle of a run, by a signal that names no reason.

    Args:
        batch_bytes: of one batch of this rank. The ranks of a machine share its memory.
        num_workers: of this rank's DataLoader; without any nothing is held there.
        folder: where the shared memory is; nothing is checked where it is missing.
    """
    if num_workers == 0 or batch_bytes == 0 or not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free  # before another rank's workers may have begun
    batches = AHEAD * num_workers + 1
    here = socket.gethostname()
    of_all = objects_of_all_ranks((here, batches * batch_bytes))
    ranks = [size for machine, size in of_all if machine == here]
    needed = sum(ranks)
    if needed > free:
        of_ranks = f" on each of {len(ranks)} ranks" if len(ranks) > 1 else ""
        gigabytes = math.ceil(1.25 * needed / 1e9)
        raise InputError(
            f"--num-workers {num_workers}: the processes that read images hold up to {batches} batches of "
            f"{batch_bytes / 1e6:.1f} MB{of_ranks} in {folder}, and {free / 1e6:.1f} MB are free there; give "
            f"it more (docker run --shm-size {gigabytes}g), or give --num-workers 0"
        )
