"""The worker's loop by itself, in real processes: the test is launcher and server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from asking import becomes, state_of
from engine_doubles import reference, submit
from torch.distributed import TCPStore

from phalanx import messages as m
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.model.known import described
from phalanx.process import EXIT_STOPPED, WorkerSpec, server_endpoint, worker_endpoint

pytestmark = pytest.mark.cluster

PATIENCE_S = 120
SCRIPT = str(Path(__file__).with_name("leading_worker.py"))


class Pair:
    """Two ranks that launch each step behind the one that runs."""

    def __init__(self, model: Path, run_dir: Path, stack: ExitStack, faults: str) -> None:
        config = ServeConfig(
            model=str(model), ep_size=2, enable_chaos=True, expert_backup="disk", num_kv_blocks=64,
            peer_timeout_s=120.0, roll_call_timeout_s=240.0,
        )  # fmt: skip
        self.board = NoticeBoard.create(2)
        stack.callback(self.board.close)
        self._store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        context = stack.enter_context(zmq.Context())
        self._inbox = context.socket(zmq.PULL)
        self._inbox.bind(server_endpoint(str(run_dir)))
        self._outboxes = [context.socket(zmq.PUSH) for _ in range(2)]
        self.processes: list[subprocess.Popen[bytes]] = []
        stack.callback(context.destroy, linger=0)
        for rank, outbox in enumerate(self._outboxes):
            outbox.connect(worker_endpoint(str(run_dir), rank, 0))
            spec = WorkerSpec(
                config=config, rank=rank, incarnation=0, run_dir=str(run_dir), store_host="127.0.0.1",
                store_port=self._store.port, notices=self.board.address, launcher_pid=os.getpid(),
                model=described(config), faults=faults,
            )  # fmt: skip
            process = subprocess.Popen([sys.executable, SCRIPT], stdin=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            self.processes.append(process)
            assert process.stdin is not None
            process.stdin.write(msgspec.msgpack.encode(spec))
            process.stdin.close()

    def tell(self, rank: int, message: m.ToWorker) -> None:
        self._outboxes[rank].send(m.encode(message))

    def hear(self) -> Iterator[Any]:
        """What the ranks say, as it comes."""
        while True:
            assert self._inbox.poll(PATIENCE_S * 1000), "nothing more comes"
            yield m.to_server_decoder.decode(self._inbox.recv())


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_rank_that_hears_between_steps_of_a_death_drops_the_step_that_is_under_way(
    tiny: Path, tmp_path: Path, stack: ExitStack
) -> None:
    pair = Pair(tiny, tmp_path, stack, "stop@roll_call:rank=0:n=2")  # the first one is that of the start
    survivor, victim = pair.processes
    asked = submit("a", [3, 5, 7], max_tokens=200)
    pair.tell(0, asked)
    told: list[int] = []
    heard = pair.hear()
    while not told:
        match next(heard):
            case m.Stepped(tokens=tokens):
                told += [token.token_id for token in tokens]
    # Rank 0 proposes a change, and stops as it begins to agree on it, beside the steps.
    pair.tell(0, m.Leave(members=[(1, 0)]))
    becomes(lambda: state_of(survivor.pid), "T")
    victim.kill()
    victim.wait()
    pair.board.declare_dead(1, 0, "exit")
    survivor.send_signal(signal.SIGCONT)
    left: list[int] | None = None
    while len(told) < 200:
        match next(heard):
            case m.Stepped(tokens=tokens):
                told += [token.token_id for token in tokens]
            case m.Adopted(epoch=2) as adopted:
                left, before = [member.rank for member in adopted.members], len(told)
    assert left == [0]
    assert before < 198, "no step was under way when the death was heard of"
    assert told == reference(asked)
    survivor.terminate()
    assert survivor.wait(PATIENCE_S) == EXIT_STOPPED
