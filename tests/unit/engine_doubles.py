"""Stand-ins for the model and the communicator, with which engine tests take microseconds a step.

`PagedModel` makes its logits out of the tokens that it *finds in the KV blocks*, so a wrong table, a block that was
overwritten or a stale prefix hit changes the text. `Weather` makes steps fail, and a failing step leaves garbage in
every KV position that it was to write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phalanx.comm.base import Communicator, Dispatched, Status
from phalanx.engine import device_sampler, sampler
from phalanx.engine.batch import StepBatch
from phalanx.engine.request import Request
from phalanx.engine.runner import Ran, Runner
from phalanx.engine.scheduler import Limits
from phalanx.engine.step import Engine, StepResult
from phalanx.errors import PeerLost
from phalanx.messages import SamplingParams, Submit, TokenOut, ToWorker
from phalanx.model.attention import ForwardBatch
from phalanx.testing.faults import NO_FAULTS, Faults
from phalanx.world import Member, Placement, View, World

VOCAB = 23
EOS = 1
ROUTES_LEW = np.zeros((1, 1, 1), np.int32)


class Weather:
    """Decides which steps fail, and how: "clear", "header" (before anything ran) or "forward" (half-way)."""

    def __init__(self, forecast: Callable[[], str] = lambda: "clear") -> None:
        self._forecast = forecast
        self.today = "clear"
        self.status = Status()
        self.failures = 0

    def reforecast(self, forecast: Callable[[], str]) -> None:
        self._forecast = forecast

    def dawn(self) -> None:
        self.today = self._forecast()
        if self.today == "header":
            self.fail()

    def fail(self) -> None:
        self.failures += 1
        self.status = Status(lost=frozenset({1}), causes=((1, "notice"),), detect_s=((1, 0.0),))


class LoneCommunicator(Communicator):
    """Rank 0 with peers that have nothing to do, or that bring the header rows of a script."""

    def __init__(self, weather: Weather | None = None, ep_size: int = 1) -> None:
        self.rank, self.ep_size = 0, ep_size
        self.weather = weather or Weather()
        self.peer_rows: list[list[int]] = []

    @property
    def address(self) -> str:
        return ""

    def adopt(self, view: View) -> None:
        self.weather.status = Status()

    def all_gather(self, row: Tensor) -> Tensor:
        self.weather.dawn()
        return torch.stack([row, *(torch.tensor(peer) for peer in self.peer_rows)])

    def status(self) -> Status:
        return self.weather.status

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor) -> Dispatched:
        raise AssertionError("the paged model has no experts")

    def combine(self, y_MD: Tensor, dispatched: Dispatched) -> Tensor:
        raise AssertionError("the paged model has no experts")

    def barrier(self) -> None: ...

    def query_mask(self) -> Tensor:
        return torch.ones(self.ep_size, dtype=torch.uint8)

    def update_mask(self, rank: int, alive: bool) -> None: ...

    def interrupt(self, epoch: int) -> None: ...

    def ring(self) -> None: ...

    def sleep(self, timeout_s: float, wake_fds: tuple[int, ...] = ()) -> bool:
        return False

    @contextmanager
    def patience(self, timeout_s: float) -> Iterator[None]:
        yield

    def close(self) -> None: ...


class PagedModel:
    """Its hidden state is 8 bytes of a digest of the context, its logits are drawn from that."""

    def __init__(self, limits: Limits, weather: Weather) -> None:
        self._limits = limits
        self._weather = weather
        self.kv = np.full((limits.num_blocks, limits.block_size), -1, np.int64)
        self.computed = 0
        self.batches: list[ForwardBatch] = []

    def forward(self, batch: ForwardBatch, kv: Any) -> Tensor:
        tokens_T = batch.token_ids_T.numpy()
        assert len(tokens_T) <= self._limits.max_num_batched_tokens
        assert len(batch.slices) <= self._limits.max_num_seqs
        self.batches.append(batch)
        self.computed += len(tokens_T)
        flat = self.kv.reshape(-1)
        failing = self._weather.today == "forward"
        hidden_TD = np.zeros((len(tokens_T), 1), np.int64)
        for part in batch.slices:
            end = part.context + part.length
            places = (part.blocks[:, None] * self._limits.block_size + np.arange(self._limits.block_size)).reshape(-1)
            rows = tokens_T[part.start : part.start + part.length]
            flat[places[part.context : end]] = -7 if failing else rows
            context = flat[places[:end]]
            for i in range(part.length):
                hidden_TD[part.start + i] = digest(context[: part.context + i + 1])
        if failing:
            self._weather.fail()
        return torch.from_numpy(hidden_TD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([logits_of(int(key)) for key in hidden_ND[:, 0]]))

    def logits_after(self, tokens: Sequence[int]) -> sampler.FloatRow:
        """What it says after a context, without any KV."""
        return logits_of(digest(np.array(tokens, np.int64)))


class Device(Runner):
    """A runner whose batches run later than they are launched, one after the other, as on a device.

    A batch runs when somebody waits for it or, by the toss of `eager`, as soon as it is launched. It takes the tokens
    that are not known from those that the batch before it chose, as they stand when it runs. Once a batch has failed,
    those behind it fail too, until the next World."""

    weather: Weather
    eager: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.queue: list[DeviceFlight] = []
        self.chosen: list[int] = []
        self.launches: list[bool] = []
        """Of each, whether it was behind another one."""
        self.failed = Status()

    def launch(self, batch: StepBatch) -> DeviceFlight:
        assert len(self.queue) < 2, "two batches are under way already"
        self.launches.append(bool(self.queue))
        flight = DeviceFlight(self, batch, self.weather.today == "forward")
        self.queue.append(flight)
        if self.eager():
            self.run_until(flight)
        return flight

    def may_lead(self, batch: StepBatch) -> bool:
        return not batch.prompts and all(device_sampler.on_device(request) for request, _ in batch.samples)

    def adopt(self, routes_LEW: Any) -> None:
        assert not self.queue, "a World is adopted while a batch is under way"
        self.failed = Status()

    def meet_peers(self, fails: bool) -> None:
        """What the collectives of a batch do; `failed` says what came of it."""
        if fails and self.failed.clean:
            self.failed = Status(lost=frozenset({1}), causes=((1, "notice"),), detect_s=((1, 0.0),))

    def run_until(self, flight: DeviceFlight) -> None:
        for each in self.queue:
            each.run()
            if each is flight:
                return


class DeviceFlight:
    def __init__(self, device: Device, batch: StepBatch, fails: bool) -> None:
        self._device, self._batch, self._fails = device, batch, fails
        self._ran: Ran | None = None
        # What the sampler is told of a request is written when its batch is launched.
        self._told = [([*request.tokens, *[-1] * batch.later], request) for request, _ in batch.samples]

    def run(self) -> None:
        if self.over:
            return
        device, batch = self._device, self._batch
        device.meet_peers(self._fails)
        forward = batch.forward
        tokens = [device.chosen[-1 - token] if token < 0 else token for token in forward.token_ids_T.tolist()]
        whole = ForwardBatch(torch.tensor(tokens, dtype=torch.int64), forward.positions_T, forward.slices)
        hidden_TD = self._forward(whole, not device.failed.clean)
        logits_NV = device.logits(hidden_TD, [row for _, row in batch.samples])
        device.chosen = [
            self._choose(logits_V, told, request)
            for logits_V, (told, request) in zip(logits_NV, self._told, strict=True)
        ]
        chosen = {
            row: token
            for (request, row), token in zip(batch.samples, device.chosen, strict=True)
            if device_sampler.on_device(request)
        }
        self._ran = Ran(lambda rows: device.logits(hidden_TD, rows), chosen, device.failed)

    @property
    def over(self) -> bool:
        return self._ran is not None

    def finish(self) -> Ran:
        assert self._device.queue[0] is self, "flights end in the order of their launches"
        self.discard()
        assert self._ran is not None
        return self._ran

    def discard(self) -> None:
        if self in self._device.queue:
            self._device.run_until(self)
            self._device.queue.remove(self)

    def _forward(self, batch: ForwardBatch, fails: bool) -> Tensor:
        """Under the weather of its own launch. Of a failure only the device's own words tell."""
        weather = self._device.weather
        before = weather.today, weather.status
        weather.today = "forward" if fails else "clear"
        hidden_TD = self._device.forward(batch)
        weather.today, weather.status = before
        return hidden_TD

    def _choose(self, logits_V: sampler.FloatRow, told: list[int], request: Request) -> int:
        if sampler.adjusts(request.sampling, len(told) - request.prompt_length, request.stop_ids):
            return 0  # not for the device
        return sampler.choose(logits_V, request.sampling, told, request.prompt_length, request.stop_ids)


class NoRoutes:
    def adopt(self, table_LEW: Any) -> None: ...


class Bench:
    """An engine on a paged model, which recovers from failed steps as a worker would."""

    def __init__(
        self,
        limits: Limits,
        forecast: Callable[[], str] = lambda: "clear",
        ep_size: int = 1,
        faults: Faults = NO_FAULTS,
        runner: type[Runner] = Runner,
    ) -> None:
        self.limits = limits
        self.weather = Weather(forecast)
        self.comm = LoneCommunicator(self.weather, ep_size)
        self.model = PagedModel(limits, self.weather)
        self.runner = runner(self.model, None, NoRoutes(), VOCAB)
        if isinstance(self.runner, Device):
            self.runner.weather = self.weather
        self.engine = Engine(limits, self.runner, self.comm, [EOS], faults)
        self.epoch = 0
        self.outputs: dict[str, list[TokenOut]] = {}
        self.results: list[StepResult] = []
        self.meet()

    def meet(self) -> None:
        """Adopt the next epoch, with the same ranks."""
        self.epoch += 1
        world = World(View(self.epoch, 1, (Member(0, 0),)), Placement(np.zeros((1, 1), np.int32), 1, 1))
        self.comm.adopt(world.view)
        self.engine.adopt(world, ROUTES_LEW)

    def accept(self, *messages: ToWorker) -> None:
        self.engine.accept(messages)

    def step(self) -> StepResult | None:
        """One step; None when it failed."""
        try:
            result = self.engine.step()
        except PeerLost:
            assert not isinstance(self.runner, Device) or not self.runner.queue, "a failure leaves something running"
            self.engine.check()
            self.meet()
            return None
        self.engine.check()
        self.results.append(result)
        for token in result.tokens:
            self.outputs.setdefault(token.request_id, []).append(token)
        return result

    def run(self, max_steps: int = 10_000) -> dict[str, list[int]]:
        """Step until there is nothing to do; the token ids of every request so far."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return {name: token_ids(out) for name, out in self.outputs.items()}
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps: {self.engine.load()}")


def limits(**changes: Any) -> Limits:
    """Small limits, at which blocks run short soon."""
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "block_size": 4, "num_blocks": 24}
    return Limits(**{"max_model_len": 64, **small, **changes})


def submit(name: str, prompt: Iterable[int], max_tokens: int = 8, **changes: Any) -> Submit:
    output_ids, attempt = list(changes.pop("output_ids", ())), changes.pop("attempt", 0)
    sampling = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **changes})
    return Submit(
        request_id=name, attempt=attempt, prompt_ids=list(prompt), sampling=sampling, output_ids=output_ids
    )  # fmt: skip


def reference(request: Submit) -> list[int]:
    """What the request is to yield, without an engine: one token after the other from its whole context."""
    tokens = [*request.prompt_ids, *request.output_ids]
    prompt_length, sampling = len(request.prompt_ids), request.sampling
    stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else {EOS})
    while len(tokens) - prompt_length < sampling.max_tokens:
        logits_V = logits_of(digest(np.array(tokens, np.int64)))
        tokens.append(sampler.choose(logits_V, sampling, tokens, prompt_length, stop_ids))
        if tokens[-1] in stop_ids:
            break
    return tokens[prompt_length + len(request.output_ids) :]


def token_ids(outputs: Sequence[TokenOut]) -> list[int]:
    return [token.token_id for token in outputs if token.token_id >= 0]


def digest(tokens: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=7).digest(), "little")


def logits_of(key: int) -> sampler.FloatRow:
    raw = np.random.Philox(key=key).random_raw(VOCAB)
    return (raw.astype(np.float64) / 2.0**61).astype(np.float32)
