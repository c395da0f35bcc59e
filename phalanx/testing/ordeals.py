"""What a soak does to a service, one ordeal at a time: kills, stops, exceptions, orders of an operator.

Each is a coroutine over a `Ground` that carries the ordeal out and says what it did and whom it cost. Which ranks and
moments are hit is drawn from the ground's generator, so a seed gives the same ordeals; what the service is doing at
that moment is up to the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import httpx

from phalanx.testing.census import take_census

_LOOK_S = 0.02
_PATIENCE_S = 60.0

STEP_POINTS = ("step", "schedule", "decode", "dispatch", "combine", "all_gather", "half_sent", "received", "commit")
"""Fault points that every step under load passes."""

RECOVERY_POINTS = ("roll_call", "replan", "adopt", "barrier")
"""Fault points that every recovery passes, on every rank."""


class OrdealFailed(Exception):
    """The service did not do what it should; the message says what was awaited."""


@dataclass(frozen=True)
class Deed:
    """What was done. fallen: the incarnations that this cost, by rank."""

    what: str
    fallen: Mapping[int, int] = field(default_factory=dict)


class Ground:
    """A service under ordeal.

    launcher: its pid. pause_s: how long a rank may be stopped without being evicted."""

    def __init__(self, http: httpx.AsyncClient, launcher: int, rng: random.Random, pause_s: float) -> None:
        self.http, self.launcher, self.rng, self.pause_s = http, launcher, rng, pause_s

    async def status(self) -> dict[str, Any]:
        """GET /fault_tolerance/status."""
        answer: dict[str, Any] = (await self.http.get("/fault_tolerance/status")).raise_for_status().json()
        return answer

    async def healthy(self) -> list[dict[str, Any]]:
        """The ranks that serve."""
        return _healthy(await self.status())

    async def some(self, count: int) -> list[dict[str, Any]]:
        """So many of the ranks that serve, by chance; a rank is not healthy for a moment in any change of membership,
        and a rebalance may be under way."""
        status = await self.until(f"{count} healthy ranks", lambda status: len(_healthy(status)) >= count)
        return self.rng.sample(_healthy(status), count)

    async def order(self, path: str, **body: Any) -> None:
        """POST an operator's order; OrdealFailed when it is refused."""
        answer = await self.http.post(path, json=body)
        if not answer.is_success:
            raise OrdealFailed(f"POST {path} {body}: {answer.status_code} {answer.text[:200]}")

    async def until(self, what: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the status is as wanted; OrdealFailed when it does not come to be."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            status = await self.status()
            if done(status):
                return status
            await asyncio.sleep(_LOOK_S)
        states = [f"{rank['rank']}.{rank['incarnation']} {rank['state']}" for rank in status["ranks"]]
        raise OrdealFailed(
            f"waited {_PATIENCE_S:.0f} s for {what}; ranks: {', '.join(states)}; vault {status['vault']}"
        )

    async def full_strength(self, ranks: int, fallen: Mapping[int, int]) -> None:
        """Wait until `ranks` ranks are healthy, and the fallen have successors."""

        def done(status: dict[str, Any]) -> bool:
            there = status["ranks"]
            return len(there) == ranks and all(
                rank["state"] == "healthy" and rank["incarnation"] > fallen.get(rank["rank"], -1) for rank in there
            )

        await self.until(f"{ranks} healthy ranks", done)


Ordeal = Callable[[Ground], Awaitable[Deed]]


async def kill_one(ground: Ground) -> Deed:
    return _kill(await ground.some(1))


async def kill_two(ground: Ground) -> Deed:
    return _kill(await ground.some(2))


async def kill_all(ground: Ground) -> Deed:
    return _kill(await ground.healthy())


async def kill_in_a_step(ground: Ground) -> Deed:
    return await _arm(ground, "kill", ground.rng.choice(STEP_POINTS))


async def raise_in_a_step(ground: Ground) -> Deed:
    return await _arm(ground, "raise", ground.rng.choice(STEP_POINTS))


async def kill_in_a_recovery(ground: Ground) -> Deed:
    """One rank is killed, and another one dies while the others recover from that."""
    first, second = await ground.some(2)
    where = ground.rng.choice(RECOVERY_POINTS)
    await ground.order("/chaos", kind="kill", rank=second["rank"], where=where)
    deed = _kill([first])
    return Deed(f"{deed.what}, rank {second['rank']} dies at {where}", {**deed.fallen, **_identity(second)})


async def kill_in_a_join(ground: Ground) -> Deed:
    """A rank is killed, and its successor as soon as it is there, or somebody else at that moment."""
    victim, witness = await ground.some(2)
    itself = ground.rng.random() < 0.5
    _kill([victim])
    status = await ground.until(
        f"the next process of rank {victim['rank']}",
        lambda status: any(r["incarnation"] > victim["incarnation"] for r in status["ranks"] if _same(r, victim)),
    )
    newcomer = next(rank for rank in status["ranks"] if _same(rank, victim))
    second = newcomer if itself else witness
    _kill([second])
    name = f"{second['rank']}.{second['incarnation']}"
    return Deed(f"SIGKILL rank {victim['rank']}, then {name} during its return",
                {**_identity(victim), **_identity(second)})  # fmt: skip


async def stop_for_a_moment(ground: Ground) -> Deed:
    """Too short a stop for an eviction."""
    (rank,) = await ground.some(1)
    seconds = ground.rng.uniform(0.05, ground.pause_s)
    os.kill(rank["pid"], signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.kill(rank["pid"], signal.SIGCONT)
    return Deed(f"SIGSTOP rank {rank['rank']} for {seconds:.2f} s")


async def stop_for_good(ground: Ground) -> Deed:
    (rank,) = await ground.some(1)
    os.kill(rank["pid"], signal.SIGSTOP)
    return Deed(f"SIGSTOP rank {rank['rank']}", _identity(rank))


async def mask_and_rejoin(ground: Ground) -> Deed:
    (rank,) = await ground.some(1)
    await ground.order("/fault_tolerance/apply", instruction="mask_rank", params={"rank": rank["rank"]})
    await ground.until(
        f"the death of rank {rank['rank']}",
        lambda status: any(r["state"] == "dead" for r in status["ranks"] if _same(r, rank)),
    )
    await ground.order("/fault_tolerance/apply", instruction="rejoin", params={"rank": rank["rank"]})
    return Deed(f"rank {rank['rank']} masked, and called back", _identity(rank))


async def pause_and_retry(ground: Ground) -> Deed:
    await ground.order("/fault_tolerance/apply", instruction="pause")
    await asyncio.sleep(ground.rng.uniform(0.05, 0.5))
    await ground.order("/fault_tolerance/apply", instruction="retry")
    return Deed("paused and resumed")


async def kill_vault_keeper(ground: Ground) -> Deed:
    status = await ground.status()
    pid, restarts = status["vault"]["pid"], status["vault"]["restarts"]
    if pid:
        os.kill(pid, signal.SIGKILL)
        await ground.until(
            "another vault keeper, and a full vault",
            lambda status: status["vault"]["restarts"] > restarts and status["vault"]["state"] == "full",
        )
    return Deed("SIGKILL the vault's process")


async def kill_nursery(ground: Ground) -> Deed:
    status = await ground.status()
    known = {rank["pid"]: "rank" for rank in status["ranks"]} | {status["vault"]["pid"]: "keeper"}
    for process in take_census(ground.launcher, known).processes:
        if process.role == "nursery" and not process.zombie:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    return Deed("SIGKILL the process that forks workers")


async def scale_there_and_back(ground: Ground) -> Deed:
    """One rank less, then as many as before; with a killed rank in between from time to time."""
    before = len((await ground.status())["ranks"])
    await ground.order("/scale_elastic_ep", new_ep_size=before - 1, drain_timeout=1)
    fallen = _kill(await ground.some(1)) if ground.rng.random() < 0.3 else Deed("")
    if fallen.fallen:
        await ground.full_strength(before - 1, fallen.fallen)
    await ground.order("/scale_elastic_ep", new_ep_size=before, drain_timeout=1)
    return Deed(f"scaled from {before} to {before - 1} ranks and back" + (f", {fallen.what}" if fallen.what else ""))


ALWAYS: Mapping[str, Ordeal] = MappingProxyType(
    {
        "kill one": kill_one,
        "kill two": kill_two,
        "kill all": kill_all,
        "kill in a step": kill_in_a_step,
        "raise in a step": raise_in_a_step,
        "kill in a recovery": kill_in_a_recovery,
        "kill in a join": kill_in_a_join,
        "stop for a moment": stop_for_a_moment,
        "stop for good": stop_for_good,
        "mask and rejoin": mask_and_rejoin,
        "pause and retry": pause_and_retry,
        "kill vault keeper": kill_vault_keeper,
        "kill nursery": kill_nursery,
    }
)

SCALING: Mapping[str, Ordeal] = MappingProxyType({"scale": scale_there_and_back})


async def ordeals_for(http: httpx.AsyncClient) -> dict[str, Ordeal]:
    """All ordeals that the service has the means for."""
    paths = (await http.get("/openapi.json")).json().get("paths", {})
    return {**ALWAYS, **(SCALING if "/scale_elastic_ep" in paths else {})}


def _healthy(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [rank for rank in status["ranks"] if rank["state"] == "healthy"]


def _kill(ranks: list[dict[str, Any]]) -> Deed:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank["pid"], signal.SIGKILL)
    names = ", ".join(str(rank["rank"]) for rank in ranks)
    return Deed(f"SIGKILL rank {names}", {rank["rank"]: rank["incarnation"] for rank in ranks})


async def _arm(ground: Ground, kind: str, where: str) -> Deed:
    (rank,) = await ground.some(1)
    await ground.order("/chaos", kind=kind, rank=rank["rank"], where=where)
    return Deed(f"{kind} in rank {rank['rank']} at {where}", _identity(rank))


def _identity(rank: dict[str, Any]) -> dict[int, int]:
    return {rank["rank"]: rank["incarnation"]}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["rank"] == other["rank"])
