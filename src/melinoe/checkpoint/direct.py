"""Read a file past the system's page cache, which would only push out what else needs memory."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Offsets, lengths and addresses must be multiples of the disk's block; no disk's is larger.
_BLOCK = 4096
# A disk gives its rate to several reads in flight only, and one expert alone may be missing.
_CHUNK_BYTES, _IN_FLIGHT = 1 << 20, 6
_local = threading.local()
_pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="melinoe-disk")


class DirectReader:
    """
    Reads an open file with ``O_DIRECT``; threads may read at the same time.

    Large ranges are read in chunks, several in flight, the first ones first. Where a buffer lies in
    memory as the bytes lie in the file, up to whole blocks, they go straight there; else through
    memory of the reading thread. OSError where there are no such reads.
    """

    def __init__(self, fd: int) -> None:
        if not (hasattr(os, "O_DIRECT") and hasattr(os, "preadv")):
            raise OSError("this system has no direct reads")
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            os.preadv(self._fd, [mmap.mmap(-1, _BLOCK)], 0)  # some refuse here, not before
        except OSError:
            self.close()
            raise

    def fill(self, buffer: memoryview, offset: int) -> int:
        """Fill *buffer* from *offset* on; returns how many bytes, fewer only at the file's end."""
        into = torch.frombuffer(buffer, dtype=torch.uint8)
        begin = _CHUNK_BYTES - offset % _BLOCK  # chunks end where blocks do
        if len(into) <= begin + _CHUNK_BYTES:
            return self._fill(into, offset)
        edges = [0, *range(begin, len(into) - _CHUNK_BYTES // 2, _CHUNK_BYTES), len(into)]
        parts = list(pairwise(edges))
        reads = [_pool.submit(self._fill, into[a:b], offset + a) for a, b in parts]
        wait(reads)  # all of them, before anybody else may write to the buffer
        done = 0
        for read, (_, last) in zip(reads, parts, strict=True):
            done += read.result()
            if done < last:
                break
        return done

    def _fill(self, into: Tensor, offset: int) -> int:
        count, done = len(into), 0
        fits = (into.data_ptr() - offset) % _BLOCK == 0
        while done < count:
            read = self._straight if fits and count - done > _BLOCK else self._bounced
            got = read(into[done:], offset + done)
            if got <= 0:
                break
            done += got
        return done

    def _straight(self, into: Tensor, offset: int) -> int:
        """Read whole blocks where they are to be, and the two at the ends beside them; once."""
        skip, ends = offset % _BLOCK, _room("ends", 2 * _BLOCK)
        first = -offset % _BLOCK
        last = first + (len(into) - first) // _BLOCK * _BLOCK
        places = [ends[:_BLOCK]] * (first > 0) + [into[first:last]] * (last > first)
        places += [ends[_BLOCK:]] * (last < len(into))
        got = os.preadv(self._fd, list(map(_view, places)), offset - skip) - skip
        into[:first].copy_(ends[_BLOCK - first : _BLOCK])
        if got > last:
            into[last:].copy_(ends[_BLOCK : _BLOCK + len(into) - last])
        return min(got, len(into))

    def _bounced(self, into: Tensor, offset: int) -> int:
        """Read into this thread's own memory and copy; once."""
        skip, room = offset % _BLOCK, _room("bounce", _CHUNK_BYTES + _BLOCK)
        want = min(len(room), -(-(skip + len(into)) // _BLOCK) * _BLOCK)
        got = min(os.preadv(self._fd, [_view(room[:want])], offset - skip) - skip, len(into))
        if got > 0:
            into[:got].copy_(room[skip : skip + got])
        return got


def _view(tensor: Tensor) -> memoryview:
    data: Any = tensor.numpy()
    return memoryview(data)


def _room(name: str, nbytes: int) -> Tensor:
    """This thread's own memory to read into, aligned to blocks."""
    if not hasattr(_local, name):
        setattr(_local, name, torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8))
    room: Tensor = getattr(_local, name)
    return room
