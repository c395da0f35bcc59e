"""The handshake between hosts: members get in, strangers, liars and mutes do not."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Queue

import msgspec
import pytest

from phalanx import wire
from phalanx.errors import BadConfig

TOKEN = b"a secret of more than sixteen bytes"


class Hello(msgspec.Struct, frozen=True):
    purpose: str
    rank: int = 0


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with wire.listen("127.0.0.1") as bound:
        yield bound


def answer(listener: socket.socket, token: bytes = TOKEN, timeout_s: float = 20) -> Future[tuple[socket.socket, Hello]]:
    """Welcome one caller in a thread."""

    def accept() -> tuple[socket.socket, Hello]:
        connection, _ = listener.accept()
        return connection, wire.welcome(connection, token, Hello, timeout_s)

    pool = ThreadPoolExecutor(1)
    future = pool.submit(accept)
    pool.shutdown(wait=False)
    return future


def test_two_who_know_the_token_talk(listener: socket.socket) -> None:
    welcomed = answer(listener)
    caller = wire.connect(wire.address_of(listener), TOKEN, Hello("comm", 3), 20)
    connection, hello = welcomed.result(20)
    assert hello == Hello("comm", 3)
    caller.sendall(b"x" * 100)
    assert connection.recv(100, socket.MSG_WAITALL) == b"x" * 100
    caller.close()
    connection.close()


def test_another_token_is_refused_on_both_sides(listener: socket.socket) -> None:
    welcomed = answer(listener)
    with pytest.raises(wire.Refused, match="cluster token"):
        wire.connect(wire.address_of(listener), b"not the same secret at all", Hello("comm"), 20)
    with pytest.raises(wire.Refused, match="another cluster token"):
        welcomed.result(20)


def test_a_recorded_conversation_cannot_be_played_again(listener: socket.socket) -> None:
    address = wire.address_of(listener)
    with wire.listen("127.0.0.1") as tap, ThreadPoolExecutor(1) as pool:
        welcomed = answer(listener)
        caller = pool.submit(wire.connect, wire.address_of(tap), TOKEN, Hello("comm"), 20)
        near, far = tap.accept()[0], socket.create_connection(wire.split_address(address))
        near.sendall(far.recv(40, socket.MSG_WAITALL))
        recorded = near.recv(1000)
        far.sendall(recorded)
        near.sendall(far.recv(32, socket.MSG_WAITALL))
        for done in (caller.result(20), welcomed.result(20)[0], near, far):
            done.close()
    with socket.create_connection(wire.split_address(address)) as thief:
        welcomed = answer(listener)
        assert len(thief.recv(40, socket.MSG_WAITALL)) == 40
        thief.sendall(recorded)
        with pytest.raises(wire.Refused, match="another cluster token"):
            welcomed.result(20)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 40, b"n" * 32 + struct.pack("<I", 1 << 30)])
def test_a_stranger_is_refused(listener: socket.socket, said: bytes) -> None:
    with socket.create_connection(wire.split_address(wire.address_of(listener))) as stranger:
        welcomed = answer(listener)
        stranger.sendall(said)
        with pytest.raises(wire.Refused):
            welcomed.result(20)


def test_a_caller_who_says_nothing_is_not_waited_for(listener: socket.socket) -> None:
    address = wire.split_address(wire.address_of(listener))
    with (
        socket.create_connection(address) as mute,
        pytest.raises(TimeoutError, match=f":{mute.getsockname()[1]} does not answer the handshake"),
    ):
        answer(listener, timeout_s=0.05).result(20)


def test_a_listener_that_hangs_up_at_once_may_be_called_again(listener: socket.socket) -> None:
    """It is ending, or has just ended: that says nothing about tokens."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: listener.accept()[0].close())
        with pytest.raises(ConnectionResetError, match="hung up at once"):
            wire.connect(wire.address_of(listener), TOKEN, Hello("comm"), 20)


def test_strangers_who_hold_every_place_keep_no_member_out(listener: socket.socket) -> None:
    admitted: Queue[tuple[Hello, socket.socket]] = Queue()
    refused: Queue[str] = Queue()
    address = wire.split_address(wire.address_of(listener))
    keeper = wire.Doorkeeper(
        listener, TOKEN, Hello, 3600, most=4, admit=lambda *caller: admitted.put(caller), refused=refused.put
    )
    with ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(6)]
        for rank in range(3):
            stack.enter_context(wire.connect(wire.join_address(*address), TOKEN, Hello("comm", rank), 20))
            hello, connection = admitted.get(timeout=20)
            assert hello == Hello("comm", rank)
            connection.close()
        for stranger in strangers[:3]:
            assert len(stranger.recv(100, socket.MSG_WAITALL)) == 40, "a challenge, and then the end"
        for _ in range(3):
            assert "in the handshake" in refused.get(timeout=20)
        assert len(strangers[5].recv(40, socket.MSG_WAITALL)) == 40
        keeper.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 20)


def test_a_listener_that_is_no_phalanx_is_named(listener: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: listener.accept()[0].sendall(b"220 smtp ready" + b" " * 40))
        with pytest.raises(wire.Refused, match="is no Phalanx"):
            wire.connect(wire.address_of(listener), TOKEN, Hello("comm"), 20)


def test_a_hello_of_another_version_is_refused(listener: socket.socket) -> None:
    class Other(msgspec.Struct):
        unknown: int

    welcomed = answer(listener)
    with pytest.raises(wire.Refused):
        wire.connect(wire.address_of(listener), TOKEN, Other(1), 20)
    with pytest.raises(wire.Refused, match="does not understand"):
        welcomed.result(20)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:65536", "host:x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        wire.split_address(address)


def test_addresses_of_both_families_are_understood() -> None:
    assert wire.split_address("[fd00::1]:80") == ("fd00::1", 80)
    assert wire.join_address("fd00::1", 80) == "[fd00::1]:80"
    assert wire.split_address("h:1") == ("h", 1)


def test_a_token_file_must_hold_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(BadConfig, match="cannot be read"):
        wire.read_token(str(path))
    path.write_bytes(b"short\n")
    with pytest.raises(BadConfig, match="5 bytes"):
        wire.read_token(str(path))
    path.write_bytes(b"  " + TOKEN + b"\n")
    assert wire.read_token(str(path)) == TOKEN
