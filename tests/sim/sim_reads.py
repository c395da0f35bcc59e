"""A model of how ranks read results where they stand (`phalanx.comm.pull_kernels`): which store may be seen when.

Every program of every kernel is a generator that is suspended at each access to memory that others write; a seeded
scheduler picks who goes on. Stores to a peer arrive in any order, some late, but before the kernel that made them has
ended. What a rank's status says is all that its host goes by, so one thing must hold: a step with a clean status has
read exactly what its peers' experts made for it.

R ranks, a token of rank r is (r, t), of K owners each. A result is a `Made`: by whom, when and for which pair.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

K = 2
Run = Generator[None]


@dataclass(frozen=True)
class Rules:
    """What of the protocol is followed; a test that leaves one out must find a wrong step.

    look: after reading, see whether anybody went on without us. relay: pass a roll call on before going on alone, if it
    was heard of while waiting; relay_look: if it was heard of by the look."""

    look: bool = True
    relay: bool = True
    relay_look: bool = True


@dataclass(frozen=True)
class Made:
    """The result of one pair."""

    by: int
    step: tuple[int, int]  # the epoch, and the how manyth dispatch of it
    pair: tuple[int, int, int]


@dataclass
class Memory:
    """What peers write at a rank, and its own words. Sequences of kernels count from 1 in each epoch."""

    cut: dict[int, int] = field(default_factory=dict)
    opened: dict[int, int] = field(default_factory=dict)
    begun: dict[int, tuple[int, int]] = field(default_factory=dict)
    ready: dict[int, tuple[int, int]] = field(default_factory=dict)
    words: dict[tuple[int, int, int, int], tuple[tuple[int, int], int]] = field(default_factory=dict)
    y: dict[int, Made] = field(default_factory=dict)
    interrupted: int = 0
    gone: set[int] = field(default_factory=set)
    host_opened: int = 0
    host_gone: set[int] = field(default_factory=set)


class Kernel:
    """Stores under way to peers: each arrives after some ticks, all before the kernel ends."""

    def __init__(self, world: World, late: int = 300) -> None:
        self._world, self._late = world, late
        self.under_way = 0

    def store(self, peer: int, what: Callable[[], None]) -> None:
        self.under_way += 1

        def arrive() -> None:
            what()
            self.under_way -= 1

        self._world.deliver(self._world.rng.choice((5, self._late) if peer == self._world.slow else (0, 0, 60)), arrive)

    def ended(self) -> Run:
        while self.under_way:
            yield


class World:
    """All ranks, the roll calls between them, and whoever takes the next turn."""

    def __init__(self, seed: int, ranks: int, steps: int, rules: Rules) -> None:
        self.rng = random.Random(seed)
        self.seed, self.steps, self.rules = seed, steps, rules
        self.epoch = 1
        self.slow = self.rng.randrange(ranks)
        self.layers = self.rng.choice((1, 2))
        self.members = frozenset(range(ranks))
        self.views = {1: self.members}
        self.dead: set[int] = set()
        self.stopped: set[int] = set()
        self.joined: dict[int, set[int]] = {}
        self.impatient: set[tuple[int, int]] = set()
        self.ranks = [Rank(self, r) for r in range(ranks)]
        self.wrong: list[str] = []
        self.clean_steps = 0
        self._runs: list[tuple[Run, float, int]] = []
        self._under_way: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.ticks = 0
        for rank in self.ranks:
            self.spawn(rank.serve(), rank.number)

    def spawn(self, run: Run, rank: int, reads: bool = False) -> None:
        """Take it in, with a pace of its own: reads of the slow rank take long. It ends when its rank dies."""
        pace = 0.01 if reads and rank == self.slow else self.rng.choice((1.0, 1.0, 0.2))
        self._runs.append((run, pace, rank))

    def deliver(self, ticks: int, arrive: Callable[[], None]) -> None:
        """A store arrives after some ticks, whether or not its rank lives by then."""
        heapq.heappush(self._under_way, (self.ticks + ticks, next(self._numbers), arrive))

    def run(self, faults: dict[int, Callable[[World], None]], most: int = 200_000) -> None:
        """Until every rank that lives has done its steps, or was left behind."""
        while self._runs and self.ticks < most:
            for at in [at for at in faults if at <= self.ticks]:
                faults.pop(at)(self)
            self.ticks += 1
            while self._under_way and self._under_way[0][0] <= self.ticks:
                heapq.heappop(self._under_way)[2]()
            weights = [pace for _, pace, _ in self._runs]
            (place,) = self.rng.choices(range(len(self._runs)), weights)
            run, _, rank = self._runs[place]
            if rank in self.dead:
                del self._runs[place]
                continue
            try:
                next(run)
            except StopIteration:
                self._runs = [other for other in self._runs if other[0] is not run]
        assert self.ticks < most, f"seed {self.seed}: nobody comes to an end"

    def tokens(self, rank: int, step: tuple[int, int]) -> int:
        """How many tokens that rank has: none in some steps."""
        return random.Random(f"{self.seed} {rank} {step} tokens").choice((0, 1, 3))

    def owners(self, step: tuple[int, int], rank: int, token: int) -> list[int]:
        """Whose experts a token wants."""
        drawn = random.Random(f"{self.seed} {rank} {step} {token}")
        return [drawn.choice(sorted(self.views[step[0]])) for _ in range(K)]

    def agree(self, rank: int, epoch: int) -> Run:
        """Join the roll call for `epoch` and wait for its view: all whom nobody holds for dead or stopped."""
        self.joined.setdefault(epoch, set()).add(rank)
        while self.epoch < epoch:
            here = self.members - self.dead - self.stopped
            if rank in self.stopped:
                yield
                continue
            if self.joined[epoch] >= here:
                self.members, self.epoch = frozenset(self.joined[epoch] & here), epoch
                self.views[epoch] = self.members
                return
            yield


class Rank:
    """One rank: its host, and the kernels that it launches one after the other."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.memory = Memory()
        self.epoch, self.view = 1, world.members
        self.sequence = 0

    # -- the host --------------------------------------------------------------------------------------------------

    def serve(self) -> Run:
        done = 0
        while done < self.world.steps:
            yield
            if self.world.epoch > self.epoch and self.number not in self.world.members:
                return  # left behind
            if self.number in self.world.stopped:
                continue
            asked = max(self.world.joined, default=0)
            if asked > self.epoch:
                yield from self._adopt(asked)
                continue
            # A step may have been launched ahead: it runs whatever becomes of the one before.
            ends = []
            for _ in range(self.world.rng.choice((1, 2))):
                right = yield from self._step()
                ends.append((right, self._clean()))
            for right, clean in ends:
                if clean:
                    self.world.clean_steps += 1
                    done += 1
                if clean and not right:
                    self.world.wrong.append(f"seed {self.world.seed}: rank {self.number}, epoch {self.epoch}")
            if not ends[-1][1] and self.number not in self.world.stopped:
                yield from self.interrupt(self.epoch + 1)
                yield from self._adopt(self.epoch + 1)
        self.world.dead.add(self.number)  # it leaves in peace; the others need not wait

    def _clean(self) -> bool:
        m = self.memory
        return not m.gone & self.view and max(m.interrupted, m.host_opened) <= self.epoch

    def interrupt(self, epoch: int) -> Run:
        self.memory.host_opened = max(self.memory.host_opened, epoch)
        self.world.joined.setdefault(epoch, set())
        kernel = Kernel(self.world, late=5000)  # nobody waits until these have arrived
        for peer in self.view - {self.number}:
            kernel.store(peer, lambda peer=peer: self._tell("opened", peer, epoch))
            yield

    def _adopt(self, epoch: int) -> Run:
        yield from self.world.agree(self.number, epoch)
        if self.number not in self.world.members:
            return
        kernel = Kernel(self.world)
        for gone in self.view - self.world.members:
            kernel.store(gone, lambda gone=gone: self._tell("cut", gone, self.world.epoch))
        yield from kernel.ended()
        self.epoch, self.view, self.sequence = self.world.epoch, self.world.members, 0
        self.memory.gone, self.memory.host_gone = set(), set()

    def _tell(self, what: str, peer: int, epoch: int) -> None:
        words = getattr(self.world.ranks[peer].memory, what)
        words[self.number] = max(words.get(self.number, 0), epoch)

    # -- the device ------------------------------------------------------------------------------------------------

    def _step(self) -> Generator[None, None, bool]:
        """A step of all layers, whatever happens. Returns whether all that was read is what should have been."""
        right = True
        for _ in range(self.world.layers):
            self.sequence += 1
            step = (self.epoch, self.sequence)
            yield from self._dispatch()
            places = yield from self._experts(step)
            right = (yield from self._combine(step, places)) and right
        return right

    def _alive(self) -> set[int]:
        """What a program reads first (`kernels.begin`)."""
        m = self.memory
        m.gone |= {r for r, epoch in m.cut.items() if epoch >= self.epoch and r in self.view}
        return set() if m.interrupted > self.epoch else set(self.view - m.gone)

    def _give_up(self, kernel: Kernel, waiting: set[int]) -> set[int]:
        """`kernels.give_up`: who is still awaited."""
        m, world = self.memory, self.world
        gone = {r for r in waiting if m.cut.get(r, 0) >= self.epoch or r in m.host_gone or r in world.dead}
        gone |= {r for r in waiting if (self.number, r) in world.impatient}
        gone |= {r for r in waiting & world.stopped if world.rng.random() < 0.01}  # a time-out
        for r in gone - m.gone:
            m.gone.add(r)
            kernel.store(r, lambda r=r, epoch=self.epoch: self._tell("cut", r, epoch))
        opened = max(m.opened.values(), default=0)
        if (opened := max(opened, m.interrupted, m.host_opened)) > self.epoch:
            self._go_on_alone(kernel, opened, self.world.rules.relay)
            return set()
        return waiting - m.gone

    def _go_on_alone(self, kernel: Kernel, opened: int, tells: bool) -> None:
        self.memory.interrupted = max(self.memory.interrupted, opened)
        if tells:
            for r in self.view - {self.number}:
                kernel.store(r, lambda r=r: self._tell("opened", r, opened))

    def _meet(self, kernel: Kernel, what: str, alive: set[int]) -> Run:
        """Raise a flag at all others and wait for theirs."""
        expected = (self.epoch, self.sequence)
        for r in sorted(alive - {self.number}):
            kernel.store(r, lambda r=r: self._raise(what, r, expected))
            yield
        flags, waiting = getattr(self.memory, what), alive - {self.number}
        while waiting := {r for r in waiting if flags.get(r, (0, 0)) < expected}:
            waiting = self._give_up(kernel, waiting)
            yield

    def _raise(self, what: str, peer: int, expected: tuple[int, int]) -> None:
        flags = getattr(self.world.ranks[peer].memory, what)
        flags[self.number] = max(flags.get(self.number, (0, 0)), expected)

    def _dispatch(self) -> Run:
        kernel = Kernel(self.world)
        yield from self._meet(kernel, "begun", self._alive())
        yield from kernel.ended()

    def _experts(self, step: tuple[int, int]) -> Generator[None, None, dict[tuple[int, int, int], int]]:
        """Write y. Returns the places of the pairs, which are others in each step."""
        pairs = [
            (rank, token, k)
            for rank in sorted(self.view)
            for token in range(self.world.tokens(rank, step))
            for k, owner in enumerate(self.world.owners(step, rank, token))
            if owner == self.number
        ]
        self.world.rng.shuffle(pairs)
        for row, pair in enumerate(pairs):
            self.memory.y[row] = Made(self.number, step, pair)
            yield
        return {pair: row for row, pair in enumerate(pairs)}

    def _combine(self, step: tuple[int, int], places: dict[tuple[int, int, int], int]) -> Generator[None, None, bool]:
        """`pull_kernel`: a program that meets the peers, one that says where results stand, a reader a token."""
        kernel = Kernel(self.world)
        alive = self._alive()
        answers: list[bool] = []
        writers = [self._meet(kernel, "ready", alive), self._point(kernel, alive, places)]
        tokens = self.world.tokens(self.number, step)
        readers = [self._take(kernel, alive, step, token, places, answers) for token in range(tokens)]
        left = len(writers) + len(readers)

        def counted(program: Run) -> Run:
            nonlocal left
            yield from program
            left -= 1

        for program in writers + readers:
            self.world.spawn(counted(program), self.number, reads=program in readers)
        while left:
            yield
        yield from kernel.ended()
        return all(answers)

    def _point(self, kernel: Kernel, alive: set[int], places: dict[tuple[int, int, int], int]) -> Run:
        tag, parity = (self.epoch, self.sequence), self.sequence % 2
        for (rank, token, k), row in places.items():
            if rank != self.number and rank in alive:
                words, at = self.world.ranks[rank].memory.words, (parity, self.number, token, k)
                kernel.store(rank, lambda words=words, at=at, row=row: words.__setitem__(at, (tag, row)))
            yield

    def _take(
        self, kernel: Kernel, alive: set[int], step: tuple[int, int], token: int,
        places: dict[tuple[int, int, int], int], answers: list[bool],
    ) -> Run:  # fmt: skip
        """Wait for the words of one token, read its rows, and look who left meanwhile."""
        m, tag, parity = self.memory, (self.epoch, self.sequence), self.sequence % 2
        owners = self.world.owners(step, self.number, token)
        rows: dict[int, int] = {k: places[self.number, token, k] for k, o in enumerate(owners) if o == self.number}
        late = {k for k, owner in enumerate(owners) if owner != self.number and owner in alive}
        while late:
            for k in sorted(late):
                came, row = m.words.get((parity, owners[k], token, k), ((0, 0), 0))
                if came == tag:
                    rows[k] = row
            late -= rows.keys()
            still = self._give_up(kernel, {owners[k] for k in late}) if late else set()
            late = {k for k in late if owners[k] in still}
            yield
        read: dict[int, Made | None] = {}
        for k in self.world.rng.sample(sorted(rows), len(rows)):
            read[k] = self.world.ranks[owners[k]].memory.y.get(rows[k])
            yield
        answers.append(all(read.get(k) == Made(o, step, (self.number, token, k)) for k, o in enumerate(owners)))
        if self.world.rules.look:
            m.gone |= {r for r in alive if m.cut.get(r, 0) >= self.epoch}
            yield
            if (opened := max(m.opened.values(), default=0)) > self.epoch:
                self._go_on_alone(kernel, opened, self.world.rules.relay_look)


# -- faults ------------------------------------------------------------------------------------------------------------


def faults(world: World) -> dict[int, Callable[[World], None]]:
    """Some of: a death, a stop that ends, a rank that takes another one for dead, an operator's mask."""
    rng, drawn = world.rng, dict[int, Callable[[World], None]]()
    ranks = len(world.ranks)
    for kind in rng.choices(("die", "stop", "doubt", "mask", "roll call"), (1, 1, 2, 1, 3), k=rng.choice((1, 2, 3))):
        at = rng.randrange(20, 3000)
        rank = rng.randrange(ranks)
        drawn.update(_fault(kind, at, rank, (rank + rng.randrange(1, ranks)) % ranks, rng))
    return drawn


def _fault(
    kind: str, at: int, rank: int, other: int, rng: random.Random
) -> Iterator[tuple[int, Callable[[World], None]]]:
    if kind == "die":
        yield at, lambda world: world.dead.add(rank)
    elif kind == "stop":
        yield at, lambda world: world.stopped.add(rank)
        yield at + rng.choice((50, 3000)), lambda world: world.stopped.discard(rank)
    elif kind == "doubt":
        yield at, lambda world: world.impatient.add((rank, other))
        yield at + 1500, lambda world: world.impatient.discard((rank, other))
    elif kind == "mask":
        yield at, lambda world: world.ranks[rank].memory.host_gone.add(other)
    else:
        yield at, lambda world: world.spawn(world.ranks[rank].interrupt(world.ranks[rank].epoch + 1), rank)
