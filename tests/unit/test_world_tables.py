"""The tables that a placement derives from its slots say what a plain look at the slots says."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phalanx.world import EMPTY, Placement


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    layers, ranks, width, experts = (draw(st.integers(low, 4)) for low in (0, 0, 1, 1))
    slot = st.integers(EMPTY, experts - 1)
    slots = draw(st.lists(slot, min_size=layers * ranks * width, max_size=layers * ranks * width))
    return Placement(np.array(slots, np.int32).reshape(layers, ranks * width), experts, width)


@given(placements())
def test_every_slot_stands_once_in_the_row_of_its_expert_in_ascending_order(placement: Placement) -> None:
    rows = [
        [[p for p, e in enumerate(slots) if e == expert] for expert in range(placement.num_experts)]
        for slots in placement.slots_LP.tolist()
    ]
    assert placement.count_LE.tolist() == [[len(row) for row in layer] for layer in rows]
    assert [[[p for p in row if p != EMPTY] for row in layer] for layer in placement.slots_LEX.tolist()] == rows
    assert placement.slots_LEX.shape[2] == max([1, *(len(row) for layer in rows for row in layer)])
    assert placement.missing == tuple(
        (la, e) for la, layer in enumerate(rows) for e, row in enumerate(layer) if not row
    )


def test_the_tables_cannot_be_written_to() -> None:
    placement = Placement(np.array([[0, 1, 1, EMPTY]], np.int32), 2, 2)
    assert not placement.count_LE.flags.writeable
    assert not placement.slots_LEX.flags.writeable
