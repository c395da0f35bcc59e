"""Launching the CUDA communicator's kernels: how they cut their work, with what constants, and whether a grid fits.

Triton is imported when the first `Kernels` is made, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from phalanx.comm.peer_memory import GATHER_WORDS, BufferLayout, lines
from phalanx.comm.received import Handle, Lists, RowNorm
from phalanx.errors import PhalanxError

_BLOCK = 1024  # pairs that dispatch takes at a time when it cannot have all
_FEW_PAIRS = 2048
_REGISTERS = 65536  # of a multiprocessor, on every device since 2014
_TILES_A_ROW = 5
_TILES_UNDER_WAY = 10

Mode = Literal["exact", "fast"]


class LaunchTooLarge(PhalanxError):
    """A kernel's programs would not all run at once: those that run would wait for peers that wait for the others."""


@dataclass(frozen=True)
class LaunchShape:
    """How kernels cut their work; the same on all ranks. A grid must fit the device at once, or ranks wait in a circle.

    chunk: columns a program moves. groups: programs that share the tokens. tile, rows: tokens and results that a
    program sends at once. few_pairs, many_pairs, most_pairs: sizes, with room for as many pairs of each source, at
    which dispatch sorts what came in registers: the least one that is enough, if any (most_pairs: only if buffers hold
    no more; the others: 0 is no size). line_tile: lines of a row (`comm.line_kernels`, mode `fast`) that a program
    moves at once; line_senders, line_receivers: how many programs at most do the one and the other. row_warps: of
    programs that own a whole row, to norm it (`RowNorm`); row_receivers: up to how many tokens there are such programs.
    pull_chunk, pull_programs: the columns that a program adds at once, and how many programs at most
    (`comm.pull_kernels`).
    """

    chunk: int = 1024
    dispatch_groups: int = 18
    dispatch_tile: int = 8
    dispatch_warps: int = 8
    few_pairs: int = 1024
    many_pairs: int = 2048
    most_pairs: int = 2048
    combine_groups: int = 48
    combine_rows: int = 8
    combine_warps: int = 4
    line_tile: int = 4
    line_warps: int = 2
    line_senders: int = 512
    line_receivers: int = 512
    row_warps: int = 4
    row_receivers: int = 256
    pull_chunk: int = 512
    pull_warps: int = 2
    pull_programs: int = 1024

    def __post_init__(self) -> None:
        # A word that two threads load may be another one for each: the number of a line is then not that of its data.
        assert self.line_tile * 16 >= 32 * self.line_warps, f"a thread without a word of its own: {self}"

    @classmethod
    def of(cls, hidden: int, programs: int = 128, pairs: int = 4096) -> LaunchShape:
        """A shape for about `programs` multiprocessors. Combine's programs wait in threes on each, so as to have more
        under way. pairs: the most (token, k) of all ranks; where they are few, 4 warps sort them in their registers."""
        chunk = min(1024, power_of_two(hidden))
        chunks = -(-hidden // chunk)
        return cls(
            chunk=chunk, dispatch_groups=max(1, programs // chunks),
            dispatch_tile=4 if pairs <= _FEW_PAIRS else 8, dispatch_warps=4 if pairs <= _FEW_PAIRS else 8,
            combine_groups=max(1, 8 * programs // (3 * chunks)),
            line_senders=4 * programs, line_receivers=4 * programs, row_receivers=2 * programs,
            pull_chunk=min(512, chunk), pull_programs=8 * programs,
        )  # fmt: skip

    @classmethod
    def on(cls, device: torch.device, hidden: int, pairs: int) -> LaunchShape:
        """`of` for this device. LOCAL."""
        if device.type != "cuda":
            return cls.of(hidden, pairs=pairs)
        return cls.of(hidden, min(128, torch.cuda.get_device_properties(device).multi_processor_count), pairs)

    def norms(self, row_lines: int, peers: int) -> int:
        """Up to how many tokens a combine can norm its rows, of so many lines, with so many peers; 0 where a row is too
        wide or comes from too many. LOCAL, pure.

        A row stands in the registers of one program, in tiles of a word a thread: its sums, our own share of them, and
        all peers', which are under way at once. Rows of 2048 values take 5 tiles and 149 registers with one peer, 160
        with two. With three they would take 211, and a grid of `row_receivers` programs would not fit every device."""
        tiles = -(-row_lines // self.row_tile)
        return self.row_receivers if tiles <= _TILES_A_ROW and tiles * peers <= _TILES_UNDER_WAY else 0

    @property
    def row_tile(self) -> int:
        """Lines of a tile of those. LOCAL, pure."""
        return 2 * self.row_warps

    def chunks(self, hidden: int) -> int:
        """How many chunks a row has. LOCAL."""
        return -(-hidden // self.chunk)


@dataclass(frozen=True, eq=False)
class Fixed:
    """What all launches of one communicator have in common.

    padded: ep_size as a power of two. guard: whether masks and time-outs are compiled in. own, state, host: the
    exported buffer and the words that kernels read, see `comm.kernels`. notice_pointer: where the launcher's notices
    stand, a word every `notice_stride` words.
    """

    rank: int
    ep_size: int
    padded: int
    slots: int
    top_k: int
    hidden: int
    max_tokens: int
    mode: Mode
    layout: BufferLayout
    shape: LaunchShape
    guard: bool
    own: Tensor
    state: Tensor
    host: Tensor
    notice_pointer: int
    notice_stride: int


class Kernels:
    """Launches: what is fixed for one communicator is given to the kernels by name."""

    def __init__(self, fixed: Fixed) -> None:
        from triton import knobs

        from phalanx.comm import combine_kernels, dispatch_kernels, kernels, line_kernels, pull_kernels

        self._code = kernels
        self._dispatch_kernel, self._combine_kernel = dispatch_kernels.dispatch_kernel, combine_kernels.combine_kernel
        self._line_kernel, self._pull_kernel = line_kernels.line_combine_kernel, pull_kernels.pull_kernel
        self._seen: dict[str, tuple[int, int, Any]] = {}
        self._fixed = fixed
        layout, shape, at = fixed.layout, fixed.shape, fixed.layout.offsets
        self._shape = shape
        common = {"R": fixed.ep_size, "P": fixed.padded}
        waits = {
            **common, "GUARD": fixed.guard, "INTERPRETED": bool(knobs.runtime.interpret), "CUT_AT": at["cut"],
            "OPENED_AT": at["opened"],
        }  # fmt: skip
        moves = {
            **waits, "S": fixed.slots, "K": fixed.top_k, "KP": power_of_two(fixed.top_k), "D": fixed.hidden,
            "T_MAX": fixed.max_tokens, "CHUNK": shape.chunk, "CHUNKS": shape.chunks(fixed.hidden),
        }  # fmt: skip
        pairs = power_of_two(fixed.max_tokens * fixed.top_k)
        block = pairs if pairs * fixed.padded <= shape.most_pairs else _BLOCK
        few, many = (n // fixed.padded if n // fixed.padded < pairs else 0 for n in (shape.few_pairs, shape.many_pairs))
        self._dispatch = {
            **moves, "GROUPS": shape.dispatch_groups, "TILE": shape.dispatch_tile, "FEW": few, "MANY": many,
            "BLOCK": block, "BLOCKS": -(-pairs // block), "FP8": layout.x_itemsize == 1,
            "WEIGHTED": fixed.mode == "fast",
            "META": at["meta"], "COUNT": at["count"], "WEIGHTS": at["weights"], "X": at["x"], "SCALES": at["scales"],
            "META_FLAG": at["meta_flag"], "DATA_FLAG": at["data_flag"],
        }  # fmt: skip
        self._combine = {
            **moves, "GROUPS": shape.combine_groups, "ROWS_AT_ONCE": shape.combine_rows, "RESULTS": at["results"],
            "RESULT_FLAG": at["result_flag"],
        }  # fmt: skip
        row_lines = lines(fixed.hidden, layout.result_itemsize)
        self._lines = {
            **{name: moves[name] for name in (*waits, "S", "K", "D", "T_MAX")},
            "LINES": row_lines, "WEIGHTS": at["weights"], "SUMS_AT": at["sums"], "BEGUN": at["begun"],
        }  # fmt: skip
        self.norms = shape.norms(row_lines, fixed.ep_size - 1) if fixed.mode == "fast" else 0
        self._pull = {
            **{name: moves[name] for name in (*waits, "S", "K", "KP", "D", "T_MAX")}, "CHUNK": shape.pull_chunk,
            "BLOCK": 32 * shape.pull_warps,  # a pair a thread: nothing passes from one to another
            "BLOCKS": min(8, -(-fixed.max_tokens * fixed.top_k // (32 * shape.pull_warps))),
            "WORDS": at["words"], "READY": at["ready"], "Y": at["y"],
        }  # fmt: skip
        self._gather = {**waits, "WIDTH": GATHER_WORDS, "ROW": at["row"], "ROW_FLAG": at["row_flag"]}
        self._common = common

    def dispatch(
        self, x: Tensor, slots: Tensor, weights: Tensor | None, lists: Lists, tokens: int, *, launch: bool = True,
    ) -> None:  # fmt: skip
        """Launch a dispatch of the first `tokens` rows of x, which fills `lists`. COLLECTIVE, graph-safe.

        launch: False only compiles and loads it, LOCAL."""
        c = self._fixed
        programs = c.ep_size + c.layout.dispatch_programs
        begin = _begin(self._dispatch_kernel, programs, launch)
        compiled = begin(
            x, slots, weights if weights is not None else slots, lists.row_M, lists.slot_M, lists.position,
            lists.first_S, lists.counts, *self._words(), tokens, c.rank, **self._dispatch,
            num_warps=self._shape.dispatch_warps,
        )  # fmt: skip
        self._seen["dispatch"] = (c.layout.dispatch_programs, self._shape.dispatch_warps, compiled)
        if not launch:
            _load(compiled)

    def combine(
        self, y: Tensor, handle: Handle, weights: Tensor | None, out: Tensor, tokens: int,
        mode: Literal["rows", "exact", "fast"], norm: RowNorm | None = None, *, launch: bool = True,
    ) -> None:  # fmt: skip
        """Launch the combine of a dispatch of `tokens` rows into `out`. COLLECTIVE, graph-safe.

        norm: for up to `norms` tokens, only in the mode fast. launch: as in `dispatch`, for the other modes."""
        c = self._fixed
        if mode == "fast":
            assert weights is not None, "mode fast adds at the expert's rank: it needs weights"
            self._combine_sums(y, handle, weights, out, tokens, norm)
            return
        assert norm is None, mode
        if self._stands_in_place(y):
            self._pull_rows(y.shape[0], handle, weights, out, tokens, mode)
            return
        begin = _begin(self._combine_kernel, c.layout.combine_programs, launch)
        compiled = begin(
            y, handle.position, handle.counts, handle.slots_TK, weights if weights is not None else handle.slots_TK,
            out, *self._words(), tokens, c.rank, y.shape[0], **self._combine,
            MODE=("rows", "exact").index(mode), num_warps=self._shape.combine_warps,
        )  # fmt: skip
        self._seen[f"combine ({mode})"] = (c.layout.combine_programs, self._shape.combine_warps, compiled)
        if not launch:
            _load(compiled)

    def _stands_in_place(self, y: Tensor) -> bool:
        """Whether peers can read y where it is. All ranks must say the same, also one whose y is empty and has, so
        torch says, no address."""
        at = y.untyped_storage().data_ptr() + y.storage_offset() * y.element_size()
        return self._fixed.layout.in_place and at == self._fixed.own.data_ptr() + self._fixed.layout.offsets["y"]

    def _pull_rows(
        self, rows: int, handle: Handle, weights: Tensor | None, out: Tensor, tokens: int,
        mode: Literal["rows", "exact"],
    ) -> None:  # fmt: skip
        c, ends = self._fixed, self._fixed.ep_size - 1
        others = 1 + ends * self._pull["BLOCKS"]
        compiled = self._pull_kernel[(others + self._pull_programs(tokens),)](
            handle.position, handle.counts, handle.slots_TK, weights if weights is not None else handle.slots_TK,
            out, *self._words(), tokens, c.rank, rows, **self._pull,
            MODE=("rows", "exact").index(mode), num_warps=self._shape.pull_warps,
        )  # fmt: skip
        most = others + self._pull_programs(c.max_tokens)
        self._seen[f"combine in place ({mode})"] = (most, self._shape.pull_warps, compiled)

    def _pull_programs(self, tokens: int) -> int:
        """How many programs read: all do equally much, as far as that goes."""
        units = tokens * -(-self._fixed.hidden // self._shape.pull_chunk)
        rounds = -(-units // self._shape.pull_programs)
        return max(1, -(-units // max(1, rounds)))

    def _combine_sums(
        self, y: Tensor, handle: Handle, weights: Tensor, out: Tensor, tokens: int, norm: RowNorm | None
    ) -> None:
        assert y.data_ptr() % 8 == 0, "results are read 8 bytes at a time"
        assert norm is None or tokens <= self.norms, f"{tokens} rows to norm, more than {self.norms}"
        c, shape = self._fixed, self._shape
        if norm is None:
            tile, warps = shape.line_tile, shape.line_warps
            receivers, most = (self._line_receivers(t, tile) for t in (tokens, c.max_tokens))
            after = out, out, 0.0
        else:
            tile, warps = shape.row_tile, shape.row_warps
            receivers, most = max(1, tokens), min(self.norms, c.max_tokens)
            after = norm.residual_TD, norm.weight_D, norm.eps
        senders = self._line_senders(tokens, tile)
        compiled = self._line_kernel[(senders + receivers,)](
            y, handle.position, handle.counts, handle.slots_TK, weights, out, *after, *self._words(), tokens, c.rank,
            y.shape[0], senders, **self._lines, TILE=tile, NORM=norm is not None, num_warps=warps,
        )  # fmt: skip
        self._seen["combine (fast)" if norm is None else "combine (fast, with a norm)"] = (most, warps, compiled)

    def _line_senders(self, tokens: int, tile: int) -> int:
        """How many programs send lines: as many as there may be work for, all of them when there is much.

        What the others own is not known here: at least as many send as a few tokens want."""
        ends = self._fixed.ep_size - 1
        few = min(self._shape.line_senders, max(tokens, 16) * -(-self._lines["LINES"] // tile) * ends)
        return -(-few // ends) * ends if ends else 0

    def _line_receivers(self, tokens: int, tile: int) -> int:
        """How many programs receive them."""
        return max(1, min(self._shape.line_receivers, tokens * -(-self._lines["LINES"] // tile)))

    def check_fit(self) -> None:
        """Whether the programs that wait for peers fit the device at once, in each grid launched so far. LOCAL.

        They must, with room for one more: those that only send wait for nobody, and end there one after the other."""
        if self._fixed.own.device.type != "cuda":
            return
        device = torch.cuda.get_device_properties(self._fixed.own.device)
        for name, (programs, warps, compiled) in self._seen.items():
            at_once = programs_at_once(compiled, warps, device) * device.multi_processor_count
            if programs >= at_once:
                raise LaunchTooLarge(
                    f"{name}: {programs} programs of {compiled.n_regs} registers a thread, {device.name} runs "
                    f"{at_once} at once: choose a LaunchShape with fewer groups"
                )

    def gather(self, row: Tensor, out: Tensor, words: int) -> None:
        """Launch an all_gather of `words` int64; 0: a barrier. COLLECTIVE, graph-safe."""
        # An empty tensor has no address: a barrier reads and writes nothing, but the kernel wants pointers.
        row, out = (row, out) if words else (self._fixed.state, self._fixed.state)
        self._code.gather_kernel[(1,)](row, out, *self._words(), words, self._fixed.rank, **self._gather, num_warps=1)

    def tell(self, whom: int, epoch: int, word_at: int) -> None:
        """Launch `tell_kernel`: bit r of `whom` is rank r. LOCAL."""
        c = self._fixed
        self._code.tell_kernel[(1,)](c.own, c.state, whom, epoch, c.rank, word_at, **self._common, num_warps=1)

    def _words(self) -> tuple[Any, ...]:
        c = self._fixed
        return c.own, c.state, c.host, c.notice_pointer, c.notice_stride


def programs_at_once(compiled: Any, warps: int, device: Any) -> int:
    """How many programs of a compiled kernel a multiprocessor holds at once. LOCAL.

    compiled: as a launch returns it. device: its properties, as torch gives them."""
    registers = -(-compiled.n_regs // 8) * 8 * 32 * warps
    held: int = min(_REGISTERS // registers, 64 // warps, 32)
    if shared := compiled.metadata.shared:
        held = min(held, device.shared_memory_per_multiprocessor // (shared + 1024))
    return held


def _begin(kernel: Any, programs: int, launch: bool) -> Any:
    """What launches a kernel, or only compiles it."""
    return kernel[(programs,)] if launch else partial(kernel.warmup, grid=(programs,))


def _load(compiled: Any) -> None:
    """Put a compiled kernel on the device. In the interpreter nothing was compiled."""
    if compiled is not None:
        compiled.run  # noqa: B018  (it is loaded when this is asked for)


def power_of_two(n: int) -> int:
    """The smallest that is not below n. LOCAL, pure."""
    return 1 << max(0, n - 1).bit_length()
