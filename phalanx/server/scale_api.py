"""Scaling over HTTP: vLLM's routes, and the operator's instruction that does the same without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from phalanx.server.answers import ServiceHere, json_answer
from phalanx.server.generate import Service
from phalanx.server.link import Link
from phalanx.server.protocol import DRAIN_S, ApiError, ScaleRequest
from phalanx.server.scaling import ScaleRefused


def routes() -> APIRouter:
    """All routes of this file."""
    router = APIRouter()
    answers: dict[int | str, dict[str, Any]] = {
        200: {"description": "The new size serves."},
        400: {"description": "There is no such size, or the body is wrong."},
        409: {"description": "Not now: another scaling is going on, or what the size needs is not there."},
        500: {"description": "It did not come about; the message says why, and which ranks there are."},
    }

    @router.post("/scale_elastic_ep", responses=answers)
    async def scale(request: ScaleRequest, service: ServiceHere) -> Response:
        """Have `new_ep_size` ranks. Answers when they serve, with the ranks that there are, those that were added and
        those that left, or with 500 and the reason when they will not. The scaling goes on when the client goes away;
        `/fault_tolerance/status` says how far it is."""
        size, param = _size(request)
        with _refusing(service, param) as link:
            ended = link.scale(link.scaler.resized(size), request.drain_timeout)
        done = await ended
        if done.failure:
            raise ApiError(500, str(done), code="scaling_failed")
        return json_answer(
            {
                "message": f"Scaled to {size} ranks", "ep_size": len(done.ranks), "ranks": sorted(done.ranks),
                "added": done.added, "removed": done.removed, "seconds": done.seconds,
            }
        )  # fmt: skip

    @router.get("/is_scaling_elastic_ep")
    @router.post("/is_scaling_elastic_ep")
    async def is_scaling(service: ServiceHere) -> Response:
        """Whether the service is being scaled now."""
        return json_answer({"is_scaling_elastic_ep": service.link.scaler.running})

    return router


def scale_down(service: Service, params: dict[str, Any]) -> list[int]:
    """Have `ranks` leave, or as many as bring it down to `new_ep_size`. Does not wait; returns who leaves. LOCAL."""
    if ("ranks" in params) == ("new_ep_size" in params):
        raise ApiError(400, "params: scale_down needs ranks or new_ep_size, one of them", param="params")
    drain_s = params.get("drain_timeout", DRAIN_S)
    if not isinstance(drain_s, int | float) or isinstance(drain_s, bool) or not 0 <= drain_s < 2**31:
        raise ApiError(400, "params.drain_timeout: not a number of seconds", param="params.drain_timeout")
    before = frozenset(service.router.roster.in_use)
    if "ranks" in params:
        ranks, param = params["ranks"], "params.ranks"
        if not isinstance(ranks, list) or not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks):
            raise ApiError(400, f"{param}: not a list of ranks", param=param)
        with _refusing(service, param) as link:
            link.scale(link.scaler.without(frozenset(ranks)), drain_s)
        return sorted(set(ranks))
    size, param = params["new_ep_size"], "params.new_ep_size"
    if not isinstance(size, int) or isinstance(size, bool) or size > len(before):
        raise ApiError(400, f"{param}: {size!r} is no number of ranks up to {len(before)}", param=param)
    with _refusing(service, param) as link:
        stay = link.scaler.resized(size)
        link.scale(stay, drain_s)
    return sorted(before - stay)


def _size(request: ScaleRequest) -> tuple[int, str]:
    """The size asked for, and under which name."""
    names = ("new_ep_size", "new_data_parallel_size")
    given = [(size, name) for name in names if (size := getattr(request, name)) is not None]
    if len(given) != 1:
        raise ApiError(400, "new_ep_size: say how many ranks there are to be, once (new_data_parallel_size means the "
                       "same)", param="new_ep_size")  # fmt: skip
    return given[0]


@contextmanager
def _refusing(service: Service, param: str) -> Iterator[Link]:
    """What scales. 400 for what cannot be, 409 for what cannot be now."""
    if not service.config.elastic:
        raise ApiError(400, "the service was started with --no-elastic: its size does not change", code="not_elastic")
    try:
        yield service.link
    except ScaleRefused as refused:
        raise ApiError(409 if refused.busy else 400, f"{param}: {refused.message}", param=param,
                       code="cannot_scale_now" if refused.busy else "cannot_scale") from None  # fmt: skip
