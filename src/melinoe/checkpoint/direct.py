"""Read a file past the system's page cache, which would only push out what else needs memory."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

# Offsets, lengths and addresses must be multiples of the disk's block; no disk's is larger.
_BLOCK = 4096
# The system cuts large reads itself, and has the parts in flight at once: cutting them here, for
# threads of our own, was slower.
_BOUNCE_BYTES = (4 << 20) + _BLOCK
_local = threading.local()


class DirectReader:
    """
    Reads an open file with ``O_DIRECT``; threads may read at the same time. Where a buffer lies in
    memory as the bytes lie in the file, up to whole blocks, they go straight there; else through 4
    MiB of the reading thread. OSError where there are no such reads.
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
        skip, room = offset % _BLOCK, _room("bounce", _BOUNCE_BYTES)
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
