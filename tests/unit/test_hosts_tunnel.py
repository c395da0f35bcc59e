"""Tunnels and channels between hosts, on real sockets: what is said arrives, and every end is told from a break."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from phalanx import messages as m
from phalanx import wire
from phalanx.hosts.gate import Gate
from phalanx.hosts.talk import MAX_MESSAGE, Beat, Channel, Hello, HungUp, News, Notice, StartWorker, ToOther
from phalanx.hosts.tunnel import Broken, Tunnels, connect_to, listen_at

TOKEN = b"a secret of more than sixteen bytes"
SESSION = 7
PATIENCE_S = 30.0


@dataclass
class Rig:
    """A door on one host, a gate on another, and a service behind the gate."""

    near: Tunnels
    near_news: News
    far: Tunnels
    far_news: News
    door: str
    service: socket.socket
    gate: Gate

    def call(self) -> tuple[socket.socket, socket.socket]:
        """A connection of a client through the tunnel: both its ends."""
        client = connect_to(self.door)
        client.settimeout(PATIENCE_S)
        self.service.settimeout(PATIENCE_S)
        server, _ = self.service.accept()
        server.settimeout(PATIENCE_S)
        return client, server


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    near_news, far_news = News(), News()
    near, far = Tunnels(near_news), Tunnels(far_news)
    service = listen_at(str(tmp_path / "service"))

    def admit(hello: Hello, connection: socket.socket) -> None:
        far.join(hello.session, connect_to(str(tmp_path / "service")), connection)

    gate = Gate(wire.listen("127.0.0.1"), TOKEN, admit)
    hello = Hello(purpose="server", node_rank=1, session=SESSION)
    near.open_door(listen_at(str(tmp_path / "door")), lambda: (SESSION, wire.connect(gate.address, TOKEN, hello, 10)))
    for tunnels in (near, far):
        tunnels.begin(SESSION)
    yield Rig(near, near_news, far, far_news, str(tmp_path / "door"), service, gate)
    gate.close()
    for tunnels in (near, far):
        tunnels.close()
    service.close()


def all_of(connection: socket.socket) -> bytes:
    parts = bytearray()
    while part := connection.recv(1 << 16):
        parts += part
    return bytes(parts)


def say_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"z" * 100_000)


def tell_for_ever(channel: Channel, word: m.Message) -> None:
    while True:
        channel.send(word)


def news_of(news: News) -> list[object]:
    assert select.select([news.fd], [], [], PATIENCE_S)[0]
    return news.take()


def test_bytes_arrive_both_ways_in_order_and_ends_are_passed_on(rig: Rig) -> None:
    client, server = rig.call()
    there, back = b"there" * 300_000, b"back" * 300_000
    for source, target, said in ((client, server, there), (server, client, back)):
        source.setblocking(False)
        sent, got = 0, bytearray()
        while len(got) < len(said):
            readable, writable, _ = select.select([target], [source] if sent < len(said) else [], [], PATIENCE_S)
            assert readable or writable
            if writable:
                sent += source.send(said[sent : sent + 65536])
            if readable:
                got += target.recv(1 << 16)
        assert got == said
        source.settimeout(PATIENCE_S)
    client.sendall(b"last words")
    client.close()
    assert all_of(server) == b"last words"
    server.close()
    assert rig.near_news.take() == rig.far_news.take() == []


def test_who_dies_while_it_is_spoken_to_is_no_broken_network(rig: Rig) -> None:
    for _ in range(20):
        client, server = rig.call()
        client.sendall(b"x" * 1000)
        assert server.recv(1)
        client.sendall(b"y" * 100_000)
        server.close()  # with bytes unread: its own connection is reset
        with pytest.raises(OSError):  # noqa: PT011  # whichever it finds first
            say_for_ever(client)
        client.close()
    client, server = rig.call()
    client.close()
    assert all_of(server) == b""
    assert rig.near_news.take() == rig.far_news.take() == []


def test_when_a_session_ends_so_do_all_its_connections_and_none_begins(rig: Rig) -> None:
    calls = [rig.call() for _ in range(3)]
    rig.far.end(SESSION)
    for client, server in calls:
        assert all_of(server) == b""
        assert all_of(client) == b""
    late = connect_to(rig.door)
    late.settimeout(PATIENCE_S)
    assert late.recv(1) == b""


def test_a_connection_that_breaks_between_the_hosts_is_reported(rig: Rig) -> None:
    outer, theirs = socket.socketpair()
    far = wire.listen("127.0.0.1")
    breaking = socket.create_connection(far.getsockname())
    there, _ = far.accept()
    rig.near.join(SESSION, theirs, breaking)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    there.close()  # a reset, as from a host that was started anew
    [broken] = news_of(rig.near_news)
    assert isinstance(broken, Broken)
    assert broken.session == SESSION
    outer.settimeout(PATIENCE_S)
    assert outer.recv(1) == b""


def test_a_stranger_does_not_reach_the_service_and_members_still_do(rig: Rig) -> None:
    host, port = wire.split_address(rig.gate.address)
    for said in (b"", b"\xff" * 100_000, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, port), PATIENCE_S) as stranger, suppress(ConnectionError):
            stranger.sendall(said)  # it may be refused before it has said it all
    with pytest.raises(wire.Refused):
        wire.connect(rig.gate.address, b"the wrong secret of others", Hello(purpose="server", node_rank=1), PATIENCE_S)
    client, server = rig.call()
    client.sendall(b"hello")
    assert server.recv(5) == b"hello"


# --- channels


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs, ToOther)
    yield ours, channel
    ours.close()
    channel.close()


def heard(channel: Channel, count: int) -> list[object]:
    found: list[object] = []
    while len(found) < count:
        assert select.select([channel.fd], [], [], PATIENCE_S)[0]
        found += channel.receive()
    return found


def framed(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def test_messages_arrive_whole_however_they_are_cut(ends: tuple[socket.socket, Channel]) -> None:
    ours, channel = ends
    said: list[m.Message] = [
        StartWorker(rank=2, incarnation=1),
        Notice(rank=3, incarnation=0, cause="host"),
        Beat(),
    ]
    stream = b"".join(framed(m.encode(message)) for message in said)
    for start in range(0, len(stream), 3):
        ours.sendall(stream[start : start + 3])
    assert heard(channel, 3) == said
    assert channel.receive() == []


GARBAGE: list[Callable[[], bytes]] = [
    lambda: struct.pack("<I", MAX_MESSAGE + 1),
    lambda: framed(b"\xc1"),
    lambda: framed(msgspec.msgpack.encode({"type": "Surprise"})),
    lambda: framed(msgspec.msgpack.encode({"type": "Notice", "rank": "two"})),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_whoever_does_not_keep_to_the_protocol_has_hung_up(
    ends: tuple[socket.socket, Channel], garbage: Callable[[], bytes]
) -> None:
    ours, channel = ends
    ours.sendall(garbage())
    with pytest.raises(HungUp):
        heard(channel, 1)


def test_a_launcher_that_takes_no_messages_has_hung_up(ends: tuple[socket.socket, Channel]) -> None:
    _, channel = ends
    with pytest.raises(HungUp, match="takes no messages"):
        tell_for_ever(channel, StartWorker(rank=1, incarnation=1))


def test_what_was_said_before_a_hang_up_is_heard(ends: tuple[socket.socket, Channel]) -> None:
    ours, channel = ends
    ours.sendall(framed(m.encode(Beat())))
    ours.close()
    assert heard(channel, 1) == [Beat()]
    with pytest.raises(HungUp, match="hang-up"):
        heard(channel, 1)
