"""The router: which rank runs a request, and how the request survives that rank. Pure: no sockets, no tasks.

It remembers for each request the prompt and every token that the client was given. When a rank is lost, each of its
requests is submitted to a survivor under the next attempt number, with those tokens: the survivor goes on after them,
and since a token's noise is a function of (seed, position), it goes on with the same text. A token is taken only from
the identity that has the request, under the current attempt, at the next index. So none is lost and none is doubled,
whatever the dead, the slow and the confused still send.

What it wants done is in `take()`: the caller does it (`server.link` with sockets, a test with a list).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import msgspec

from phalanx import messages as m
from phalanx.observe.metrics import Metrics
from phalanx.server.flight import (
    Connect,
    Disconnect,
    Effect,
    Flight,
    Lost,
    NewView,
    QueueFull,
    RankRefused,
    Report,
    Request,
    RequestBroken,
    RouterError,
    ToLauncher,
    ToRank,
    Unavailable,
)
from phalanx.server.ledger import Ledger
from phalanx.server.roster import Identity, RankRecord, Roster

log = logging.getLogger("phalanx.router")

MAX_GAPS = 3
"""How often a request is started anew because a token of it never came, before it fails."""

REPORT_PATIENCE_S = 30.0
"""How long a recovery waits for the last rank's timeline."""


class Router:
    """Places requests on ranks and carries them over the ranks' deaths. Not for several threads.

    clock: monotonic seconds. max_running: sequences that one rank runs at once. max_queued: requests held beyond those.
    patience_s: how long requests in flight wait while no rank serves.
    places: how many ranks there can be at most; 0: ep_size.
    """

    def __init__(
        self, ep_size: int, *, max_running: int, max_queued: int, patience_s: float, clock: Callable[[], float],
        metrics: Metrics, places: int = 0,
    ) -> None:  # fmt: skip
        self.roster = Roster(ep_size, places)
        self.metrics = metrics
        self._max_running, self._max_queued, self._patience_s = max_running, max_queued, patience_s
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self._ledger = Ledger()
        self._held: dict[str, Flight] = {}
        self._effects: list[Effect] = []
        self._closed = ""
        self._troubled_since: float | None = None
        self._moved = 0
        self._report_by: float | None = None
        self._mute_epoch = -1
        self._told_epoch = 0

    # --- the client's side

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def held(self) -> int:
        return len(self._held)

    def why_not_ready(self) -> str:
        """Why new requests should go elsewhere; empty when they are welcome."""
        if self._closed:
            return self._closed
        why = self.roster.why_not_serving()
        if not why and not self.roster.taking():
            return "every rank is paused by an operator"
        return why

    def submit(self, requests: list[Request]) -> None:
        """Take all of these or none. Raises Unavailable or QueueFull. LOCAL."""
        why = self._closed or self.roster.why_not_serving()
        if why:
            self.metrics.refused("unavailable")
            raise Unavailable(f"the service cannot take requests now: {why}")
        limit = self._max_queued + self._max_running * len(self.roster.serving())
        if len(self._flights) + len(requests) > limit:
            self.metrics.refused("queue_full")
            raise QueueFull(f"{len(self._flights)} requests are in flight and {limit} may be: try again later")
        for request in requests:
            assert request.request_id not in self._flights, f"{request.request_id} is in flight already"
            flight = Flight(request, self._clock())
            self._flights[request.request_id] = flight
            self._place(flight)
        self.metrics.held(len(self._held))

    def release(self, request_id: str) -> bool:
        """The client needs no more of it, or is gone. False when it had ended already. LOCAL."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        self._drop(flight, abort=True)
        return True

    def abort(self, groups: Iterable[str] | None = None) -> list[str]:
        """End the calls named (None: all) as an operator; their clients get what there is. Returns the names found."""
        wanted = None if groups is None else set(groups)
        flights = [f for f in self._flights.values() if wanted is None or f.request.group in wanted]
        for flight in flights:
            self._drop(flight, abort=True)
            request = flight.request
            index = len(flight.output_ids)
            end = m.TokenOut(request.request_id, flight.attempt, index, -1, finish_reason="abort")
            request.sink.token(end)
        return sorted({f.request.group for f in flights})

    def close(self, reason: str) -> None:
        """Take no more requests; those in flight go on. LOCAL."""
        self._closed = reason

    def fail_all(self, reason: str) -> None:
        """End everything in flight with an error. LOCAL."""
        for flight in list(self._flights.values()):
            self._fail(flight, Unavailable(reason))

    def take(self) -> list[Effect]:
        """What is to be done since the last call, in order. LOCAL."""
        effects, self._effects = self._effects, []
        return effects

    def pause(self, rank: int | None, *, paused: bool) -> list[int]:
        """An operator pauses a rank (None: all), or has it go on; whoever comes to run it later, too. Returns the ranks
        that live and were told. LOCAL."""
        self.roster.order(rank, paused=paused)
        told = [record.identity for record in self.roster.living() if rank in (None, record.identity.rank)]
        for identity in told:
            self._effects.append(ToRank(identity, m.Pause() if paused else m.Resume()))
        self._place_held()  # all that go on get their part, whoever is the first to say that it does
        self._gauge()
        return [identity.rank for identity in told]

    # --- the hands of `server.scaling`

    def requests_on(self, identity: Identity) -> int:
        """How many requests one identity has. LOCAL."""
        return len(self._ledger.of(identity))

    def hand_over(self, identity: Identity) -> None:
        """Give what a living rank has to others, which go on after the tokens that the clients have. LOCAL."""
        for flight in self._ledger.of(identity):
            self._effects.append(ToRank(identity, m.Abort(request_id=flight.request.request_id)))
        self._move([identity])

    def tell(self, message: m.ToWorker | m.ToLauncher, to: Identity | None = None) -> None:
        """Have a message sent, after all that was to be sent before it. `to` None: to the launcher. LOCAL."""
        if isinstance(message, m.ToWorker):
            assert to is not None
            self._effects.append(ToRank(to, message))
        else:
            self._effects.append(ToLauncher(message))

    # --- the ranks' side

    def handle(self, message: m.ToServer) -> None:
        """Hear a worker or the launcher. LOCAL."""
        match message:
            case m.Stepped():
                self._stepped(message)
            case m.Spawned() | m.Died() | m.GivenUp() | m.HostState() | m.VaultState():
                self._hear_launcher(message)
            case m.Adopted():
                self._adopted(message)
            case m.Suspected():
                self.roster.suspected(message)
            case m.Recovered():
                if self.roster.current(message.rank, message.incarnation) and self.roster.recovered(message):
                    self._close_tally("complete")
            case m.Balance():
                self._balanced(message)
            case m.CannotServe():
                self.roster.cannot_serve(message)
                self._tell_view(message.epoch, message.members, serving=False)
                if message.epoch > self._mute_epoch and not self.roster.serving():
                    self._mute_epoch = message.epoch
                    self.metrics.recoveries.labels("failure", "cannot_serve").inc()
            case m.Paused():
                self.roster.paused(message)
            case m.Rejected():
                self._rejected(message)
            case m.Knock():
                self._pass_on(message)
        self._gauge()

    def expire(self) -> None:
        """Do what is due by the clock: to be called a few times a second. LOCAL."""
        now = self._clock()
        if self._report_by is not None and now >= self._report_by:
            self._close_tally("partial")
        states = self.roster.states()
        if {"healthy", "paused", "leaving"} & set(states) or not self._flights:
            self._troubled_since = None
        elif self._troubled_since is None:
            self._troubled_since = now
        elif now - self._troubled_since >= self._patience_s:
            why = self.roster.why_not_serving() or "the ranks did not recover"
            self.fail_all(f"no rank could serve for {self._patience_s:.0f} s: {why}")

    def undeliverable(self, identity: Identity, message: m.ToWorker) -> None:
        """A message could not even be queued for its rank. LOCAL."""
        flight = self._flights.get(message.request_id) if isinstance(message, m.Submit) else None
        if flight is not None and flight.at == identity:
            self._fail(flight, Unavailable(f"rank {identity.rank} takes no messages"))

    # --- placing

    def _place(self, flight: Flight) -> None:
        identity = self._ledger.choose(self.roster.taking())
        if identity is None:
            flight.at = None
            self._held[flight.request.request_id] = flight
            return
        self._held.pop(flight.request.request_id, None)
        self._ledger.give(identity, flight)
        if not flight.submitted:
            flight.submitted = True
            self.metrics.queue_time.observe(self._clock() - flight.arrived_at)
        sampling = flight.request.sampling
        if flight.has_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        submit = m.Submit(
            request_id=flight.request.request_id, attempt=flight.attempt, prompt_ids=flight.request.prompt_ids,
            sampling=sampling, output_ids=list(flight.output_ids),
        )  # fmt: skip
        self._effects.append(ToRank(identity, submit))

    def _place_held(self) -> None:
        if self._held and self.roster.taking():
            for flight in list(self._held.values()):
                self._place(flight)

    def _move(self, lost: Iterable[Identity]) -> None:
        """Give every request of the lost to somebody else, under the next attempt."""
        for identity in lost:
            for flight in self._ledger.take_all(identity):
                flight.attempt += 1
                self.metrics.requests_moved.inc()
                self._moved += 1
                self._place(flight)

    def _drop(self, flight: Flight, *, abort: bool) -> None:
        request_id = flight.request.request_id
        del self._flights[request_id]
        self._held.pop(request_id, None)
        if flight.at is not None:
            self._ledger.take(flight)
            if abort:
                self._effects.append(ToRank(flight.at, m.Abort(request_id=request_id)))

    def _fail(self, flight: Flight, error: RouterError) -> None:
        self._drop(flight, abort=True)
        flight.request.sink.fail(error)

    # --- hearing

    def _stepped(self, message: m.Stepped) -> None:
        record = self.roster.current(message.rank, message.incarnation)
        if record is None:
            return
        record.in_recovery = False  # it would not have stepped
        self.metrics.load(message.rank, message.incarnation, message.load)
        self.metrics.computed_tokens.inc(message.prompt_tokens)
        for report in message.prompt_logprobs:
            self._prompt_report(record.identity, report)
        now = self._clock()
        taken = sum(self._token(record.identity, token, message.epoch, now) for token in message.tokens)
        self.metrics.generation_tokens.inc(taken)

    def _prompt_report(self, sender: Identity, report: m.PromptLogprobs) -> None:
        flight = self._flights.get(report.request_id)
        if flight is None or report.attempt != flight.attempt or flight.at != sender or flight.has_prompt_logprobs:
            return
        flight.has_prompt_logprobs = True
        self._give(flight, lambda: flight.request.sink.prompt_logprobs(report.entries))

    def _token(self, sender: Identity, token: m.TokenOut, epoch: int, now: float) -> bool:
        """Take a token if it is the next one; True when it was."""
        flight = self._flights.get(token.request_id)
        if flight is None or token.attempt != flight.attempt or flight.at != sender:
            return False
        if token.token_id < 0:
            self._drop(flight, abort=False)
            self._give(flight, lambda: flight.request.sink.token(token))
            return False
        if token.index != len(flight.output_ids):
            if token.index > len(flight.output_ids):
                self._gap(flight, token.index)
            return False
        self._time(flight, epoch, now)
        flight.output_ids.append(token.token_id)
        if token.finish_reason is not None:
            self._drop(flight, abort=False)
        if self._give(flight, lambda: flight.request.sink.token(token)):
            self.release(token.request_id)
        return True

    def _give(self, flight: Flight, deliver: Callable[[], object]) -> object:
        """Call a sink. One that raises loses its request, not the service."""
        try:
            return deliver()
        except Exception as error:
            log.exception("request %s fails", flight.request.request_id)
            self.release(flight.request.request_id)
            flight.request.sink.fail(RequestBroken(f"internal error: {type(error).__name__}"))
            return False

    def _time(self, flight: Flight, epoch: int, now: float) -> None:
        through = 0 < flight.disturbed <= epoch
        if flight.output_ids:
            gap = now - flight.last_token_at
            self.metrics.itl.observe(gap)
            if through:
                self.metrics.stall.observe(gap)
        else:
            self.metrics.ttft.observe(now - flight.arrived_at)
            self.metrics.prompt_tokens.inc(len(flight.request.prompt_ids))
        if through:
            flight.disturbed = 0
        flight.last_token_at = now

    def _gap(self, flight: Flight, index: int) -> None:
        """A token before this one never came: have the rank start anew after what the client has."""
        flight.gaps += 1
        request_id = flight.request.request_id
        log.error("request %s: token %d came before %d", request_id, index, len(flight.output_ids))
        if flight.gaps > MAX_GAPS:
            self._fail(flight, RequestBroken("tokens were lost on the way"))
            return
        assert flight.at is not None
        self._effects.append(ToRank(flight.at, m.Abort(request_id=request_id)))
        self._ledger.take(flight)
        flight.attempt += 1
        self._place(flight)

    def _balanced(self, message: m.Balance) -> None:
        if self.roster.current(message.rank, message.incarnation) is not None:
            now = self.roster.balanced(message)
            self.metrics.balance(message.moves, now.replicas, now.balancedness)

    def _rejected(self, message: m.Rejected) -> None:
        flight = self._flights.get(message.request_id)
        if (
            flight is not None
            and flight.attempt == message.attempt
            and flight.at == (message.rank, message.incarnation)
            and self.roster.current(message.rank, message.incarnation) is not None
        ):
            self._drop(flight, abort=False)
            flight.request.sink.fail(RankRefused(message.reason))

    def _hear_launcher(self, message: m.Spawned | m.Died | m.GivenUp | m.HostState | m.VaultState) -> None:
        match message:
            case m.Spawned():
                self._spawned(message)
            case m.Died():
                self._died(message)
            case m.GivenUp():
                self.roster.given_up(message)
            case m.HostState():
                self._hear_host(message)
            case m.VaultState():
                self.roster.vaults[message.node_rank] = message
                self.metrics.vaults(self.roster.vaults_within_reach())

    def _spawned(self, message: m.Spawned) -> None:
        known = self._known()
        record, lost = self.roster.meet(Identity(message.rank, message.incarnation))
        if record is not None:
            record.pid, record.host = message.pid, message.host
        self._change(known, lost)

    def _died(self, message: m.Died) -> None:
        known = self._known()
        self._bury(known, self.roster.died(message), [Identity(message.rank, message.incarnation)])

    def _hear_host(self, message: m.HostState) -> None:
        """All ranks of a lost host are lost before any request moves, so that none moves from one to another."""
        known = self._known()
        lost = self.roster.host_state(message)
        self._bury(known, lost, [Identity(*name) for name in message.lost])
        self.metrics.hosts_alive.set(sum(host.state == "alive" for host in self.roster.hosts.values()))
        self.metrics.vaults(self.roster.vaults_within_reach())

    def _bury(self, known: set[Identity], lost: list[Identity], named: Iterable[Identity]) -> None:
        """After deaths, of which `lost` were news."""
        for identity in named:
            late = self.roster.records.get(identity.rank)
            if late is not None and late.dead and late.identity == identity and identity not in lost:
                self._count(late)  # evicted before the launcher could say why
        was_member = any(i in self.roster.members for i in lost)
        self._change(known, lost)
        if was_member:
            self._disturb(self.roster.epoch + 1)
        if self.roster.all_reported():
            self._close_tally("complete")

    def _pass_on(self, knock: m.Knock) -> None:
        """A newcomer cannot reach the members of other hosts by itself. Which of the living are members of a view that
        cannot be served is not known here, and these, too, wait for it."""
        for record in self.roster.records.values():
            if not record.dead and record.identity.rank != knock.rank:
                self._effects.append(ToRank(record.identity, knock))

    def _adopted(self, message: m.Adopted) -> None:
        identity = Identity(message.rank, message.incarnation)
        known = self._known()
        record, lost = self.roster.meet(identity)
        if record is None:
            return
        newer = message.epoch > self.roster.epoch
        if newer and self.roster.tally is not None:
            self._close_tally("superseded")
        lost += self.roster.adopted(message)
        self._change(known, lost)
        self._tell_view(message.epoch, message.members, serving=True)
        if newer:
            self._disturb(self.roster.epoch)
            if self.roster.tally is not None:
                self._report_by = self._clock() + REPORT_PATIENCE_S
        self._place_held()

    def _tell_view(self, epoch: int, members: list[m.MemberInfo], *, serving: bool) -> None:
        """The launcher hears of each view once, also of one that cannot serve: a rank that it evicted is replaced."""
        if members and epoch > self._told_epoch:
            self._told_epoch = epoch
            self._effects.append(NewView(epoch, tuple(Identity(i.rank, i.incarnation) for i in members), serving))

    def _change(self, known: set[Identity], lost: list[Identity]) -> None:
        """After any change of who is there: meet the new, leave the lost, move what they had."""
        for identity in sorted(self._known() - known):
            self._effects.append(Connect(identity))
            if self.roster.is_to_pause(identity.rank):
                self._effects.append(ToRank(identity, m.Pause()))
        for identity in lost:
            self._effects.append(Disconnect(identity))
            self.metrics.gone(*identity)
            record = self.roster.records.get(identity.rank)
            if record is not None and record.identity == identity:
                if record.cause != "notice":
                    self._count(record)
            else:  # a newer incarnation took its place before anybody said that it had died
                self._count(RankRecord(identity, cause="exit"))
        self._move(lost)
        if self.roster.tally is not None:
            self.roster.tally.requests_moved += self._moved
            self._moved = 0

    def _count(self, record: RankRecord) -> None:
        if not record.counted and record.cause != "left":  # nothing is lost with one that was asked to end
            record.counted = True
            self.metrics.rank_failures.labels(record.cause).inc()
            self._effects.append(Lost(record.identity, record.cause, record.detail))

    def _known(self) -> set[Identity]:
        return {r.identity for r in self.roster.records.values()}

    def _disturb(self, epoch: int) -> None:
        for flight in self._flights.values():
            flight.disturbed = epoch

    def _close_tally(self, outcome: str) -> None:
        tally, self.roster.tally, self._report_by = self.roster.tally, None, None
        if tally is not None:
            recovery = tally.recovery(outcome)
            self.roster.remember(recovery)
            self.metrics.recovered(recovery)
            self._effects.append(Report(recovery))

    def _gauge(self) -> None:
        self.metrics.held(len(self._held))
        self.metrics.ranks_alive.set(self.roster.alive)
        self.metrics.view_epoch.set(self.roster.epoch)
