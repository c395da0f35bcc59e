"""Which hosts keep which experts: every one on as many as asked for, evenly, and no host is the only one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phalanx.elastic.vault.memory import Vault, VaultMemory, VaultShape
from phalanx.elastic.vault.shares import EVERYTHING, Share, hosts_of

clusters = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 6), st.integers(1, 40))


def table(nnodes: int, copies: int, layers: int, experts: int) -> list[tuple[int, ...]]:
    return [hosts_of(layer, e, experts, nnodes, copies) for layer in range(layers) for e in range(experts)]


@given(clusters)
def test_every_expert_is_on_as_many_different_hosts_as_asked_for_or_on_all(cluster: tuple[int, int, int, int]) -> None:
    nnodes, copies, _, _ = cluster
    for hosts in table(*cluster):
        assert len(hosts) == len(set(hosts)) == min(copies, nnodes)
        assert all(0 <= host < nnodes for host in hosts)


@given(clusters)
def test_shares_differ_by_no_more_than_the_number_of_copies(cluster: tuple[int, int, int, int]) -> None:
    nnodes, copies, _, _ = cluster
    held = np.bincount([host for hosts in table(*cluster) for host in hosts], minlength=nnodes)
    assert held.max() - held.min() <= min(copies, nnodes)


@given(clusters)
def test_with_two_copies_no_host_takes_an_expert_along(cluster: tuple[int, int, int, int]) -> None:
    nnodes, copies, layers, experts = cluster
    if min(nnodes, copies) < 2:
        return
    for lost in range(nnodes):
        assert all(set(hosts) - {lost} for hosts in table(nnodes, copies, layers, experts))


@given(clusters)
def test_a_hosts_share_is_what_the_table_says(cluster: tuple[int, int, int, int]) -> None:
    nnodes, copies, layers, experts = cluster
    for node_rank in range(nnodes):
        wanted = np.array([node_rank in hosts for hosts in table(*cluster)]).reshape(layers, experts)
        assert (Share(node_rank, nnodes, copies).mask_LE(layers, experts) == wanted).all()


@given(st.integers(3, 12), st.integers(1, 3))
def test_what_a_lost_host_held_is_spread_over_all_others(nnodes: int, layers: int) -> None:
    experts = nnodes * (nnodes - 1)
    others = [h for hosts in table(nnodes, 2, layers, experts) if 0 in hosts for h in hosts if h != 0]
    assert len(set(np.bincount(others, minlength=nnodes)[1:])) == 1


def test_one_host_holds_everything_whatever_the_number_of_copies() -> None:
    assert EVERYTHING.mask_LE(3, 7).all()
    assert Share(0, 1, 4).mask_LE(3, 7).all()


def test_a_vault_takes_memory_for_its_share_alone_and_is_full_with_it() -> None:
    whole = VaultShape(2, 8, 10_000, 0, 1)
    shares = [VaultShape(2, 8, 10_000, 0, 1, Share(n, 4, 2)) for n in range(4)]
    room = [shape.total_bytes - shape.experts_start for shape in (whole, *shares)]
    assert room[1:] == [room[0] // 2] * 4
    memory = VaultMemory(shares[1])
    vault = Vault.open_for_writing(memory.address)
    assert vault.shape == shares[1]
    vault.publish_dense([])
    places = np.argwhere(vault.missing_LE).tolist()
    assert places == np.argwhere(shares[1].share_LE).tolist()
    starts = {vault.shape.expert_start(layer, expert) for layer, expert in places}
    assert len(starts) == len(places) == 8
    assert max(starts) + vault.shape.stride == vault.shape.total_bytes
    for layer, expert in places:
        assert not vault.is_full
        vault.publish(layer, expert, 1)
    assert vault.is_full
    vault.close()
    memory.close()
