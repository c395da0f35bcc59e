"""What the routes of operators share: the service behind the app, and answers in JSON."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import Depends
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from phalanx.server.generate import Service


def service_of(request: HttpRequest) -> Service:
    """The service behind this app."""
    service: Service = request.app.state.service
    return service


ServiceHere = Annotated[Service, Depends(service_of)]


def json_answer(content: Any, status: int = 200) -> Response:
    """A body in JSON. LOCAL."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")
