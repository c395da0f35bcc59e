"""One step of one rank, as a transaction: schedule, run, check, commit.

Nothing that is committed changes before the check: no block table, token, count or name in the prefix cache. So a
step that fails leaves no trace but KV in blocks that nobody reads, and replaying it takes no code: the next `step()`
plans from the same state and, because all is exact and the noise is a function of (seed, position), gives the same
tokens. Commit is local: a peer that failed where this rank did not simply runs its own part again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from phalanx.comm.base import Communicator, Status
from phalanx.engine import sampler
from phalanx.engine.batch import PromptRows, StepBatch, build, build_ahead, complete
from phalanx.engine.request import Request
from phalanx.engine.runner import Ran, StepRunner
from phalanx.engine.scheduler import Limits, Plan, Scheduler
from phalanx.errors import PeerLost
from phalanx.messages import Abort, Load, Logprob, Pause, PromptLogprobs, Resume, Submit, TokenOut, ToWorker
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
    idle: no rank had anything to do, nothing ran: all may sleep. proposal: the highest of any rank. boundary: all ranks
    were ready for what is proposed; nothing ran, all are at the same step boundary. step: the number of the step, the
    same on all ranks. prompt_tokens: prompt tokens computed in it.
    """

    tokens: list[TokenOut] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    rejected: list[Refusal] = field(default_factory=list)
    idle: bool = False
    proposal: int = 0
    boundary: bool = False
    step: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class _Outcome:
    """What the sampler made of a step, not committed yet. Keys are request ids."""

    tokens: dict[str, int]
    logprobs: dict[str, list[Logprob]]
    prompt_logprobs: dict[str, list[list[Logprob]]]


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
        self._ahead: tuple[Plan, StepBatch] | None = None
        self._epoch = 0
        self._step = 0
        self._ended: list[TokenOut] = []
        self._rejected: list[Refusal] = []

    def step(self, proposal: int = 0, ready: bool = False) -> StepResult:
        """Run one step with all ranks. COLLECTIVE.

        proposal: greater than 0 when this rank knows of a change that all are to make together. ready: whether it is
        ready for it. When all ranks are, the step ends at its boundary, on all of them.
        Raises PeerLost when ranks fell silent or a roll call was opened; then nothing of the step was committed."""
        self._faults.point("step", self._step + 1)
        ahead, self._ahead = self._ahead, None
        if self._paused:
            plan, ahead = Plan(), None
        elif ahead and self._scheduler.confirm(ahead[0]):
            plan = ahead[0]
        else:
            plan, ahead = self._scheduler.schedule(), None
        self._faults.point("schedule")
        header_RN = self._header(plan, proposal, ready)
        proposal = int(header_RN[:, _PROPOSAL].max())
        if header_RN[header_RN[:, _STEP] > 0, _READY].all():
            return self._result(proposal=proposal, boundary=True)
        if not header_RN[:, _WANTS].any():
            return self._result(proposal=proposal, idle=True)
        if ahead:
            batch, prompt_tokens = ahead[1], 0  # decodes alone are made ahead
            complete(batch)
        else:
            batch = build(plan)
            prompt_tokens = sum(min(c.length, max(0, c.request.prompt_length - c.start)) for c in plan.chunks)
        if header_RN[:, _TOKENS].any():
            self._faults.point("prefill" if prompt_tokens else "decode")
            ran = self._runner.run(batch, lambda: self._prepare(plan))
            # The last collective is over and what follows is local: the check can stand before the sampler.
            self._check(ran.status)
            outcome = self._sample(batch, ran)
        else:
            outcome = _Outcome({}, {}, {})
        self._faults.point("commit")
        self._step = int(header_RN[:, _STEP].max())
        return self._commit(plan, outcome, prompt_tokens, proposal)

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
        self._epoch = world.epoch
        self._runner.adopt(routes_LEW)

    @property
    def has_work(self) -> bool:
        """Whether the next step of this rank has something to run or to tell: then it must not sleep."""
        return bool(self._ended or self._rejected or (self._scheduler.requests and not self._paused))

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def steps(self) -> int:
        """The number of the last step that this rank committed."""
        return self._step

    def next_plan(self) -> Plan:
        """What the next step would run, as things stand. LOCAL, changes nothing."""
        return self._scheduler.schedule()

    def load(self) -> Load:
        """How occupied this rank is. LOCAL."""
        return self._scheduler.load()

    def check(self) -> None:
        """Assert that requests and KV blocks agree; for tests, between steps. LOCAL."""
        self._scheduler.check()

    # --- the parts of a step

    def _header(self, plan: Plan, proposal: int, ready: bool) -> npt.NDArray[np.int64]:
        """What every rank brings to this step: int64 [R, 6]. It is read only if it is complete. COLLECTIVE."""
        header_RN, status = self._comm.meet([plan.num_tokens, proposal, ready, self._epoch, bool(plan), self._step + 1])
        self._check(status)
        present = header_RN[header_RN[:, _STEP] > 0]
        assert (present[:, _EPOCH] == self._epoch).all(), f"ranks in a step of epochs {present[:, _EPOCH].tolist()}"
        return header_RN

    def _prepare(self, plan: Plan) -> StepBatch | None:
        """While the step of `plan` runs: make the plan and the batch that most likely follow it. Nothing is committed
        by that, and when it comes otherwise (a failure, an end, a newcomer) the next step plans anew. LOCAL."""
        following = self._scheduler.follow(plan)
        if following is None:
            return None
        self._ahead = following, build_ahead(following)
        return self._ahead[1]

    def _check(self, status: Status | None = None) -> None:
        """The one place where a failure surfaces. LOCAL."""
        status = status or self._comm.status()
        if not status.clean:
            raise PeerLost(status.lost, status.interrupted)

    def _sample(self, batch: StepBatch, ran: Ran) -> _Outcome:
        outcome = _Outcome({r.request_id: ran.tokens[row] for r, row in batch.samples if row in ran.tokens}, {}, {})
        left = [(request, row) for request, row in batch.samples if row not in ran.tokens]
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

    def _commit(self, plan: Plan, outcome: _Outcome, prompt_tokens: int, proposal: int) -> StepResult:
        """Make the step count. LOCAL."""
        told: list[PromptLogprobs] = []
        sampled: list[tuple[Request, int]] = []
        for chunk in plan.chunks:
            request = chunk.request
            if outcome.prompt_logprobs:
                request.prompt_logprobs.extend(outcome.prompt_logprobs.get(request.request_id, ()))
            if chunk.samples:
                sampled.append((request, request.output_length))
                if request.sampling.prompt_logprobs is not None and request.output_length == 0:
                    told.append(PromptLogprobs(request.request_id, request.attempt, request.prompt_logprobs))
        endings = self._scheduler.commit(plan, outcome.tokens)
        tokens = [
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
        return self._result(tokens=tokens, prompt_logprobs=told, prompt_tokens=prompt_tokens, proposal=proposal)

    def _result(
        self,
        *,
        tokens: Iterable[TokenOut] = (),
        prompt_logprobs: Iterable[PromptLogprobs] = (),
        idle: bool = False,
        proposal: int = 0,
        boundary: bool = False,
        prompt_tokens: int = 0,
    ) -> StepResult:
        """Hand out what the step brought, and what was waiting to be told."""
        result = StepResult(
            tokens=[*self._ended, *tokens],
            prompt_logprobs=list(prompt_logprobs),
            rejected=self._rejected,
            idle=idle,
            proposal=proposal,
            boundary=boundary,
            step=self._step,
            prompt_tokens=prompt_tokens,
        )
        self._ended, self._rejected = [], []
        return result

    # --- requests that come and go, between steps

    def _submit(self, submit: Submit) -> None:
        known = self._scheduler.requests.get(submit.request_id)
        if known is not None:
            if submit.attempt <= known.attempt:
                return
            self._scheduler.remove(submit.request_id)
        reason = self._refuse(submit)
        if reason:
            self._rejected.append(Refusal(submit.request_id, submit.attempt, reason))
            return
        self._scheduler.add(Request.of(submit, self._eos_ids, self._limits.block_size))

    def _abort(self, request_id: str) -> None:
        if request_id in self._scheduler.requests:
            request = self._scheduler.remove(request_id)
            self._ended.append(TokenOut(request_id, request.attempt, request.output_length, -1, "abort"))

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
