"""Threads that run one at a time, in an order that a seed decides, on a clock that jumps when nobody can go on.

The code under test blocks in ordinary calls (a store, a communicator, a clock); here each such call ends in `pause`,
which hands the baton to another task. So every run with the same seed is the same run, and an hour passes in no time.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


class Killed(BaseException):
    """SIGKILL for a task. Not an Exception, and raised again at every call: no handler survives it."""


class Hang(Exception):
    """Nothing can go on any more, or it goes on for ever."""


@dataclass(eq=False)
class Task:
    """One simulated process."""

    name: str
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] | None = None
    deadline: float = 0.0
    frozen_until: float = 0.0
    killed: bool = False
    done: bool = False
    error: BaseException | None = None
    points_left: list[tuple[int, Callable[[], None]]] = field(default_factory=list)
    """(countdown, action): actions to take after this task passed so many points."""


class Scheduler:
    """Runs tasks until `stop` or until they are done. Time is in seconds."""

    def __init__(self, seed: int, max_time_s: float, max_switches: int = 100_000) -> None:
        self.rng = random.Random(seed)
        self.time_s = 0.0
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0
        self._main = threading.Semaphore(0)
        self._max_time_s, self._switches_left = max_time_s, max_switches
        self._stopped = False
        self.hang: Hang | None = None

    # --- the clock of the code under test

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.pause(None, self.time_s + max(0.0, seconds))

    # --- for tasks

    def pause(self, ready: Callable[[], bool] | None = None, deadline: float | None = None) -> None:
        """Let others run until `ready()` or the deadline; with neither, until it is this task's turn again."""
        task = self.current
        assert task is not None
        if task.killed:
            raise Killed
        task.ready = ready
        task.deadline = self.time_s if deadline is None and ready is None else (1e18 if deadline is None else deadline)
        following = self._choose()
        if following is not task:
            self._hand_to(following)
            task.baton.acquire()
        task.ready = None
        if task.killed:
            raise Killed

    def point(self) -> None:
        """A place where this task can be killed or frozen, or another one can overtake it."""
        task = self.current
        assert task is not None
        if task.killed:
            raise Killed
        if task.points_left:
            due = [action for left, action in task.points_left if left <= 0]
            task.points_left = [(left - 1, action) for left, action in task.points_left if left > 0]
            for action in due:
                action()
            if task.killed:
                raise Killed
            if task.frozen_until > self.time_s:
                self.pause()
        if self.rng.random() < 0.25:
            self.pause()

    # --- for the story that is told

    def spawn(self, name: str, body: Callable[[], None]) -> Task:
        task = Task(name, deadline=self.time_s)

        def run() -> None:
            task.baton.acquire()
            try:
                if not task.killed:
                    body()
            except Killed:
                pass
            except BaseException as error:
                task.error = error
                self._stopped = True
            task.done = True
            self._hand_to(self._choose())

        threading.Thread(target=run, name=name, daemon=True).start()
        self.tasks.append(task)
        return task

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._counter += 1
        heapq.heappush(self._events, (self.time_s + delay_s, self._counter, action))

    def kill(self, task: Task) -> None:
        task.killed = True

    def freeze(self, task: Task, seconds: float) -> None:
        task.frozen_until = max(task.frozen_until, self.time_s + seconds)

    def stop(self) -> None:
        """End the run: every task is killed."""
        self._stopped = True

    def run(self) -> None:
        """From the main thread: run all tasks to their end. Raises the first error of a task, or Hang."""
        first = self._choose()
        if first is not None:
            self._hand_to(first)
            self._main.acquire()
        for task in self.tasks:
            if task.error is not None:
                raise task.error
        if self.hang is not None:
            raise self.hang

    # --- parts

    def _hand_to(self, task: Task | None) -> None:
        self.current = task
        (self._main if task is None else task.baton).release()

    def _choose(self) -> Task | None:
        """Whose turn it is; None when all are done."""
        while True:
            alive = [t for t in self.tasks if not t.done]
            if not alive and (self._stopped or not self._events):
                return None
            self._switches_left -= 1
            if self._switches_left < 0 or self.time_s > self._max_time_s:
                self._give_up("goes on for ever")
            if self._stopped:
                for task in alive:
                    task.killed = True
                return alive[0]
            self._fire()
            if not alive:  # all are dead; the next event may start somebody
                if all(t.done for t in self.tasks) and self._events:
                    self._jump(alive)
                continue
            able = [t for t in alive if t.killed or (t.frozen_until <= self.time_s and self._can_go_on(t))]
            if able:
                return able[0] if len(able) == 1 else able[self.rng.randrange(len(able))]
            self._jump(alive)

    def _can_go_on(self, task: Task) -> bool:
        return task.deadline <= self.time_s or (task.ready is not None and task.ready())

    def _fire(self) -> None:
        while self._events and self._events[0][0] <= self.time_s:
            heapq.heappop(self._events)[2]()

    def _jump(self, alive: list[Task]) -> None:
        times = [max(t.deadline, t.frozen_until) for t in alive]
        times += [t.frozen_until for t in alive if t.frozen_until > self.time_s]
        if self._events:
            times.append(self._events[0][0])
        soonest = min(times)
        if soonest >= 1e17:
            self._give_up("nobody can go on")
        else:
            self.time_s = max(self.time_s, soonest)

    def _give_up(self, why: str) -> None:
        if not self._stopped:
            where = ", ".join(f"{t.name} until {t.deadline:.3f}" for t in self.tasks if not t.done)
            self.hang = Hang(f"at {self.time_s:.3f} s the simulation {why}: {where}")
            self._stopped = True
