"""From a request to its choices: what completions and chat do alike.

A call asks for `prompts x n` choices. Each choice is a request of the router's, and the sink of its tokens: it makes
text of them as they come, so that a stop string ends the request before another token is taken. The handler reads the
deltas; tokens that come faster than it reads are joined in one delta.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from phalanx import messages as m
from phalanx.config import ServeConfig
from phalanx.observe.metrics import Metrics
from phalanx.server.flight import QueueFull, RankRefused, Request, RouterError, Unavailable
from phalanx.server.link import Link
from phalanx.server.protocol import ApiError, GenerationRequest
from phalanx.server.router import Router
from phalanx.server.sse import DONE, KEEP_ALIVE, KEEP_ALIVE_S, raw_event
from phalanx.server.text import Detokenizer, ModelText, StopStrings

RETRY_AFTER_S = 2
_THREAD_FROM_CHARS = 20_000
"""Texts from this length on are tokenized in a thread, so that streams do not wait for it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """What every handler works with."""

    config: ServeConfig
    text: ModelText
    link: Link
    metrics: Metrics
    max_model_len: int
    seeds: random.Random
    started_at: int

    @property
    def router(self) -> Router:
        return self.link.router


@dataclass(slots=True)
class Entry:
    """One token of a choice and its report. offset: characters of the choice's text before it."""

    token_id: int
    offset: int
    logprobs: list[m.Logprob] | None


@dataclass(slots=True)
class Delta:
    """What came to a choice since its last delta."""

    index: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    """Tokens with their reports; those of the prompt come first when it is echoed with logprobs."""
    token_ids: list[int] = field(default_factory=list)
    """Output tokens."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Plan:
    """One choice that is to be made. echo: the prompt's text, None when it is not wanted. hide_output: max_tokens is 0,
    so the one token that the engine must make is not shown."""

    prompt_ids: list[int]
    sampling: m.SamplingParams
    echo: str | None = None
    hide_output: bool = False


class Choice:
    """One choice: the router's sink."""

    def __init__(self, call: Generation, index: int, plan: Plan, request: GenerationRequest) -> None:
        text = call.service.text
        self.index, self.plan = index, plan
        self.tokens = 0
        self.outcome: str | None = None
        self.prompt_report: list[list[m.Logprob]] = []
        self._call = call
        self._text = text
        self._skip_special = request.skip_special_tokens
        self._include_stop = request.include_stop_str_in_output
        self._own_stops = frozenset(request.stop_token_ids or ())
        self._detokenizer = Detokenizer(text, plan.prompt_ids, skip_special=request.skip_special_tokens)
        self._stops = StopStrings(request.stop or (), include=request.include_stop_str_in_output)
        self._chars = 0
        self._delta = Delta(index)
        self._owes_prompt = plan.echo is not None
        if self._owes_prompt and plan.sampling.prompt_logprobs is None:
            self._echo()

    def prompt_logprobs(self, entries: list[list[m.Logprob]]) -> None:
        self.prompt_report = entries
        if self._owes_prompt:
            self._echo()
            self._call.wake(self)

    def token(self, token: m.TokenOut) -> bool:
        if self._owes_prompt:
            self._echo()
        if token.token_id < 0:
            self._finish(token.finish_reason or "abort")
            return True
        if self.plan.hide_output:
            self._finish("length")
            return True
        self.tokens += 1
        offset = self._chars
        shown = not token.stop_token or self._include_stop
        piece = self._detokenizer.push(token.token_id) if shown else ""
        self._chars += len(piece)
        # Text of the first min_tokens tokens cannot stop the request.
        self._delta.text += self._stops.push(piece) if self.tokens > self.plan.sampling.min_tokens else piece
        self._delta.entries.append(Entry(token.token_id, offset, token.logprobs))
        self._delta.token_ids.append(token.token_id)
        if self._stops.found is not None:
            self._finish("stop", self._stops.found)
        elif token.finish_reason is not None:
            mine = token.stop_token and token.token_id in self._own_stops
            self._finish(token.finish_reason, token.token_id if mine else None)
        self._call.wake(self)
        return self.outcome is not None

    def fail(self, error: RouterError) -> None:
        self._call.fail(error)

    def take(self) -> Delta:
        """What came since the last call."""
        delta, self._delta = self._delta, Delta(self.index)
        return delta

    def _echo(self) -> None:
        self._owes_prompt = False
        plan, delta = self.plan, self._delta
        assert plan.echo is not None
        delta.text += plan.echo
        if plan.sampling.prompt_logprobs is not None:
            pieces = Detokenizer(self._text, [], skip_special=True)
            reports: Sequence[list[m.Logprob] | None] = [None, *self.prompt_report]
            chars = 0
            for token_id, report in zip(plan.prompt_ids, reports, strict=False):
                delta.entries.append(Entry(token_id, min(chars, len(plan.echo)), report))
                chars += len(pieces.push(token_id))
        self._chars = len(plan.echo)

    def _finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        if self._stops.found is None:
            tail = "" if self.plan.hide_output else self._detokenizer.flush()
            self._delta.text += self._stops.push(tail) if self.tokens > self.plan.sampling.min_tokens else tail
            if self._stops.found is not None and reason != "abort":
                reason, stop_reason = "stop", self._stops.found
            self._delta.text += self._stops.flush() if self._stops.found is None else ""
        self._delta.finish_reason, self._delta.stop_reason = reason, stop_reason
        self.outcome = reason
        self._call.finished(self)


class Generation:
    """All choices of one call. Use as `with`: leaving it aborts what is still running."""

    def __init__(self, service: Service, call_id: str, plans: Sequence[Plan], request: GenerationRequest) -> None:
        self.service, self.id = service, call_id
        self.choices = [Choice(self, i, plan, request) for i, plan in enumerate(plans)]
        self._n = request.n or 1
        self._news = asyncio.Event()
        self._fresh: dict[int, Choice] = {c.index: c for c in self.choices if c.plan.echo is not None}
        self._error: RouterError | None = None
        self._began = time.monotonic()
        if self._fresh:
            self._news.set()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(c.plan.prompt_ids) for c in self.choices[:: self._n])

    @property
    def completion_tokens(self) -> int:
        return sum(c.tokens for c in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def start(self) -> None:
        """Hand all choices to the router. ApiError 429 or 503 when it takes none."""
        requests = [
            Request(f"{self.id}-{c.index}", self.id, c.plan.prompt_ids, c.plan.sampling, c) for c in self.choices
        ]
        metrics = self.service.metrics
        try:
            self.service.link.submit(requests)
        except RouterError as error:
            raise api_error(error) from None
        for choice in self.choices:
            metrics.request_prompt.observe(len(choice.plan.prompt_ids))
            metrics.request_max.observe(choice.plan.sampling.max_tokens)
        metrics.request_n.observe(self._n)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What came, as it comes, until every choice is done; an empty list when nothing came for a while. Raises
        ApiError when the call fails."""
        while True:
            if not self._news.is_set():
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        await self._news.wait()
                except TimeoutError:
                    yield []
                    continue
            self._news.clear()
            fresh, self._fresh = self._fresh, {}
            yield [choice.take() for choice in fresh.values()]
            if self._error is not None:
                raise api_error(self._error)
            if not self._fresh and all(c.outcome is not None for c in self.choices):
                return

    async def complete(self) -> list[Delta]:
        """Each choice as one delta. Raises ApiError when the call fails."""
        whole = [Delta(c.index) for c in self.choices]
        async for deltas in self.deltas():
            for delta in deltas:
                sum_ = whole[delta.index]
                sum_.text += delta.text
                sum_.entries += delta.entries
                sum_.token_ids += delta.token_ids
                sum_.finish_reason, sum_.stop_reason = delta.finish_reason, delta.stop_reason
        return whole

    def wake(self, choice: Choice) -> None:
        self._fresh[choice.index] = choice
        self._news.set()

    def fail(self, error: RouterError) -> None:
        self._error = self._error or error
        self._news.set()

    def finished(self, choice: Choice) -> None:
        self.wake(choice)
        self._count(choice)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        for choice in self.choices:
            if choice.outcome is None:
                self.service.link.release(f"{self.id}-{choice.index}")
                choice.outcome = "abort" if self._error is None else "error"
                self._count(choice)

    def _count(self, choice: Choice) -> None:
        assert choice.outcome is not None
        metrics = self.service.metrics
        metrics.finished(choice.outcome)
        if choice.outcome in ("stop", "length"):
            metrics.e2e.observe(time.monotonic() - self._began)
            metrics.request_output.observe(choice.tokens)


async def framed(frames: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """The frames of a stream, its error if it breaks, and the end mark."""
    try:
        async for frame in frames:
            yield frame
    except ApiError as error:
        yield raw_event(error.body())
    yield DONE


def keep_alive(deltas: list[Delta]) -> bytes | None:
    """The frame for a wait in which nothing came."""
    return None if deltas else KEEP_ALIVE


async def unless_gone(request: HttpRequest, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None when the client went away first; `work` is cancelled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, watch):
            future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def api_error(error: RouterError) -> ApiError:
    """A router's refusal as an HTTP answer."""
    retry = {"Retry-After": str(RETRY_AFTER_S)}
    match error:
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", headers=retry)
        case Unavailable():
            return ApiError(503, str(error), code="unavailable", headers=retry)
        case RankRefused():
            return ApiError(400, str(error), param="prompt", code="request_too_large")
        case _:
            return ApiError(500, str(error))


# --- parameters


def check_model(service: Service, name: str | None) -> None:
    """404 unless the client means this model. A client may leave the name out, or say the path it was served from."""
    if name and name not in (service.config.name, service.config.model):
        raise ApiError(404, f"the model {name!r} does not exist: this server has {service.config.name!r}",
                       param="model", code="model_not_found")  # fmt: skip


async def encode(service: Service, texts: Sequence[str], *, special: bool, param: str = "prompt") -> list[list[int]]:
    """Token ids of each text. 400 for text that is not valid Unicode."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param}: the text holds half of a surrogate pair", param=param) from None
    if sum(map(len, texts)) >= _THREAD_FROM_CHARS:
        return await asyncio.to_thread(lambda: [service.text.encode_long(text, special=special) for text in texts])
    return [service.text.encode(text, special=special) for text in texts]


def check_choices(service: Service, prompts: int, n: int) -> None:
    """400 for a call that asks for more choices than the service ever takes at once: waiting would not help."""
    config = service.config
    most = config.max_queued_requests + config.max_num_seqs * service.router.roster.ep_size
    if prompts * n > most:
        asked = f"{prompts} prompts with n = {n} ask" if prompts > 1 else f"n = {n} asks"
        raise ApiError(
            400, f"{asked} for {prompts * n} answers, and this service takes at most {most} at once: split the call",
            param="prompt" if prompts > 1 else "n", code="too_many_choices",
        )  # fmt: skip


def budget(service: Service, prompt_ids: list[int], max_tokens: int | None, param: str) -> int:
    """How many tokens the answer may have. 400 when the prompt, or prompt and answer, exceed the model's length."""
    length, room = len(prompt_ids), service.router.roster.kv_tokens
    limit = service.max_model_len
    if length == 0:
        raise ApiError(400, f"{param}: the prompt has no tokens", param=param)
    if length >= limit:
        raise ApiError(
            400, f"the prompt has {length} tokens, and this model's maximum context length is {limit} tokens, answer "
            "included: shorten it", param=param, code="context_length_exceeded",
        )  # fmt: skip
    if max_tokens is not None and length + max_tokens > limit:
        raise ApiError(
            400, f"the prompt has {length} tokens and max_tokens asks for {max_tokens}: {length + max_tokens} in all, "
            f"but this model's maximum context length is {limit} tokens", param="max_tokens",
            code="context_length_exceeded",
        )  # fmt: skip
    if room and length + (max_tokens or 1) > room:
        raise ApiError(
            400, f"the prompt has {length} tokens, and a rank's KV cache holds {room}, answer included: shorten the "
            "prompt, lower max_tokens, or serve with more --kv-cache-memory-mb", param=param, code="request_too_large",
        )  # fmt: skip
    return min(limit, room or limit) - length if max_tokens is None else max_tokens


def check_ids(service: Service, ids: Sequence[int], param: str) -> None:
    """400 for a token id outside the vocabulary."""
    size = service.text.vocab_size
    bad = next((i for i in ids if not 0 <= i < size), None)
    if bad is not None:
        raise ApiError(400, f"{param}: token id {bad} is outside the vocabulary of {size}", param=param)


def sampling(
    service: Service, request: GenerationRequest, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> list[m.SamplingParams]:
    """How to sample each of the `n` choices: they differ in their seeds. A request without a seed gets one here, so
    that it keeps it when it moves to another rank."""
    defaults = service.text.sampling_defaults
    if request.min_tokens > max_tokens:
        raise ApiError(400, f"min_tokens {request.min_tokens} is more than max_tokens {max_tokens}", param="min_tokens")
    check_ids(service, request.stop_token_ids or (), "stop_token_ids")
    check_ids(service, list(request.logit_bias or ()), "logit_bias")

    def chosen(name: str, fallback: float) -> float:
        value = getattr(request, name)
        return float(defaults.get(name, fallback) if value is None else value)

    stops = set(request.stop_token_ids or ()) | (set() if request.ignore_eos else service.text.eos_ids)
    seed = service.seeds.getrandbits(63) if request.seed is None else request.seed
    return [
        m.SamplingParams(
            max_tokens=max(1, max_tokens),
            temperature=chosen("temperature", 1.0),
            top_p=chosen("top_p", 1.0),
            top_k=int(chosen("top_k", 0)),
            min_p=chosen("min_p", 0.0),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=chosen("repetition_penalty", 1.0),
            logit_bias=request.logit_bias or None,
            seed=(seed + i) & (2**63 - 1),
            stop_token_ids=tuple(sorted(stops)),
            ignore_eos=request.ignore_eos,
            min_tokens=request.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for i in range(request.n or 1)
    ]
