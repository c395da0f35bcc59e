"""Roll calls over a store: who is in, who decides, and who learns that it is out."""

from __future__ import annotations

import itertools
from multiprocessing import get_context

import msgspec
import numpy as np
import pytest
from elastic_doubles import SHAPE, Announcements, HookedStore, answer, member, planner
from torch.distributed import TCPStore

from phalanx.elastic.agree import Agreed, FakeClock, Limits, MemoryStore, RollCall, Store, TcpStore
from phalanx.elastic.store import MonotonicClock
from phalanx.errors import Evicted, StoreLost
from phalanx.remains import stale_keys
from phalanx.world import View

LIMITS = Limits(roll_call_s=5.0, start_s=30.0, join_s=1.0, succession_s=0.5)


class Table:
    """Several ranks' roll calls over one store and one clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = HookedStore(self.clock)
        self.notices = Announcements()

    def rank(self, rank: int, incarnation: int = 0) -> RollCall:
        return RollCall(
            member(rank, incarnation), SHAPE, LIMITS,
            store=self.store, clock=self.clock, notices=self.notices, plan=planner,
        )  # fmt: skip

    def answers(self, epoch: int, *ranks: int, held: dict[int, int] | None = None) -> None:
        """What the others would have written by now."""
        for rank in ranks:
            value = msgspec.msgpack.encode(answer(member(rank), (held or {}).get(rank)))
            self.store.set(f"entry/{epoch}/{member(rank)}", value)

    def first_world(self) -> Agreed:
        self.answers(1, 1, 2, 3)
        return self.rank(0).hold(None, "start", answer(member(0)))


@pytest.fixture
def table() -> Table:
    return Table()


def ranks_of(agreed: Agreed) -> tuple[int, ...]:
    return agreed.view.ranks


def test_the_first_meeting_closes_as_soon_as_everyone_has_answered(table: Table) -> None:
    agreed = table.first_world()
    assert (agreed.epoch, ranks_of(agreed), agreed.trigger) == (1, (0, 1, 2, 3), "start")
    assert table.clock.now() < 0.1


def test_a_member_that_does_not_answer_is_waited_for_until_the_deadline_and_no_longer(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 3)
    before = table.clock.now()
    agreed = table.rank(0).hold(base, "rebalance", answer(member(0)))
    assert ranks_of(agreed) == (0, 1, 3)
    assert agreed.trigger == "failure"
    assert LIMITS.roll_call_s <= table.clock.now() - before < LIMITS.roll_call_s + 0.1


@pytest.mark.parametrize(("me", "others", "said"), [(0, [1, 3], "ranks 2.0"), (1, [3], "ranks 0.0, 2.0"), (3, [1], "")])
def test_a_first_meeting_that_lasts_says_for_whom_it_waits_once_for_all(
    table: Table, caplog: pytest.LogCaptureFixture, me: int, others: list[int], said: str
) -> None:
    table.answers(1, *others)
    with caplog.at_level("INFO", "phalanx.elastic"):
        assert ranks_of(table.rank(me).hold(None, "start", answer(member(me)))) == tuple(sorted([me, *others]))
    wanted = [f"waiting for {said} to meet for World 1; 5 s so far"] if said else []
    assert [record.getMessage() for record in caplog.records] == wanted


def test_a_member_whose_death_was_announced_is_not_waited_for(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 3)
    table.notices.announce(2, 0)
    before = table.clock.now()
    assert ranks_of(table.rank(0).hold(base, "failure", answer(member(0)))) == (0, 1, 3)
    assert table.clock.now() - before < 0.1


def test_an_announcement_ends_the_wait_that_is_already_going_on(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 3)
    began = table.clock.now()
    table.store.before_get = lambda key: table.clock.now() - began > 1.0 and table.notices.announce(2, 0)
    assert ranks_of(table.rank(0).hold(base, "failure", answer(member(0)))) == (0, 1, 3)
    assert 1.0 < table.clock.now() - began < 1.1


def test_a_member_that_died_after_it_answered_is_not_let_in(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 2, 3)
    table.notices.announce(2, 0)
    assert ranks_of(table.rank(0).hold(base, "failure", answer(member(0)))) == (0, 1, 3)


def test_the_next_lowest_publishes_when_the_lowest_is_dead(table: Table) -> None:
    base = table.first_world()
    table.notices.announce(0, 0)
    table.answers(2, 2, 3)
    before = table.clock.now()
    assert ranks_of(table.rank(1).hold(base, "failure", answer(member(1)))) == (1, 2, 3)
    assert table.clock.now() - before < 0.1


def test_the_next_in_line_publishes_when_the_lowest_answered_and_then_fell_silent(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 0, 2, 3)
    before = table.clock.now()
    agreed = table.rank(1).hold(base, "failure", answer(member(1)))
    assert ranks_of(agreed) == (0, 1, 2, 3), "who answered was not absent"
    assert table.clock.now() - before == pytest.approx(LIMITS.roll_call_s + LIMITS.succession_s, abs=0.1)


def test_of_two_plans_for_one_epoch_both_ranks_take_the_first_published(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 2, 3)
    winner: list[Agreed] = []

    def overtake(key: str) -> None:
        """While rank 0 is about to publish, rank 1 knows of a death that rank 0 does not, and is faster."""
        table.store.before_compare_set = None
        table.notices.announce(0, 0)
        table.notices.announce(2, 0)
        winner.append(table.rank(1).hold(base, "failure", answer(member(1))))
        table.notices.forget()

    table.store.before_compare_set = overtake
    with pytest.raises(Evicted):
        table.rank(0).hold(base, "failure", answer(member(0)))
    assert ranks_of(winner[0]) == (1, 3)
    assert table.rank(3).follow(base).world == winner[0].world


def test_a_latecomer_learns_that_the_others_went_on_without_it(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 3)
    table.notices.announce(2, 0)
    table.rank(0).hold(base, "failure", answer(member(0)))
    table.notices.forget()
    late = table.rank(2)
    with pytest.raises(Evicted) as error:
        late.follow(base)
    assert error.value.epoch == 2
    with pytest.raises(Evicted):
        late.hold(base, "failure", answer(member(2)))


def test_a_rank_that_slept_through_many_epochs_is_evicted_by_the_first_one_without_it(table: Table) -> None:
    base = last = table.first_world()
    for epoch in range(2, 9):
        table.answers(epoch, 1, 3)
        table.notices.announce(2, 0)
        last = table.rank(0).hold(last, "rebalance", answer(member(0)))
    assert last.epoch == 8
    with pytest.raises(Evicted):
        table.rank(2).follow(base)


def test_a_rank_that_was_declared_dead_does_not_go_on(table: Table) -> None:
    base = table.first_world()
    table.notices.announce(0, 0)
    with pytest.raises(Evicted):
        table.rank(0).hold(base, "operator", answer(member(0)))


def test_a_rank_that_was_counted_while_it_was_away_finds_the_world_it_is_in(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 2, 3)
    agreed = table.rank(0).hold(base, "rebalance", answer(member(0)))
    assert table.rank(3).follow(base).world == agreed.world


def test_a_newcomer_is_let_in_when_it_answers_and_is_forgotten_when_it_does_not(table: Table) -> None:
    base = table.first_world()
    table.notices.announce(2, 0)
    table.store.set("joiners", b"2.1")
    table.answers(2, 1, 3)
    before = table.clock.now()
    agreed = table.rank(0).hold(base, "join", answer(member(0)))
    assert ranks_of(agreed) == (0, 1, 3)
    assert table.clock.now() - before == pytest.approx(LIMITS.join_s, abs=0.1)
    assert table.rank(0).joiners() == ()

    table.store.set("joiners", b"2.1")
    table.answers(3, 1, 3)
    table.store.set(f"entry/3/{member(2, 1)}", msgspec.msgpack.encode(answer(member(2, 1))))
    agreed = table.rank(0).hold(agreed, "join", answer(member(0)))
    assert [str(m) for m in agreed.view.members] == ["0.0", "1.0", "2.1", "3.0"]
    assert agreed.trigger == "join"


def test_a_newcomer_waits_for_a_roll_call_and_answers_the_one_that_is_open(table: Table) -> None:
    base = table.first_world()
    table.notices.announce(2, 0)
    looks = itertools.count()

    def members_meet(key: str) -> None:
        if key == "open/2" and next(looks) == 20:
            table.answers(2, 1, 3)
            table.store.set("open/2", b"1")
        if key == "world/2" and table.store.get(f"entry/2/{member(2, 1)}") and not table.store.get("plan/2/0.0"):
            table.store.before_get = None
            table.rank(0).hold(base, "join", answer(member(0)))

    table.store.before_get = members_meet
    agreed, let_in = table.rank(2, 1).join(answer(member(2, 1)))
    assert let_in
    assert member(2, 1) in agreed.view


def test_a_newcomer_in_a_members_place_says_that_this_member_is_dead(table: Table) -> None:
    base = table.first_world()
    table.store.set("joiners", b"2.1")
    table.answers(2, 1, 3)
    table.store.set(f"entry/2/{member(2, 1)}", msgspec.msgpack.encode(answer(member(2, 1))))
    before = table.clock.now()
    agreed = table.rank(0).hold(base, "join", answer(member(0)))
    assert member(2, 1) in agreed.view
    assert table.clock.now() - before < 0.1, "nobody waits for the one that was replaced"


def test_digests_are_remembered_though_their_holder_died(table: Table) -> None:
    base = table.first_world()
    table.rank(2).remember(answer(member(2), held=5))
    table.notices.announce(2, 0)
    table.answers(2, 1, 3)
    agreed = table.rank(0).hold(base, "failure", answer(member(0)))
    assert agreed.digest_LE[0, 5] == answer(member(2), held=5).digest_of_first
    table.answers(3, 1, 3)
    assert table.rank(0).hold(agreed, "rebalance", answer(member(0))).digest_LE[0, 5] == agreed.digest_LE[0, 5]


def test_a_slot_with_another_digest_than_the_rest_counts_as_empty(table: Table) -> None:
    first = answer(member(0), held=4)
    other = answer(member(1), held=4, digest=99)
    table.store.set(f"entry/1/{member(1)}", msgspec.msgpack.encode(other))
    table.answers(1, 2, 3)
    agreed = table.rank(0).hold(None, "start", first)
    slots = SHAPE.slots_per_rank
    assert agreed.held_LP[0, 0] == 4
    assert agreed.held_LP[0, slots] == -1
    assert agreed.digest_LE[0, 4] == first.digest_of_first


def test_loads_are_summed_over_those_who_are_in(table: Table) -> None:
    base = table.first_world()
    table.answers(2, 1, 2, 3)
    table.notices.announce(3, 0)
    agreed = table.rank(0).hold(base, "failure", answer(member(0)))
    assert agreed.load_LE.tolist() == (3 * np.ones_like(agreed.load_LE)).tolist()
    assert agreed.step == 12


def test_the_store_does_not_grow_with_every_epoch(table: Table) -> None:
    last = table.first_world()
    sizes = []
    calls = table.rank(0)
    for epoch in range(2, 30):
        table.answers(epoch, 1, 2, 3)
        last = calls.hold(last, "rebalance", answer(member(0)))
        while calls.tidy():
            pass
        sizes.append(table.store.size())
    assert sizes[-1] - sizes[5] < 200 * (len(sizes) - 6), "only a few bytes a World may stay"


def test_a_newcomer_finds_its_way_in_while_one_change_follows_the_other_and_nobody_tidies_up(table: Table) -> None:
    last, calls = table.first_world(), table.rank(0)
    for epoch in range(2, 8):
        table.answers(epoch, 1, 2, 3)
        last = calls.hold(last, "rebalance", answer(member(0)))
        for key in stale_keys([f"plan/{n}/{member(0)}" for n in range(1, epoch + 1)], epoch, {}):
            table.store.delete(key)  # as the launcher does
    found = table.rank(2, 1).follow(None)
    assert found is not None
    assert found.epoch == last.epoch == 7


def test_what_a_newcomer_prepared_for_is_kept_until_it_is_in(table: Table) -> None:
    base, calls = table.first_world(), table.rank(0)
    table.notices.announce(2, 0)
    newcomer = table.rank(2, 1)
    newcomer.wish(base.placement)
    kept = []
    for epoch, answers in ((2, False), (3, True)):
        table.store.compare_set("joiners", "", "2.1")
        table.answers(epoch, 1, 3)
        if answers:
            newcomer.post(f"entry/{epoch}/{member(2, 1)}", answer(member(2, 1)))
        base = calls.hold(base, "join", answer(member(0)))
        while calls.tidy():
            pass
        kept.append((member(2, 1) in base.view, calls.wish_of(member(2, 1)) is not None))
    assert kept == [(False, True), (True, False)]


def test_where_newcomers_start_never_goes_back(table: Table) -> None:
    """A leader that is stopped just when its World is published wakes up long after."""
    base, asleep = table.first_world(), table.rank(0)
    table.answers(2, 1, 2, 3)

    def others_go_on(key: str) -> None:
        if key == "latest" and table.store.get("world/2"):
            table.store.before_get = None
            table.notices.announce(0, 0)
            last, calls = table.rank(1).follow(base), table.rank(1)
            for epoch in range(3, 8):
                table.answers(epoch, 2, 3)
                last = calls.hold(last, "failure", answer(member(1)))
            while calls.tidy():
                pass

    table.store.before_get = others_go_on
    with pytest.raises(Evicted):
        asleep.hold(base, "rebalance", answer(member(0)))
    found = table.rank(0, 1).follow(None)
    assert found is not None
    assert found.epoch == 7


# --- the store


@pytest.fixture
def launcher_store() -> TCPStore:
    """As the launcher has it."""
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture(params=["memory", "tcp"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return MemoryStore(MonotonicClock())
    server: TCPStore = request.getfixturevalue("launcher_store")
    return TcpStore("127.0.0.1", server.port)


def test_a_key_without_a_value_reads_as_none_at_once(store: Store) -> None:
    assert store.get("nothing") is None
    assert store.wait("nothing", 0.01) is None


def test_a_key_that_was_only_read_is_not_there(launcher_store: TCPStore) -> None:
    """The launcher takes a key that is there for a key that was written: so it knows whether the ranks have met."""
    rank = TcpStore("127.0.0.1", launcher_store.port)
    keys = launcher_store.list_keys()
    assert rank.get("world/1") is None
    assert rank.wait("world/1", 0.01) is None
    assert not launcher_store.check(["world/1"])
    assert launcher_store.list_keys() == keys
    assert rank.compare_set("world/1", "", "0.0") == "0.0"
    assert launcher_store.check(["world/1"])


def test_values_are_any_bytes_and_can_be_forgotten(store: Store) -> None:
    value = bytes(range(256)) * 400
    store.set("key", value)
    assert store.get("key") == value
    assert store.wait("key", 0.0) == value
    store.delete("key")
    store.delete("key")
    assert store.get("key") is None


def test_compare_set_writes_once_and_tells_who_was_first(store: Store) -> None:
    assert store.get("world") is None, "reading must not make the key"
    assert store.compare_set("world", "", "0.0") == "0.0"
    assert store.compare_set("world", "", "1.0") == "0.0"
    assert store.compare_set("world", "0.0", "2.0") == "2.0"
    assert store.get("world") == b"2.0"
    assert store.compare_set("world", "2.0", "") == ""
    assert store.get("world") is None


def test_a_launcher_that_is_gone_is_a_clear_error() -> None:
    ours, theirs = get_context("fork").Pipe()

    def launcher() -> None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        theirs.send(store.port)
        theirs.recv()  # for ever

    server = get_context("fork").Process(target=launcher, daemon=True)
    server.start()
    port = ours.recv()
    client = TcpStore("127.0.0.1", port, timeout_s=20.0)
    client.set("key", b"value")
    assert client.get("key") == b"value"
    server.kill()
    server.join()
    with pytest.raises(StoreLost, match=f"127.0.0.1:{port}"):
        client.get("key")
    with pytest.raises(StoreLost):
        TcpStore("127.0.0.1", port, timeout_s=0.5)


def test_a_view_keeps_its_members_addresses_through_a_roll_call(table: Table) -> None:
    agreed = table.first_world()
    assert agreed.view == View(1, 4, tuple(member(r) for r in range(4)))
    assert [m.comm_address for m in agreed.view.members] == [member(r).comm_address for r in range(4)]
