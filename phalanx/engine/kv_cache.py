"""Which KV block belongs to whom: the free list, reference counts, and the prefix cache. Numbers only, no tensors.

A block is in one of three states. *In use*: in the table of one request, or of several that share a prefix.
*Cached*: in nobody's table, but its content still has a name (a digest of all tokens up to its end) under which a
later request finds it. *Clean*: in nobody's table and without a name.

A step that fails has written KV all the same. That must harm nothing, so **a step writes only into clean blocks and
into its own requests' unfilled ones**: a block that anyone could still read, a cached one included, is never handed
out directly. To make that cost nothing, every change ends by cleaning the least recently used cached blocks until
`reserve` clean ones lie ready, as many as one step can ask for.

The clean blocks that a launched step was planned with are *lent* to it until it is committed or dropped: nothing of
it is committed, but no later plan may name them.

The idea of naming full blocks by their prefix is vLLM's automatic prefix caching.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """The blocks of one rank.

    num_blocks: blocks in all. reserve: the most new blocks that one step takes. caching: remember freed prefixes.
    """

    def __init__(self, num_blocks: int, reserve: int, *, caching: bool = True) -> None:
        assert num_blocks > 0
        assert reserve > 0
        self.num_blocks = num_blocks
        self._reserve = reserve
        self._caching = caching
        self._refs = [0] * num_blocks
        self._clean = list(range(num_blocks - 1, -1, -1))  # a stack: the top is the next to be taken
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._lent: set[int] = set()
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    # --- questions: they change nothing

    @property
    def free(self) -> int:
        """Blocks in nobody's table, clean or cached, and lent to nobody."""
        return len(self._clean) + len(self._cached)

    @property
    def clean(self) -> int:
        """Blocks that `next_clean` has."""
        return len(self._clean)

    @property
    def used(self) -> int:
        return self.num_blocks - self.free

    def lookup(self, digests: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks that hold the longest known prefix of `digests`."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def idle(self, block: int) -> bool:
        """Whether the block is in nobody's table."""
        return self._refs[block] == 0

    def next_clean(self, count: int, after: int = 0) -> tuple[int, ...]:
        """The `count` blocks that would be taken after the next `after` ones."""
        if not count:
            return ()
        end = len(self._clean) - after
        assert count <= end, f"{count} clean blocks asked for after {after}, {len(self._clean)} are there"
        return tuple(reversed(self._clean[end - count : end]))

    def freed_by(self, blocks: Iterable[int]) -> int:
        """How many blocks become free when these references to them are given up."""
        return sum(self._refs[block] == count for block, count in Counter(blocks).items())

    # --- while a step is under way: nobody's table changes

    def lend(self, blocks: Sequence[int]) -> None:
        """A step is launched that writes into these clean blocks, given in the order of `next_clean`."""
        for block in blocks:
            top = self._clean.pop()
            assert top == block, f"block {block} was planned, {top} is next"
            self._lent.add(block)

    def give_back(self, blocks: Sequence[int]) -> None:
        """The step to which these were lent does not count for their table: they are the next clean ones again."""
        for block in reversed(blocks):
            self._lent.remove(block)
            self._clean.append(block)

    # --- changes: for a commit, or between steps

    def take(self, blocks: Sequence[int]) -> None:
        """Put blocks into one table: lent ones, or clean ones in the order of `next_clean`."""
        for block in blocks:
            if block in self._lent:
                self._lent.remove(block)
            else:
                top = self._clean.pop()
                assert top == block, f"block {block} was planned, {top} is next"
            self._refs[block] = 1

    def share(self, blocks: Iterable[int]) -> None:
        """Put blocks that `lookup` found into one more table."""
        for block in blocks:
            assert block in self._name_of, f"block {block} has no name to be found under"
            self._cached.pop(block, None)
            self._refs[block] += 1

    def name(self, block: int, digest: bytes) -> None:
        """A block in use is full from now on. The first block with a content keeps the name."""
        assert self._refs[block] > 0
        if self._caching and digest not in self._block_of and block not in self._name_of:
            self._block_of[digest] = block
            self._name_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Take blocks out of one table. The end of a sequence is forgotten before its beginning."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is freed twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._name_of:
                    self._cached[block] = None
                else:
                    self._clean.append(block)

    def settle(self) -> None:
        """Clean cached blocks until the next step finds what it may need. Ends every change."""
        while len(self._clean) < self._reserve and self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._name_of.pop(block)]
            self._clean.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the books agree with the requests' block tables."""
        counted = Counter(block for table in tables for block in table)
        assert all(self._refs[block] == counted[block] for block in range(self.num_blocks)), "references are off"
        assert all(count == 1 or block in self._name_of for block, count in counted.items()), (
            "a nameless block is shared"
        )
        idle = [*self._clean, *self._cached, *self._lent]
        assert len(idle) == len(set(idle)) == self.num_blocks - len(counted), "blocks are lost or doubled"
        assert not any(block in self._name_of for block in self._clean), "a clean block has a name"
        assert {self._name_of[block]: block for block in self._name_of} == self._block_of, "names are off"
        ready = len(self._clean) + len(self._lent)
        assert ready >= min(self._reserve, self.free + len(self._lent)), "the reserve is short"
