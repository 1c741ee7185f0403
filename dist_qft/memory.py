"""Host memory that is free but still counted as this process's."""

import ctypes


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MiB, which add up to several shards."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
