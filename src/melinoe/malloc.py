"""
Tell glibc what to do with freed memory while a model trains on the CPU; elsewhere nothing happens.

A small model asks for the same blocks at every step: kept, they save a page fault for every 4 KiB
(docs/log.md, 2026-11-22: a third of the time). A large model's blocks would leave holes between
what stays, which count as the process's own: returned one by one, they cost a few per cent.
"""

import ctypes
import platform

# mallopt's parameter numbers, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """
    Serve blocks up to 32 MiB, the most that glibc takes, from the heap; hold 256 MiB of freed ones.

    Affects the whole process until it ends. Gives whether it was done: only with glibc on Linux.
    """
    return _set(32 << 20, 256 << 20, 64 << 20)


def return_large_blocks() -> bool:
    """Give blocks from 1 MiB on back to the kernel as soon as they are freed."""
    return _set(1 << 20, 1 << 20, 0)


def return_freed_memory() -> None:
    """Give back now what is kept of freed memory, as after loading a model."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _set(mapped_from: int, kept: int, ahead: int) -> bool:
    values = ((_M_MMAP_THRESHOLD, mapped_from), (_M_TRIM_THRESHOLD, kept), (_M_TOP_PAD, ahead))
    return _is_glibc() and all(ctypes.CDLL(None).mallopt(*one) == 1 for one in values)


def _is_glibc() -> bool:
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
