"""The heap of a process that trains: memory that a step frees is kept for the next."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of ``mallopt(3)``; numbers of the GNU C library."""
LARGEST_THRESHOLD = 32 << 20
"""Bytes; the upper limit that ``mallopt(3)`` gives for the second. Larger blocks come and go."""
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Have the GNU C library keep the memory that is freed, for the rest of the process.

    By default it gives much of what a step's backward pass frees back to the system, which clears
    each page anew when the next step asks for it. The process's peak stays what it was.

    Returns:
        Whether it will; not with another C library, nor where the environment settles this.
    """
    if sys.platform != "linux" or any(name in os.environ for name in SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {M_MMAP_THRESHOLD: LARGEST_THRESHOLD, M_TRIM_THRESHOLD: 2**31 - 1}
    return all(mallopt(ctypes.c_int(key), ctypes.c_int(value)) for key, value in wanted.items())
