"""POST /v1/completions: text in, text out; with `echo` and `logprobs` it scores a text, as lm-eval does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from phalanx import messages as m
from phalanx.server.generate import (
    Delta,
    Entry,
    Generation,
    Plan,
    Service,
    budget,
    check_choices,
    check_ids,
    check_model,
    encode,
    framed,
    keep_alive,
    sampling,
    unless_gone,
)
from phalanx.server.protocol import ApiError, CompletionRequest
from phalanx.server.sse import EventStream, event
from phalanx.server.text import ModelText

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""


async def complete(service: Service, request: CompletionRequest, http: HttpRequest, call_id: str) -> Response:
    """Answer one call. ApiError for what cannot be done."""
    request.log_unknown()
    check_model(service, request.model)
    plans = await _plans(service, request)
    generation = Generation(service, call_id, plans, request)
    head = {
        "id": call_id, "object": "text_completion", "created": int(time.time()), "model": service.config.name,
    }  # fmt: skip
    generation.start()
    if request.stream:
        return EventStream(generation, framed(_frames(generation, head, request)))
    with generation:
        whole = await unless_gone(http, generation.complete())
        if whole is None:
            return Response(status_code=499)
        choices = [_choice(service.text, request, generation, delta) for delta in whole]
        body = head | {"choices": choices, "usage": generation.usage}
        return Response(msgspec.json.encode(body), media_type="application/json")


async def _plans(service: Service, request: CompletionRequest) -> list[Plan]:
    plans = []
    scores_prompt = request.echo and request.logprobs is not None
    prompt_logprobs = request.logprobs if scores_prompt else request.prompt_logprobs
    for text, ids in await _prompts(service, request):
        wanted = request.max_tokens
        if wanted is not None and "max_tokens" not in request.model_fields_set:
            wanted = min(wanted, max(1, service.max_model_len - len(ids)))  # a default must not be what goes too far
        max_tokens = budget(service, ids, wanted, "prompt")
        echo = (service.text.decode(ids) if text is None else text) if request.echo else None
        plans += [
            Plan(ids, params, echo, hide_output=max_tokens == 0)
            for params in sampling(
                service, request, max_tokens=max_tokens, logprobs=request.logprobs, prompt_logprobs=prompt_logprobs
            )
        ]
    return plans


async def _prompts(service: Service, request: CompletionRequest) -> list[tuple[str | None, list[int]]]:
    """Each prompt's text, None where it came as token ids, and its token ids."""
    given = request.prompt
    single = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    texts = cast("Sequence[str | list[int]]", [given] if single else given)
    if not texts:
        raise ApiError(400, "prompt: the list is empty", param="prompt")
    check_choices(service, len(texts), request.n or 1)
    strings = [prompt for prompt in texts if isinstance(prompt, str)]
    encoded = iter(await encode(service, strings, special=request.add_special_tokens))
    prompts: list[tuple[str | None, list[int]]] = []
    for prompt in texts:
        if isinstance(prompt, str):
            text, ids = prompt, next(encoded)
            if not ids and service.text.bos_id is not None:
                ids = [service.text.bos_id]
        else:
            text, ids = None, prompt
            check_ids(service, ids, "prompt")
        if request.truncate_prompt_tokens is not None and len(ids) > request.truncate_prompt_tokens:
            text, ids = None, ids[-request.truncate_prompt_tokens :]
        prompts.append((text, ids))
    return prompts


async def _frames(generation: Generation, head: dict[str, Any], request: CompletionRequest) -> AsyncIterator[bytes]:
    options = request.stream_options
    text = generation.service.text
    wants_usage = options is not None and options.include_usage
    continuous = options is not None and options.continuous_usage_stats
    named: set[int] = set()
    async for deltas in generation.deltas():
        if frame := keep_alive(deltas):
            yield frame
        for delta in deltas:
            shows_tokens = request.logprobs is not None or request.return_token_ids
            if not delta.text and delta.finish_reason is None and not (shows_tokens and delta.entries):
                continue  # nothing to show yet: half a character, or what may become a stop string
            chunk: dict[str, Any] = head | {"choices": [_choice(text, request, generation, delta)]}
            if request.return_token_ids and delta.index not in named:
                named.add(delta.index)
                chunk["choices"][0]["prompt_token_ids"] = generation.choices[delta.index].plan.prompt_ids
            if wants_usage:
                chunk["usage"] = generation.usage if continuous else None
            yield event(chunk)
    if wants_usage:
        yield event(head | {"choices": [], "usage": generation.usage})


def _choice(text: ModelText, request: CompletionRequest, generation: Generation, delta: Delta) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": delta.index,
        "text": delta.text,
        "logprobs": None if request.logprobs is None else _logprobs(text, request, delta.entries),
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
    if request.prompt_logprobs is not None and not request.stream:
        choice["prompt_logprobs"] = prompt_report(text, generation.choices[delta.index].prompt_report)
    if request.return_token_ids:
        choice["token_ids"] = delta.token_ids
        if not request.stream:
            choice["prompt_token_ids"] = generation.choices[delta.index].plan.prompt_ids
    return choice


def _logprobs(text: ModelText, request: CompletionRequest, entries: Sequence[Entry]) -> dict[str, Any]:
    """The legacy object: four lists in step. The first token of a prompt has no logprob."""
    as_ids = request.return_tokens_as_token_ids
    return {
        "tokens": [token_name(text, e.token_id, as_ids) for e in entries],
        "token_logprobs": [None if not e.logprobs else finite(e.logprobs[0].logprob) for e in entries],
        "top_logprobs": [None if not e.logprobs else _top(text, e.logprobs, as_ids) for e in entries],
        "text_offset": [e.offset for e in entries],
    }


def _top(text: ModelText, report: Sequence[m.Logprob], as_ids: bool) -> dict[str, float]:
    """Token to logprob. Of two tokens with one text the likelier counts."""
    top: dict[str, float] = {}
    for item in report:
        name = token_name(text, item.token_id, as_ids)
        top[name] = max(top.get(name, LOWEST_LOGPROB), finite(item.logprob))
    return top


def token_name(text: ModelText, token_id: int, as_ids: bool) -> str:
    """A token as a string: its text; its bytes, in OpenAI's notation, where it is a part of a character."""
    if as_ids:
        return f"token_id:{token_id}"
    shown = text.token_text(token_id)
    if "\ufffd" not in shown:
        return shown
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text.token_bytes(token_id))


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def prompt_report(text: ModelText, report: Sequence[Sequence[m.Logprob]]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token its alternatives by token id, None for the first."""
    return [None] + [
        {
            str(item.token_id): {
                "logprob": finite(item.logprob),
                "rank": item.rank,
                "decoded_token": text.token_text(item.token_id),
            }
            for item in entries
        }
        for entries in report
    ]
