"""Local files mapped into memory for reading, for state larger than memory.

`mmap.mmap` keeps a file handle for each mapping, of which a process often may have no more than 1,024; Arrow's mapping
outlives its handle.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

_LIBC: Final = ctypes.CDLL(None)


class Mapping:
    """A file that stays readable, whoever removes it, as long as something of ``buffer`` is in use."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:
            self.buffer: Any = file.read_buffer()

    def release(self) -> None:
        """Nothing of it is needed in memory just now: its pages are read again when they are touched."""
        address, size = ctypes.c_void_p(self.buffer.address), ctypes.c_size_t(self.buffer.size)
        _LIBC.madvise(address, size, mmap.MADV_DONTNEED)


__all__ = ["Mapping"]
