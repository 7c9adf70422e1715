"""
Let glibc keep freed memory, because CPU training asks for the same large tensors at every step.

By default glibc returns large blocks to the kernel when they are freed, and the next step pays a
page fault for every 4 KiB of them again. Kept memory stays counted as the process's own.
"""

import ctypes
import platform

# mallopt's parameter numbers, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# Larger blocks are returned when they are freed: a large model's would leave holes. 32 MiB is the
# most that every glibc takes.
_FROM_THE_HEAP_BYTES = 32 << 20
_KEPT_BYTES = 256 << 20
_AHEAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """
    Tell glibc to serve blocks up to 32 MiB from its heap, and to hold 256 MiB of freed ones.

    Affects the whole process until it ends; calling it again changes nothing.

    Returns:
        Whether it was done: only on Linux with glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in (
            (_M_MMAP_THRESHOLD, _FROM_THE_HEAP_BYTES),
            (_M_TRIM_THRESHOLD, _KEPT_BYTES),
            (_M_TOP_PAD, _AHEAD_BYTES),
        )
    )


def return_freed_memory() -> None:
    """Give the kernel what glibc keeps of freed memory now, as after loading a model."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
