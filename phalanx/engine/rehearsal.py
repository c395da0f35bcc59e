"""A newcomer's first step is one that others wait for: so it is not the first that its process takes.

`StepRunner.warm_up` runs every kernel; what is left is the way of a request through the host's code, which is slow when
it is taken for the first time: a worker is forked, and each page of objects that it comes to is copied then.
"""

from __future__ import annotations

from phalanx.comm.base import Communicator
from phalanx.engine.runner import StepRunner
from phalanx.engine.scheduler import Limits
from phalanx.engine.step import Engine
from phalanx.messages import SamplingParams, Submit

_PROMPT, _TOKENS, _REQUESTS = 16, 6, 8


def rehearse(limits: Limits, runner: StepRunner, comm: Communicator) -> int:
    """Serve a few requests from beginning to end, for nobody, after `warm_up`; how many steps that took. LOCAL in
    effect, like `warm_up`: the communicator has no peers to wait for. Uses the first KV blocks as scratch; the cache
    of the engine that will serve knows nothing of them."""
    engine = Engine(limits, runner, comm, ())
    longest = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    tokens = min(_TOKENS, longest - 1)
    prompt = [0] * min(_PROMPT, longest - tokens)
    engine.accept(
        Submit(
            f"rehearsal-{number}", 0, prompt,
            SamplingParams(max_tokens=tokens, temperature=float(number % 2), top_p=0.9, seed=number, ignore_eos=True),
        )
        for number in range(min(_REQUESTS, limits.max_num_seqs) if tokens > 0 else 0)
    )  # fmt: skip
    while engine.has_work:
        engine.step()
    engine.step()  # an idle one
    return engine.steps
