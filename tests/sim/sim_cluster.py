"""A simulated service: ranks that run the worker's loop with a small deterministic engine, a router, a launcher.

What is simulated is the outside. Recovery, roll call, detection, restore and planning are the real ones. A stream's
text depends on the bytes of every expert that its tokens pass, on their order, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from sim_network import SimBank, SimComm, SimDisk, SimNotices, SimPeer, SimStore, Wires, true_bytes
from sim_scheduler import Killed, Scheduler, Task

from phalanx.elastic.agree import Change, Limits, Shape
from phalanx.elastic.ahead import FORESEEN, LOOK_S
from phalanx.elastic.balance import Balancer, Rules
from phalanx.elastic.planning import PlanHere
from phalanx.elastic.recover import Adoption, Recovery
from phalanx.elastic.restore import DiskSource, PeerSource
from phalanx.errors import Evicted, ExpertsLost, Left, PeerLost, TooFewRanks, TooFewSlots
from phalanx.testing.faults import Faults
from phalanx.world import Member, World

TOP_K = 2
PRIME = 1_000_003
PEER_TIMEOUT_S = 0.02
HEARTBEAT_S = 0.01
LIMITS = Limits(
    roll_call_s=0.06, start_s=0.5, join_s=0.02, succession_s=0.01, restore_s=0.3, slice_s=0.005, min_ranks=1
)


def mix(*numbers: int) -> int:
    """A hash that is the same in every run."""
    h = 17
    for n in numbers:
        h = (h * 1_000_033 + n + 7) % 2_147_483_647
    return h


def expert_value(content: np.ndarray) -> int:
    return int.from_bytes(bytes(content[:3]), "little")


def chosen(x: int, layer: int, num_experts: int) -> list[int]:
    """The gate: TOP_K different experts for a token."""
    first = mix(x, layer) % num_experts
    return [(first + k * (1 + mix(x, layer, 1) % (num_experts - 1))) % num_experts for k in range(TOP_K)]


def start_of(prompt: int, output: list[int]) -> int:
    return mix(prompt, len(output), *output[-2:])


def expected_text(prompt: int, length: int, shape: Shape) -> list[int]:
    """The stream that a service without failures would give."""
    output: list[int] = []
    for _ in range(length):
        x = start_of(prompt, output) % PRIME
        for layer in range(shape.num_layers):
            ys = [(x * expert_value(true_bytes(layer, e)) + 1) % PRIME for e in chosen(x, layer, shape.num_experts)]
            x = mix(x, *ys) % PRIME
        output.append(x)
    return output


@dataclass(eq=False)
class Request:
    name: int
    prompt: int
    length: int
    owner: Member | None = None
    attempt: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.output) == self.length


class Router:
    """Gives requests to ranks, takes tokens by (request, attempt, index), and moves what a lost rank had."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.requests: list[Request] = []
        self.mail: dict[Member, list[tuple[Request, int, list[int]]]] = {}
        self.members: tuple[Member, ...] = ()
        self._epoch = 0
        self.moved = 0

    def submit(self, prompt: int, length: int) -> None:
        self.requests.append(Request(len(self.requests), prompt, length))
        self._place()

    def adopted(self, world: World) -> None:
        """A rank serves under `world`."""
        if world.epoch > self._epoch:
            self._epoch, self.members = world.epoch, world.view.members
            self._place()

    def token(self, request: Request, attempt: int, index: int, token: int) -> None:
        if attempt != request.attempt:
            return
        assert index == len(request.output), f"token {index} of request {request.name}, but {len(request.output)} due"
        request.output.append(token)

    @property
    def done(self) -> bool:
        return all(r.done for r in self.requests)

    def check(self) -> None:
        for r in self.requests:
            assert r.output == expected_text(r.prompt, r.length, self._shape), f"request {r.name} has the wrong text"

    def _place(self) -> None:
        for r in self.requests:
            if self.members and not r.done and r.owner not in self.members:
                self.moved += r.owner is not None
                r.owner = self.members[r.name % len(self.members)]
                r.attempt += 1
                self.mail.setdefault(r.owner, []).append((r, r.attempt, list(r.output)))


class Engine:
    """Batching, expert parallelism and the transaction of a step, as small as can be."""

    def __init__(self, cluster: Cluster, me: Member, comm: SimComm, bank: SimBank) -> None:
        self._cluster, self._me, self._comm, self._bank = cluster, me, comm, bank
        self._running: list[tuple[Request, int, list[int]]] = []
        self._routes_LEW: np.ndarray | None = None
        self.step_number = 0
        self.load_LE = np.zeros((cluster.shape.num_layers, cluster.shape.num_experts), np.int64)

    def adopt(self, adoption: Adoption) -> None:
        self._routes_LEW = adoption.routes_LEW

    def accept(self) -> None:
        self._running += self._cluster.router.mail.pop(self._me, [])

    @property
    def has_work(self) -> bool:
        return bool(self._running) or bool(self._cluster.router.mail.get(self._me))

    def step(self, proposal: int, ready: bool) -> tuple[bool, int, bool]:
        """(idle, the highest proposal, whether all are ready for it). Raises PeerLost before anything is committed."""
        batch = self._running[:3]
        rows = self._comm.all_gather(torch.tensor([len(batch), proposal, ready, 1]))
        self._check()
        proposal = int(rows[:, 1].max())
        if rows[rows[:, 3] > 0, 2].all():
            return False, proposal, True
        if int(rows[:, 0].sum()) == 0:
            return True, proposal, False
        tokens = self._forward(batch)
        self._check()
        for (request, attempt, output), token in zip(batch, tokens, strict=True):
            output.append(token)
            self._cluster.router.token(request, attempt, len(output) - 1, token)
        self._running = [r for r in self._running if len(r[2]) < r[0].length]
        self.step_number += 1
        return False, proposal, False

    def _forward(self, batch: list[tuple[Request, int, list[int]]]) -> list[int]:
        shape = self._cluster.shape
        xs = [start_of(request.prompt, output) % PRIME for request, _, output in batch]
        for layer in range(shape.num_layers):
            assert self._routes_LEW is not None
            width = self._routes_LEW.shape[2]
            experts = [chosen(x, layer, shape.num_experts) for x in xs]
            np.add.at(self.load_LE[layer], np.array(experts, int).ravel(), 1)
            slots = [
                [int(self._routes_LEW[layer, e, len(output) % width]) for e in row]
                for row, (_, _, output) in zip(experts, batch, strict=True)
            ]
            got = self._comm.dispatch(
                torch.tensor(xs, dtype=torch.int64).reshape(-1, 1),
                torch.tensor(slots, dtype=torch.int32).reshape(-1, TOP_K),
            )
            values = [expert_value(self._bank.slot_bytes(layer, s)) for s in got.slot_M.tolist()]
            y_MD = (got.x_ND[got.row_M] * torch.tensor(values, dtype=torch.int64).reshape(-1, 1) + 1) % PRIME
            self._cluster.sim.sleep(0.0003 * self._cluster.sim.rng.random())
            y_TKD = self._comm.combine(y_MD, got)
            xs = [mix(x, *ys[:, 0].tolist()) % PRIME for x, ys in zip(xs, y_TKD, strict=True)]
        return xs

    def _check(self) -> None:
        status = self._comm.status()
        if not status.clean:
            raise PeerLost(status.lost, status.interrupted)


class SimFaults(Faults):
    """Fault points that hand over to the story of a trial."""

    def __init__(self, passed: Callable[[str], None]) -> None:
        self._passed = passed

    def point(self, name: str, step: int | None = None) -> None:
        self._passed(name)


@dataclass(eq=False)
class Process:
    """One incarnation of a rank, with what the checks need to know about it."""

    member: Member
    task: Task | None = None
    recovery: Recovery | None = None
    bank: SimBank | None = None
    comm: SimComm | None = None
    evicted: bool = False
    long_silent: bool = False
    declared: bool = False
    scaled: bool = False
    """Started because the service was scaled up."""
    leaving: tuple[tuple[int, int], ...] = ()
    """With whom it was told to leave."""
    deaf: bool = False
    """What it is told does not reach it."""
    left: bool = False
    epochs: list[int] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.task is not None and not self.task.done and not self.task.killed


class Cluster:
    """All of it, and the invariants that are checked while it runs."""

    def __init__(
        self,
        sim: Scheduler,
        shape: Shape,
        *,
        limits: Limits = LIMITS,
        garbage: float = 0.0,
        disk_read_s: float = 0.002,
        balance: Rules | None = None,
        on_point: Callable[[Process, str], None] = lambda process, name: None,
    ) -> None:
        """balance: when to balance the load, never unless it is said."""
        self.sim, self.shape, self.limits = sim, shape, limits
        self.notices = SimNotices()
        self.wires = Wires(sim, self.notices)
        self.store = SimStore(sim)
        self.router = Router(shape)
        self.processes: list[Process] = []
        self.worlds: dict[int, World] = {}
        self.cannot_serve: list[tuple[Member, int, str]] = []
        self.adoptions: list[tuple[Member, Adoption]] = []
        self.resume = 0
        self.moves = 0
        """Experts staged in the background."""
        self.garbage, self._on_point = garbage, on_point
        self._balance = balance or Rules(window=1, interval=0, min_gain=0.0, num_redundant=0)
        self.disk = SimDisk(sim, disk_read_s)

    def scale_down(self, ranks: Iterable[int]) -> list[Process]:
        """Tell the living processes of these ranks to leave, as a router does; returns them."""
        going = [p for p in self.processes if p.alive and p.member.rank in set(ranks)]
        for process in going:
            process.leaving = tuple((p.member.rank, p.member.incarnation) for p in going)
        return going

    def start(self, rank: int, incarnation: int = 0, *, scaled: bool = False) -> Process:
        """Start a process, as a launcher does: it says so in the store when it is a newcomer."""
        if incarnation:
            self.store.coming(rank, incarnation)
        address = f"bank:{rank}.{incarnation}"
        member = Member(rank, incarnation, "here", 100 * rank + incarnation, f"sim:{rank}.{incarnation}", address)
        process = Process(member, scaled=scaled)
        self.processes.append(process)
        process.task = self.sim.spawn(str(member), lambda: self._run(process))
        return process

    def latest_members(self) -> tuple[Member, ...]:
        return self.worlds[max(self.worlds)].view.members if self.worlds else ()

    # --- a rank

    def _run(self, process: Process) -> None:
        me = process.member
        comm = SimComm(self.wires, me, self.shape.ep_size, PEER_TIMEOUT_S).sized(self.shape.slots_per_rank)
        process.comm = comm
        bank = process.bank = SimBank(
            self.sim,
            self.shape.num_layers,
            self.shape.slots_per_rank,
            lambda: process.recovery is not None and process.recovery.ahead.under_way,
        )
        self.wires.banks[me.weights_address] = bank
        engine = Engine(self, me, comm, bank)
        sources = (PeerSource(me, self._open_bank), DiskSource(self.disk, None))
        faults = SimFaults(lambda name: self._on_point(process, name))
        balancer = Balancer(
            me, self.shape, self._balance, store=self.store, clock=self.sim, bank=bank, sources=sources,
            counter=lambda: engine.load_LE, planner=PlanHere(), faults=faults,
        )  # fmt: skip
        recovery = process.recovery = Recovery(
            me,
            self.shape,
            self.limits,
            store=self.store,
            clock=self.sim,
            comm=comm,
            bank=bank,
            sources=sources,
            notices=self.notices,
            route_width=4,
            load=balancer.load,
            prepared=balancer.prepared,
            step=lambda: engine.step_number,
            scaled=process.scaled,
            faults=faults,
        )
        try:
            self._loop(process, comm, engine, recovery, balancer)
        except Left:
            process.left = True
            assert process.leaving, f"{me} left, and nobody had told it to"
            while True:  # its memory stays readable, until the launcher ends it
                self.sim.sleep(0.01)
        except Evicted:
            process.evicted = True
            self._check_eviction(process)

    def _loop(self, process: Process, comm: SimComm, engine: Engine, recovery: Recovery, balancer: Balancer) -> None:
        """The worker's loop."""
        rounds, told = 0, False
        change: Change | None = Change("join" if process.member.incarnation else "start")
        if process.member.incarnation:
            recovery.prepare()
        while True:
            try:
                if change is not None:
                    adoption = recovery.run(change)
                    self._check_adoption(process, adoption)
                    engine.adopt(adoption)
                    balancer.adopted(adoption)
                    self.router.adopted(adoption.world)
                    self._end_those_that_left(adoption.world)
                    change = None
                engine.accept()
                self._on_point(process, "step")
                rounds += 1
                if recovery.ahead.under_way:
                    pass
                elif process.leaving and not (told or process.deaf):
                    recovery.leave(process.leaving)
                    recovery.begin("scale")
                    told = True
                elif rounds % 4 == 0 and recovery.joiners():
                    recovery.begin("join")
                elif balancer.staged:
                    recovery.begin("rebalance")
                said = recovery.ahead.to_say
                idle, proposal, boundary = engine.step(*said)
                if boundary:
                    change = Change(FORESEEN[proposal - 1])
                    continue
                if proposal:
                    recovery.begin(FORESEEN[proposal - 1])
                recovery.work()
                if not recovery.ahead.under_way:
                    balancer.work(engine.step_number)
                self._reports(balancer)
                if idle:
                    self._sleep(comm, engine, recovery, balancer, said)
            except PeerLost as lost:
                change = recovery.change_after(lost)
            except (TooFewRanks, TooFewSlots, ExpertsLost) as error:
                self.cannot_serve.append((process.member, recovery.view.epoch, str(error)))
                change = self._wait_for_help(comm, recovery)

    def _sleep(
        self, comm: SimComm, engine: Engine, recovery: Recovery, balancer: Balancer, said: tuple[int, bool]
    ) -> None:
        """As long as there is nothing to tell the others, working on what is done beside the steps."""
        until = self.sim.now() + HEARTBEAT_S
        while not engine.has_work and recovery.ahead.to_say == said and self.sim.now() < until:
            if recovery.work():
                continue
            pause = LOOK_S if recovery.ahead.under_way else balancer.idle_work()
            end = min(until, self.sim.now() + pause)
            if comm.sleep_until(end - self.sim.now(), lambda: engine.has_work):
                break
            if balancer.staged and not recovery.ahead.under_way:
                break
        comm.ring()

    def _reports(self, balancer: Balancer) -> None:
        if (report := balancer.take_report()) is not None:
            self.moves += report.moves

    def _wait_for_help(self, comm: SimComm, recovery: Recovery) -> Change:
        asked = self.resume
        while comm.status().clean and self.resume == asked and not recovery.joiners():
            comm.sleep_until(HEARTBEAT_S, lambda: self.resume != asked)
        return Change("operator") if comm.status().clean else recovery.change_after(PeerLost(()))

    def _open_bank(self, address: str) -> SimPeer:
        owner = next(p for p in self.processes if p.member.weights_address == address)
        if not owner.alive:
            raise OSError(f"{address} is gone")
        return SimPeer(self.sim, self.wires.banks[address], self.garbage)

    def _end_those_that_left(self, world: World) -> None:
        """What a launcher does when it hears that a view serves."""
        for process in self.processes:
            if process.alive and process.leaving and process.member not in world.view:
                self.sim.after(0.005 * self.sim.rng.random(), lambda process=process: self._end(process))

    def _end(self, process: Process) -> None:
        if process.alive:
            self.notices.declare_dead(process.member, "exit")
            die(self, process)

    # --- invariants

    def _check_adoption(self, process: Process, adoption: Adoption) -> None:
        world, me = adoption.world, process.member
        known = self.worlds.setdefault(world.epoch, world)
        assert known == world, f"epoch {world.epoch} is two Worlds"
        assert me in world.view, f"{me} adopted a view without itself"
        assert not process.epochs or world.epoch > process.epochs[-1], "epochs grow"
        process.epochs.append(world.epoch)
        assert not world.placement.missing, f"epoch {world.epoch}: no slot for {world.placement.missing}"
        alive = np.repeat(world.view.mask_R, self.shape.slots_per_rank).astype(bool)
        assert (world.placement.slots_LP[:, ~alive] < 0).all(), "a dead rank's slot is to hold an expert"
        assert alive[adoption.routes_LEW].all(), "tokens are routed to a dead rank"
        mine = world.placement.of_rank(me.rank)
        assert process.bank is not None
        held = process.bank.held_LS
        assert (held[mine >= 0] == mine[mine >= 0]).all(), f"{me} serves with slots that are not filled"
        for layer, slot in np.argwhere(held >= 0).tolist():
            content = process.bank.slot_bytes(layer, slot)
            assert (content == true_bytes(layer, int(held[layer, slot]))).all(), f"{me} holds wrong bytes"
        self.adoptions.append((me, adoption))

    def _check_eviction(self, process: Process) -> None:
        replaced = any(
            p.member.rank == process.member.rank and p.member.incarnation > process.member.incarnation
            for p in self.processes
        )
        assert process.long_silent or process.declared or process.leaving or replaced, (
            f"{process.member} was evicted, though it was never silent for long"
        )


def die(cluster: Cluster, process: Process) -> None:
    """Kill a process from its own points."""
    assert process.task is not None
    cluster.sim.kill(process.task)
    if cluster.sim.current is process.task:
        raise Killed
