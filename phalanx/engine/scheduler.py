"""Who computes what in the next step: continuous batching, chunked prefill, preemption, prefix hits.

`schedule` is a pure function of what is committed. It returns a frozen plan, and only `commit` applies one. A plan
whose step fails is dropped; the next one is made from the same state, or from a newer one when requests came or went.
While a step runs, `follow` may say what comes after it. Plans are committed in the order in which they departed.

A request that ends with step n may have a row in step n + 1, which is launched by then, and its blocks are free as soon
as n is committed. That harms nobody: n + 1 writes only to the position after the last committed one, so into a block
that is not full (nameless: the prefix cache names full blocks of committed tokens) or into one lent to it (in no other
plan until n + 1 is committed); and whoever gets the freed block next writes to it in a later step, which the device
runs after n + 1.

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
    """The request's blocks at the time of the step, where they are not its own yet: in a plan that `follow` made."""

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
        """The step after `plan`, which is launched and not committed: every request of it that does not end with it for
        certain goes on by one token. None when `schedule` may do more than that once it is committed (somebody could be
        let in, blocks are short), so that it must be asked. LOCAL, changes nothing.

        A request that ends with `plan` all the same, by a stop token, has a row too many; `commit` drops it."""
        limits = self.limits
        chunks = self.alive(plan)
        if plan.preempted or not all(chunk.samples for chunk in chunks):
            return None
        if len(chunks) > limits.max_num_batched_tokens:
            return None
        staying = [chunk for chunk in chunks if chunk.request.goes_on_for(2, limits.max_model_len)]
        others = len(self.requests) - len(chunks)
        if others and (not staying or self._may_change(chunks, staying)):
            return None
        following, taken = [], 0
        for chunk in staying:
            start = chunk.start + chunk.length
            blocks = chunk.blocks
            need = start // limits.block_size + 1 - len(blocks)
            if need and taken + need > self.pool.clean:
                return None
            following.append(Chunk(chunk.request, start, 1, (), self.pool.next_clean(need, after=taken), True, blocks))
            taken += need
        return Plan(tuple(following))

    def depart(self, plan: Plan) -> None:
        """A step of `plan` is launched: its new blocks are in no later plan until it is committed or dropped. LOCAL."""
        for chunk in plan.chunks:
            self.pool.lend(chunk.new)

    def drop(self, plan: Plan) -> None:
        """The launched step of `plan`, the last one, does not count. LOCAL."""
        for chunk in reversed(plan.chunks):
            self.pool.give_back(chunk.new)

    def commit(self, plan: Plan, tokens: Mapping[str, int]) -> dict[str, Ending]:
        """Apply a plan whose step succeeded. LOCAL.

        tokens: what each request whose chunk samples got. Returns how each of them stands now; one that ended is
        gone from here. Requests that were gone before, because they ended with the step before this one or were
        aborted while it ran, get nothing: their chunks are as if they had not been."""
        endings: dict[str, Ending] = {}
        size = self.limits.block_size
        for chunk in plan.chunks:
            request = chunk.request
            if not self.has(request):
                self.pool.give_back(chunk.new)
                continue
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

    def has(self, request: Request) -> bool:
        """Whether the request, and no later attempt of it, is here. LOCAL."""
        return self.requests.get(request.request_id) is request

    def alive(self, plan: Plan) -> list[Chunk]:
        """The plan's chunks whose requests are still here: what `commit` applies. LOCAL."""
        return [chunk for chunk in plan.chunks if self.has(chunk.request)]

    # --- the parts of schedule and follow

    def _may_change(self, chunks: list[Chunk], staying: list[Chunk]) -> bool:
        """Whether somebody who is not among these chunks may get one when those that stay decode next."""
        busy = {chunk.request.request_id for chunk in chunks}
        first = next(request for name, request in self.requests.items() if name not in busy)
        if first.running:
            return True
        if min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens) <= len(staying):
            return False
        # The first in the queue holds up the others, as in `_admit`. Whoever leaves may make room for it.
        return len(staying) < len(chunks) or first.blocks_for(len(first.tokens)) <= self.pool.free + len(
            self._prefix_of(first)
        )

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
