"""
Tell glibc what to do with freed memory while a model trains on the CPU.

A small model asks for the same blocks at every step: kept, they save a page fault for every 4 KiB
(docs/log.md, 2026-11-22: a third of the time). A large model's blocks would leave holes between
what stays, which count as the process's own: returned one by one, they cost a few per cent.
"""

import ctypes
import platform

# mallopt's parameter numbers, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MOST_FROM_THE_HEAP_BYTES = 32 << 20  # the most that every glibc takes
_KEPT_BYTES = 256 << 20
_AHEAD_BYTES = 64 << 20
_LARGE_BYTES = 1 << 20


def keep_freed_memory() -> bool:
    """
    Serve blocks up to 32 MiB from the heap, and hold 256 MiB of freed ones.

    Affects the whole process until it ends, as `return_large_blocks` does.

    Returns:
        Whether it was done: only on Linux with glibc.
    """
    return _set(_MOST_FROM_THE_HEAP_BYTES, _KEPT_BYTES, _AHEAD_BYTES)


def return_large_blocks() -> bool:
    """Give blocks from 1 MiB on back to the kernel as soon as they are freed."""
    return _set(_LARGE_BYTES, _LARGE_BYTES, 0)


def return_freed_memory() -> None:
    """Give back now what is kept of freed memory, as after loading a model."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _set(mapped_from: int, kept: int, ahead: int) -> bool:
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    values = ((_M_MMAP_THRESHOLD, mapped_from), (_M_TRIM_THRESHOLD, kept), (_M_TOP_PAD, ahead))
    return all(mallopt(parameter, value) == 1 for parameter, value in values)


def _is_glibc() -> bool:
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
