"""The names of messages, the same in shared memory and on a stream: epoch, number of the collective within it, kind.

Equal tags, and only those, are the same message. A tag without a kind is a place in an epoch (the word of a ring), one
with the epoch alone names a roll call. No torch here.
"""

from __future__ import annotations

KINDS = ("", "barrier", "all_gather", "dispatch", "combine", "ring", "roll_call")
BARRIER, ALL_GATHER, DISPATCH, COMBINE = 1, 2, 3, 4
RING, ROLL_CALL = 5, 6
"""Kinds of frames that carry a word; in shared memory the words themselves are there to be read."""

NUMBER_SHIFT = 3
EPOCH_SHIFT = 40
KIND_MASK = (1 << NUMBER_SHIFT) - 1
NUMBER_MASK = (1 << (EPOCH_SHIFT - NUMBER_SHIFT)) - 1
MAX_EPOCH = (1 << (63 - EPOCH_SHIFT)) - 1


def tag_of(epoch: int, number: int, kind: int = 0) -> int:
    """The tag of a collective; kind 0: of the place that it has in its epoch. LOCAL."""
    return epoch << EPOCH_SHIFT | number << NUMBER_SHIFT | kind


def number_of(tag: int) -> int:
    """The number of a tag's collective within its epoch. LOCAL."""
    return tag >> NUMBER_SHIFT & NUMBER_MASK
