"""One step of one rank, as a transaction: schedule, run, check, commit.

Nothing that is committed changes before the check: no block table, token, count or name in the prefix cache. So a
step that fails leaves no trace but KV in blocks that nobody reads, and replaying it takes no code: the next `step()`
plans from the same state and, because all is exact and the noise is a function of (seed, position), gives the same
tokens. Commit is local: a peer that failed where this rank did not simply runs its own part again.

Two steps may be under way. Where the runner computes on a device (`StepRunner.may_lead`) and what follows step n is
known without its tokens (`Scheduler.follow`), step n + 1 meets and is launched while n still runs, and takes n's tokens
from the device; only then is n waited for, checked, committed and told. So the device has work while the host does
its share. The order of everything COLLECTIVE stays what it is without: header n, n, header n + 1, n + 1; a rank that
cannot do so meets its peers later, and they wait for it in the header. Behind the first step of a World that took
another one's place nothing is launched: its tokens have been waited for long enough. A failure drops whatever is not
committed: both steps, when n failed. What was committed before the failure was noticed is told with the next result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from phalanx.comm.base import Communicator, Status
from phalanx.engine import sampler
from phalanx.engine.batch import PromptRows, StepBatch, build, build_behind
from phalanx.engine.laps import Laps
from phalanx.engine.request import Request
from phalanx.engine.runner import Flight, Ran, StepRunner
from phalanx.engine.scheduler import Limits, Plan, Scheduler
from phalanx.errors import PeerLost
from phalanx.messages import (
    Abort,
    Load,
    Logprob,
    Pause,
    PromptLogprobs,
    Resume,
    StepSeconds,
    Submit,
    TokenOut,
    ToWorker,
)
from phalanx.testing.faults import NO_FAULTS, Faults
from phalanx.world import World

_ROWS_AT_ONCE = 64
"""Rows of logits that are in memory at a time: with V = 150,000 one row is 600 KB."""

_TOKENS, _PROPOSAL, _READY, _EPOCH, _WANTS, _STEP = range(6)
"""What stands where in the header that each rank gathers at the start of a step."""


@dataclass(frozen=True)
class Refusal:
    """A request that this rank could never run, and why."""

    request_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class StepResult:
    """What one call of `step` brought.

    tokens: committed ones and ends, also of requests that were aborted since the last call. rejected: since then.
    idle: no rank has anything more to do, nothing runs: all may sleep. proposal: the highest of any rank. boundary: all
    ranks are ready for what is proposed; nothing runs, all are at the same step boundary. Both may come with the tokens
    of the step before. step: the number of the last step committed, the same on all ranks. prompt_tokens: prompt tokens
    computed in it. seconds: what this call spent its time on.
    """

    tokens: list[TokenOut] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    rejected: list[Refusal] = field(default_factory=list)
    idle: bool = False
    proposal: int = 0
    boundary: bool = False
    step: int = 0
    prompt_tokens: int = 0
    seconds: StepSeconds = field(default_factory=StepSeconds)


@dataclass(frozen=True)
class _Outcome:
    """What the sampler made of a step, not committed yet. Keys are request ids."""

    tokens: dict[str, int]
    logprobs: dict[str, list[Logprob]]
    prompt_logprobs: dict[str, list[list[Logprob]]]


@dataclass(frozen=True)
class _Launched:
    """A step under way. number: its own. flight: None when no rank had a token, so that nothing runs."""

    plan: Plan
    batch: StepBatch
    number: int
    prompt_tokens: int
    flight: Flight | None


@dataclass
class _Untold:
    """What the next result brings."""

    tokens: list[TokenOut] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    rejected: list[Refusal] = field(default_factory=list)
    prompt_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.tokens or self.prompt_logprobs or self.rejected)


@dataclass(frozen=True)
class _Said:
    """What all ranks together said in a header."""

    proposal: int = 0
    boundary: bool = False
    idle: bool = False


class Engine:
    """The requests of one rank, and its part in every step.

    eos_ids: the model's end-of-sequence tokens. `adopt` must be called once before the first step.
    """

    def __init__(
        self, limits: Limits, runner: StepRunner, comm: Communicator, eos_ids: Iterable[int], faults: Faults = NO_FAULTS
    ) -> None:
        self._limits = limits
        self._runner = runner
        self._comm = comm
        self._eos_ids = frozenset(eos_ids)
        self._faults = faults
        self._scheduler = Scheduler(limits)
        self._paused = False
        self._epoch = 0
        self._fresh = False
        """Whether this World took another one's place, and no step was committed under it yet."""
        self._step = 0
        self._launched: list[_Launched] = []
        """Steps under way, the older one first: at most two within `step`, at most one between its calls."""
        self._untold = _Untold()
        self._laps = Laps()

    def step(self, proposal: int = 0, ready: bool = False) -> StepResult:
        """Take one step to its end, with all ranks; the one after it may have been launched by then. COLLECTIVE.

        proposal: greater than 0 when this rank knows of a change that all are to make together. ready: whether it is
        ready for it. When all ranks are, they end at the same step boundary, with nothing under way.
        Raises PeerLost when ranks fell silent or a roll call was opened. Then nothing is under way; what was committed
        before is told with the next result."""
        self._laps = Laps()
        try:
            self._faults.point("step", self._step + 1)
            said = self._go_on(proposal, ready)
        except Exception:
            self.drop()
            raise
        untold, self._untold = self._untold, _Untold()
        return StepResult(
            tokens=untold.tokens,
            prompt_logprobs=untold.prompt_logprobs,
            rejected=untold.rejected,
            idle=said.idle,
            proposal=said.proposal,
            boundary=said.boundary,
            step=self._step,
            prompt_tokens=untold.prompt_tokens,
            seconds=self._laps.seconds(),
        )

    def accept(self, messages: Iterable[ToWorker]) -> None:
        """Take in what the server sends, between steps. Messages that are not the engine's are left alone. LOCAL."""
        for message in messages:
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Abort):
                self._abort(message.request_id)
            elif isinstance(message, Pause):
                self._paused = True
            elif isinstance(message, Resume):
                self._paused = False

    def adopt(self, world: World, routes_LEW: npt.NDArray[np.int32]) -> None:
        """Serve under `world` from now on; the communicator has adopted its view. Requests and KV stay. LOCAL."""
        assert not self._launched, "a step of the last World is under way"
        self._epoch, self._fresh = world.epoch, self._epoch > 0
        self._runner.adopt(routes_LEW)

    def drop(self) -> None:
        """Forget every step under way, once nothing of it runs any more: what was planned with it is free again.

        For who learns between steps that a peer is lost; `step` does so itself. LOCAL, waits."""
        dropped, self._launched = self._launched, []
        for step in reversed(dropped):
            self._scheduler.drop(step.plan)
        for step in dropped:
            if step.flight is not None:
                step.flight.discard()

    @property
    def has_work(self) -> bool:
        """Whether the next step of this rank has something to run or to tell: then it must not sleep."""
        return bool(self._launched or self._untold or (self._scheduler.requests and not self._paused))

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def steps(self) -> int:
        """The number of the last step that this rank committed."""
        return self._step

    def next_plan(self) -> Plan:
        """What the next step would run, as things stand, if none is under way. LOCAL, changes nothing."""
        return self._scheduler.schedule()

    def load(self) -> Load:
        """How occupied this rank is. LOCAL."""
        return self._scheduler.load()

    def check(self) -> None:
        """Assert that requests and KV blocks agree; for tests, between steps. LOCAL."""
        self._scheduler.check()

    # --- the parts of a step

    def _go_on(self, proposal: int, ready: bool) -> _Said:
        """See `step`."""
        said = _Said()
        if not self._launched:
            said = self._begin(Plan() if self._paused else self._scheduler.schedule(), None, proposal, ready)
            if not self._launched:
                return said
        first = self._launched[0]
        following = self._following(first)
        if following is not None:
            try:
                said = self._begin(following, first, proposal, ready)
            except PeerLost as lost:
                self._land(lost)  # it may have been whole; whoever committed it elsewhere told its tokens
                raise
        self._land()
        return said

    def _begin(self, plan: Plan, behind: _Launched | None, proposal: int, ready: bool) -> _Said:
        """Meet, and launch a step unless all are to do something else. behind: the step under way. COLLECTIVE."""
        self._faults.point("schedule")
        number = (behind.number if behind else self._step) + 1
        header_RN = self._header([plan.num_tokens, proposal, ready, self._epoch, bool(plan), number])
        self._laps.lap("meet_next" if behind else "meet")
        proposal = int(header_RN[:, _PROPOSAL].max())
        if header_RN[header_RN[:, _STEP] > 0, _READY].all():
            return _Said(proposal, boundary=True)
        if not header_RN[:, _WANTS].any():
            return _Said(proposal, idle=True)
        batch = build(plan) if behind is None else build_behind(plan, behind.plan)
        prompt_tokens = sum(min(c.length, max(0, c.request.prompt_length - c.start)) for c in plan.chunks)
        flight = None
        step_tokens = int(header_RN[:, _TOKENS].sum())
        if step_tokens:
            self._faults.point("prefill" if prompt_tokens else "decode")
            flight = self._runner.launch(replace(batch, step_tokens=step_tokens))
        self._scheduler.depart(plan)
        number = int(header_RN[:, _STEP].max())
        self._launched.append(_Launched(plan, batch, number, prompt_tokens, flight))
        self._laps.lap("launch_next" if behind else "launch")
        return _Said(proposal)

    def _following(self, step: _Launched) -> Plan | None:
        """The plan that can be launched behind a step under way; None: it must be committed first. LOCAL."""
        if self._fresh or self._paused or step.flight is None or not self._runner.may_lead(step.batch):
            return None
        return self._scheduler.follow(step.plan)

    def _land(self, lost: PeerLost | None = None) -> None:
        """Wait for the oldest step under way, check it, and commit it. lost: what is known to have failed since. LOCAL.
        Raises PeerLost."""
        step = self._launched[0]
        outcome = _Outcome({}, {}, {})
        if step.flight is not None:
            ran = step.flight.finish()
            self._laps.lap("wait")
            # The last collective is over and what follows is local: the check can stand before the sampler.
            self._check(ran.status or self._comm.status(), lost)
            outcome = self._sample(step.batch, ran)
        self._faults.point("commit")
        del self._launched[0]
        self._step, self._fresh = step.number, False
        self._commit(step, outcome)
        self._laps.lap("commit")

    def _header(self, row: list[int]) -> npt.NDArray[np.int64]:
        """What every rank brings to a step: int64 [R, 6]. It is read only if it is complete. COLLECTIVE."""
        header_RN, status = self._comm.meet(row)
        self._check(status)
        present = header_RN[header_RN[:, _STEP] > 0]
        assert (present[:, _EPOCH] == self._epoch).all(), f"ranks in a step of epochs {present[:, _EPOCH].tolist()}"
        return header_RN

    def _check(self, status: Status, lost: PeerLost | None = None) -> None:
        """The one place where a failure surfaces, together with what is `lost` already. LOCAL."""
        if not status.clean:
            ranks, epoch = (lost.ranks, lost.epoch) if lost else ((), 0)
            raise PeerLost(status.lost.union(ranks), max(status.interrupted, epoch), lost.found_s if lost else None)

    def _sample(self, batch: StepBatch, ran: Ran) -> _Outcome:
        outcome = _Outcome({r.request_id: ran.tokens[row] for r, row in batch.samples if row in ran.tokens}, {}, {})
        here = self._scheduler.has
        left = [(request, row) for request, row in batch.samples if row not in ran.tokens and here(request)]
        for first in range(0, len(left), _ROWS_AT_ONCE):
            samples = left[first : first + _ROWS_AT_ONCE]
            logits_NV = ran.logits([row for _, row in samples])
            for (request, _), logits_V in zip(samples, logits_NV, strict=True):
                token_id = sampler.choose(
                    logits_V, request.sampling, request.tokens, request.prompt_length, request.stop_ids
                )
                outcome.tokens[request.request_id] = token_id
                if request.sampling.logprobs is not None:
                    outcome.logprobs[request.request_id] = sampler.logprobs(
                        logits_V, token_id, request.sampling.logprobs
                    )
        for prompt in batch.prompts:
            outcome.prompt_logprobs[prompt.request.request_id] = self._prompt_logprobs(prompt, ran)
        return outcome

    def _prompt_logprobs(self, prompt: PromptRows, ran: Ran) -> list[list[Logprob]]:
        entries: list[list[Logprob]] = []
        count = prompt.request.sampling.prompt_logprobs or 0
        for first in range(0, prompt.count, _ROWS_AT_ONCE):
            offsets = range(first, min(first + _ROWS_AT_ONCE, prompt.count))
            logits_NV = ran.logits([prompt.first_row + i for i in offsets])
            for i, logits_V in zip(offsets, logits_NV, strict=True):
                token_id = prompt.request.tokens[prompt.first_token + i]
                entries.append(sampler.logprobs(logits_V, token_id, count))
        return entries

    def _commit(self, step: _Launched, outcome: _Outcome) -> None:
        """Make the step count. LOCAL."""
        untold = self._untold
        sampled: list[tuple[Request, int]] = []
        for chunk in self._scheduler.alive(step.plan):
            request = chunk.request
            if outcome.prompt_logprobs:
                request.prompt_logprobs.extend(outcome.prompt_logprobs.get(request.request_id, ()))
            if chunk.samples:
                sampled.append((request, request.output_length))
                if request.sampling.prompt_logprobs is not None and request.output_length == 0:
                    untold.prompt_logprobs.append(
                        PromptLogprobs(request.request_id, request.attempt, request.prompt_logprobs)
                    )
        endings = self._scheduler.commit(step.plan, outcome.tokens)
        untold.prompt_tokens += step.prompt_tokens
        untold.tokens += [
            TokenOut(
                request_id=request.request_id,
                attempt=request.attempt,
                index=index,
                token_id=outcome.tokens[request.request_id],
                finish_reason=endings[request.request_id].reason,
                stop_token=endings[request.request_id].stop_token,
                logprobs=outcome.logprobs.get(request.request_id),
            )
            for request, index in sampled
        ]

    # --- requests that come and go, between steps

    def _submit(self, submit: Submit) -> None:
        known = self._scheduler.requests.get(submit.request_id)
        if known is not None:
            if submit.attempt <= known.attempt:
                return
            self._scheduler.remove(submit.request_id)
        reason = self._refuse(submit)
        if reason:
            self._untold.rejected.append(Refusal(submit.request_id, submit.attempt, reason))
            return
        self._scheduler.add(Request.of(submit, self._eos_ids, self._limits.block_size))

    def _abort(self, request_id: str) -> None:
        if request_id in self._scheduler.requests:
            request = self._scheduler.remove(request_id)
            self._untold.tokens.append(TokenOut(request_id, request.attempt, request.output_length, -1, "abort"))

    def _refuse(self, submit: Submit) -> str:
        """Why this rank can never run the request; empty when it can."""
        prompt, output, sampling = submit.prompt_ids, submit.output_ids, submit.sampling
        vocab = range(self._runner.vocab_size)
        total = len(prompt) + sampling.max_tokens
        blocks = -(-(total - 1) // self._limits.block_size)  # the last token's KV is never needed
        if not prompt:
            return "the prompt has no tokens"
        if any(token not in vocab for token in prompt):
            return f"the prompt has token ids outside the vocabulary of {len(vocab)}"
        if any(token not in vocab for token in sampling.logit_bias or ()):
            return f"logit_bias has token ids outside the vocabulary of {len(vocab)}"
        if sampling.max_tokens <= len(output):
            return f"max_tokens is {sampling.max_tokens} and {len(output)} tokens are there already"
        if total > self._limits.max_model_len:
            return (
                f"the prompt's {len(prompt)} tokens and max_tokens {sampling.max_tokens} together exceed the "
                f"maximum length of {self._limits.max_model_len} tokens: shorten the prompt or lower max_tokens"
            )
        if blocks > self._limits.num_blocks:
            return (
                f"the prompt's {len(prompt)} tokens and max_tokens {sampling.max_tokens} need {blocks} KV blocks, "
                f"and there are {self._limits.num_blocks}: lower max_tokens or serve with more KV cache memory"
            )
        return ""
