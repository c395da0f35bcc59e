"""What a communicator and a notice board say, as one change."""

from __future__ import annotations

from elastic_doubles import Announcements, member

from phalanx.comm.base import Status
from phalanx.elastic.agree import Change
from phalanx.elastic.detect import certainly_dead, change_after, dead_ranks, merged
from phalanx.errors import PeerLost
from phalanx.world import View

VIEW = View(4, 4, tuple(member(r) for r in range(4)))


def test_a_time_out_names_the_silent_rank_and_how_long_it_was_silent() -> None:
    status = Status(frozenset({2}), 0, ((2, "timeout"),), ((2, 2.01),))
    change = change_after(PeerLost((2,)), status, VIEW, Announcements())
    assert change == Change("failure", (2,), {2: "timeout"}, 2.01, 0)


def test_the_launchers_word_on_the_cause_counts_more_than_the_communicators() -> None:
    notices = Announcements()
    notices.announce(2, 0)
    status = Status(frozenset({2}), 0, ((2, "notice"),), ((2, 0.001),))
    assert change_after(PeerLost((2,)), status, VIEW, notices).causes == {2: "signal"}


def test_a_peers_open_roll_call_is_a_change_though_this_rank_misses_nobody() -> None:
    change = change_after(PeerLost((), 5), Status(interrupted=6), VIEW, Announcements())
    assert (change.lost, change.epoch) == ((), 6)


def test_a_death_that_was_only_announced_is_found_too() -> None:
    notices = Announcements()
    notices.announce(1, 0)
    assert dead_ranks(VIEW, notices) == (1,)
    assert change_after(PeerLost(()), Status(), VIEW, notices).lost == (1,)


def test_the_death_of_an_earlier_incarnation_says_nothing_about_this_one() -> None:
    view = View(5, 4, (member(0), member(2, 1)))
    notices = Announcements()
    notices.announce(2, 0)
    assert dead_ranks(view, notices) == ()
    assert certainly_dead(Status(), view, notices) == frozenset()


def test_silence_is_no_proof_of_death_but_an_ended_process_is() -> None:
    status = Status(frozenset({1, 2}), 0, ((1, "timeout"), (2, "notice")), ((1, 2.0), (2, 0.0)))
    assert certainly_dead(status, VIEW, Announcements()) == {member(2)}


def test_trouble_upon_trouble_keeps_the_first_detection_and_all_the_lost() -> None:
    first = Change("failure", (1,), {1: "signal"}, 0.002, 5)
    second = Change("failure", (3,), {3: "timeout", 1: "timeout"}, 2.0, 6)
    assert merged(first, second) == Change("failure", (1, 3), {1: "signal", 3: "timeout"}, 0.002, 6)
    assert merged(None, second) is second


def test_a_loss_during_the_start_is_still_the_start() -> None:
    assert merged(Change("start"), Change("failure", (1,))).trigger == "start"


def test_what_was_noticed_at_once_was_detected_in_no_time_whatever_came_after() -> None:
    told = Change("failure", (), {}, 0.0, 3)  # a peer's roll call: the time-out of the next loss is in other phases
    assert merged(told, Change("failure", (1,), {1: "timeout"}, 2.0)).detect_s == 0.0
