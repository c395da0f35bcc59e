"""Memory files: what is written to one is where its mapping shows it, and nowhere else."""

from __future__ import annotations

import gc
import mmap
import os

import numpy as np
import pytest

from phalanx.pages import FilePart, MemoryFile, bring_within_reach

PAGE = mmap.PAGESIZE


def resident(data: np.ndarray) -> int:
    """Bytes of the mapping that holds `data` which this process's page table points to."""
    begin = data.ctypes.data
    with open("/proc/self/smaps") as file:
        for line in file:
            first, *rest = line.split()
            if "-" in first and not first.endswith(":"):
                low, high = (int(part, 16) for part in first.split("-"))
                found = low <= begin < high
            elif found and first == "Rss:":
                return int(rest[0]) << 10
    raise AssertionError("it is not mapped")


def test_bytes_written_to_a_part_of_a_file_are_seen_through_its_mapping_and_take_no_page_of_it_until_asked_for() -> (
    None
):
    file = MemoryFile("test", 64 * PAGE)
    data = np.frombuffer(mmap.mmap(file.fd, 64 * PAGE), np.uint8)
    content = np.random.default_rng(1).integers(0, 256, 40 * PAGE, np.uint8)
    part = FilePart(file, 3 * PAGE)
    for at in range(0, content.nbytes, 1000):
        part.write(at, content[at : at + 1000])
    assert resident(data) == 0
    bring_within_reach(data[3 * PAGE + 5 : 43 * PAGE - 5])
    assert resident(data) >= 40 * PAGE
    assert (data[3 * PAGE : 43 * PAGE] == content).all()
    assert not data[: 3 * PAGE].any()
    assert not data[43 * PAGE :].any()


def test_a_file_is_open_for_as_long_as_somebody_may_still_write_to_a_part_of_it() -> None:
    file = MemoryFile("test", PAGE)
    fd, part = file.fd, FilePart(file, 0)
    del file
    gc.collect()
    part.write(10, np.ones(5, np.uint8))
    assert os.pread(fd, 16, 0) == bytes(10) + b"\1" * 5 + b"\0"
    del part
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
