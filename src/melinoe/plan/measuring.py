"""Time this machine's own parts, so that a plan need not take a datasheet's word."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from melinoe.checkpoint.safetensors_file import BINARY, read_at
from melinoe.errors import HardwareError

_CHUNK = 8 * 2**20


def measure(directory: str | Path | None = None, nbytes: int = 256 * 2**20) -> dict[str, float]:
    """
    Measure bandwidths, bytes a second by part: the disk in one run, the rest best of several.

    - ``DRAM``: reading a matrix larger than any cache in a matrix-vector product, which is what
      computing a missed expert on the CPU does, with torch's threads as they are set.
    - ``disk``: reading a file in order, past the page cache where the file system allows it:
      the largest safetensors file of *directory*, else one that is written there and removed.
    - ``link``, ``device memory``: with CUDA, pinned host memory to device, and a copy within the
      device (reads and writes both counted). Without CUDA slots are in host memory and the store is
      on disk, so these are the two above.

    Takes a few seconds, and *nbytes* of memory and disk.
    """
    matrix, vector = torch.ones(nbytes // 16384, 4096), torch.ones(4096)
    dram = _best(lambda: torch.mv(matrix, vector), matrix.nbytes)
    disk = _disk(Path(directory or tempfile.gettempdir()).expanduser(), nbytes)
    if not torch.cuda.is_available():
        return {"DRAM": dram, "disk": disk, "link": disk, "device memory": dram}
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    here, there = (torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))

    def copied(source: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    link = _best(lambda: copied(host, here), nbytes)
    inside = _best(lambda: copied(here, there), 2 * nbytes)
    return {"DRAM": dram, "disk": disk, "link": link, "device memory": inside}


def _best(run: Callable[[], object], nbytes: int) -> float:
    """Bytes a second of the fastest of five runs, after one to warm up."""
    taken = []
    for _ in range(6):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return nbytes / min(taken[1:])


def _disk(directory: Path, nbytes: int) -> float:
    shards = sorted(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    if shards and shards[-1].stat().st_size >= _CHUNK:
        return _read_in_order(shards[-1], nbytes)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="melinoe-") as file:
            for _ in range(nbytes // _CHUNK):
                file.write(os.urandom(_CHUNK))
            file.flush()
            os.fsync(file.fileno())
            return _read_in_order(Path(file.name), nbytes)
    except OSError as error:
        raise HardwareError(
            f"cannot write to {directory} to time its disk ({error.strerror}); name a directory "
            "that can be written to, or give --disk"
        ) from None


def _read_in_order(path: Path, nbytes: int) -> float:
    """Bytes a second of reading a file once, not from the page cache."""
    try:
        handle = os.open(path, BINARY | getattr(os, "O_DIRECT", 0))
    except OSError:  # some file systems know no direct reads
        handle = os.open(path, BINARY)
    try:
        # An anonymous map is aligned to pages, which reading past the cache demands.
        with mmap.mmap(-1, _CHUNK) as buffer, memoryview(buffer) as view:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            whole = min(nbytes, os.fstat(handle).st_size) // _CHUNK * _CHUNK
            done, begin = 0, time.perf_counter()
            while done < whole and (got := read_at(handle, view, done)) > 0:
                done += got
            return done / (time.perf_counter() - begin)
    finally:
        os.close(handle)
