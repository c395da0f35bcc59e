"""POST /v1/chat/completions: a conversation in, the assistant's next message out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from phalanx import messages as m
from phalanx.server.completions import finite, prompt_report, token_name
from phalanx.server.generate import (
    Delta,
    Entry,
    Generation,
    Plan,
    Service,
    budget,
    check_choices,
    check_model,
    encode,
    framed,
    keep_alive,
    sampling,
    unless_gone,
)
from phalanx.server.protocol import ChatRequest
from phalanx.server.sse import EventStream, event
from phalanx.server.text import ModelText


async def chat(service: Service, request: ChatRequest, http: HttpRequest, call_id: str) -> Response:
    """Answer one call. ApiError or BadRequest for what cannot be done."""
    request.log_unknown()
    check_model(service, request.model)
    generation = Generation(service, call_id, await _plans(service, request), request)
    head = {"id": call_id, "created": int(time.time()), "model": service.config.name}
    generation.start()
    if request.stream:
        return EventStream(generation, framed(_frames(generation, head, request)))
    with generation:
        whole = await unless_gone(http, generation.complete())
        if whole is None:
            return Response(status_code=499)
        body = head | {
            "object": "chat.completion",
            "choices": [_choice(service.text, request, delta) for delta in whole],
            "usage": generation.usage,
        }
        if request.return_token_ids:
            body["prompt_token_ids"] = generation.choices[0].plan.prompt_ids
        if request.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_report(service.text, generation.choices[0].prompt_report)
        return Response(msgspec.json.encode(body), media_type="application/json")


async def prompt_of(service: Service, request: ChatRequest) -> list[int]:
    """The conversation's token ids."""
    tools = None if request.tool_choice == "none" else request.tools
    text = service.text.template.render(
        [message.for_template() for message in request.messages],
        tools=tools or None,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        extra=request.chat_template_kwargs,
    )
    # The template writes the special tokens that the model wants; the tokenizer must not add them again.
    return (await encode(service, [text], special=request.add_special_tokens, param="messages"))[0]


async def _plans(service: Service, request: ChatRequest) -> list[Plan]:
    check_choices(service, 1, request.n or 1)
    ids = await prompt_of(service, request)
    if request.truncate_prompt_tokens is not None:
        ids = ids[-request.truncate_prompt_tokens :]
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    max_tokens = budget(service, ids, wanted, "messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = sampling(
        service, request, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=request.prompt_logprobs
    )
    return [Plan(ids, p) for p in params]


async def _frames(generation: Generation, head: dict[str, Any], request: ChatRequest) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"}
    options = request.stream_options
    text = generation.service.text
    wants_usage = options is not None and options.include_usage
    continuous = options is not None and options.continuous_usage_stats

    def chunk(delta: Delta, message: dict[str, Any], logprobs: Any = None) -> bytes:
        choice = {
            "index": delta.index,
            "delta": message,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if request.return_token_ids and delta.token_ids:
            choice["token_ids"] = delta.token_ids
        body = head | {"choices": [choice]}
        if wants_usage:
            body["usage"] = generation.usage if continuous else None
        return event(body)

    for choice in generation.choices:
        yield chunk(Delta(choice.index), {"role": "assistant", "content": ""})
    async for deltas in generation.deltas():
        if frame := keep_alive(deltas):
            yield frame
        for delta in deltas:
            logprobs = _logprobs(text, request, delta.entries)
            shows_tokens = request.logprobs or request.return_token_ids
            if delta.text or delta.finish_reason is not None or (shows_tokens and delta.entries):
                yield chunk(delta, {"content": delta.text} if delta.text else {}, logprobs)
    if wants_usage:
        yield event(head | {"choices": [], "usage": generation.usage})


def _choice(text: ModelText, request: ChatRequest, delta: Delta) -> dict[str, Any]:
    choice = {
        "index": delta.index,
        "message": {"role": "assistant", "content": delta.text, "refusal": None},
        "logprobs": _logprobs(text, request, delta.entries),
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
    if request.return_token_ids:
        choice["token_ids"] = delta.token_ids
    return choice


def _logprobs(text: ModelText, request: ChatRequest, entries: Sequence[Entry]) -> dict[str, Any] | None:
    if not request.logprobs:
        return None
    as_ids, top = request.return_tokens_as_token_ids, request.top_logprobs or 0
    return {"content": [_token(text, e.logprobs, top, as_ids) for e in entries if e.logprobs], "refusal": None}


def _token(text: ModelText, report: Sequence[m.Logprob], top: int, as_ids: bool) -> dict[str, Any]:
    def shown(item: m.Logprob) -> dict[str, Any]:
        return {
            "token": token_name(text, item.token_id, as_ids),
            "logprob": finite(item.logprob),
            "bytes": list(text.token_bytes(item.token_id)),
        }

    likeliest = sorted({item.token_id: item for item in report}.values(), key=lambda item: item.rank)
    return {**shown(report[0]), "top_logprobs": [shown(item) for item in likeliest if item.rank <= top]}
