"""A worker: one rank's process. `Worker.run` holds the loop that a reader should see first.

Only this file knows both the engine (which computes steps) and the failure path (which decides between which ranks).
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch

from phalanx import messages as m
from phalanx.backend import Backend, Place, backend
from phalanx.comm.notices import NoticeBoard
from phalanx.device_errors import leave_at_once, said_of_device
from phalanx.elastic.agree import Change, Limits, MonotonicClock, Shape, TcpStore
from phalanx.elastic.ahead import FORESEEN, LOOK_S
from phalanx.elastic.balance import Balancer, Rules
from phalanx.elastic.digests import threads_for
from phalanx.elastic.once import once
from phalanx.elastic.planning import PlanProcess
from phalanx.elastic.recover import Adoption, Recovery
from phalanx.elastic.restore import DiskSource, PeerSource, Source, VaultSource
from phalanx.elastic.vault.memory import Bytes, Follower, Vault, VaultGone
from phalanx.elastic.vault.remote import Remote
from phalanx.elastic.vault.transports import transports
from phalanx.engine.rehearsal import rehearse
from phalanx.engine.step import Engine, StepResult
from phalanx.errors import Evicted, ExpertsLost, Left, PeerLost, PhalanxError, TooFewRanks, TooFewSlots
from phalanx.mail import Mail
from phalanx.model.known import KnownCheckpoint
from phalanx.model.layers import DenseWeights
from phalanx.observe.log import set_up_logging
from phalanx.process import EXIT_EVICTED, EXIT_FAILED, EXIT_STOPPED, WorkerSpec, last_words
from phalanx.testing import faults
from phalanx.timeline import Stopwatch, Timeline
from phalanx.world import Member, View

log = logging.getLogger("phalanx.worker")

ROUTE_WIDTH = 16
"""W: the columns of the routing table, over which a token's position spreads it among an expert's replicas."""

JOIN_S = 0.25
"""How long members wait for a newcomer that knocked and does not answer: it looks every few milliseconds."""

CHECK_PATIENCE_S = 5.0
"""How long a rank waits for another one of its host to check the products, before it does so itself."""

BESIDE_S = 0.002
"""How long a rank goes on after a step with a change that is agreed on beside the steps, when one bit of it leads to
the next."""


class Stopped(BaseException):
    """The launcher asked this process to end. Not an Exception: nothing on the way may take it for a failure."""


def run(spec: WorkerSpec, parts: Callable[[Place], Backend] = backend) -> int:
    """One worker's whole life; its exit code. Leaves its last words for the launcher when it fails. LOCAL, blocks.

    parts: makes what depends on where it computes. A worker on a device that fails, or is out, ends here and at once:
    what it holds there may never answer again."""
    set_up_logging(spec.config.log_level, spec.config.log_format, f"rank {spec.rank}.{spec.incarnation}")
    torch.set_num_threads(spec.config.threads_per_rank)
    torch.set_grad_enabled(False)

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    on_device = spec.config.device != "cpu"
    try:
        Worker(spec, parts).run()
    except Stopped:
        return EXIT_STOPPED
    except Evicted as error:
        log.warning("%s: exiting", error)
        if on_device:
            leave_at_once(EXIT_EVICTED)
        return EXIT_EVICTED
    except Exception as error:
        on_it = said_of_device(error)
        expected = isinstance(error, PhalanxError) or on_it  # the message says it all; a bug needs its traceback
        log.error("rank %d.%d fails: %s", spec.rank, spec.incarnation, on_it or error, exc_info=not expected)
        with suppress(OSError), open(last_words(spec.run_dir, spec.rank, spec.incarnation), "w") as file:
            file.write(on_it or " ".join(f"{type(error).__name__}: {error}".split()))
        if on_device:
            leave_at_once(EXIT_FAILED)
        return EXIT_FAILED


class Worker:
    """One rank's engine, its membership, and its mail."""

    def __init__(self, spec: WorkerSpec, parts: Callable[[Place], Backend] = backend) -> None:
        config = spec.config
        self._prepared = Stopwatch(spec.asked_s)
        chaos = config.enable_chaos
        self._faults = faults.armed(spec.faults, spec.rank, spec.incarnation) if chaos else faults.NO_FAULTS
        self._faults.point("start")
        self._config = config
        self._mail = Mail(spec)
        checkpoint = KnownCheckpoint(config, spec.model)
        model = checkpoint.config
        notices = NoticeBoard.open(spec.notices)
        place = Place(
            config,
            model,
            spec.rank,
            spec.incarnation,
            notices,
            ROUTE_WIDTH,
            fault_point=self._faults.point if chaos else None,
            site=spec.site,
        )
        slots, dtype = place.slots, place.dtype
        rank_parts = parts(place)
        if isinstance(self._faults, faults.FaultInjector):
            self._faults.on_device = rank_parts.failing()
        bank = self._bank = rank_parts.bank
        self._comm = rank_parts.comm
        self._me = Member(spec.rank, spec.incarnation, spec.host, os.getpid(), self._comm.address, bank.address)
        vault = _open_vault(spec.vault, rank_parts.on_device, rank_parts.reached)
        disk = DiskSource(checkpoint, dtype, first_load_only=config.expert_backup == "none")
        store, clock = TcpStore(spec.store_host, spec.store_port), MonotonicClock()
        sources: list[Source | Remote] = [PeerSource(self._me), disk]
        if vault is not None:
            sources.insert(0, VaultSource(vault))  # the fastest: it lends, the others copy
        if (site := spec.site) is not None:
            ways = transports(config, site)
            other = Remote(self._me, site.node_rank, site.nnodes, store, ways, config.peer_timeout_s)
            sources.insert(-1, other)
        dense = vault.dense_parts() if vault is not None else None
        weights = DenseWeights.of(dense) if dense else checkpoint.dense_weights(dtype)
        checked = partial(
            once, store, f"products/{spec.host}", me=f"{spec.rank}.{spec.incarnation}", patience_s=CHECK_PATIENCE_S
        )
        self._runner = rank_parts.runner(weights, checked)
        self._limits = rank_parts.limits
        self._engine = Engine(self._limits, self._runner, self._comm, model.eos_ids, self._faults)
        shape = Shape(
            model.num_moe_layers, model.num_experts, config.places, slots, config.num_redundant_experts, config.ep_size
        )
        self._ranks_needed = -(-model.num_experts // slots)
        self._balancer = Balancer(
            self._me,
            shape,
            Rules(
                window=config.eplb_window,
                interval=config.eplb_interval if config.enable_eplb else 0,
                min_gain=config.eplb_min_gain,
                num_redundant=config.num_redundant_experts,
            ),
            store=store,
            clock=clock,
            bank=bank,
            sources=sources,
            counter=rank_parts.load,
            planner=PlanProcess(),
            faults=self._faults,
        )
        self._recovery = Recovery(
            self._me,
            shape,
            Limits(
                roll_call_s=config.roll_call_timeout_s,
                start_s=config.warmup_timeout_s,
                join_s=min(JOIN_S, config.roll_call_timeout_s),
                restore_s=config.restore_timeout_s,
                min_ranks=config.min_ranks,
            ),
            store=store,
            clock=clock,
            comm=self._comm,
            bank=bank,
            sources=sources,
            notices=notices,
            route_width=ROUTE_WIDTH,
            load=self._balancer.load,
            prepared=self._balancer.prepared,
            step=lambda: self._engine.steps,
            knock=lambda view: self._mail.knock(view, self._me),
            scaled=spec.scaled,
            faults=self._faults,
            threads=threads_for(len(os.sched_getaffinity(0)), -(-config.places // config.nnodes)),
        )
        self._change: Change | None = Change("join" if spec.incarnation else "start")
        self._knocked = self._told_to_leave = False
        self._said = (0, False)
        self._timeline = Timeline()

    def run(self) -> NoReturn:
        """Serve until told to stop, evicted, or broken. Every membership change and every step goes through here."""
        self._get_ready()
        while True:
            try:
                if self._change is not None:
                    self._adopt(self._recovery.run(self._change))
                self._accept()
                self._settle(self._step())
            except Left as left:
                self._wait_for_the_end(left)
            except PeerLost as lost:  # the only handler of this error; the next step is the replay
                self._engine.drop()  # a loss that is found between steps leaves one under way
                self._change = self._suspect(lost)
            except (TooFewRanks, TooFewSlots, ExpertsLost) as error:
                self._change = self._wait_for_help(str(error))

    # --- the parts of the loop

    def _get_ready(self) -> None:
        """Run all that serving runs once, alone. A newcomer first takes in the experts that it will be given, and has
        its peers' experts computed by nobody: what it sends to them is dropped."""
        self._prepared.lap("load")
        if self._change == Change("join"):
            self._recovery.prepare()
            self._runner.adopt(self._recovery.own_routes())
            self._prepared.lap("fetch")
            self._bank.pack()
            self._prepared.lap("pack")
        self._runner.warm_up(self._limits)
        rehearse(self._limits, self._runner, self._comm)
        gc.collect()
        gc.freeze()  # what serving begins with lives as long: no collection looks at it while others wait
        self._prepared.lap("warm_up")

    def _step(self) -> StepResult:
        """One step. Its header says which change this rank knows of that all could make, and whether it is ready."""
        if not self._recovery.ahead.under_way:
            self._begin_what_is_due()
        self._said = self._recovery.ahead.to_say
        return self._engine.step(*self._said)

    def _begin_what_is_due(self) -> None:
        if self._told_to_leave:
            self._told_to_leave = False  # if it is refused, a later roll call will do: this rank goes on asking
            self._recovery.begin("scale")
        elif self._knocked and self._recovery.joiners():  # a knock is only a hint: the store says who asks
            self._recovery.begin("join")
        elif self._balancer.staged:
            self._recovery.begin("rebalance")
        self._knocked = False

    def _accept(self) -> None:
        """Take the mail in: requests for the engine, the rest for this rank itself."""
        for message in self._mail.drain():
            match message:
                case m.InjectFault(kind=kind, at_step=at_step, where=where):
                    self._faults.arm(kind, at_step, where)
                case m.Stop():
                    raise Stopped
                case m.Knock():
                    self._knocked = True
                case m.Leave() | m.Stay():
                    self._hear_where_to_be(message)
                case m.Pause() | m.Resume():
                    self._engine.accept([message])
                    self._mail.send(m.Paused(**self._name, paused=self._engine.paused))
                case _:
                    self._engine.accept([message])

    def _settle(self, result: StepResult) -> None:
        """Tell the server what a step brought, and sleep when nobody has anything to do."""
        for refusal in result.rejected:
            self._mail.send(
                m.Rejected(**self._name, request_id=refusal.request_id, attempt=refusal.attempt, reason=refusal.reason)
            )
        if result.tokens or result.prompt_logprobs or result.prompt_tokens:
            self._mail.send(
                m.Stepped(
                    **self._name,
                    epoch=self._recovery.view.epoch,
                    step=result.step,
                    tokens=result.tokens,
                    prompt_logprobs=result.prompt_logprobs,
                    load=self._engine.load(),
                    prompt_tokens=result.prompt_tokens,
                )
            )
        recovered = self._timeline.stepped(
            self._me, self._prepared, result.seconds, idle=result.idle, boundary=result.boundary
        )
        if recovered is not None:
            self._mail.send(recovered)
        if result.boundary:
            self._change = Change(FORESEEN[result.proposal - 1])
            return
        if result.proposal:
            self._recovery.begin(FORESEEN[result.proposal - 1])
        until = time.monotonic() + BESIDE_S
        while self._recovery.work() and self._recovery.ahead.under_way and time.monotonic() < until:
            pass  # what can wait until later is done one bit a step
        if not self._recovery.ahead.under_way:
            self._balancer.work(result.step)
        self._report_balance()
        if result.idle:
            self._sleep()

    def _report_balance(self) -> None:
        if (report := self._balancer.take_report()) is not None:
            self._mail.send(
                m.Balance(
                    **self._name,
                    epoch=self._recovery.view.epoch,
                    moves=report.moves,
                    replicas=report.replicas,
                    balancedness=report.balancedness,
                )
            )

    def _sleep(self) -> None:
        """All ranks sleep together. One that finds work, or whose heartbeat is due, wakes the others for a step: a
        peer that hangs is found by an empty step."""
        deadline = time.monotonic() + self._config.heartbeat_interval_s
        while not self._comm.sleep(
            max(0.0, min(self._idle_work(), deadline - time.monotonic())), (self._mail.wake_fd,)
        ):
            self._accept()
            news = not self._recovery.ahead.under_way and (
                self._knocked or self._told_to_leave or self._balancer.staged
            )
            wanted = self._engine.has_work or self._said != self._recovery.ahead.to_say or news
            if wanted or time.monotonic() >= deadline:
                self._comm.ring()
                return

    def _idle_work(self) -> float:
        """Do one bit of what is done beside the steps. How many seconds to sleep at most before the next one. LOCAL."""
        if self._recovery.work():
            return 0.0
        return LOOK_S if self._recovery.ahead.under_way else self._balancer.idle_work()

    def _suspect(self, lost: PeerLost) -> Change:
        change = self._recovery.change_after(lost)
        change = replace(change, detect_s=change.detect_s + time.monotonic() - lost.found_s)
        self._timeline.trouble(change.detect_s)
        if change.lost:
            self._mail.send(m.Suspected(**self._name, suspects=list(change.lost), epoch=self._recovery.view.epoch))
        return change

    def _adopt(self, adoption: Adoption) -> None:
        self._engine.adopt(adoption.world, adoption.routes_LEW)
        if adoption.trigger == "start":  # later ones are packed one a step, so that no recovery waits for it
            self._bank.pack()
        self._change = None
        self._prepared.lap("ask")
        self._balancer.adopted(adoption)
        self._timeline.adopted(adoption, *self._balancer.take_staged())
        self._mail.send(
            m.Adopted(
                **self._name,
                epoch=adoption.world.epoch,
                members=_members(adoption.world.view, self._config.device),
                trigger=adoption.trigger,
                lost=list(adoption.lost),
                causes=dict(adoption.causes),
                left=list(adoption.left),
                kv_tokens=self._limits.num_blocks * self._limits.block_size,
                ranks_needed=self._ranks_needed,
            )
        )

    def _wait_for_help(self, reason: str) -> Change:
        """This view cannot serve. Stay, and try again when an operator says so or the membership changes."""
        view = self._recovery.view
        log.debug("cannot serve under epoch %d: %s", view.epoch, reason)  # the server says it aloud
        members = _members(view, self._config.device)
        self._mail.send(m.CannotServe(**self._name, epoch=view.epoch, reason=reason, members=members))
        while True:
            self._comm.sleep(self._config.heartbeat_interval_s, (self._mail.wake_fd,))
            messages = list(self._mail.drain())
            self._engine.accept(messages)
            for message in messages:
                if isinstance(message, m.Leave | m.Stay):
                    self._hear_where_to_be(message)
            if any(isinstance(message, m.Stop) for message in messages):
                raise Stopped
            if any(isinstance(message, m.Pause | m.Resume) for message in messages):
                self._mail.send(m.Paused(**self._name, paused=self._engine.paused))
            status = self._comm.status()
            if self._comm.failed or not status.clean:
                # a peer that heard of the same retry sooner is answered by the same roll call
                return self._suspect(PeerLost(status.lost, status.interrupted))
            if any(isinstance(message, m.Resume) for message in messages):
                return Change("operator")
            if any(isinstance(message, m.Knock) for message in messages) and self._recovery.joiners():
                return Change("join")

    def _hear_where_to_be(self, message: m.Leave | m.Stay) -> None:
        self._told_to_leave = isinstance(message, m.Leave)
        self._recovery.leave(message.members if isinstance(message, m.Leave) else ())

    def _wait_for_the_end(self, left: Left) -> NoReturn:
        """The others go on without this rank. They may still read its slots; the launcher says when they do not."""
        log.info("%s: waiting for the others to need nothing more of it", left)
        deadline = time.monotonic() + self._config.warmup_timeout_s  # Stopped ends it, as soon as they serve
        while (left_s := deadline - time.monotonic()) > 0:
            if any(isinstance(message, m.Stay) for message in self._mail.drain()):
                log.warning("the others died before they served: ending, for another process to take this place")
                break
            select.select([self._mail.wake_fd], [], [], left_s)
        raise Stopped

    @property
    def _name(self) -> dict[str, int]:
        return {"rank": self._me.rank, "incarnation": self._me.incarnation}


def _open_vault(address: str, on_device: bool, reached: Callable[[Bytes], object]) -> Vault | None:
    """This host's vault, if it has one, with a thread that keeps its contents within reach."""
    if not address:
        return None
    try:
        vault = (Vault.open_for_device if on_device else Vault.open)(address)
    except VaultGone as error:
        log.warning("going on without the vault: %s", error)
        return None
    Follower(vault, reached=reached).start()
    return vault


def _members(view: View, device: str) -> list[m.MemberInfo]:
    return [
        m.MemberInfo(rank=member.rank, incarnation=member.incarnation, pid=member.pid, host=member.host, device=device)
        for member in view.members
    ]
