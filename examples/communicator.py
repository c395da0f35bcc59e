"""The communicator by itself: four processes exchange tokens, one is killed, the others go on masked.

Run it with `python examples/communicator.py`. No launcher, no store, no model: whoever wants only the exchange needs a
view, a communicator a rank, and a look at `status()`. Token t of each rank wants slots t and t + 1, one slot a rank.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from multiprocessing.connection import Connection

import torch

from phalanx.comm.cpu import CpuCommunicator
from phalanx.world import Member, View

RANKS, ROUNDS, VICTIM, DIES_IN = 4, 6, 2, 3


def rank_main(rank: int, parent: Connection) -> None:
    shape = {"max_tokens": 8, "hidden": 4, "top_k": 2, "slots_per_rank": 1, "dtype": torch.float32}
    comm = CpuCommunicator(rank, RANKS, incarnation=0, peer_timeout_s=2.0, **shape)
    parent.send(comm.address)
    comm.adopt(View(1, RANKS, tuple(Member(r, 0, comm_address=a) for r, a in enumerate(parent.recv()))))
    x_TD = torch.full((RANKS, 4), float(rank))
    slots_TK = torch.tensor([[t, (t + 1) % RANKS] for t in range(RANKS)], dtype=torch.int32)
    for round_ in range(ROUNDS):
        if (rank, round_) == (VICTIM, DIES_IN):
            os.kill(os.getpid(), signal.SIGKILL)
        received = comm.dispatch(x_TD, slots_TK)
        y_MD = received.x_ND[received.row_M] + 100  # this rank's expert
        answers = comm.combine(y_MD, received).count_nonzero(-1).bool().sum().item()
        parent.send(f"rank {rank}, round {round_}: {len(y_MD)} tokens came, {answers} of 8 answers; {comm.status()}")
    comm.close()


if __name__ == "__main__":
    context = mp.get_context("fork")
    pipes = [context.Pipe() for _ in range(RANKS)]
    processes = [context.Process(target=rank_main, args=(r, theirs)) for r, (_, theirs) in enumerate(pipes)]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    addresses = [ours.recv() for ours, _ in pipes]
    for ours, _ in pipes:
        ours.send(addresses)
    for rank, (ours, _) in enumerate(pipes):
        try:
            while True:
                print(ours.recv())
        except EOFError:
            print(f"rank {rank} has ended")
