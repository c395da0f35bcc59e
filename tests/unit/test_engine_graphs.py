"""Which graph serves which batch: pure bookkeeping, without a device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.engine.graphs import Graphs, find, ladder, token_ladder
from phalanx.engine.runner import largest_chunks
from phalanx.engine.scheduler import Limits
from phalanx.moe.cuda import Tiling


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
    assert list(Graphs[int](()).holding(1)) == []


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


def test_graphs_that_hold_a_batch_come_smallest_first_and_an_empty_one_takes_any() -> None:
    graphs = Graphs[str]((1, 2, 4))
    graphs.capture(str)
    assert list(graphs.holding(0)) == list(graphs.holding(1)) == [(1, "1"), (2, "2"), (4, "4")]
    assert list(graphs.holding(3)) == [(4, "4")]
    assert list(graphs.holding(5)) == []


def test_nothing_is_replayed_before_it_is_captured() -> None:
    assert list(Graphs[str]((1, 2)).holding(1)) == []


def test_what_was_captured_can_be_let_go() -> None:
    graphs = Graphs[str]((1, 2))
    graphs.capture(str)
    assert list(graphs.holding(2)) == [(2, "2")]
    graphs.clear()
    assert list(graphs.holding(2)) == []


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


@dataclass(frozen=True)
class Drawn:
    """A graph of a ladder, for so many rows at every rank."""

    name: str
    tile: int


def tile_for(rows: int, ranks: int) -> int:
    """Of the experts of Qwen3-30B-A3B when every rank has so many rows."""
    return Tiling.of(rows * 8, -(-128 // ranks), exact=False).rows


def captured(ranks: int, decodes: int = 256, tokens: int = 2048) -> tuple[Graphs[Drawn], Graphs[Drawn]]:
    """The graphs for decodes and for prefills of one of so many ranks."""
    made = Graphs[Drawn](ladder(decodes)), Graphs[Drawn](token_ladder(tokens))
    for name, graphs in zip(("decodes", "prefills"), made, strict=True):
        graphs.capture(lambda size, name=name: Drawn(name, tile_for(size, ranks)))  # type: ignore[misc]
    return made


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_ranks_that_have_equally_many_rows_take_the_smallest_graph_that_holds_them(ranks: int) -> None:
    ladders = captured(ranks)
    for graphs in ladders:
        for rows in range(1, graphs.sizes[-1] + 1):
            assert find([graphs], rows, tile_for(rows, ranks)) == next(graphs.holding(rows))
    for rows in range(257):
        found = find(ladders, rows, tile_for(rows, ranks))
        assert found is not None
        assert found[1].name == "decodes"


def test_a_decode_beside_a_long_prefill_takes_a_graph_with_its_tiles_and_of_fewer_rows() -> None:
    ladders = captured(ranks=2)
    mean = (64 + 2048) // 2
    alone, beside = find(ladders, 64, tile_for(64, 2)), find(ladders, 64, tile_for(mean, 2))
    assert alone == (64, Drawn("decodes", 16))
    assert beside == (512, Drawn("prefills", 128))
    assert find(ladders, 0, tile_for(mean, 2)) == beside, "so does a rank that has nothing to do"
    assert find(captured(ranks=8), 64, tile_for(mean, 8)) == (104, Drawn("decodes", 128)), "one of decodes if it can"


@given(counts=st.lists(st.integers(0, 2048), min_size=2, max_size=8), seed=st.integers(0, 1 << 16))
@settings(max_examples=200, deadline=None)
def test_whatever_the_ranks_have_their_tiles_suit_the_step_and_no_graph_is_larger_than_the_busiest_ranks(
    counts: list[int], seed: int
) -> None:
    ranks, most = len(counts), max(counts)
    ladders = captured(ranks)
    tile = tile_for(-(-sum(counts) // ranks), ranks)
    for i, rows in enumerate(counts):
        decodes = rows <= 256 and bool(seed >> i & 1)
        found = find(ladders if decodes else ladders[1:], rows, tile)
        assert found is not None
        assert found[0] >= rows
        assert found[1].tile >= tile
        assert found[0] <= (ladders[1].size_for(most) or 0)


def test_where_no_tiles_are_tall_enough_the_largest_graph_is_taken_and_where_no_graph_holds_the_rows_none() -> None:
    decodes, none = captured(ranks=2, tokens=0)
    assert find([decodes, none], 8, 128) == (256, Drawn("decodes", 64))
    assert find([none], 8, 16) is None
    assert find(captured(ranks=2)[1:], 2049, 16) is None
