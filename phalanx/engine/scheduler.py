"""Who computes what in the next step: continuous batching, chunked prefill, preemption, prefix hits.

`schedule` is a pure function of what is committed. It returns a frozen plan, and only `commit` applies one. A plan
whose step fails is dropped; the next one is made from the same state, or from a newer one when requests came or went.

Order of arrival is the priority. Running requests are always the oldest ones: a request is admitted only when all
older ones run, and pages are taken back from the youngest. The oldest therefore always gets on, so that every request
finishes: it fits into the blocks alone, or it was refused when it came.

Preempted blocks are free from the *next* step on. Were they handed out within the step, a step that fails could
leave another's KV in the blocks of a request that still counts on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile

from phalanx.engine.kv_cache import BlockPool
from phalanx.engine.request import Ending, Request
from phalanx.messages import Load


@dataclass(frozen=True)
class Limits:
    """What one rank may do at once.

    max_model_len: tokens of prompt and output together. max_num_seqs: requests that run at once.
    max_num_batched_tokens: tokens a step. num_blocks blocks of block_size tokens hold the KV.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    prefix_caching: bool = True

    @property
    def blocks_a_step(self) -> int:
        """No step takes more new blocks: one for each request, and the full ones that its tokens fill."""
        return self.max_num_batched_tokens // self.block_size + min(self.max_num_seqs, self.max_num_batched_tokens)


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request that a step computes: `length` from position `start` on.

    shared: blocks found in the prefix cache, for a request that is admitted by this step; they hold the tokens up to
    `start`. new: clean blocks. The table during the step is the request's blocks, then shared, then new.
    samples: the chunk ends with the last token, so it yields the next one.
    """

    request: Request
    start: int
    length: int
    shared: tuple[int, ...] = ()
    new: tuple[int, ...] = ()
    samples: bool = False
    before: tuple[int, ...] | None = None
    """The request's blocks at the time of the step, where they are not its own yet: in a plan made ahead."""

    @property
    def blocks(self) -> tuple[int, ...]:
        return (*(self.request.blocks if self.before is None else self.before), *self.shared, *self.new)


@dataclass(frozen=True)
class Plan:
    """One step. A plan can hold only preemptions: then nothing is computed, but it must be committed all the same."""

    chunks: tuple[Chunk, ...] = ()
    preempted: tuple[Request, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def __bool__(self) -> bool:
        return bool(self.chunks or self.preempted)


@dataclass
class _Draft:
    """A plan in the making: what it has used up so far."""

    budget: int
    free: int
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    taken: int = 0
    shared: set[int] = field(default_factory=set)


class Scheduler:
    """The requests of one rank, in order of arrival, and its blocks."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.blocks_a_step, caching=limits.prefix_caching)
        self.requests: dict[str, Request] = {}
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def schedule(self) -> Plan:
        """The next step, from committed state alone. LOCAL, changes nothing."""
        draft = _Draft(budget=self.limits.max_num_batched_tokens, free=self.pool.free)
        running = list(takewhile(lambda r: r.running, self.requests.values()))
        short = self._continue_running(draft, running)
        if not short:
            self._admit(draft, len(running))
        return Plan(tuple(draft.chunks), tuple(draft.preempted))

    def follow(self, plan: Plan) -> Plan | None:
        """What `schedule` will most likely return once `plan`, the step in hand, is committed: every request goes on by
        one token. None when more than that happens, somebody waiting to be let in, say. `confirm` tells later whether
        it came so. LOCAL, changes nothing."""
        chunks = plan.chunks
        alike = len(chunks) == len(self.requests) and not plan.preempted and all(chunk.samples for chunk in chunks)
        if not alike or not chunks or len(chunks) > self.limits.max_num_batched_tokens:
            return None
        size, taken = self.limits.block_size, sum(len(chunk.new) for chunk in chunks)
        following = []
        for chunk in chunks:
            start = chunk.start + chunk.length
            blocks = chunk.blocks
            need = start // size + 1 - len(blocks)
            if need and taken + need > self.pool.clean:
                return None
            following.append(Chunk(chunk.request, start, 1, (), self.pool.next_clean(need, after=taken), True, blocks))
            taken += need
        return Plan(tuple(following))

    def confirm(self, plan: Plan) -> bool:
        """Whether `plan`, from `follow`, is what `schedule` returns now: its step was committed, nobody ended, nobody
        came, and the same blocks are the next clean ones. LOCAL, changes nothing."""
        if len(plan.chunks) != len(self.requests):
            return False
        new: list[int] = []
        for chunk in plan.chunks:
            if chunk.request.computed != chunk.start or not chunk.request.running:
                return False
            new += chunk.new
        return len(new) <= self.pool.clean and self.pool.next_clean(len(new)) == tuple(new)

    def commit(self, plan: Plan, tokens: Mapping[str, int]) -> dict[str, Ending]:
        """Apply a plan whose step succeeded. LOCAL.

        tokens: what each request whose chunk samples got. Returns how each of them stands now; one that ended is
        gone from here."""
        endings: dict[str, Ending] = {}
        size = self.limits.block_size
        for chunk in plan.chunks:
            request = chunk.request
            if not request.running:
                self._prefix_queries += len(request.tokens)
                self._prefix_hits += chunk.start
            if chunk.shared or chunk.new:
                self.pool.share(chunk.shared)
                self.pool.take(chunk.new)
                request.blocks.extend((*chunk.shared, *chunk.new))
            request.computed = chunk.start + chunk.length
            if chunk.samples:
                token_id = tokens[request.request_id]
                endings[request.request_id] = request.ending(token_id, self.limits.max_model_len)
                request.append(token_id)
            first, filled = chunk.start // size, request.computed // size
            if filled > first:
                for i in range(first, filled):
                    self.pool.name(request.blocks[i], request.digests[i])
        for request in plan.preempted:
            self._vacate(request)
            self._preemptions += 1
        for request_id, ending in endings.items():
            if ending.reason is not None:
                self._vacate(self.requests.pop(request_id))
        self.pool.settle()
        return endings

    def add(self, request: Request) -> None:
        """A request has come: it is the youngest. Between steps only. LOCAL."""
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request

    def remove(self, request_id: str) -> Request:
        """A request is gone: aborted, or replaced. Between steps only. LOCAL."""
        request = self.requests.pop(request_id)
        self._vacate(request)
        self.pool.settle()
        return request

    def load(self) -> Load:
        """How occupied this rank is. LOCAL."""
        running = sum(1 for _ in takewhile(lambda r: r.running, self.requests.values()))
        return Load(
            running=running,
            waiting=len(self.requests) - running,
            kv_blocks_used=self.pool.used,
            kv_blocks_total=self.pool.num_blocks,
            preemptions=self._preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    def check(self) -> None:
        """Assert what must hold between steps. LOCAL."""
        requests = list(self.requests.values())
        self.pool.check(request.blocks for request in requests)
        flags = [request.running for request in requests]
        assert flags == sorted(flags, reverse=True), "a younger request runs while an older one waits"
        assert sum(flags) <= self.limits.max_num_seqs
        for request in requests:
            assert len(request.blocks) == request.blocks_for(request.computed), "blocks and computed tokens disagree"
            assert request.computed < len(request.tokens)

    # --- the parts of schedule

    def _continue_running(self, draft: _Draft, running: list[Request]) -> bool:
        """Plan the next chunk of each running request, the oldest first. True when blocks ran short: then nobody is
        admitted. `running` loses those who are preempted."""
        short = False
        i = 0
        while i < len(running) and draft.budget > 0:
            request = running[i]
            i += 1
            length = min(request.remaining, draft.budget)
            need = request.blocks_for(request.computed + length) - len(request.blocks)
            if need <= (0 if short else draft.free):
                self._plan(draft, request, request.computed, length, (), need)
                continue
            if not short:
                # The oldest that lacks blocks gets those of the youngest, in the next step. The others that lack some
                # keep what they have and wait: taking still more would only cost more prefill.
                short = True
                while len(running) > i and draft.free + self._freed_by(draft.preempted) < need:
                    draft.preempted.append(running.pop())
        return short

    def _admit(self, draft: _Draft, num_running: int) -> None:
        """Let waiting requests in by order of arrival while there is room."""
        waiting = islice(self.requests.values(), num_running, None)
        for request, _ in zip(waiting, range(self.limits.max_num_seqs - num_running), strict=False):
            shared = self._prefix_of(request)
            start = len(shared) * self.limits.block_size
            revived = {block for block in shared if self.pool.idle(block)} - draft.shared
            # All of its blocks must be free, not just its first chunk's, or it would soon be thrown out again.
            room = request.blocks_for(len(request.tokens)) - len(shared) <= draft.free - len(revived)
            if draft.budget == 0 or not room:
                break
            length = min(len(request.tokens) - start, draft.budget)
            draft.shared |= revived
            draft.free -= len(revived)
            self._plan(draft, request, start, length, shared, request.blocks_for(start + length) - len(shared))

    def _plan(
        self, draft: _Draft, request: Request, start: int, length: int, shared: tuple[int, ...], need: int
    ) -> None:
        new = self.pool.next_clean(need, after=draft.taken)
        samples = start + length == len(request.tokens)
        draft.chunks.append(Chunk(request, start, length, shared, new, samples))
        draft.budget -= length
        draft.free -= need
        draft.taken += need

    def _prefix_of(self, request: Request) -> tuple[int, ...]:
        """Cached blocks to start from. At least the last token is left to compute: its logits are wanted."""
        if request.owes_prompt_logprobs:
            return ()
        return self.pool.lookup(request.digests[: (len(request.tokens) - 1) // self.limits.block_size])

    def _freed_by(self, requests: list[Request]) -> int:
        return self.pool.freed_by(block for request in requests for block in request.blocks)

    def _vacate(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks.clear()
        request.computed = 0
