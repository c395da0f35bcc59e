"""Decode throughput of one Phalanx rank against `generate` of transformers: same machine, same model, same run.

    python benchmarks/decode.py MODEL [--streams 1,16] [--prompt-tokens 64] [--new-tokens 64] [--repeats 5] [--json]

Both sides run in this process with the same number of threads, greedy, in turns, so that a machine that is busy with
something else slows both down alike; the medians of the repeats are compared. What counts is decode alone: from the
moment every stream has its first token to the moment all have their last. Beside the clock on the wall stands the CPU
time of the process, which says more where other processes want the same cores. Needs the extra `test` (transformers).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from phalanx.comm.cpu import CpuCommunicator
from phalanx.config import Dtype, ServeConfig
from phalanx.messages import SamplingParams, Submit
from phalanx.model.config import ModelConfig
from phalanx.testing.solo import SoloEngine


@dataclass(frozen=True)
class Workload:
    """What both sides get: so many streams, each with a prompt of its own and so many new tokens."""

    streams: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        random = np.random.default_rng(seed)
        return random.integers(3, vocab_size, (self.streams, self.prompt_tokens)).tolist()  # type: ignore[no-any-return]

    @property
    def decoded(self) -> int:
        return self.streams * (self.new_tokens - 1)


@dataclass(frozen=True)
class Rate:
    """Decoded tokens a second on the wall, and a second of CPU time."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Comparison:
    """Medians; ratio = Phalanx over transformers, the median of the ratios of each turn."""

    streams: int
    phalanx: Rate
    transformers: Rate
    ratio: Rate
    turns: list[tuple[Rate, Rate]]


@dataclass(frozen=True)
class Moment:
    """A reading of both clocks, in seconds."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.process_time())

    def since(self, earlier: Moment) -> Moment:
        return Moment(self.wall - earlier.wall, self.cpu - earlier.cpu)

    def rate(self, tokens: int) -> Rate:
        return Rate(tokens / self.wall, tokens / self.cpu)


class Phalanx:
    """One rank with every expert, as `phalanx serve --ep-size 1` runs it, without the HTTP side."""

    def __init__(self, model: Path, dtype: Dtype, streams: int) -> None:
        shape = ModelConfig.read(model)
        config = ServeConfig(model=str(model), dtype=dtype, max_num_seqs=streams, max_num_batched_tokens=512)
        comm = CpuCommunicator(
            0, 1, incarnation=0, max_tokens=config.max_num_batched_tokens, hidden=shape.hidden, top_k=shape.top_k,
            slots_per_rank=shape.num_experts, dtype=getattr(torch, dtype), peer_timeout_s=config.peer_timeout_s,
        )  # fmt: skip
        self._solo = SoloEngine(config, comm, warm_up=True)

    def run(self, work: Workload, prompts: Sequence[Sequence[int]]) -> Rate:
        """Decode alone: from the step in which the last stream gets its first token on."""
        engine = self._solo.engine
        sampling = SamplingParams(max_tokens=work.new_tokens, temperature=0.0, ignore_eos=True)
        engine.accept(
            Submit(request_id=f"{i}", attempt=0, prompt_ids=list(prompt), sampling=sampling)
            for i, prompt in enumerate(prompts)
        )
        started = set[str]()
        decoded = 0
        while len(started) < work.streams:  # prefill; streams that are ahead decode some tokens in it
            tokens = engine.step().tokens
            decoded += sum(token.index > 0 for token in tokens)
            started.update(token.request_id for token in tokens)
        begin = Moment.now()
        while engine.has_work:
            engine.step()
        return Moment.now().since(begin).rate(work.decoded - decoded)


class Transformers:
    """`generate` with a KV cache and a batch of equally long prompts, so that it needs no padding."""

    def __init__(self, model: Path, dtype: Dtype) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = loaded.eval()

    def run(self, work: Workload, prompts: Sequence[Sequence[int]]) -> Rate:
        """Decode alone: of what all tokens take, the first token's share is taken off."""
        ids = torch.tensor(prompts)
        first = self._took(ids, 1)
        return self._took(ids, work.new_tokens).since(first).rate(work.decoded)

    def _took(self, ids: torch.Tensor, new_tokens: int) -> Moment:
        begin = Moment.now()
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return Moment.now().since(begin)


def compare(ours: Phalanx, theirs: Transformers, work: Workload, vocab_size: int, repeats: int) -> Comparison:
    """Both in turns; the first turn warms up and is not counted."""
    turns = []
    for repeat in range(repeats + 1):
        prompts = work.prompts(vocab_size, seed=repeat)
        turns.append((ours.run(work, prompts), theirs.run(work, prompts)))
    counted = turns[1:]
    return Comparison(
        streams=work.streams,
        phalanx=median([a for a, _ in counted]),
        transformers=median([b for _, b in counted]),
        ratio=median([Rate(a.wall / b.wall, a.cpu / b.cpu) for a, b in counted]),
        turns=counted,
    )


def median(rates: Sequence[Rate]) -> Rate:
    """Of each clock on its own."""
    return Rate(statistics.median(rate.wall for rate in rates), statistics.median(rate.cpu for rate in rates))


def machine() -> dict[str, str | int]:
    """Where the figures were taken."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":")
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--streams", default="1,16", help="Numbers of concurrent streams to compare at.")
@click.option("--prompt-tokens", default=64, help="Tokens of each prompt.")
@click.option("--new-tokens", default=64, help="Tokens that each stream generates.")
@click.option("--repeats", default=5, help="Turns that count.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16")
@click.option("--threads", default=1, help="Threads of each side.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    model: Path,
    streams: str,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: Dtype,
    threads: int,
    as_json: bool,
) -> None:
    """Compare the decode throughput of one rank with transformers' on MODEL."""
    torch.set_num_threads(threads)
    counts = [int(count) for count in streams.split(",")]
    vocab_size = ModelConfig.read(model).vocab_size
    ours, theirs = Phalanx(model, dtype, max(counts)), Transformers(model, dtype)
    results = []
    for count in counts:
        work = Workload(count, prompt_tokens, new_tokens)
        results.append(compare(ours, theirs, work, vocab_size, repeats))
        if not as_json:
            last = results[-1]
            for clock in ("wall", "cpu"):
                ours_, theirs_, ratio = (getattr(r, clock) for r in (last.phalanx, last.transformers, last.ratio))
                click.echo(
                    f"{count:3d} streams, tokens a second ({clock}): phalanx {ours_:.1f}, transformers {theirs_:.1f}, "
                    f"ratio {ratio:.2f}"
                )
    if as_json:
        parameters = {"model": model.name, "dtype": dtype, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        click.echo(json.dumps({"machine": machine(), **parameters, "results": [asdict(r) for r in results]}, indent=2))


if __name__ == "__main__":
    main()
