"""The router, driven by messages alone: no socket, no task, a clock that stands still unless told."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from phalanx import messages as m
from phalanx.observe.metrics import Metrics
from phalanx.server.flight import (
    Connect,
    Disconnect,
    Effect,
    QueueFull,
    RankRefused,
    Report,
    Request,
    RequestBroken,
    RouterError,
    ToRank,
    Unavailable,
)
from phalanx.server.roster import Identity
from phalanx.server.router import Router


def truth(prompt_ids: list[int], index: int) -> int:
    return (sum(prompt_ids) * 31 + index * 7) % 997


@dataclass
class Stream:
    """A client: insists on every index once, in order, with the right token."""

    prompt_ids: list[int]
    wants: int = 10**9
    tokens: list[int] = field(default_factory=list)
    reports: list[list[list[m.Logprob]]] = field(default_factory=list)
    ended: str | None = None
    error: RouterError | None = None

    def prompt_logprobs(self, entries: list[list[m.Logprob]]) -> None:
        assert not self.tokens, "the prompt's report comes before the first token"
        self.reports.append(entries)

    def token(self, token: m.TokenOut) -> bool:
        assert self.ended is None, "nothing comes after the end"
        assert self.error is None, "nothing comes after an error"
        if token.token_id >= 0:
            assert token.index == len(self.tokens), "each index once, in order"
            assert token.token_id == truth(self.prompt_ids, token.index), "a token that nobody committed"
            self.tokens.append(token.token_id)
        self.ended = token.finish_reason
        if len(self.tokens) >= self.wants:
            self.ended = "enough"
        return self.ended is not None

    def fail(self, error: RouterError) -> None:
        assert self.ended is None
        self.error = error


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A router with its clock, and the messages that tests send most."""

    def __init__(self, ranks: int = 3, **options: float) -> None:
        self.clock = Clock()
        self.metrics = Metrics("m")
        settings = {"max_running": 8, "max_queued": 4, "patience_s": 30.0} | options
        self.router = Router(ranks, clock=self.clock, metrics=self.metrics, **settings)  # type: ignore[arg-type]
        self.epoch = 0
        self.sent: list[Effect] = []
        self.count = 0

    def meet(self, *identities: tuple[int, int], trigger: m.Trigger = "start", **more: object) -> None:
        """All of these adopt the next view."""
        self.epoch += 1
        for identity in identities:
            self.adopted(identity, identities, trigger, **more)

    def adopted(
        self, by: tuple[int, int], members: tuple[tuple[int, int], ...], trigger: m.Trigger = "failure",
        causes: dict[int, str] | None = None, lost: tuple[int, ...] = (), left: tuple[int, ...] = (),
        ranks_needed: int = 1,
    ) -> None:  # fmt: skip
        infos = [m.MemberInfo(r, i, 100 + r, "localhost", "cpu") for r, i in members]
        self.hear(
            m.Adopted(rank=by[0], incarnation=by[1], epoch=self.epoch, members=infos, trigger=trigger,
                      lost=list(lost), causes=causes or {}, left=list(left), ranks_needed=ranks_needed)
        )  # fmt: skip

    def hear(self, message: m.ToServer) -> None:
        self.router.handle(message)
        self.sent += self.router.take()

    def submit(self, *prompt: int, sampling: m.SamplingParams | None = None, wants: int = 10**9) -> Stream:
        self.count += 1
        stream = Stream(list(prompt) or [self.count], wants)
        sampling = sampling or m.SamplingParams(max_tokens=5)
        self.router.submit([Request(f"r{self.count}", f"g{self.count}", stream.prompt_ids, sampling, stream)])
        self.sent += self.router.take()
        return stream

    def to(self, rank: int, incarnation: int = 0) -> list[m.ToWorker]:
        """What was sent to one identity."""
        return [e.message for e in self.sent if isinstance(e, ToRank) and e.identity == (rank, incarnation)]

    def submits(self) -> list[tuple[int, m.Submit]]:
        """Every Submit sent, with its rank."""
        return [
            (e.identity.rank, e.message) for e in self.sent if isinstance(e, ToRank) and isinstance(e.message, m.Submit)
        ]

    def last(self, request_id: str) -> tuple[int, m.Submit]:
        return [(r, s) for r, s in self.submits() if s.request_id == request_id][-1]

    def token(
        self, rank: int, submit: m.Submit, index: int, *, incarnation: int = 0,
        finish: m.FinishReason | None = None, epoch: int | None = None, attempt: int | None = None,
    ) -> None:  # fmt: skip
        attempt = submit.attempt if attempt is None else attempt
        token = m.TokenOut(submit.request_id, attempt, index, truth(submit.prompt_ids, index), finish)
        self.hear(m.Stepped(rank=rank, incarnation=incarnation, epoch=epoch or self.epoch, step=1, tokens=[token]))

    def died(self, rank: int, incarnation: int = 0, cause: str = "signal") -> None:
        self.hear(m.Died(rank=rank, incarnation=incarnation, cause=cause))

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.meet((0, 0), (1, 0), (2, 0))
    return desk


# --- placing


def test_requests_spread_evenly_over_the_ranks(desk: Desk) -> None:
    for _ in range(9):
        desk.submit()
    assert sorted(rank for rank, _ in desk.submits()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_requests_one_after_the_other_take_turns(desk: Desk) -> None:
    for _ in range(3):
        desk.submit()
        rank, submit = desk.submits()[-1]
        desk.token(rank, submit, 0, finish="length")
    assert sorted(rank for rank, _ in desk.submits()) == [0, 1, 2]


def test_a_suspect_gets_no_new_requests_while_others_are_there(desk: Desk) -> None:
    desk.hear(m.Suspected(rank=0, incarnation=0, suspects=[1], epoch=1))
    for _ in range(4):
        desk.submit()
    assert {rank for rank, _ in desk.submits()} == {0, 2}


def test_nothing_is_taken_before_the_ranks_have_met() -> None:
    desk = Desk()
    desk.hear(m.Spawned(rank=0, incarnation=0, pid=1))
    with pytest.raises(Unavailable, match="starting"):
        desk.submit()
    assert desk.router.why_not_ready() == "the ranks are starting"


def test_the_queue_is_bounded_and_all_choices_of_a_call_fit_or_none(desk: Desk) -> None:
    for _ in range(3 * 8 + 3):
        desk.submit()
    two = [
        Request(f"pair-{i}", "pair", [1], m.SamplingParams(max_tokens=1), Stream([1])) for i in range(2)
    ]  # fmt: skip
    with pytest.raises(QueueFull):
        desk.router.submit(two)
    assert desk.router.in_flight == 27
    desk.submit()
    with pytest.raises(QueueFull):
        desk.submit()
    assert desk.value("phalanx_requests_refused_total", model_name="m", reason="queue_full") == 2


def test_a_message_before_the_launchers_introduction_is_an_introduction() -> None:
    desk = Desk()
    desk.meet((0, 0), (1, 0))
    assert [e.identity for e in desk.sent if isinstance(e, Connect)] == [(0, 0), (1, 0)]
    desk.hear(m.Spawned(rank=0, incarnation=0, pid=77))
    assert len([e for e in desk.sent if isinstance(e, Connect)]) == 2
    assert desk.router.roster.status()["ranks"][0]["pid"] == 77


# --- tokens


def test_a_token_is_taken_once_in_order_from_its_own_rank_and_attempt(desk: Desk) -> None:
    stream = desk.submit()
    rank, submit = desk.submits()[0]
    desk.token(rank, submit, 0)
    desk.token(rank, submit, 0)
    desk.token((rank + 1) % 3, submit, 1)
    desk.token(rank, submit, 1, attempt=7)
    desk.token(rank, submit, 1, incarnation=3)
    assert len(stream.tokens) == 1
    desk.token(rank, submit, 1)
    assert len(stream.tokens) == 2
    assert desk.value("phalanx_generation_tokens_total", model_name="m") == 2


def test_a_token_that_never_came_is_computed_again(desk: Desk) -> None:
    stream = desk.submit()
    rank, submit = desk.submits()[0]
    desk.token(rank, submit, 0)
    desk.token(rank, submit, 2)
    rank, again = desk.last("r1")
    assert (again.attempt, again.output_ids) == (1, stream.tokens)
    desk.token(rank, again, 1)
    assert len(stream.tokens) == 2


def test_a_request_whose_tokens_keep_vanishing_fails_in_the_end(desk: Desk) -> None:
    stream = desk.submit()
    for _ in range(4):
        rank, submit = desk.last("r1")
        desk.token(rank, submit, 3)
    assert isinstance(stream.error, RequestBroken)
    assert desk.router.in_flight == 0


def test_a_client_that_has_enough_ends_its_request_on_the_rank(desk: Desk) -> None:
    desk.submit(wants=1)
    rank, submit = desk.submits()[0]
    desk.token(rank, submit, 0)
    assert desk.to(rank)[-1] == m.Abort(request_id="r1")
    assert desk.router.in_flight == 0


def test_a_request_that_had_enough_is_not_moved_when_its_rank_dies(desk: Desk) -> None:
    desk.submit(wants=1)
    rank, submit = desk.submits()[0]
    desk.token(rank, submit, 0)
    desk.died(rank)
    assert len(desk.submits()) == 1
    assert desk.value("phalanx_requests_moved_total") == 0


def test_a_client_that_goes_away_ends_its_request_on_the_rank(desk: Desk) -> None:
    desk.submit()
    rank, _ = desk.submits()[0]
    assert desk.router.release("r1")
    assert not desk.router.release("r1")
    assert desk.router.take() == [ToRank(Identity(rank, 0), m.Abort(request_id="r1"))]


def test_an_operator_can_end_one_call_or_all(desk: Desk) -> None:
    streams = [desk.submit() for _ in range(3)]
    assert desk.router.abort(["g2", "unknown"]) == ["g2"]
    assert [s.ended for s in streams] == [None, "abort", None]
    assert desk.router.abort() == ["g1", "g3"]
    assert desk.router.in_flight == 0


def test_a_request_that_a_rank_can_never_run_fails(desk: Desk) -> None:
    stream = desk.submit()
    rank, _ = desk.submits()[0]
    desk.hear(m.Rejected(rank=rank, incarnation=0, request_id="r1", attempt=0, reason="too long"))
    assert isinstance(stream.error, RankRefused)
    assert "too long" in str(stream.error)


def test_a_sink_that_raises_loses_its_request_and_nothing_else(desk: Desk) -> None:
    class Broken(Stream):
        def token(self, token: m.TokenOut) -> bool:
            raise ZeroDivisionError

    broken = Broken([1])
    desk.router.submit([Request("b", "b", [1], m.SamplingParams(max_tokens=5), broken)])
    desk.sent += desk.router.take()
    healthy = desk.submit()
    for rank, submit in desk.submits():
        desk.token(rank, submit, 0)
    assert isinstance(broken.error, RequestBroken)
    assert len(healthy.tokens) == 1


# --- deaths


def test_the_requests_of_a_dead_rank_move_at_once_with_the_tokens_that_clients_have(desk: Desk) -> None:
    streams = [desk.submit() for _ in range(6)]
    mine = [s for r, s in desk.submits() if r == 2]
    for submit in mine:
        desk.token(2, submit, 0)
    desk.died(2)
    moved = [(r, s) for r, s in desk.submits() if s.attempt == 1]
    assert sorted(r for r, _ in moved) == [0, 1]
    assert all(s.output_ids == [truth(s.prompt_ids, 0)] for _, s in moved)
    desk.token(2, mine[0], 1)
    assert sum(len(s.tokens) for s in streams) == 2
    assert desk.value("phalanx_requests_moved_total") == 2
    assert desk.value("phalanx_rank_failures_total", cause="signal") == 1
    assert Disconnect(Identity(2, 0)) in desk.sent


def test_a_rank_that_the_others_left_behind_loses_its_requests_and_is_not_heard(desk: Desk) -> None:
    stream = [desk.submit() for _ in range(3)]
    rank, submit = next((r, s) for r, s in desk.submits() if r == 1)
    desk.meet((0, 0), (2, 0), trigger="failure", causes={1: "timeout"})
    _, moved = desk.last(submit.request_id)
    assert moved.attempt == 1
    desk.token(rank, submit, 0)
    desk.token(rank, submit, 0, attempt=1)
    assert not any(s.tokens for s in stream)
    assert desk.router.roster.state(1) == "dead"
    assert desk.value("phalanx_rank_failures_total", cause="timeout") == 1
    desk.died(1, cause="evicted")
    assert desk.value("phalanx_rank_failures_total", cause="evicted") == 0


def test_a_death_that_a_notice_told_first_is_counted_once_with_the_launchers_cause(desk: Desk) -> None:
    desk.meet((0, 0), (2, 0), trigger="failure", causes={1: "notice"})
    assert desk.value("phalanx_rank_failures_total", cause="notice") == 0
    desk.died(1, cause="signal")
    assert desk.value("phalanx_rank_failures_total", cause="signal") == 1
    assert desk.router.roster.state(0) == "healthy", "the view without it is already adopted"


def test_when_nobody_lives_requests_are_held_until_somebody_does(desk: Desk) -> None:
    streams = [desk.submit() for _ in range(3)]
    for rank in range(3):
        desk.died(rank)
    assert desk.router.held == 3
    with pytest.raises(Unavailable, match="no rank is alive"):
        desk.submit()
    desk.hear(m.Spawned(rank=0, incarnation=1, pid=9))
    assert desk.router.held == 3
    desk.meet((0, 1), trigger="join")
    assert desk.router.held == 0
    for submit in [x for x in desk.to(0, 1) if isinstance(x, m.Submit)]:
        desk.token(0, submit, 0, incarnation=1)
    assert [len(s.tokens) for s in streams] == [1, 1, 1]


def test_requests_that_arrive_during_a_recovery_are_queued_on_a_survivor(desk: Desk) -> None:
    desk.died(1)
    assert desk.router.roster.states() == ["recovering", "dead", "recovering"]
    assert desk.router.why_not_ready() == ""
    desk.submit()
    assert desk.submits()[-1][0] in (0, 2)


def test_those_in_flight_get_an_error_when_no_rank_serves_for_too_long(desk: Desk) -> None:
    stream = desk.submit()
    for rank in range(3):
        desk.hear(m.CannotServe(rank=rank, incarnation=0, epoch=1, reason="2 ranks are alive, serving needs 3"))
    with pytest.raises(Unavailable, match="serving needs 3"):
        desk.submit()
    desk.router.expire()
    desk.clock.now += 29
    desk.router.expire()
    assert stream.error is None
    desk.clock.now += 2
    desk.router.expire()
    assert isinstance(stream.error, Unavailable)
    assert "serving needs 3" in str(stream.error)
    assert desk.router.in_flight == 0


def test_ranks_that_cannot_serve_without_a_dead_one_are_believed_before_its_death_is_told(desk: Desk) -> None:
    left = [m.MemberInfo(rank=rank, incarnation=0, pid=1, host="h", device="cpu") for rank in (0, 1)]
    for rank in (0, 1):
        desk.hear(m.CannotServe(rank=rank, incarnation=0, epoch=2, reason="experts lost", members=left))
    with pytest.raises(Unavailable, match="experts lost"):
        desk.submit()
    desk.hear(m.Died(rank=2, incarnation=0, cause="signal"))
    with pytest.raises(Unavailable, match="experts lost"):
        desk.submit()


def test_a_service_that_recovers_in_time_fails_nobody(desk: Desk) -> None:
    stream = desk.submit()
    for rank in range(3):
        desk.hear(m.CannotServe(rank=rank, incarnation=0, epoch=1, reason="experts lost"))
    desk.router.expire()
    desk.clock.now += 29
    desk.meet((0, 0), (1, 0), (2, 0), trigger="operator")
    desk.router.expire()
    desk.clock.now += 29
    desk.router.expire()
    assert stream.error is None


def test_a_prompt_report_that_was_received_is_not_asked_for_again(desk: Desk) -> None:
    stream = desk.submit(1, 2, sampling=m.SamplingParams(max_tokens=5, prompt_logprobs=1))
    rank, submit = desk.submits()[0]
    report = m.PromptLogprobs(submit.request_id, 0, [[m.Logprob(2, -1.0, 1)]])
    for _ in range(2):
        desk.hear(m.Stepped(rank=rank, incarnation=0, epoch=1, step=1, tokens=[], prompt_logprobs=[report]))
    desk.died(rank)
    _, moved = desk.last("r1")
    assert moved.sampling.prompt_logprobs is None
    assert len(stream.reports) == 1


def test_a_prompt_report_that_is_missing_is_asked_for_again(desk: Desk) -> None:
    desk.submit(1, 2, sampling=m.SamplingParams(max_tokens=5, prompt_logprobs=1))
    desk.died(desk.submits()[0][0])
    assert desk.last("r1")[1].sampling.prompt_logprobs == 1


def test_the_seed_of_a_request_moves_with_it(desk: Desk) -> None:
    desk.submit(sampling=m.SamplingParams(max_tokens=5, seed=1234))
    desk.died(desk.submits()[0][0])
    assert desk.last("r1")[1].sampling.seed == 1234


def test_the_gap_that_a_recovery_made_is_a_stall_and_no_other_gap_is(desk: Desk) -> None:
    desk.submit()
    rank, submit = desk.submits()[0]
    desk.token(rank, submit, 0)
    desk.clock.now += 5
    desk.token(rank, submit, 1)
    assert desk.value("phalanx_stream_stall_seconds_count") == 0
    desk.died((rank + 1) % 3)
    desk.clock.now += 0.25
    desk.token(rank, submit, 2, epoch=1)  # committed before the death, late on the way
    assert desk.value("phalanx_stream_stall_seconds_count") == 0
    desk.clock.now += 0.5
    desk.meet(*[(r, 0) for r in range(3) if r != (rank + 1) % 3], trigger="failure")
    desk.token(rank, submit, 3)
    assert desk.value("phalanx_stream_stall_seconds_count") == 1
    assert desk.value("phalanx_stream_stall_seconds_sum") == pytest.approx(0.5)


def test_whoever_comes_to_a_paused_rank_is_paused_until_it_is_told_to_go_on(desk: Desk) -> None:
    def told(rank: int, incarnation: int) -> list[m.ToWorker]:
        sent = [e.message for e in desk.sent if isinstance(e, ToRank) and e.identity == (rank, incarnation)]
        return [message for message in sent if isinstance(message, m.Pause | m.Resume)]

    def back(rank: int, incarnation: int) -> None:
        desk.hear(m.Died(rank=rank, incarnation=incarnation - 1, cause="signal"))
        desk.hear(m.Spawned(rank=rank, incarnation=incarnation, pid=1))
        members = {r.identity for r in desk.router.roster.living()}
        desk.meet(*sorted(members), trigger="join")

    assert desk.router.pause(None, paused=True) == [0, 1, 2]
    for rank in range(3):
        desk.hear(m.Paused(rank=rank, incarnation=0, paused=True))
    back(1, 1)
    assert told(1, 1) == [m.Pause()]
    assert desk.router.roster.state(1) == "paused"
    stream = desk.submit()
    assert desk.router.pause(1, paused=False) == [1]
    desk.sent += desk.router.take()
    assert told(1, 1) == [m.Pause(), m.Resume()]
    desk.hear(m.Paused(rank=1, incarnation=1, paused=False))
    assert [e.identity for e in desk.sent if isinstance(e, ToRank) and isinstance(e.message, m.Submit)] == [(1, 1)]
    back(1, 2)
    assert told(1, 2) == []
    back(2, 1)
    assert told(2, 1) == [m.Pause()]
    desk.router.pause(None, paused=False)
    back(0, 1)
    assert told(0, 1) == []
    assert stream.error is None


def test_paused_ranks_get_nothing_and_held_requests_start_when_one_goes_on(desk: Desk) -> None:
    desk.router.pause(None, paused=True)
    assert "paused" in desk.router.why_not_ready()
    desk.submit()
    assert desk.router.held == 1
    for rank in range(3):
        desk.hear(m.Paused(rank=rank, incarnation=0, paused=True))
    desk.router.pause(1, paused=False)
    desk.hear(m.Paused(rank=1, incarnation=0, paused=False))
    assert desk.submits()[-1][0] == 1
    assert desk.router.roster.states() == ["paused", "healthy", "paused"]


def test_what_was_held_is_spread_over_all_that_go_on_whoever_says_so_first(desk: Desk) -> None:
    desk.router.pause(None, paused=True)
    for _ in range(6):
        desk.submit()
    for rank in range(3):
        desk.hear(m.Paused(rank=rank, incarnation=0, paused=True))
    assert desk.submits() == []
    desk.router.pause(None, paused=False)
    desk.hear(m.Paused(rank=2, incarnation=0, paused=False))
    assert sorted(rank for rank, _ in desk.submits()) == [0, 0, 1, 1, 2, 2]
    told = [type(e.message) for e in desk.sent if isinstance(e, ToRank) and e.identity.rank == 0]
    assert told == [m.Pause, m.Resume, m.Submit, m.Submit], "it goes on before it gets anything"


def test_a_closed_router_takes_nothing_but_lets_streams_end(desk: Desk) -> None:
    stream = desk.submit()
    desk.router.close("the server is shutting down")
    with pytest.raises(Unavailable, match="shutting down"):
        desk.submit()
    rank, submit = desk.submits()[0]
    desk.token(rank, submit, 0, finish="length")
    assert stream.ended == "length"


# --- the story of a recovery


def recovered(rank: int, epoch: int, detect: float, peer: int, lost: list[int]) -> m.Recovered:
    seconds = m.PhaseSeconds(detect=detect, total=detect + 0.01)
    return m.Recovered(rank=rank, incarnation=0, epoch=epoch, trigger="failure", lost=lost, seconds=seconds,
                       bytes_restored={"peer": peer}, seconds_restored={"peer": 0.25}, steps_replayed=1)  # fmt: skip


def test_a_recovery_is_the_slowest_rank_by_phase_and_the_sum_of_bytes(desk: Desk) -> None:
    for _ in range(3):
        desk.submit()
    desk.died(2)
    desk.meet((0, 0), (1, 0), trigger="failure", lost=(2,), causes={2: "notice"})
    desk.hear(recovered(0, 2, 0.010, 100, [2]))
    assert desk.router.roster.last_recovery is not None
    assert desk.router.roster.last_recovery.outcome == "partial"
    desk.hear(recovered(1, 2, 0.004, 50, [2]))
    last = desk.router.roster.status()["last_recovery"]
    assert set(last) == {
        "trigger", "lost", "joined", "left", "epoch", "seconds", "bytes_restored", "seconds_restored", "requests_moved",
        "first_step", "pace",
    }  # fmt: skip
    assert (last["trigger"], last["lost"], last["epoch"]) == ("failure", [2], 2)
    assert last["seconds"]["detect"] == 0.010
    assert last["bytes_restored"] == {"peer": 150, "vault": 0, "disk": 0}
    assert last["requests_moved"] == 1
    report = next(e for e in desk.sent if isinstance(e, Report)).recovery
    assert report.summary() == (
        "recovered: lost ranks [2], epoch 1 -> 2, total 0.020 s (detect 0.010, agree 0.000, mask 0.000, replan 0.000, "
        "restore 0.000, replay 0.000), 1 requests moved, 150 bytes from peer at 0.00 GB/s a rank restored"
    )
    assert desk.value("phalanx_recoveries_total", trigger="failure", outcome="complete") == 1
    assert desk.value("phalanx_expert_bytes_restored_total", source="peer") == 150
    assert desk.value("phalanx_expert_restore_seconds_total", source="peer") == 0.5
    assert desk.value("phalanx_steps_replayed_total") == 1


def test_a_recovery_that_another_death_interrupts_is_superseded(desk: Desk) -> None:
    desk.died(2)
    desk.meet((0, 0), (1, 0), trigger="failure", lost=(2,))
    desk.died(1)
    desk.meet((0, 0), trigger="failure", lost=(1,))
    desk.hear(recovered(0, 3, 0.01, 1, [1]))
    outcomes = [e.recovery.outcome for e in desk.sent if isinstance(e, Report)]
    assert outcomes == ["superseded", "complete"]
    assert desk.router.roster.status()["last_recovery"]["epoch"] == 3


def test_a_recovery_whose_last_reporter_dies_is_complete_without_it(desk: Desk) -> None:
    desk.died(2)
    desk.meet((0, 0), (1, 0), trigger="failure", lost=(2,))
    desk.hear(recovered(0, 2, 0.01, 1, [2]))
    desk.died(1)
    assert [e.recovery.outcome for e in desk.sent if isinstance(e, Report)] == ["complete"]


def test_a_recovery_with_a_silent_reporter_is_closed_after_a_while(desk: Desk) -> None:
    desk.died(2)
    desk.meet((0, 0), (1, 0), trigger="failure", lost=(2,))
    desk.hear(recovered(0, 2, 0.01, 1, [2]))
    desk.clock.now += 31
    desk.router.expire()
    assert [e.recovery.outcome for e in desk.router.take() if isinstance(e, Report)] == ["partial"]


def test_a_rebalance_is_reported_and_leaves_the_last_recovery_on_show(desk: Desk) -> None:
    desk.died(2)
    desk.meet((0, 0), (1, 0), trigger="failure", lost=(2,))
    for rank in (0, 1):
        desk.hear(recovered(rank, 2, 0.01, 1, [2]))
    desk.meet((0, 0), (1, 0), trigger="rebalance")
    for rank in (0, 1):
        desk.hear(recovered(rank, 3, 0.0, 0, []))
    reports = [e.recovery for e in desk.sent if isinstance(e, Report)]
    assert [(r.trigger, r.outcome) for r in reports] == [("failure", "complete"), ("rebalance", "complete")]
    last = desk.router.roster.status()["last_recovery"]
    assert (last["trigger"], last["lost"]) == ("failure", [2])


def test_start_up_is_no_recovery_and_a_join_names_who_joined(desk: Desk) -> None:
    assert desk.router.roster.status()["last_recovery"] is None
    desk.died(2)
    desk.meet((0, 0), (1, 0), trigger="failure", lost=(2,))
    desk.hear(m.Spawned(rank=2, incarnation=1, pid=5))
    assert desk.router.roster.state(2) == "rejoining"
    desk.meet((0, 0), (1, 0), (2, 1), trigger="join")
    for rank, incarnation in ((0, 0), (1, 0), (2, 1)):
        desk.hear(m.Recovered(rank=rank, incarnation=incarnation, epoch=3, trigger="join", lost=[],
                              seconds=m.PhaseSeconds(total=0.002), bytes_restored={}, pace=0.0016,
                              first_step=m.StepSeconds(wait=0.001 * (rank + 1))))  # fmt: skip
    report = [e.recovery for e in desk.sent if isinstance(e, Report)][-1]
    assert report.joined == [2]
    assert report.summary().startswith("recovered: ranks [2] rejoined, epoch 2 -> 3, total 0.002 s = 1.25 steps (")
    assert {rank: took.wait for rank, took in report.first_step.items()} == {0: 0.001, 1: 0.002, 2: 0.003}
    assert desk.router.roster.states() == ["healthy"] * 3


def test_ranks_say_what_they_staged_and_the_lowest_one_how_even_it_is(desk: Desk) -> None:
    desk.hear(m.Balance(rank=0, incarnation=0, epoch=1, moves=2, replicas=36, balancedness=0.5))
    desk.hear(m.Balance(rank=1, incarnation=0, epoch=1, moves=3))
    desk.hear(m.Balance(rank=1, incarnation=7, epoch=1, moves=100))  # nobody knows this one
    balance = desk.router.roster.balance
    assert (balance.moves, balance.replicas, balance.balancedness) == (5, 36, 0.5)
    assert desk.value("phalanx_expert_moves_total") == 5
    assert desk.value("phalanx_expert_replicas") == 36
    assert desk.value("phalanx_expert_balancedness") == 0.5


def test_what_was_measured_before_the_last_change_is_not_believed_any_more(desk: Desk) -> None:
    desk.meet((0, 0), (1, 0), (2, 0), trigger="rebalance")
    desk.hear(m.Balance(rank=0, incarnation=0, epoch=2, replicas=36, balancedness=0.9))
    desk.hear(m.Balance(rank=0, incarnation=0, epoch=1, moves=1, replicas=24, balancedness=0.5))
    balance = desk.router.roster.balance
    assert (balance.moves, balance.replicas, balance.balancedness) == (1, 36, 0.9)
    assert desk.value("phalanx_expert_balancedness") == 0.9


def test_a_suspicion_that_proves_false_leaves_everybody_healthy(desk: Desk) -> None:
    desk.hear(m.Suspected(rank=0, incarnation=0, suspects=[1], epoch=1))
    assert desk.router.roster.states() == ["recovering", "suspected", "healthy"]
    desk.meet((0, 0), (1, 0), (2, 0), trigger="failure")
    assert desk.router.roster.states() == ["healthy"] * 3


def test_a_suspicion_that_arrives_after_the_view_that_settled_it_is_old_news(desk: Desk) -> None:
    desk.meet((0, 0), (1, 0), (2, 0), trigger="failure")
    desk.hear(m.Suspected(rank=0, incarnation=0, suspects=[1], epoch=1))
    assert desk.router.roster.states() == ["healthy"] * 3


# --- everything at once


class Storm:
    """Ranks that die, come back, are left behind and talk on as zombies; messages that are late, doubled and reordered
    between senders. Each sender's own messages stay in order, as sockets keep them."""

    def __init__(self, seed: int, ranks: int = 4) -> None:
        self.random = random.Random(seed)
        self.ranks = ranks
        self.clock = Clock()
        self.router = Router(
            ranks, max_running=8, max_queued=100, patience_s=1e9, clock=self.clock, metrics=Metrics("m")
        )
        self.epoch = 0
        self.streams: list[Stream] = []
        self.queues: dict[Identity | str, deque[m.ToServer]] = {"launcher": deque()}
        self.old: list[m.Stepped] = []
        self.work: dict[Identity, dict[str, tuple[m.Submit, int]]] = {}
        self.next_incarnation = [0] * ranks
        for rank in range(ranks):
            self.spawn(rank)
        self.meet("start")

    def spawn(self, rank: int) -> None:
        identity = Identity(rank, self.next_incarnation[rank])
        self.next_incarnation[rank] += 1
        self.queues[identity] = deque()
        self.work[identity] = {}
        self.queues["launcher"].append(m.Spawned(rank=rank, incarnation=identity.incarnation, pid=1))

    def meet(self, trigger: m.Trigger) -> None:
        self.epoch += 1
        members = [m.MemberInfo(i.rank, i.incarnation, 1, "localhost", "cpu") for i in sorted(self.work)]
        for identity in self.work:
            self.queues[identity].append(
                m.Adopted(rank=identity.rank, incarnation=identity.incarnation, epoch=self.epoch, members=members,
                          trigger=trigger)
            )  # fmt: skip

    def step(self, identity: Identity) -> None:
        """One committed step: what it sends is the truth."""
        tokens = []
        for submit, index in list(self.work[identity].values()):
            last = index + 1 == submit.sampling.max_tokens
            token = truth(submit.prompt_ids, index)
            tokens.append(m.TokenOut(submit.request_id, submit.attempt, index, token, "length" if last else None))
            self.work[identity][submit.request_id] = (submit, index + 1)
            if last:
                del self.work[identity][submit.request_id]
        self.queues[identity].append(
            m.Stepped(rank=identity.rank, incarnation=identity.incarnation, epoch=self.epoch, step=1, tokens=tokens)
        )

    def deliver(self) -> None:
        ready = [name for name, queue in self.queues.items() if queue]
        if ready:
            message = self.queues[self.random.choice(ready)].popleft()
            if isinstance(message, m.Stepped):
                self.old.append(message)
            self.router.handle(message)
        self.carry_out()

    def carry_out(self) -> None:
        for effect in self.router.take():
            if isinstance(effect, ToRank) and effect.identity in self.work:
                match effect.message:
                    case m.Submit() as submit:
                        self.work[effect.identity][submit.request_id] = (submit, len(submit.output_ids))
                    case m.Abort(request_id=request_id):
                        self.work[effect.identity].pop(request_id, None)

    def lose(self, identity: Identity, *, told: bool) -> None:
        """told: the launcher saw it die. Else the others leave it behind, and it may talk on."""
        del self.work[identity]
        if told:
            self.queues["launcher"].append(m.Died(rank=identity.rank, incarnation=identity.incarnation, cause="signal"))
        if self.work:
            self.meet("failure")

    def zombie(self) -> None:
        """Somebody known to be gone says what would fit, and is wrong."""
        gone = [i for i in self.queues if isinstance(i, Identity) and self.router.roster.current(*i) is None]
        met = [i for i in gone if i.rank in self.router.roster.records]
        open_streams = [(n, s) for n, s in enumerate(self.streams) if s.ended is None and s.error is None]
        if met and open_streams:
            identity, (number, stream) = self.random.choice(met), self.random.choice(open_streams)
            tokens = [m.TokenOut(f"r{number}", a, len(stream.tokens), 10_000) for a in range(6)]
            self.router.handle(
                m.Stepped(
                    rank=identity.rank, incarnation=identity.incarnation, epoch=self.epoch + 9, step=1, tokens=tokens
                )
            )

    def submit(self) -> None:
        stream = Stream([self.random.randrange(1000) for _ in range(3)], self.random.choice((10**9, 10**9, 4)))
        sampling = m.SamplingParams(max_tokens=self.random.randint(1, 12))
        number = len(self.streams)
        try:
            self.router.submit([Request(f"r{number}", f"r{number}", stream.prompt_ids, sampling, stream)])
        except Unavailable:
            return
        self.streams.append(stream)
        self.carry_out()

    def act(self) -> None:
        roll = self.random.random()
        alive = sorted(self.work)
        if roll < 0.55:
            self.deliver()
        elif roll < 0.80 and alive:
            self.step(self.random.choice(alive))
        elif roll < 0.90:
            self.submit()
        elif roll < 0.93 and alive:
            self.lose(self.random.choice(alive), told=self.random.random() < 0.7 or len(alive) == 1)
        elif roll < 0.95:
            empty = [r for r in range(self.ranks) if all(i.rank != r for i in self.work)]
            if empty:
                self.spawn(self.random.choice(empty))
                self.meet("join")
        elif roll < 0.98 and self.old:
            self.router.handle(self.random.choice(self.old))
        else:
            self.zombie()
        self.carry_out()

    def settle(self) -> None:
        """Let the storm pass: everybody is there, every message arrives."""
        for rank in range(self.ranks):
            if all(i.rank != rank for i in self.work):
                self.spawn(rank)
        self.meet("join")
        for _ in range(2000):
            while any(self.queues.values()):
                self.deliver()
            if not self.router.in_flight:
                return
            for identity in sorted(self.work):
                self.step(identity)


@pytest.mark.parametrize("block", range(5))
def test_in_any_storm_every_stream_gets_each_token_once_in_order_and_ends(block: int) -> None:
    moved = 0.0
    for seed in range(block * 60, block * 60 + 60):
        storm = Storm(seed)
        for _ in range(250):
            storm.act()
        storm.settle()
        assert storm.router.in_flight == 0, f"seed {seed}: {storm.router.in_flight} requests never ended"
        for stream in storm.streams:
            assert stream.error is None, f"seed {seed}: {stream.error}"
            assert stream.ended in ("length", "enough"), f"seed {seed}: {stream.ended}"
        moved += storm.router.metrics.registry.get_sample_value("phalanx_requests_moved_total") or 0
    assert moved > 100, "the storm was no storm"


def test_how_the_vault_is_stands_in_status_and_metrics(desk: Desk) -> None:
    assert desk.router.roster.status()["vault"]["state"] == "off"
    desk.hear(m.VaultState(state="filling", pid=7, filled_bytes=10, total_bytes=40))
    assert desk.router.roster.status()["vault"] == {
        "state": "filling", "pid": 7, "restarts": 0, "filled_bytes": 10, "total_bytes": 40, "reason": "",
    }  # fmt: skip
    for restarts, filled in ((1, 10), (1, 40), (3, 40)):
        desk.hear(m.VaultState(state="full", pid=8, restarts=restarts, filled_bytes=filled, total_bytes=40))
    assert desk.value("phalanx_vault_filled_bytes") == 40
    assert desk.value("phalanx_vault_total_bytes") == 40
    assert desk.value("phalanx_vault_restarts_total") == 3
