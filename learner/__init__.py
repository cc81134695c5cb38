"""The learner: votes move an adapter.

Its threads allocate from two heaps, where malloc is glibc's (mallopt(3)): one for each thread would keep what that
thread once needed, and a single one serves only one of an update's two lanes at a time. That has to be said before
there are threads.
"""

import contextlib
import ctypes

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

with contextlib.suppress(AttributeError, OSError):  # another C library
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
