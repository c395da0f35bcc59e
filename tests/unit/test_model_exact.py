"""A token's hidden state, keys and values have the same bits whatever computes them along with what.

A stream that moves to another rank, or is preempted, recomputes by prefill what it had decoded: so these must be equal
bit by bit, or the text would change.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from model_rig import BLOCK, Piece, Rank, solo

from phalanx.model.attention import ForwardBatch, kv_length, tile_tokens
from phalanx.testing.tiny import make_tiny

LENGTHS = (1, 2, 5, 33, 64, 129, 257, 300, 530, 1100)
MODELS = {
    "3 queries a KV head, width 1536 in and out": dict(
        arch="mixtral", layers=2, hidden=192, heads=9, kv_heads=3, head_dim=64, expert_width=1536, experts=4
    ),
    "q and k norms, a dense layer, head size 16": dict(arch="qwen3-moe", layers=3, dense_layers=(1,), expert_width=48),
    "8 queries a KV head of 128": dict(
        arch="qwen3-moe", layers=2, hidden=128, heads=8, kv_heads=1, head_dim=128, experts=16, top_k=4
    ),
    "odd sizes": dict(arch="mixtral", layers=2, hidden=72, heads=3, kv_heads=3, head_dim=24, expert_width=40),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Sequences:
    """Some texts in random blocks of a KV store full of what others left there."""

    def __init__(self, rank: Rank, rng: random.Random) -> None:
        self.rank, self.rng = rank, rng
        tokens = random.Random(7)
        texts = [[tokens.randrange(rank.config.vocab_size) for _ in range(n)] for n in LENGTHS]
        blocks = list(range(sum(-(-n // BLOCK) for n in LENGTHS) + 9))
        rng.shuffle(blocks)
        self.kv = rank.kv(len(blocks) * BLOCK)
        self.kv.data[:, :-1].normal_(std=30.0, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
        self.all: list[tuple[list[int], np.ndarray]] = []
        for text in texts:
            count = -(-len(text) // BLOCK)
            self.all.append((text, np.array(blocks[:count], np.int32)))
            blocks = blocks[count:]

    def compute(self, steps: list[list[Piece]]) -> dict[tuple[int, int], torch.Tensor]:
        """The hidden state of every (sequence, position), the last one computed."""
        found = {}
        for step in steps:
            rows = iter(self.rank.run(self.all, step, self.kv))
            for sequence, first, count in step:
                for position in range(first, first + count):
                    found[sequence, position] = next(rows)
        return found

    def keys_and_values(self) -> list[torch.Tensor]:
        layers = self.kv.data.shape[0]
        return [
            self.kv.data[:, torch.from_numpy(blocks.astype(np.int64))]
            .view(layers, len(blocks) * BLOCK, -1)[:, : len(text)]
            .clone()
            for text, blocks in self.all
        ]

    def random_steps(self) -> list[list[Piece]]:
        """Prefill in chunks of any size, beside each other's decodes; the last tokens of some are decoded."""
        at, steps = [0] * len(LENGTHS), []
        while any(a < n for a, n in zip(at, LENGTHS, strict=True)):
            budget, step = self.rng.choice([3, 40, 200, 600]), []
            for s in self.rng.sample(range(len(LENGTHS)), len(LENGTHS)):
                near_the_end = LENGTHS[s] - at[s] < 12
                wish = 1 if near_the_end and s % 2 else self.rng.choice([1, 2, 3, 7, 16, 50, 128, 333, 511])
                count = min(LENGTHS[s] - at[s], budget, wish)
                if count > 0:
                    step.append((s, at[s], count))
                    at[s] += count
                    budget -= count
            steps.append(step)
        return steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_batch_chunks_or_prefill_against_decode(name, dtype, tmp_path):
    rank = solo(make_tiny(tmp_path / "m", dtype="float32", **MODELS[name]), dtype)
    alone = Sequences(rank, random.Random(0))
    reference = alone.compute([[(s, a, min(500, n - a))] for s, n in enumerate(LENGTHS) for a in range(0, n, 500)])
    for seed in (1, 2):
        mixed = Sequences(rank, random.Random(seed))
        found = mixed.compute(mixed.random_steps())
        different = [key for key, hidden in found.items() if not torch.equal(hidden, reference[key])]
        assert different == []
        for ours, theirs in zip(mixed.keys_and_values(), alone.keys_and_values(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_of_a_row_do_not_depend_on_the_rows_beside_it(dtype, tmp_path):
    rank = solo(make_tiny(tmp_path / "m", "mixtral", vocab=3000, hidden=576, layers=1, dtype="float32"), dtype)
    hidden = torch.randn(64, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = rank.logits(hidden)
    for count in (1, 2, 3, 4, 5, 17, 63):
        for first in (0, 1, 64 - count):
            assert torch.equal(rank.logits(hidden[first : first + count]), whole[first : first + count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packing_experts_in_the_middle_of_a_text_changes_no_bit(dtype, tmp_path):
    path = make_tiny(tmp_path / "m", "mixtral", layers=2, expert_width=1536, dtype="float32")
    plain, packed = solo(path, dtype), solo(path, dtype)
    expected_packs = 2 * 8 if dtype is torch.bfloat16 and packed.bank.products.packed else 0
    assert packed.bank.pack() == expected_packs
    text = [(list(range(40)), np.arange(3, dtype=np.int32))]
    kv_plain, kv_packed = plain.kv(48), packed.kv(48)
    for piece in [(0, 0, 30), *((0, p, 1) for p in range(30, 40))]:
        assert torch.equal(plain.run(text, [piece], kv_plain), packed.run(text, [piece], kv_packed))


def test_a_replayed_step_gives_the_same_bits(tmp_path):
    rank = solo(make_tiny(tmp_path / "m", "qwen3-moe"), torch.bfloat16)
    text = [(list(range(50)), np.arange(4, dtype=np.int32))]
    kv = rank.kv(64)
    rank.run(text, [(0, 0, 47)], kv)
    first = rank.run(text, [(0, 47, 3)], kv)
    left = kv.data.clone()
    assert torch.equal(rank.run(text, [(0, 47, 3)], kv), first)
    assert torch.equal(kv.data, left)


def test_what_a_block_held_before_cannot_poison_its_next_owner(tmp_path):
    rank = solo(make_tiny(tmp_path / "m", "mixtral", layers=2), torch.bfloat16)
    text = [(list(range(20)), np.arange(2, dtype=np.int32))]
    clean, dirty = rank.kv(32), rank.kv(32)
    dirty.data[:, :-1] = torch.nan
    for piece in [(0, 0, 5), (0, 5, 11), (0, 16, 1), (0, 17, 3)]:
        hidden = rank.run(text, [piece], dirty)
        assert hidden.isfinite().all()
        assert torch.equal(hidden, rank.run(text, [piece], clean))


def test_a_batch_without_tokens_runs(tmp_path):
    rank = solo(make_tiny(tmp_path / "m", "qwen3-moe", dense_layers=(0,)), torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64)
    with torch.inference_mode():
        hidden = rank.model.forward(ForwardBatch(nothing, nothing, ()), rank.kv(16))
    assert hidden.shape == (0, 64)
    assert rank.logits(hidden).shape == (0, 259)
    assert rank.model.load_LE.sum() == 0


def test_the_load_counts_every_token_for_each_of_its_experts(tmp_path):
    rank = solo(make_tiny(tmp_path / "m", "qwen3-moe", top_k=3, dense_layers=(2,)), torch.float32)
    rank.run([(list(range(20)), np.arange(2, dtype=np.int32))], [(0, 0, 20)], rank.kv(32))
    assert rank.model.load_LE.sum(dim=1).tolist() == [60, 60, 60]


def test_a_token_looks_at_a_kv_length_that_covers_it_and_depends_on_its_place_alone(tmp_path):
    config = solo(make_tiny(tmp_path / "m", "mixtral", layers=1), torch.float32).config
    c = tile_tokens(config)
    lengths = [kv_length((position // c + 1) * c) for position in range(5000)]
    assert all(length > position for position, length in enumerate(lengths))
    assert lengths == sorted(lengths)
    assert set(lengths) == {64, 128, 192, 256, *range(512, 5121, 512)}
