"""What a command says when a service cannot be reached or refuses: one clear line, no traceback, exit 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from phalanx.errors import PhalanxError


class ServiceError(PhalanxError):
    """The service at a URL cannot be reached, refuses, or answers what cannot be understood."""


@contextmanager
def talking_to(url: str) -> Iterator[None]:
    """Turn httpx's errors within the block into ServiceErrors that name `url`."""
    try:
        yield
    except httpx.TimeoutException:
        raise ServiceError(f"{url} does not answer in time") from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServiceError(f"cannot reach {url}: {error or type(error).__name__}; is the service running?") from None
    except httpx.HTTPStatusError as error:
        raise ServiceError(refusal(error.response)) from None
    except ValueError as error:
        raise ServiceError(f"{url} did not answer in JSON: {error}") from None


def refusal(response: httpx.Response) -> str:
    """An error answer as one line: status, path, and the service's own message."""
    return f"{response.request.url} answered {response.status_code}: {message_of(response)}"


def message_of(response: httpx.Response) -> str:
    """The message of an error body, `{"error": {"message": ...}}` or anything else, shortened to one line."""
    try:
        body: Any = response.json()
    except ValueError:
        body = response.text
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if key in body), str(body))
    return " ".join(str(body).split())[:300]


def headers(api_key: str) -> dict[str, str]:
    """The header that carries the key, if there is one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
