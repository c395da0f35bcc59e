"""Which graph serves which batch: pure bookkeeping, without a device."""

from __future__ import annotations

import pytest

from phalanx.engine.graphs import Graphs, ladder, token_ladder
from phalanx.engine.runner import largest_chunks
from phalanx.engine.scheduler import Limits


@pytest.mark.parametrize("largest", [1, 3, 8, 9, 64, 100, 128, 200, 256, 512])
def test_a_ladder_ends_with_the_largest_size_and_grows(largest: int) -> None:
    sizes = ladder(largest)
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("rows", [*range(1, 40), 127, 128, 129, 255])
def test_padding_costs_at_most_fifteen_rows(rows: int) -> None:
    size = Graphs[int](ladder(256)).size_for(rows)
    assert size is not None
    assert rows <= size < rows + 16


def test_a_ladder_up_to_nothing_has_no_graphs() -> None:
    assert ladder(0) == ()
    assert Graphs[int](()).find(1) is None


@pytest.mark.parametrize("largest", [1, 24, 64, 65, 512, 600, 2048, 8192])
def test_token_sizes_are_few_end_with_the_largest_and_pad_to_less_than_twice_the_tokens(largest: int) -> None:
    sizes = token_ladder(largest)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == largest
    assert len(sizes) <= max(1, largest // 64).bit_length() + 1
    graphs = Graphs[str](sizes)
    for tokens in range(1, largest + 1):
        size = graphs.size_for(tokens)
        assert size is not None
        assert tokens <= size <= max(64, 2 * tokens)
    assert graphs.size_for(largest + 1) is None


def test_without_graphs_for_prefills_there_are_no_token_sizes() -> None:
    assert token_ladder(0) == ()


def test_each_size_is_captured_once_the_largest_first() -> None:
    made: list[int] = []

    def make(size: int) -> str:
        made.append(size)
        return f"graph of {size}"

    graphs = Graphs[str]((1, 2, 4))
    graphs.capture(make)
    assert made == [4, 2, 1]
    with pytest.raises(AssertionError, match="captured once"):
        graphs.capture(make)
    assert made == [4, 2, 1]


def test_the_smallest_graph_that_holds_a_batch_is_taken_and_an_empty_one_takes_the_first() -> None:
    graphs = Graphs[str]((1, 2, 4))
    graphs.capture(str)
    assert [graphs.find(rows) for rows in (0, 1, 2, 3, 4)] == [(1, "1"), (1, "1"), (2, "2"), (4, "4"), (4, "4")]
    assert graphs.find(5) is None


def test_nothing_is_replayed_before_it_is_captured() -> None:
    assert Graphs[str]((1, 2)).find(1) is None


def test_what_was_captured_can_be_let_go() -> None:
    graphs = Graphs[str]((1, 2))
    graphs.capture(str)
    assert graphs.find(2) == (2, "2")
    graphs.clear()
    assert graphs.find(2) is None


@pytest.mark.parametrize(
    ("tokens", "longest", "blocks", "sequences", "wanted"),
    [
        (512, 4096, 1000, 64, [512]),
        (512, 200, 1000, 64, [200, 200, 112]),
        (512, 4096, 10, 64, [160, 160, 160, 32]),
        (512, 100, 1000, 2, [100, 100]),
        (1, 1, 1, 1, [1]),
    ],
)
def test_the_largest_step_has_all_tokens_that_its_sequences_can_have(
    tokens: int, longest: int, blocks: int, sequences: int, wanted: list[int]
) -> None:
    limits = Limits(
        max_num_seqs=sequences, max_num_batched_tokens=tokens, max_model_len=longest, block_size=16, num_blocks=blocks
    )
    assert largest_chunks(limits) == [(0, length) for length in wanted]
