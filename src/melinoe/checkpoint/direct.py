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
_BOUNCE_BYTES = 4 << 20
_local = threading.local()


class DirectReader:
    """
    Reads an open file with ``O_DIRECT``; threads may read at the same time.

    Where a buffer lies in memory as the bytes lie in the file, up to whole blocks, they go straight
    there; else through 4 MiB of the reading thread. OSError where there are no such reads.
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
        count, done = into.numel(), 0
        fits = (into.data_ptr() - offset) % _BLOCK == 0
        while done < count:
            skip = (offset + done) % _BLOCK
            if fits and not skip and count - done >= _BLOCK:
                straight = into[done : done + (count - done) // _BLOCK * _BLOCK]
                got = os.preadv(self._fd, [_view(straight)], offset + done)
            else:
                room = _bounce()
                want = min(len(room), -(-(skip + count - done) // _BLOCK) * _BLOCK)
                want = _BLOCK if fits else want  # the rest goes straight
                got = os.preadv(self._fd, [_view(room[:want])], offset + done - skip)
                got = min(got - skip, count - done)
                if got > 0:
                    into[done : done + got].copy_(room[skip : skip + got])
            if got <= 0:
                break
            done += got
        return done


def _view(tensor: Tensor) -> memoryview:
    data: Any = tensor.numpy()
    return memoryview(data)


def _bounce() -> Tensor:
    """This thread's own memory to read into, aligned to blocks."""
    if not hasattr(_local, "room"):
        room = torch.frombuffer(mmap.mmap(-1, _BOUNCE_BYTES), dtype=torch.uint8)
        _local.room = room
    return _local.room
