"""What clients may send, field by field, and what an error looks like. pydantic at the edge, msgspec behind it.

Meanings and defaults are OpenAI's, extra fields vLLM's. Fields that Phalanx does not know are ignored, as clients of
both expect, and logged at debug level; fields that it knows and cannot honour are refused by name. Only what operators
send is taken exactly: there an unknown field is a slip of the pen, and leaving it out may mean every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from phalanx.errors import BadRequest
from phalanx.testing.faults import Kind

log = logging.getLogger("phalanx.http")

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOPS = 64
DRAIN_S = 120.0
"""How long streams on ranks that leave may go on there when nothing else is said; vLLM's number."""

_MAX_SEED = 2**63 - 1
_MAX_COUNT = 2**31 - 1
"""Far above whatever is counted, and within what every message can carry."""


class ApiError(Exception):
    """An HTTP answer in OpenAI's form: {"error": {message, type, param, code}}."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None, kind: str = "",
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        self.kind = kind or _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")

    def body(self) -> bytes:
        """The answer's body, which is also what a stream that breaks ends with."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_OPEN = ConfigDict(extra="allow", allow_inf_nan=False)
_Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS), BeforeValidator(_listed)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TokenId = Annotated[int, Field(strict=True)]
"""Strict: true and 1.0 are no token ids. Whether it is one of the model's is checked where the model is known."""


class _Request(BaseModel):
    model_config = _OPEN

    def log_unknown(self) -> None:
        """Say at debug level which fields are ignored."""
        if self.model_extra:
            log.debug("%s: ignored fields %s", type(self).__name__, ", ".join(sorted(self.model_extra)))


class StreamOptions(_Request):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(_Request):
    """What completions and chat share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = 1
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = 0.0
    frequency_penalty: _Penalty | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-_MAX_SEED, le=_MAX_SEED)] | None = None
    stop: _Stops | None = None
    stop_token_ids: list[_TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool | None = False
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _field_error("stream_options", "it is only allowed with stream=true")
        if self.response_format is not None and self.response_format.get("type", "text") != "text":
            raise _field_error("response_format", "only {'type': 'text'} is supported: output cannot be constrained")
        if self.structured_outputs is not None:
            raise _field_error("structured_outputs", "output cannot be constrained")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _field_error("best_of", "it is only supported when it equals n")
        if self.prompt_logprobs is not None and self.stream:
            raise _field_error("prompt_logprobs", "it is not supported with stream=true")
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[_TokenId] | list[list[_TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = False
    suffix: str | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.suffix:
            raise _field_error("suffix", "it is not supported: the model only writes on after a prompt")
        return self


class ChatMessage(_Request):
    role: Annotated[str, Field(min_length=1)]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as templates expect it: text as one string, tool arguments as objects. BadRequest if it is not
        text."""
        message: dict[str, Any] = {**(self.model_extra or {}), "role": self.role, "content": _text_of(self.content)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        return message


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise _field_error("top_logprobs", "it needs logprobs=true")
        if self.tool_choice not in (None, "none", "auto"):
            raise _field_error("tool_choice", "only 'none' and 'auto' are supported: output cannot be constrained")
        if self.functions:
            raise _field_error("functions", "it is not supported: pass tools")
        if self.chat_template is not None:
            raise _field_error("chat_template", "only the operator can choose it (--chat-template)")
        if self.continue_final_message and self.add_generation_prompt:
            if "add_generation_prompt" in self.model_fields_set:
                raise _field_error("continue_final_message", "it excludes add_generation_prompt=true")
            self.add_generation_prompt = False
        if self.modalities not in (None, ["text"]):
            raise _field_error("modalities", "only ['text'] is supported")
        return self


class TokenizeRequest(_Request):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _field_error("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(_Request):
    model: str | None = None
    tokens: list[_TokenId]
    skip_special_tokens: bool = False


class _Order(BaseModel):
    """What an operator sends."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        if isinstance(body, dict) and (unknown := sorted(map(str, body.keys() - cls.model_fields.keys()))):
            raise _field_error(named(unknown[0]), f"this field is not known, only {', '.join(cls.model_fields)}")
        return body


class AbortRequest(_Order):
    """POST /abort_requests: the ids that clients were given, or "all"."""

    request_ids: list[str] | Literal["all"]


class ApplyRequest(_Order):
    """POST /fault_tolerance/apply."""

    instruction: str
    params: dict[str, Any] = Field(default_factory=dict)


class ScaleRequest(_Order):
    """POST /scale_elastic_ep: the size under either name, as SGLang's and vLLM's users write it."""

    new_ep_size: Annotated[int, Field(strict=True)] | None = None
    new_data_parallel_size: Annotated[int, Field(strict=True)] | None = None
    drain_timeout: Annotated[float, Field(strict=True, ge=0, le=_MAX_COUNT)] = DRAIN_S


class ChaosRequest(_Order):
    """POST /chaos."""

    kind: Literal[Kind, "cont"]
    rank: int
    at_step: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    where: str | None = None


class FieldError(ValueError):
    """A field that contradicts another or cannot be honoured; pydantic carries it to the answer."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param, self.message = param, message


def named(field: str) -> str:
    """A field's name that a client made up, for an answer: half a surrogate pair cannot be sent, nor need all of a long
    one be. LOCAL."""
    return field[:100].encode("utf-8", "backslashreplace").decode()


def _field_error(param: str, message: str) -> FieldError:
    return FieldError(param, message)


def _text_of(content: str | list[dict[str, Any]] | None) -> str:
    """No content, as in a message of tool calls alone, is no text: templates join it to strings."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind, text = part.get("type", "text"), part.get("text", part.get("refusal"))
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise BadRequest(f"a content part of type {kind!r} is not text: this model takes text", "messages")
        if not isinstance(text, str):
            raise BadRequest(f"a content part of type {kind!r} has no string in its field text", "messages")
        texts.append(text)
    return "\n".join(texts)


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = msgspec.json.decode(function["arguments"] or "{}")
        except msgspec.DecodeError:
            raise BadRequest("tool_calls: function.arguments is not valid JSON", "messages") from None
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """pydantic's findings as one answer that names the field. `errors`: as `ValidationError.errors()` gives them."""
    first: dict[str, Any] = errors[0] if errors else {"msg": "the request is not valid", "loc": ()}
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, FieldError):
        return ApiError(400, str(cause), param=cause.param)
    if first.get("type") == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {(first.get('ctx') or {}).get('error', first['msg'])}")
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path")]
    if place and place[0] == "prompt":
        return ApiError(400, "prompt: must be a string, a list of strings, a list of token ids or a list of such lists",
                        param="prompt")  # fmt: skip
    if not place:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    where = ".".join(place)
    return ApiError(400, f"{where}: {first['msg']}", param=place[0])
