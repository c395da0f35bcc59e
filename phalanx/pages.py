"""Pages of memory files, and what a page fault costs.

A fresh page of a memory file that is first touched through a mapping is taken, cleared, mapped and then filled, one
fault a page. Written by a system call it is taken and filled, with no fault; thousands of pages that are there already
are mapped in one call. Where bytes go to fresh pages, that is about half the time (benchmarks/restore.py). No torch
here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 has no name for it


class MemoryFile:
    """A new memory file, open for as long as somebody holds this: whoever writes late writes to no other file."""

    def __init__(self, name: str, size: int) -> None:
        """name: as /proc shows it. size: bytes, none of which takes memory yet. Raises OSError."""
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)


@dataclass(frozen=True, eq=False)
class FilePart:
    """Bytes of a memory file from `start` on."""

    file: MemoryFile
    start: int

    def write(self, at: int, data: Bytes) -> None:
        """Put bytes there, `at` bytes from the start on. Raises OSError: no memory is left. LOCAL."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.file.fd, data[done:].data, self.start + at + done)


def bring_within_reach(data: Bytes) -> None:
    """Have this process's page table point to bytes that are there, so that the first access costs no fault. LOCAL;
    other threads run meanwhile."""
    address = data.ctypes.data
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    # An older kernel refuses, and the first access pays. A call by ctypes lets other threads run.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(address + data.nbytes - begin), _MADV_POPULATE_READ
    )
