"""Give memory back to the system, which an allocator left alone keeps for itself."""

from __future__ import annotations

import ctypes
import gc
import sys

__all__ = ["give_back"]


def give_back() -> None:
    """Collect what nothing refers to, and return free pages where the C library offers to."""
    gc.collect()
    if sys.platform.startswith("linux"):
        # musl has no malloc_trim, and needs none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
