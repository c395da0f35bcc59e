"""One trial: a service, requests, and a seeded story of deaths, freezes, notices and returns."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

from sim_cluster import LIMITS, PEER_TIMEOUT_S, Cluster, Process, die
from sim_scheduler import Scheduler

from phalanx.elastic.agree import Shape
from phalanx.elastic.balance import Rules

NAMED_POINTS = ("roll_call", "publish", "publish", "replan", "restore", "adopt", "barrier", "join", "step", "stage")


@dataclass
class Tally:
    """What really happened, over many trials."""

    trials: int = 0
    deaths: int = 0
    recoveries: int = 0
    joins: int = 0
    evictions: int = 0
    moved: int = 0
    rebalances: int = 0
    staged: int = 0
    scaled_up: int = 0
    """Ranks that came in because the service was scaled up."""
    left: int = 0
    """Ranks that left because it was scaled down."""
    cannot_serve: int = 0
    """Trials in which ranks were too few for a while."""
    kinds: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.trials} trials: {self.deaths} deaths, {self.evictions} evictions, {self.recoveries} worlds, "
            f"{self.joins} joins, {self.moved} requests moved, {self.staged} experts staged, "
            f"{self.rebalances} rebalances, {self.scaled_up} ranks added, {self.left} ranks left, "
            f"{self.cannot_serve} trials with too few ranks; "
            + ", ".join(f"{n} x {kind}" for kind, n in sorted(self.kinds.items()))
        )


class Trial:
    """Draws a story from its seed, runs it to the end of all requests, and checks what must hold afterwards.

    One rank is spared, so that there is always someone to finish; which one, the seed decides. It may be frozen for
    short times, and must never be evicted."""

    def __init__(self, seed: int, tally: Tally) -> None:
        self.tally = tally
        self.sim = Scheduler(seed, max_time_s=30.0)
        rng = self.rng = self.sim.rng
        ranks = rng.choice((2, 3, 4, 4, 5))
        experts = rng.choice((3, 4, 6))
        redundant = rng.choice((0, 1, experts))
        starting = rng.choice((ranks, rng.randrange(1, ranks + 1)))
        self._min_ranks = rng.choice((1, 1, 1, min(2, starting), starting))
        restore_s = rng.choice((LIMITS.restore_s, 3.0))
        self.cluster = Cluster(
            self.sim,
            Shape(rng.choice((1, 2)), experts, ranks, experts, redundant, starting),
            limits=dataclasses.replace(
                LIMITS, min_ranks=self._min_ranks, restore_s=restore_s, start_s=LIMITS.start_s + 2 * restore_s
            ),
            balance=Rules(window=4, interval=rng.choice((0, 2, 5)), min_gain=0.0, num_redundant=redundant),
            garbage=rng.choice((0.0, 0.1)),
            disk_read_s=rng.choice((0.0, 0.002, 0.008)),
            on_point=self._passed,
        )
        self.spared = rng.randrange(starting)
        self._in_use = set(range(starting))
        """The places that are wanted. Nobody is started again elsewhere."""
        self._scalings_left = rng.choice((0, 0, 1, 2, 3)) if self._min_ranks == 1 else 0
        self._returns = rng.random() < 0.5
        self._notice = rng.choice(("early", "late", "never", "mixed"))
        self._named = {rng.choice(NAMED_POINTS): rng.choice((0.05, 0.2, 0.6)) for _ in range(rng.choice((0, 1, 2)))}
        self._kills_left = rng.choice((1, 2, 3, 4, 6))
        self._last_freeze: dict[Process, float] = {}

    def run(self) -> None:
        for rank in sorted(self._in_use):
            self._start(rank, 0)
        requests = self.rng.choice((2, 4, 8))
        for _ in range(requests):
            delay = self.rng.choice((0.0, 0.0, 0.01, 0.05, 0.15))
            self.sim.after(
                delay, lambda: self.cluster.router.submit(self.rng.randrange(10**6), self.rng.randint(3, 16))
            )
        for _ in range(self._kills_left + 2):
            self.sim.after(self.rng.random() * 0.3, self._strike)
        for _ in range(self._scalings_left):
            self.sim.after(self.rng.random() * 0.3, self._scale)
        self._submitted = requests
        self.sim.after(0.31, self._end_when_done)
        self.sim.run()
        self._check()

    # --- the story

    def _start(self, rank: int, incarnation: int, *, scaled: bool = False) -> None:
        if rank not in self._in_use:
            return
        if any(p.member.rank == rank and p.member.incarnation >= incarnation for p in self.cluster.processes):
            return  # a scaling and a return from death wanted the same, and one was faster
        process = self.cluster.start(rank, incarnation, scaled=scaled)
        assert process.task is not None
        if rank != self.spared and self.rng.random() < 0.5:
            kill = self.rng.random() < 0.6
            action = (lambda: self._kill(process)) if kill else (lambda: self._freeze(process))
            process.task.points_left.append((self.rng.randrange(1, 400), action))

    def _scale(self) -> None:
        """An operator wants more ranks or fewer."""
        if not self.cluster.worlds:
            return
        before = self._in_use
        places = range(self.cluster.shape.ep_size)
        self._in_use = {rank for rank in places if rank == self.spared or self.rng.random() < 0.5}
        self.tally.kinds["scaling"] += 1
        for rank in sorted(self._in_use - before):
            last = [p.member.incarnation for p in self.cluster.processes if p.member.rank == rank]
            self._bring(rank, max(last, default=0) + 1)
        members = self.cluster.latest_members()
        for process in self.cluster.processes:  # who has not come in yet is ended by the launcher
            if process.alive and process.member.rank in before - self._in_use and process.member not in members:
                self._end(process)
        self.cluster.scale_down(before - self._in_use)

    def _bring(self, rank: int, incarnation: int) -> None:
        """Start a rank in a place whose last process may still be leaving: the launcher waits for its end."""
        if any(p.alive and p.member.rank == rank for p in self.cluster.processes):
            self.sim.after(0.01, lambda: self._bring(rank, incarnation))
        else:
            self._start(rank, incarnation, scaled=True)

    def _end(self, process: Process) -> None:
        process.declared = True
        self.cluster.notices.declare_dead(process.member, "exit")
        die(self.cluster, process)

    def _passed(self, process: Process, name: str) -> None:
        self.sim.point()
        if name in self._named and self.rng.random() < self._named[name]:
            kill = process.member.rank != self.spared and self.rng.random() < 0.7
            self.tally.kinds[f"{'kill' if kill else 'freeze'} at {name}"] += 1
            action = (lambda: self._kill(process)) if kill else (lambda: self._freeze(process))
            assert process.task is not None
            process.task.points_left.append((self.rng.choice((0, 0, 1, 2, 3, 5, 8)), action))

    def _strike(self) -> None:
        """Something happens to one process, or to two at once, wherever they are."""
        alive = [p for p in self.cluster.processes if p.alive]
        for process in self.rng.sample(alive, min(len(alive), self.rng.choice((1, 1, 2, 3)))):
            if process.member.rank == self.spared or self.rng.random() < 0.3:
                self._freeze(process)
            elif self.rng.random() < 0.1:
                self._mask(process)
            else:
                self._kill(process)

    def _kill(self, process: Process) -> None:
        if not process.alive or process.member.rank == self.spared or self._kills_left <= 0:
            return
        self._kills_left -= 1
        self.tally.deaths += 1
        self.tally.kinds["kill"] += 1
        self._announce(process)
        if self._returns and self.rng.random() < 0.7:
            member = process.member
            self.sim.after(0.002 + 0.05 * self.rng.random(), lambda: self._start(member.rank, member.incarnation + 1))
        die(self.cluster, process)

    def _announce(self, process: Process) -> None:
        how = self.rng.choice(("early", "late", "never")) if self._notice == "mixed" else self._notice
        self.tally.kinds[f"notice {how}"] += 1
        if how == "never":
            return
        delay = 0.0003 * self.rng.random() if how == "early" else 0.1 * self.rng.random()
        self.sim.after(delay, lambda: self.cluster.notices.declare_dead(process.member, "signal"))

    def _mask(self, process: Process) -> None:
        """An operator takes a living rank out."""
        self.tally.kinds["mask"] += 1
        process.declared = True
        self.cluster.notices.declare_dead(process.member, "operator")

    def _freeze(self, process: Process) -> None:
        """SIGSTOP, for a time that evicts nobody or for one that may."""
        bound = LIMITS.roll_call_s * 0.7
        kind = self.rng.choice(("short", "middle", "long"))
        if process.member.rank == self.spared and kind == "long":
            kind = "short"
        last = self._last_freeze.get(process, -1.0)
        if not process.alive or self.sim.now() - last < 6 * bound:
            return
        seconds = {
            "short": PEER_TIMEOUT_S * 0.8 * self.rng.random(),
            "middle": PEER_TIMEOUT_S + (bound - PEER_TIMEOUT_S) * self.rng.random(),
            "long": LIMITS.roll_call_s * self.rng.choice((1.0, 1.2, 1.5, 3.0, 9.0)),
        }[kind]
        self.tally.kinds[f"freeze {kind}"] += 1
        process.long_silent |= kind == "long"
        self._last_freeze[process] = self.sim.now() + seconds
        assert process.task is not None
        self.sim.freeze(process.task, seconds)

    def _end_when_done(self) -> None:
        """All requests done and every process either in the last view or gone: the trial is over."""
        members = self.cluster.latest_members()
        settled = all(not p.alive or p.member in members for p in self.cluster.processes)
        if self.cluster.router.done and settled and len(self.cluster.router.requests) == self._submitted:
            self.sim.stop()
        else:
            self._named.clear()
            if self._min_ranks > 1:  # none that are needed stay dead for ever
                for rank in sorted(self._in_use):
                    if not any(p.alive for p in self.cluster.processes if p.member.rank == rank):
                        self._start(
                            rank, 1 + max(p.member.incarnation for p in self.cluster.processes if p.member.rank == rank)
                        )
            self.sim.after(0.02, self._end_when_done)

    # --- what must hold

    def _check(self) -> None:
        self.cluster.router.check()
        spared = next(p for p in self.cluster.processes if p.member.rank == self.spared)
        assert not spared.evicted, f"{spared.member} did nothing wrong and was evicted"
        assert spared.epochs, "the spared rank never served"
        tally = self.tally
        tally.cannot_serve += bool(self.cluster.cannot_serve)
        assert self._min_ranks > 1 or not self.cluster.cannot_serve, self.cluster.cannot_serve
        tally.trials += 1
        tally.evictions += sum(p.evicted for p in self.cluster.processes)
        tally.recoveries += len(self.cluster.worlds)
        tally.joins += sum(p.member.incarnation > 0 and bool(p.epochs) for p in self.cluster.processes)
        tally.scaled_up += sum(p.scaled and bool(p.epochs) for p in self.cluster.processes)
        tally.left += sum(p.left for p in self.cluster.processes)
        tally.moved += self.cluster.router.moved
        tally.staged += self.cluster.moves
        tally.rebalances += len({a.world.epoch for _, a in self.cluster.adoptions if a.trigger == "rebalance"})
