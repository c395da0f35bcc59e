"""The keeper: the process that fills the vault, and looks after what is in it.

It reads no expert that a rank has read already: it waits until the first load is over and copies each from the slots
of a rank of this host that holds it, by the digest that rank left in the store. What no rank here has it asks of other
hosts' vaults, as long as those still fill. Only what nobody can give comes from disk. Then it checks every entry from
time to time, and fills again what is damaged.

Nobody waits for it. It runs at the lowest ordinary priority. It may be killed at any time: the memory is the
launcher's, the index says what is whole, and the next keeper goes on from there.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import torch
import zmq

from phalanx import messages as m
from phalanx.comm.notices import NoticeBoard
from phalanx.elastic.agree import Answer, MonotonicClock, TcpStore
from phalanx.elastic.restore import TROUBLE, Bytes
from phalanx.elastic.vault.memory import Vault
from phalanx.elastic.vault.remote import BATCH_BYTES, Remote, Want
from phalanx.elastic.vault.room import RESERVE_BYTES, available_bytes, gb
from phalanx.elastic.vault.stall import StallProcess
from phalanx.elastic.vault.transports import transports
from phalanx.elastic.waiting import LongWait
from phalanx.errors import BadCheckpoint
from phalanx.model.known import KnownCheckpoint
from phalanx.moe.experts import PeerBank, digest
from phalanx.observe.log import set_up_logging
from phalanx.process import VaultSpec, server_endpoint
from phalanx.testing import faults
from phalanx.wire import Site
from phalanx.world import Member

log = logging.getLogger("phalanx.vault")

REPORT_EVERY_S = 0.5
LOG_EVERY_S = 5.0
CHECK_EVERY_S = 600.0
"""How often every entry of a full vault is checked; SIGUSR1 asks for it at once."""

OTHER_HOSTS_S = 10.0
"""How long after the last expert that another host's vault could give the rest is taken from disk."""

DISK_AGAIN_S = 30.0
"""How long after disk could not give what is missing that is tried again; SIGUSR1 asks for it at once."""

_LOOK_S = 0.05
_PAUSE_BETWEEN_LOOKS_S = 0.25
_PAUSE_S = 1.0
_LOOK_AT_MEMORY_EVERY = 64 << 20


def run(spec: VaultSpec) -> int:
    """The keeper's whole life, until it is killed. LOCAL, blocks."""
    set_up_logging(spec.config.log_level, spec.config.log_format, "vault")
    # Before any thread is started: a signal to the process goes to whichever thread does not block it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    if spec.site is not None:
        StallProcess(spec).start()
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if not spec.vault:
        log.info("no vault to fill: only serving what the ranks of this host hold")
        while True:
            signal.pause()
    try:
        Keeper(spec).run()
    except Exception as error:
        expected = isinstance(error, TROUBLE)  # its message says it all; a bug needs its traceback
        log.error("the vault's process fails: %s", error, exc_info=not expected)
    return 1


class Keeper:
    """One incarnation of the vault's process."""

    def __init__(self, spec: VaultSpec) -> None:
        config = spec.config
        self._spec, self._config = spec, config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        chaos = config.enable_chaos
        self._faults = faults.armed(spec.faults, -1, spec.incarnation) if chaos else faults.NO_FAULTS
        self._vault = Vault.open_for_writing(spec.vault)
        self._report = Report(spec, self._vault)
        self._checkpoint = KnownCheckpoint(config, spec.model)
        self._since_look = _LOOK_AT_MEMORY_EVERY

    def run(self) -> None:
        """Check what is there, fill what is missing, and again from time to time. Does not return."""
        self._report.now("filling")
        if self._vault.has_dense or self._vault.filled_LE.any():
            self._check()
        while True:
            try:
                self._fill()
            except BadCheckpoint as error:
                self._report.now("filling", f"the vault cannot be filled: {error}")
                signal.sigtimedwait({signal.SIGUSR1}, DISK_AGAIN_S)
                continue
            self._vault.found_full()
            self._report.full()
            signal.sigtimedwait({signal.SIGUSR1}, CHECK_EVERY_S)
            self._check()

    def _fill(self) -> None:
        """Fill all that is missing. BadCheckpoint when disk alone can give some of it, and cannot."""
        trouble: BadCheckpoint | None = None
        if not self._vault.has_dense:
            try:
                self._fill_dense()
            except BadCheckpoint as error:
                trouble = error  # experts may still be had from memory
        if self._vault.missing_LE.any():
            self._fill_experts(Holders(self._spec))
        if trouble is not None:
            raise trouble

    def _check(self) -> None:
        """Withdraw every entry whose bytes do not have its digest."""
        vault, damaged = self._vault, 0
        for layer, expert in np.argwhere(vault.filled_LE).tolist():
            entry = vault.expert(layer, expert)
            assert entry is not None
            if digest(entry[0].data) != entry[1]:
                vault.withdraw(layer, expert)
                damaged += 1
        if vault.has_dense and vault.dense_parts() is None:
            vault.withdraw_dense()
            damaged += 1
        count = int(vault.filled_LE.sum())
        if damaged:
            log.warning("%d entries of the vault are damaged and will be filled again, %d are whole", damaged, count)
        else:
            log.info("checked the vault: all %d experts in it are whole", count)

    def _fill_dense(self) -> None:
        writer = self._vault.dense_writer()
        for name, tensor in self._checkpoint.dense_parts(self._dtype):
            self._faults.point("vault_dense")
            size = writer.add(name, tensor)
            self._took("disk", size)
        self._vault.publish_dense(writer.table)

    def _fill_experts(self, holders: Holders) -> None:
        """Fill what is missing, from the nearest who has it."""
        holders.wait_for_the_first_load(self._config.warmup_timeout_s)
        out = np.empty(self._vault.shape.expert_bytes, np.uint8)
        for layer, expert in self._missing():
            if holders.read(layer, expert, out):
                self._put(layer, expert, out, "peer")
        holders.close()
        if self._spec.site is not None:
            self._fill_from_other_hosts(self._spec.site)
        for layer, expert in self._missing():
            self._put_from_disk(layer, expert, out)

    def _fill_from_other_hosts(self, site: Site) -> None:
        """Fill what other hosts' vaults have. They may be filling, too: what they do not have yet is asked again for
        as long as more comes, and a little longer."""
        vault = self._vault
        me = Member(-1, self._spec.incarnation, site.host, os.getpid())
        store = TcpStore(self._spec.store_host, self._spec.store_port)
        config = self._config
        remote = Remote(me, site.node_rank, site.nnodes, store, transports(config, site), config.peer_timeout_s)
        size = vault.shape.expert_bytes
        buffers = np.empty((max(1, min(BATCH_BYTES // size, vault.shape.share_count)), size), np.uint8)
        end = time.monotonic() + OTHER_HOSTS_S
        while (missing := self._missing()) and time.monotonic() < end:
            came = 0
            for first in range(0, len(missing), len(buffers)):
                part = missing[first : first + len(buffers)]
                remote.begin([Want(*place, out, 0) for place, out in zip(part, buffers, strict=False)])
                left = len(part)
                while left:
                    if (arrival := remote.poll(_LOOK_S)) is None:
                        continue
                    left -= 1
                    if arrival.source:
                        came += 1
                        want = arrival.want
                        self._put(want.layer, want.expert, want.out, "vault")
            if came:
                end = time.monotonic() + OTHER_HOSTS_S
            remote.stop()
            time.sleep(_PAUSE_BETWEEN_LOOKS_S if missing else 0)

    def _missing(self) -> list[tuple[int, int]]:
        return [(layer, expert) for layer, expert in np.argwhere(self._vault.missing_LE).tolist()]

    def _put_from_disk(self, layer: int, expert: int, out: Bytes) -> None:
        self._checkpoint.read_expert(layer, expert, out, self._dtype)
        self._put(layer, expert, out, "disk")

    def _put(self, layer: int, expert: int, data: Bytes, source: str) -> None:
        """An expert's bytes are in hand: write them, and say that they are there."""
        self._faults.point("vault_fill")
        found = digest(data.data)
        start = self._vault.shape.expert_start(layer, expert)
        middle = len(data) // 2
        self._vault.write(start, data[:middle])
        self._faults.point("vault_torn")
        self._vault.write(start + middle, data[middle:])
        self._faults.point("vault_publish")
        self._vault.publish(layer, expert, found)
        self._took(source, len(data))

    def _took(self, source: str, size: int) -> None:
        self._report.took(source, size)
        self._since_look += size
        if self._since_look >= _LOOK_AT_MEMORY_EVERY:
            self._since_look = 0
            while (available := self._available()) < RESERVE_BYTES:
                self._report.now("short", f"only {gb(available)} of memory are left: the vault waits")
                time.sleep(_PAUSE_S)
            self._report.enough()

    def _available(self) -> int:
        try:
            self._faults.point("vault_memory")
        except faults.InjectedFault:
            return 0
        return available_bytes()


class Holders:
    """The ranks' slots, as the ranks described them in the store once they had loaded."""

    def __init__(self, spec: VaultSpec) -> None:
        self._ep_size = spec.config.ep_size
        self._host = spec.site.host if spec.site is not None else None
        self._notices = NoticeBoard.open(spec.notices)
        self._store = TcpStore(spec.store_host, spec.store_port)
        self._where: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        self._banks: dict[str, PeerBank | None] = {}

    def wait_for_the_first_load(self, patience_s: float) -> None:
        """Until every rank has said what it holds, or is dead, or has had its time; then learn where each expert is.
        LOCAL."""
        end = time.monotonic() + patience_s
        awaited = [Member(rank, 0) for rank in range(self._ep_size)]
        wait = LongWait(MonotonicClock())
        while awaited and time.monotonic() < end:
            awaited = [member for member in awaited if not (self._learn(member) or self._notices.is_dead(member))]
            if awaited:
                if wait.is_due:
                    wait.say(f"ranks {', '.join(map(str, awaited))} to load, to copy what they hold")
                time.sleep(_LOOK_S)
        for rank in range(self._ep_size):  # nobody waits for those that come back, but they may know more
            if incarnation := int(self._store.get(f"coming/{rank}") or 0):
                self._learn(Member(rank, incarnation))

    def read(self, layer: int, expert: int, out: Bytes) -> bool:
        """Copy an expert from the first rank whose slot has it, checked by its digest; whether there was one. LOCAL."""
        return any(self._copy(layer, *place, out) for place in self._where.get((layer, expert), ()))

    def close(self) -> None:
        """Unmap the ranks' slots. LOCAL."""
        for bank in self._banks.values():
            if bank is not None:
                bank.close()
        self._banks.clear()
        self._notices.close()

    def _learn(self, member: Member) -> bool:
        value = self._store.get(f"digests/{member}")
        if not value:
            return False
        answer = msgspec.msgpack.decode(value, type=Answer)
        here = self._host is None or answer.member.host == self._host
        bank = self._bank(answer.member.weights_address) if here else None
        if bank is not None:
            held_LS = np.frombuffer(answer.held, np.int32).reshape(bank.num_layers, bank.slots_per_rank)
            digest_LS = np.frombuffer(answer.digests, np.uint64).reshape(held_LS.shape)
            for layer, slot in np.argwhere(held_LS >= 0).tolist():
                place = answer.member.weights_address, slot, int(digest_LS[layer, slot])
                self._where.setdefault((layer, int(held_LS[layer, slot])), []).append(place)
        return True

    def _copy(self, layer: int, address: str, slot: int, wanted: int, out: Bytes) -> bool:
        bank = self._bank(address)
        try:
            if bank is not None:
                np.copyto(out, bank.slot_bytes(layer, slot))
                return digest(out.data) == wanted
        except TROUBLE:
            pass
        return False

    def _bank(self, address: str) -> PeerBank | None:
        if address not in self._banks:
            try:
                self._banks[address] = PeerBank.open(address)
            except TROUBLE:
                self._banks[address] = None
        return self._banks[address]


class Report:
    """Says how far the vault is: to the log, and to the server for metrics and status."""

    def __init__(self, spec: VaultSpec, vault: Vault) -> None:
        self._vault, self._restarts = vault, spec.incarnation
        self._node_rank = spec.site.node_rank if spec.site else 0
        shape = vault.shape
        self._total = shape.weight_bytes
        self._filled = vault.filled_bytes
        self._by_source: dict[str, int] = {}
        self._state: m.VaultPhase = "filling"
        self._trouble = ""
        self._began = self._said = self._logged = time.monotonic()
        self._context = zmq.Context()
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.connect(server_endpoint(spec.run_dir))

    def took(self, source: str, size: int) -> None:
        """So many more bytes are in. LOCAL."""
        self._by_source[source] = self._by_source.get(source, 0) + size
        self._filled += size
        now = time.monotonic()
        if now - self._said >= REPORT_EVERY_S:
            self._send("filling")
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("the vault is filled to %.0f %% of %s", 100 * self._filled / self._total, gb(self._total))

    def full(self) -> None:
        """Everything is there. LOCAL."""
        self._filled = self._vault.filled_bytes
        parts = ", ".join(self._sources()) or "nothing was missing"
        self._by_source, self._trouble = {}, ""
        self._send("full")
        log.info("the vault is full: %s in %.1f s (%s)", gb(self._filled), time.monotonic() - self._began, parts)

    def enough(self) -> None:
        """There is memory, so the vault fills. LOCAL."""
        if self._state == "short":
            log.info("there is memory again: the vault goes on filling")
            self._trouble = ""
            self.now("filling")

    def now(self, state: m.VaultPhase, reason: str = "") -> None:
        """Something worth saying at once; trouble that goes on is said to the log once. LOCAL."""
        news = reason and (state, reason) != (self._state, self._trouble) and not (state == self._state == "short")
        self._trouble = reason
        self._began = time.monotonic()
        self._filled = self._vault.filled_bytes
        self._send(state, reason)
        if news:
            log.warning("%s", reason)

    def _sources(self) -> Iterator[str]:
        names = {"vault": "from other hosts", "peer": "from ranks", "disk": "from disk"}
        return (f"{gb(size)} {names[source]}" for source, size in sorted(self._by_source.items(), reverse=True))

    def _send(self, state: m.VaultPhase, reason: str = "") -> None:
        self._state = state
        self._said = time.monotonic()
        self._outbox.send(
            m.encode(
                m.VaultState(
                    state=state, pid=os.getpid(), restarts=self._restarts, filled_bytes=self._filled,
                    total_bytes=self._total, reason=reason, node_rank=self._node_rank,
                )
            )
        )  # fmt: skip
