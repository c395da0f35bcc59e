"""Ranks with the real engine and simulated devices: hosts meet on one network, their devices on another.

Each device is a task of its own, which runs the batches that its host launches, in their order, and exchanges with its
peers' devices in each; so a batch may run while the host plans, commits, or waits for peers' hosts. What recovers the
ranks is as small as can be: all that live answer, and go on with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from engine_doubles import ROUTES_LEW, VOCAB, Device, DeviceFlight, NoRoutes, PagedModel, Weather, limits, reference
from sim_network import SimComm, SimNotices, Wires
from sim_scheduler import Scheduler, Task

from phalanx.engine.step import Engine
from phalanx.errors import PeerLost
from phalanx.messages import Abort, Submit, TokenOut
from phalanx.world import Member, Placement, View, World

PEER_TIMEOUT_S = 0.02


class SimDevice(Device):
    """See the module."""

    sim: Scheduler
    comm: SimComm

    def serve(self) -> None:
        """The device's own task."""
        while True:
            self.sim.pause(lambda: any(not flight.over for flight in self.queue))
            for flight in list(self.queue):
                flight.run()

    def meet_peers(self, fails: bool) -> None:
        for _ in range(2):
            self.comm.all_gather(torch.tensor([1]))
            self.sim.sleep(0.0004 * self.sim.rng.random())
        self.failed = self.comm.status()

    def run_until(self, flight: DeviceFlight) -> None:
        self.sim.pause(lambda: flight.over)

    def adopt(self, routes_LEW: Any) -> None:
        assert not self.queue, "a World is adopted while a batch is under way"


class HostComm(SimComm):
    """What a host sees of it all: headers on its own network, and the device's status on demand."""


class Rank:
    """One rank: host task, device task, engine."""

    def __init__(self, fleet: Fleet, rank: int, flies: bool) -> None:
        sim = fleet.sim
        self.fleet, self.member = fleet, Member(rank, 0)
        self.host = HostComm(fleet.host_wires, self.member, fleet.size, PEER_TIMEOUT_S)
        small = limits(num_blocks=sim.rng.randint(10, 24), max_num_seqs=sim.rng.randint(1, 4))
        weather = Weather()
        self.device = SimDevice(PagedModel(small, weather), None, NoRoutes(), VOCAB)
        self.device.weather, self.device.sim = weather, sim
        self.device.comm = SimComm(fleet.device_wires, self.member, fleet.size, PEER_TIMEOUT_S)
        if not flies:
            self.device.may_lead = lambda batch: False  # type: ignore[method-assign]
        self.engine = Engine(small, self.device, self.host, [1])
        self.mail: list[Submit | Abort] = []
        self.boundaries = 0
        self.epoch = 0
        self.tasks: tuple[Task, Task] = (
            sim.spawn(f"host {rank}", self.run),
            sim.spawn(f"device {rank}", self.device.serve),
        )

    @property
    def alive(self) -> bool:
        return not any(task.killed or task.done for task in self.tasks)

    def run(self) -> None:
        sim = self.fleet.sim
        self.recover(0)
        while True:
            mail, self.mail = self.mail, []
            self.engine.accept(mail)
            sim.point()
            wanted = self.fleet.wanted
            proposal, ready = (1, sim.rng.random() < 0.8) if wanted > self.epoch else (0, False)
            try:
                result = self.engine.step(proposal, ready)
            except PeerLost as lost:
                self.fleet.failures += 1
                self.check()
                self.recover(max(lost.epoch, self.epoch + 1))
                continue
            for token in result.tokens:
                self.fleet.token(self, token)
            if result.boundary:
                self.boundaries += 1
                self.check()
                self.recover(self.epoch + 1)
                continue
            if self.hears_of_a_death():
                self.fleet.failures += 1
                self.engine.drop()
                self.check()
                self.recover(self.epoch + 1)
                continue
            self.engine.check()
            sim.sleep(0.0003 * sim.rng.random() + (0.001 if result.idle else 0.0))

    def hears_of_a_death(self) -> bool:
        """Whether what goes on beside the steps finds it, before a step does."""
        members = self.fleet.views[self.epoch].members
        return any(map(self.fleet.notices.is_dead, members)) and self.fleet.sim.rng.random() < 0.5

    def check(self) -> None:
        assert not self.device.queue, "something is under way between two Worlds"
        self.engine.check()

    def recover(self, epoch: int) -> None:
        """Adopt the next view: everybody who lives, as the first one sees it to whom all have answered."""
        epoch = max(epoch, self.epoch + 1)
        fleet = self.fleet
        if self.epoch:
            self.host.interrupt(epoch)
            self.device.comm.interrupt(epoch)
        fleet.answers.setdefault(epoch, set()).add(self)
        fleet.sim.pause(
            lambda: epoch in fleet.views or all(rank in fleet.answers[epoch] for rank in fleet.ranks if rank.alive)
        )
        members = tuple(rank.member for rank in fleet.ranks if rank.alive)
        view = fleet.views.setdefault(epoch, View(epoch, fleet.size, members))
        self.epoch = epoch
        self.host.adopt(view)
        self.device.comm.adopt(view)
        world = World(view, Placement(np.zeros((1, fleet.size), np.int32), 1, 1))
        self.engine.adopt(world, ROUTES_LEW)


class Fleet:
    """All ranks, their requests, and what has been told of them."""

    def __init__(self, seed: int, size: int = 3) -> None:
        self.sim = Scheduler(seed, max_time_s=60.0, max_switches=600_000)
        self.notices = SimNotices()
        self.host_wires, self.device_wires = Wires(self.sim, self.notices), Wires(self.sim, self.notices)
        self.size = size
        self.answers: dict[int, set[Rank]] = {}
        self.views: dict[int, View] = {}
        self.wanted = self.failures = self.due = 0
        self.requests: dict[str, Submit] = {}
        self.attempts: dict[str, int] = {}
        self.owner: dict[str, Rank] = {}
        self.told: dict[str, list[int]] = {}
        self.over: set[str] = set()
        self.aborted: set[str] = set()
        flying = [self.sim.rng.random() < 0.8 for _ in range(size)]
        self.ranks: list[Rank] = []
        for rank in range(size):
            self.ranks.append(Rank(self, rank, flying[rank]))

    def submit(self, request: Submit) -> None:
        self.requests[request.request_id] = request
        self.told[request.request_id] = []
        self._give(request.request_id, self.sim.rng.choice([rank for rank in self.ranks if rank.alive]))

    def abort(self, name: str) -> None:
        self.aborted.add(name)
        if self.owner[name].alive:
            self.owner[name].mail.append(Abort(name))
        else:
            self.over.add(name)
            self._stop_when_done()

    def kill(self, rank: Rank) -> None:
        """SIGKILL; the launcher's notice and the server's moves come a little later."""
        for task in rank.tasks:
            self.sim.kill(task)
        soon = self.sim.rng.choice([0.0, 0.003])
        self.sim.after(soon, lambda: self.notices.declare_dead(rank.member, "signal"))
        self.sim.after(soon + 0.001, lambda: self._move(rank))

    def token(self, rank: Rank, token: TokenOut) -> None:
        """As the router takes it: of the present attempt, and in its order."""
        name = token.request_id
        if token.attempt != self.attempts[name]:
            return
        assert self.owner[name] is rank
        assert name not in self.over, f"{name} has ended, and is told of again"
        if token.token_id >= 0:
            assert token.index == len(self.told[name]), f"{name}: token {token.index}, {len(self.told[name])} is due"
            self.told[name].append(token.token_id)
        if token.finish_reason is not None:
            self.over.add(name)
        self._stop_when_done()

    def check(self) -> None:
        for name, request in self.requests.items():
            expected = reference(request)
            told = self.told[name]
            assert told == (expected[: len(told)] if name in self.aborted else expected), name

    def _give(self, name: str, rank: Rank) -> None:
        first = self.requests[name]
        self.owner[name] = rank
        attempt = self.attempts[name] = self.attempts.get(name, -1) + 1
        rank.mail.append(
            Submit(
                request_id=name, attempt=attempt, prompt_ids=first.prompt_ids, sampling=first.sampling,
                output_ids=list(self.told[name]),
            )
        )  # fmt: skip

    def _move(self, dead: Rank) -> None:
        alive = [rank for rank in self.ranks if rank.alive]
        for name, owner in list(self.owner.items()):
            if owner is dead and name not in self.over:
                if name in self.aborted:
                    self.over.add(name)
                else:
                    self._give(name, self.sim.rng.choice(alive))
        self._stop_when_done()

    def _stop_when_done(self) -> None:
        if len(self.over) == self.due:
            self.sim.stop()


def at_random(fleet: Fleet, times: int, span_s: float, action: Callable[[], None]) -> None:
    """Take an action so many times, at moments within the span."""
    for _ in range(times):
        fleet.sim.after(span_s * fleet.sim.rng.random(), action)


def launches(ranks: Sequence[Rank]) -> int:
    """Batches that were launched behind another one."""
    return sum(sum(rank.device.launches) for rank in ranks)
