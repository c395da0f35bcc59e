"""Code that was written for DeepEP's low-latency kernels, on Phalanx: one import is different. It needs no GPU.

Run it with `python examples/deep_ep.py`. Three processes exchange tokens; before the third round the last one kills
itself. The others go on without its experts, and their mask says so (1 = masked). The process group is needed only
until the first exchange.
"""

import multiprocessing as mp
import os
import signal
import tempfile

import torch
import torch.distributed as dist

from phalanx.comm.deep_ep import Buffer

RANKS, TOKENS, HIDDEN, EXPERTS, TOP_K = 3, 4, 256, 6, 2


def rank_main(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
    nbytes = Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, RANKS, EXPERTS)
    buffer = Buffer(dist.group.WORLD, 0, nbytes, low_latency_mode=True, enable_shrink=True, device="cpu")
    mask = torch.zeros(RANKS, dtype=torch.int32)
    x = torch.full((TOKENS, HIDDEN), 1.0 + rank, dtype=torch.bfloat16)
    topk_idx = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) % EXPERTS
    weights = torch.full((TOKENS, TOP_K), 0.5)
    for round_ in range(4):
        if (rank, round_) == (RANKS - 1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            x, topk_idx, TOKENS, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        hook()  # what a rank computes before this line overlaps with the exchange
        out, _, _ = buffer.low_latency_combine(recv_x * 2, topk_idx, weights, handle)  # each expert doubles its tokens
        buffer.low_latency_query_mask_buffer(mask)
        answers = out[:, 0].tolist()
        line = f"rank {rank}, round {round_}: came {count.tolist()}, answers {answers}, mask {mask.tolist()}\n"
        os.write(1, line.encode())  # in one piece, whatever the others write
        if round_ == 0:
            dist.destroy_process_group()
    buffer.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [mp.get_context("fork").Process(target=rank_main, args=(r, f"{folder}/meet")) for r in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
