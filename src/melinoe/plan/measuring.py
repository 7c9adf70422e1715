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

_BYTES = 256 * 2**20
_CHUNK = 8 * 2**20
_REPEATS = 5


def measure(directory: str | Path | None = None, nbytes: int = _BYTES) -> dict[str, float]:
    """
    Measure the bandwidths that a plan needs: the disk in one run, the rest best of several.

    - ``DRAM``: reading a matrix larger than any cache in a matrix-vector product, which is what
      computing a missed expert on the CPU does, with torch's threads as they are set.
    - ``disk``: reading a file in order, past the system's page cache where the file system allows
      it.
    - ``link``, ``device memory``: with CUDA, pinned host memory to device, and a copy within the
      device (reads and writes both counted). Without CUDA slots are in host memory and the store is
      on disk, so these are the two above.

    Takes a few seconds, and *nbytes* of memory and disk.

    Args:
        directory: Where the file to read is: its largest safetensors file, else one that is
            written there and removed. Default: the directory for temporary files.
        nbytes: How much is moved each time.

    Returns:
        Bytes a second by part.

    Raises:
        HardwareError: the directory cannot be written to, or its disk is full.
    """
    dram = _dram(nbytes)
    disk = _disk(Path(directory or tempfile.gettempdir()).expanduser(), nbytes)
    if torch.cuda.is_available():
        return {"DRAM": dram, "disk": disk, **_cuda(nbytes)}
    return {"DRAM": dram, "disk": disk, "link": disk, "device memory": dram}


def _best(run: Callable[[], object], nbytes: int, repeats: int = _REPEATS) -> float:
    """Bytes a second of the fastest of several runs; the first is warm-up."""
    fastest = float("inf")
    for number in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if number:
            fastest = min(fastest, time.perf_counter() - begin)
    return nbytes / fastest


def _dram(nbytes: int) -> float:
    columns = 4096
    matrix = torch.ones(nbytes // (4 * columns), columns)
    vector = torch.ones(columns)
    return _best(lambda: torch.mv(matrix, vector), matrix.numel() * 4)


def _cuda(nbytes: int) -> dict[str, float]:
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    here, there = (torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))

    def over_the_link() -> None:
        here.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    def inside() -> None:
        there.copy_(here)
        torch.cuda.synchronize()

    return {"link": _best(over_the_link, nbytes), "device memory": _best(inside, 2 * nbytes)}


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
    # An anonymous map is aligned to pages, which reading past the cache demands.
    buffer = mmap.mmap(-1, _CHUNK)
    flags = BINARY | getattr(os, "O_DIRECT", 0)
    try:
        try:
            handle = os.open(path, flags)
        except OSError:  # some file systems know no direct reads
            handle = os.open(path, BINARY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            whole = min(nbytes, os.fstat(handle).st_size) // _CHUNK * _CHUNK
            done, begin = 0, time.perf_counter()
            while done < whole:
                got = read_at(handle, memoryview(buffer), done)
                if got <= 0:
                    break
                done += got
            return done / (time.perf_counter() - begin)
        finally:
            os.close(handle)
    finally:
        buffer.close()
