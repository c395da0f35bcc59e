"""Whether steps that are launched while one runs change anything that they must not: for scripts/gpu_check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from engine_checks import on_device, replace_config, served

from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine.batch import StepBatch
from phalanx.engine.runner import Flight, Ran, StepRunner
from phalanx.engine.scheduler import Limits
from phalanx.engine.step import Engine
from phalanx.messages import Abort, SamplingParams, Submit
from phalanx.testing.solo import SoloEngine


class Watched:
    """A runner as it is, but that says how many batches were launched while another was under way, and can be kept from
    doing so."""

    def __init__(self, runner: StepRunner, *, grounded: bool) -> None:
        self._runner, self._grounded = runner, grounded
        self.vocab_size = runner.vocab_size
        self.behind = 0
        self._under_way: list[Tracked] = []

    def launch(self, batch: StepBatch) -> Flight:
        self.behind += bool(self._under_way)
        self._under_way.append(Tracked(self, self._runner.launch(batch)))
        return self._under_way[-1]

    def landed(self, flight: Tracked) -> None:
        """Nothing of it runs any more. One that was finished and is not whole is discarded, too."""
        if flight in self._under_way:
            self._under_way.remove(flight)

    def may_lead(self, batch: StepBatch) -> bool:
        return not self._grounded and self._runner.may_lead(batch)

    def run(self, batch: StepBatch) -> Ran:
        return self._runner.run(batch)

    def adopt(self, routes_LEW: Any) -> None:
        assert not self._under_way, "a World is adopted while a batch is under way"
        self._runner.adopt(routes_LEW)

    def warm_up(self, limits: Limits) -> None:
        self._runner.warm_up(limits)


@dataclass(frozen=True, eq=False)
class Tracked:
    """A flight of `Watched`."""

    runner: Watched
    flight: Flight

    def finish(self) -> Ran:
        self.runner.landed(self)
        return self.flight.finish()

    def discard(self) -> None:
        self.runner.landed(self)
        self.flight.discard()


def check_flights(device: torch.device, large: bool) -> None:
    """The next step launched while one runs or not: the same tokens, also when requests stop or are aborted in between
    and others take their places and their blocks."""
    board = NoticeBoard.create(1)
    with served(large) as config:
        _same_in_flight(replace_config(config, deterministic=True), device, board, *((8, 40) if large else (2, 4)))
    board.close()


def _same_in_flight(config: ServeConfig, device: torch.device, board: NoticeBoard, count: int, length: int) -> None:
    prompts = [[5 + (11 * i + j * j) % 190 for j in range(3 + 4 * i)] for i in range(count)]
    tight = replace_config(
        config, max_num_seqs=max(1, count // 2), num_kv_blocks=2 + count * (length + 4 * count) // 16
    )

    solo = SoloEngine(tight, parts=on_device(device, board), warm_up=device.type == "cuda")

    def run(grounded: bool, stops: dict[str, int]) -> tuple[dict[str, list[int]], int]:
        """Each request's tokens, and how many batches were launched behind another."""
        runner = Watched(solo.runner, grounded=grounded)
        engine = Engine(solo.limits, runner, solo.comm, ())
        engine.adopt(solo.world, solo.world.placement.slots_LP[:, :, None])
        outputs: dict[str, list[int]] = {f"r{i}": [] for i in range(count)}
        for i, (name, prompt) in enumerate(zip(outputs, prompts, strict=True)):
            sampling = SamplingParams(
                max_tokens=length, temperature=0.8 if i % 2 else 0.0, seed=90 + i, ignore_eos=True,
                stop_token_ids=(stops[name],) if name in stops else (),
            )  # fmt: skip
            engine.accept([Submit(name, 0, prompt, sampling)])
        while engine.has_work:
            for token in engine.step().tokens:
                outputs[token.request_id] += [token.token_id] if token.token_id >= 0 else []
            engine.check()
            if stops and len(outputs["r1"]) == 2:
                engine.accept([Abort("r1")])
        return outputs, runner.behind

    whole, behind = run(True, {})
    assert behind == 0
    stops = {name: out[length // 2] for name, out in whole.items() if name != "r1"}
    want, _ = run(True, stops)
    got, behind = run(False, stops)
    solo.close()
    assert behind, "nothing was launched ahead"
    assert got == want, "tokens depend on what is launched ahead"
    assert all(len(out) < length for out in got.values()), got
    print(f"    in flight: {count} requests that stop or are aborted, alike with {behind} batches launched ahead")
