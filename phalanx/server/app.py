"""The ASGI application: routes, authentication, and one form for every error."""

from __future__ import annotations

import hmac
import logging
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phalanx import __version__
from phalanx.errors import BadRequest
from phalanx.server import admin, scale_api
from phalanx.server.answers import ServiceHere
from phalanx.server.chat import chat
from phalanx.server.completions import complete
from phalanx.server.generate import Service
from phalanx.server.protocol import ApiError, ChatRequest, CompletionRequest, validation_error

log = logging.getLogger("phalanx.http")

MAX_BODY_BYTES = 64 << 20


def create_app(service: Service) -> FastAPI:
    """The application over a running service. LOCAL."""
    app = FastAPI(title="Phalanx", version=__version__, description="OpenAI-compatible API", redirect_slashes=False)
    app.state.service = service
    app.include_router(admin.routes())
    app.include_router(scale_api.routes())

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, http: HttpRequest, service: ServiceHere) -> Response:
        return await complete(service, request, http, _call_id("cmpl", http))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest, http: HttpRequest, service: ServiceHere) -> Response:
        return await chat(service, request, http, _call_id("chatcmpl", http))

    _errors(app)
    app.add_middleware(Gate, api_key=service.config.api_key)
    return app


class Gate:
    """What every request passes first: the API key, and a bound on its body."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._admitted(scope, headers):
            challenge = {"WWW-Authenticate": "Bearer"}
            error = ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                             code="invalid_api_key", headers=challenge)  # fmt: skip
            await _answer(error)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            await _answer(_too_large())(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _admitted(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if not self._key or scope["path"] in admin.OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key)


def _bounded(receive: Receive) -> Receive:
    """The same, but a body that goes on and on without having said its length is refused, too."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return bounded


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB", code="body_too_large")


def _call_id(prefix: str, http: HttpRequest) -> str:
    """A name for the call: unique, and with the client's own name in it when it gave one."""
    own = http.headers.get("x-request-id", "")
    unique = uuid.uuid4().hex
    return f"{prefix}-{own[:128]}-{unique[:8]}" if own else f"{prefix}-{unique}"


def _answer(error: ApiError) -> Response:
    return Response(error.body(), error.status, headers=error.headers, media_type="application/json")


def _errors(app: FastAPI) -> None:
    """Whatever goes wrong is answered in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def api_error(_: HttpRequest, error: ApiError) -> Response:
        return _answer(error)

    @app.exception_handler(BadRequest)
    async def bad_request(_: HttpRequest, error: BadRequest) -> Response:
        return _answer(ApiError(400, error.message, param=error.param))

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def invalid(_: HttpRequest, error: Any) -> Response:
        return _answer(validation_error(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http_error(request: HttpRequest, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # raised within the reading of the body: too large
            return _answer(error.__cause__)
        if error.status_code == 404:
            message, code = f"there is no {request.url.path}", "not_found"
        elif error.status_code == 405:
            message, code = f"{request.method} is not allowed on {request.url.path}", "method_not_allowed"
        elif error.status_code == 400:
            message, code = "the body cannot be read: it must be JSON in UTF-8", "invalid_body"
        else:
            message, code = str(error.detail), "http_error"
        return _answer(ApiError(error.status_code, message, code=code, headers=error.headers))

    @app.exception_handler(Exception)
    async def bug(_: HttpRequest, error: Exception) -> Response:
        # The traceback goes to the log (the server writes it when this returns), never to the client.
        return _answer(ApiError(500, f"internal error: {type(error).__name__}", code="internal_error"))
