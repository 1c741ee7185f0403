"""Pages of files that a process has mapped, for a fork to map as well. Linux only.

A fork shares its parent's own memory from the start, but maps a page of a file, such as a library's code, only when it
touches it. Memory that is measured from the fork on would then hold pages that the imports have touched already.
"""

import ctypes
import mmap
from pathlib import Path

import numpy as np

_POPULATE_READ = 22  # madvise(2), since Linux 5.14
_BYTES_OF_ENTRY = 8


def mapped_file_pages() -> list[tuple[int, int]]:
    """Address and number of bytes of every stretch of file pages that this process has mapped."""
    found = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, _, _, _, inode, *_ = line.split()
            if inode == "0":
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            pagemap.seek(start // mmap.PAGESIZE * _BYTES_OF_ENTRY)
            entries = pagemap.read((end - start) // mmap.PAGESIZE * _BYTES_OF_ENTRY)
            found += [(start + first, size) for first, size in _present(entries)]
    return found


def map_file_pages(stretches: list[tuple[int, int]]) -> None:
    """Map the pages that `mapped_file_pages` has found in the parent. Does nothing on an older kernel."""
    madvise = ctypes.CDLL(None).madvise
    for address, size in stretches:
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_READ)


def _present(entries: bytes) -> list[tuple[int, int]]:
    """Offset and size in bytes of every stretch of pages whose entry says that they are present (bit 63: the sign)."""
    present = np.frombuffer(entries, np.int64) < 0
    edges = np.flatnonzero(np.diff(present.astype(np.int8), prepend=0, append=0))
    return [(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE) for first, last in edges.reshape(-1, 2).tolist()]
