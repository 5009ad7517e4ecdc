"""The C library's heap, where it is glibc's: what it keeps of freed memory. Elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_ARENA_MAX = -8  # of glibc's malloc.h


def share_heap() -> None:
    """Have all threads of this process take memory from one heap, from now on; for a process that is a command.

    Each of a judge's threads would get one of its own, of which little is given back: 15 MiB and more after some
    thousand requests. With one heap there are as many requests a second.
    """
    _tell_glibc("mallopt", M_ARENA_MAX, 1)


def return_freed() -> None:
    """Give memory that was freed back to the system: after a large piece of work, the heap keeps it for the next."""
    _tell_glibc("malloc_trim", 0)


def _tell_glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(None), function)(*arguments)
