"""Who may be which host, and when one counts as lost: decided without a network or a clock."""

from __future__ import annotations

import random

import msgspec
import pytest

from phalanx.config import ServeConfig
from phalanx.errors import BadConfig
from phalanx.hosts.places import BEAT_S, FREE_TO_DIFFER, Places, Refusal, Silence, Terms, next_incarnation, ranks_of

LIMIT_S = 2.0


def terms(model: str = "shape", version: str = "1.0", **options: object) -> Terms:
    return Terms.of(ServeConfig(model="here", **options), version, model)  # type: ignore[arg-type]


def places(nnodes: int = 3, ep_size: int = 8) -> Places:
    return Places(ep_size, nnodes, terms())


def refused(answer: int | Refusal) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer


@pytest.mark.parametrize(("ep_size", "nnodes"), [(4, 2), (5, 2), (8, 3), (3, 3), (1, 1), (16, 7)])
def test_ranks_are_dealt_in_blocks_as_equal_as_can_be(ep_size: int, nnodes: int) -> None:
    blocks = [ranks_of(node, nnodes, ep_size) for node in range(nnodes)]
    assert [rank for block in blocks for rank in block] == list(range(ep_size))
    sizes = [len(block) for block in blocks]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    seats = Places(ep_size, nnodes, terms())
    assert [seats.host_of(rank) for rank in range(ep_size)] == [n for n, b in enumerate(blocks) for _ in b]


def test_vacant_places_are_dealt_over_all_hosts_too() -> None:
    assert [ranks_of(node, 2, 4, 7) for node in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6]]
    assert [Places(4, 2, terms(), 7).host_of(rank) for rank in range(7)] == [0, 0, 1, 1, 0, 0, 1]


def test_more_hosts_than_ranks_are_refused() -> None:
    with pytest.raises(BadConfig, match="--ep-size 2 leaves some of the hosts of --nnodes 3 without a rank"):
        ServeConfig(model="here", ep_size=2, nnodes=3, dist_init_addr="a:1").check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nnodes": 2, "ep_size": 2, "node_rank": 2, "dist_init_addr": "a:1"}, "--node-rank must lie between 0 and 1"),
        ({"node_rank": 1}, "--node-rank must lie between 0 and 0"),
        ({"nnodes": 2, "ep_size": 2}, "--dist-init-addr '' must be HOST:PORT"),
        ({"nnodes": 2, "ep_size": 2, "dist_init_addr": "a"}, "--dist-init-addr 'a' must be HOST:PORT"),
        ({"nnodes": 2, "ep_size": 2, "dist_init_addr": "a:0"}, "with a port of your choice"),
        (
            {"nnodes": 2, "ep_size": 2, "dist_init_addr": "a:1", "elastic_ep_rejoin": True},
            "--elastic-ep-rejoin: the first host .* cannot come back",
        ),
        ({"nnodes": 0}, "--nnodes must be at least 1"),
    ],
)
def test_flags_that_make_no_cluster_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        ServeConfig(model="here", **options).check()  # type: ignore[arg-type]


def test_a_host_is_in_until_it_leaves_and_each_time_in_another_session() -> None:
    seats = places()
    sessions = [seats.register(1, terms(), LIMIT_S, 0.0), seats.register(2, terms(), LIMIT_S, 0.0)]
    assert sessions == [seats.session(1), seats.session(2)]
    assert len(set(sessions)) == 2
    seats.left(1)
    assert seats.session(1) == 0
    again = seats.register(1, terms(), LIMIT_S, 1.0)
    assert again not in sessions
    assert again == seats.session(1) != 0


def test_a_place_that_a_living_host_has_is_refused_for_good_and_a_silent_ones_for_now() -> None:
    seats = places()
    seats.register(1, terms(), LIMIT_S, 0.0)
    living = refused(seats.register(1, terms(), LIMIT_S, 0.1))
    assert living.final
    assert "--node-rank 1 is taken by a living host" in living.reason
    for tick in range(3):
        assert seats.silent((tick + 1) * BEAT_S) == []
    assert not refused(seats.register(1, terms(), LIMIT_S, 3 * BEAT_S)).final


@pytest.mark.parametrize("node_rank", [-1, 0, 3, 99])
def test_a_number_that_no_other_host_has_is_refused(node_rank: int) -> None:
    assert "--node-rank" in refused(places().register(node_rank, terms(), LIMIT_S, 0.0)).reason


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (terms(ep_size=6), "--ep-size 6, the first host has 1"),
        (terms(nnodes=2), "--nnodes 2"),
        (terms(dtype="float32"), "--dtype float32, the first host has bfloat16"),
        (terms(peer_timeout_s=9.0), "--peer-timeout 9.0"),
        (terms(enable_chaos=True), "--enable-chaos is on there and off on the first host"),
        (terms(version="0.9"), "version 0.9"),
        (terms(model="other"), "MODEL has another shape"),
    ],
)
def test_a_host_that_differs_where_all_must_be_alike_is_told_where(theirs: Terms, named: str) -> None:
    answer = refused(places().register(1, theirs, LIMIT_S, 0.0))
    assert named in answer.reason
    assert answer.final
    assert places().register(1, terms(), LIMIT_S, 0.0) == 1


def test_what_may_differ_is_a_field_and_does_not_keep_a_host_out() -> None:
    assert set(ServeConfig.__struct_fields__) >= FREE_TO_DIFFER
    theirs = terms(port=9, log_level="debug", node_rank=1, cluster_token_file="x", threads_per_rank=2)
    assert places().register(1, theirs, LIMIT_S, 0.0) == 1


def test_terms_survive_the_wire() -> None:
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(terms()), type=Terms)
    assert terms().difference(sent) == ""


def test_silence_counts_what_could_have_been_heard_and_not_the_listeners_own_absence() -> None:
    silence = Silence(LIMIT_S, 0.0)
    assert not silence.is_over(100.0), "this process was stopped: it heard nobody, and that says nothing"
    silence.heard(100.0)
    now = 100.0
    while not silence.is_over(now):
        now += BEAT_S
    assert LIMIT_S < now - 100.0 <= LIMIT_S + 2 * BEAT_S


def test_a_ranks_first_process_joins_when_the_ranks_have_met_without_it() -> None:
    assert next_incarnation(None, met=False) == 0
    assert next_incarnation(None, met=True) == 1
    assert next_incarnation(0, met=False) == 1
    assert next_incarnation(4, met=True) == 5


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_no_two_hosts_have_one_place_or_one_session(seed: int) -> None:
    """Many launchers claim the places in any order, fall silent, hang up and come back."""
    dice = random.Random(seed)
    seats, now = places(nnodes=4), 0.0
    holders: dict[int, tuple[int, int]] = {}
    sessions: set[int] = set()
    spoke: dict[int, float] = {}
    for launcher in range(300):
        now += dice.uniform(0.0, BEAT_S)
        for node in seats.silent(now):
            assert now - spoke[node] > LIMIT_S, "nobody is lost who spoke in time"
            seats.left(node)
            del holders[node]
        node = dice.randrange(1, 4)
        match dice.choice(["claim", "claim", "speak", "hang up"]):
            case "claim":
                answer = seats.register(node, terms(), LIMIT_S, now)
                assert isinstance(answer, Refusal) == (node in holders)
                if isinstance(answer, int):
                    assert answer not in sessions
                    sessions.add(answer)
                    holders[node], spoke[node] = (launcher, answer), now
            case "speak" if node in holders:
                seats.heard(node, now)
                spoke[node] = now
            case "hang up" if node in holders:
                seats.left(node)
                del holders[node]
        assert {n: s for n in range(1, 4) if (s := seats.session(n))} == {n: h[1] for n, h in holders.items()}
    assert len(sessions) > 20
