"""Places: which ranks stand on which host, who may take a host's place, and when a silent host is lost. Pure.

The first host decides all of this, for it has the store: a host is in from the moment it is welcomed until its
connection ends or stays silent. Whoever takes the place next is another incarnation of every rank in it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from phalanx.config import ServeConfig

BEAT_S = 0.5
"""How often launchers tell each other that they live."""

FREE_TO_DIFFER = frozenset(
    {
        "model", "served_model_name", "ib_device", "chat_template", "threads_per_rank", "expert_backup", "max_restarts",
        "restart_window_s", "max_queued_requests", "drain_timeout_s", "request_patience_s", "host", "port", "api_key",
        "log_level", "log_format", "events_file", "node_rank", "node_host", "dist_init_addr", "cluster_token_file",
        "elastic_ep_rejoin",
    }
)  # fmt: skip
"""Fields of a config that only the first host uses, or that are each host's own matter."""


def ranks_of(node_rank: int, nnodes: int, ep_size: int, places: int = 0) -> list[int]:
    """The ranks of a host: a block of those that the service starts with, and one of the vacant places (of `places` in
    all; 0: there are none), each as equal as can be, the first hosts having one more. LOCAL."""
    further = max(0, places - ep_size)
    return [*_block(node_rank, nnodes, ep_size, 0), *_block(node_rank, nnodes, further, ep_size)]


def _block(node_rank: int, nnodes: int, count: int, start: int) -> range:
    base, more = divmod(count, nnodes)
    first = start + node_rank * base + min(node_rank, more)
    return range(first, first + base + (node_rank < more))


_ON = ("off", "on")


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What hosts must have in common. model: a digest of the model's shape; flags: by field of `ServeConfig`."""

    version: str
    model: str
    flags: dict[str, Any]

    @classmethod
    def of(cls, config: ServeConfig, version: str, model: str) -> Terms:
        """What this host has. LOCAL."""
        flags = {name: value for name, value in msgspec.to_builtins(config).items() if name not in FREE_TO_DIFFER}
        return cls(version=version, model=model, flags=flags)

    def difference(self, theirs: Terms) -> str:
        """What another host must change to be like this one; "" when nothing. LOCAL."""
        if self.version != theirs.version:
            return f"it runs version {theirs.version}, the first host runs {self.version}: install the same"
        for name in sorted(self.flags.keys() | theirs.flags.keys()):
            here, there = self.flags.get(name), theirs.flags.get(name)
            if here != there:
                flag = "--" + name.removesuffix("_s").replace("_", "-")
                if isinstance(here, bool) and isinstance(there, bool):
                    return f"{flag} is {_ON[there]} there and {_ON[here]} on the first host: give the same on each host"
                return f"it has {flag} {there}, the first host has {here}: give the same on each host"
        if self.model != theirs.model:
            return "its MODEL has another shape than the first host's: give the same model on each host"
        return ""


class Silence:
    """How long another host has been silent, counting only time in which this process could have heard it: one that
    was stopped, or had no CPU, must not hold its own absence against the others."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        self.limit_s = limit_s
        self.silent_s = 0.0
        self._looked_s = now_s

    def heard(self, now_s: float) -> None:
        """Something came. LOCAL."""
        self.silent_s, self._looked_s = 0.0, now_s

    def is_over(self, now_s: float) -> bool:
        """Whether the limit has passed. To be asked every BEAT_S or so, after what came was read. LOCAL."""
        self.silent_s += min(now_s - self._looked_s, 2 * BEAT_S)
        self._looked_s = now_s
        return self.silent_s > self.limit_s


class Refusal(msgspec.Struct, frozen=True):
    """Why a host is not let in. final: asking again is of no use."""

    reason: str
    final: bool = True


class Places:
    """Who is in, as the first host decides."""

    def __init__(self, ep_size: int, nnodes: int, terms: Terms, places: int = 0, sessions_from: int = 0) -> None:
        """sessions_from: below the numbers of the sessions; another one in each life of a first host."""
        assert ep_size >= nnodes, f"{nnodes} hosts for {ep_size} ranks"  # `ServeConfig.check` refuses it
        self._ranks = [ranks_of(node, nnodes, ep_size, places) for node in range(nnodes)]
        self.nnodes = nnodes
        self._terms = terms
        self._in: dict[int, tuple[int, Silence]] = {}
        """By host: its session, and how long it has been silent."""
        self._sessions = sessions_from

    def ranks_of(self, node_rank: int) -> list[int]:
        return self._ranks[node_rank]

    def host_of(self, rank: int) -> int:
        """The host on which a rank stands. LOCAL."""
        return next(node for node in range(self.nnodes) if rank in self.ranks_of(node))

    def register(self, node_rank: int, terms: Terms, limit_s: float, now_s: float) -> int | Refusal:
        """A host asks for its place: the number of its session, or why not. limit_s: the longest silence. LOCAL."""
        if not 1 <= node_rank < self.nnodes:
            return Refusal(f"--node-rank {node_rank} is none of the other hosts' 1 to {self.nnodes - 1} (--nnodes)")
        if difference := self._terms.difference(terms):
            return Refusal(f"host {node_rank} cannot come in: {difference}")
        if node_rank in self._in:
            silent_s = self._in[node_rank][1].silent_s
            where = f"--node-rank {node_rank} is taken by a living host"
            if silent_s <= 2 * BEAT_S:
                return Refusal(f"{where}: choose another, or end that one first")
            return Refusal(f"{where}, which has been silent for {silent_s:.1f} s", final=False)
        self._sessions += 1
        self._in[node_rank] = self._sessions, Silence(limit_s, now_s)
        return self._sessions

    def session(self, node_rank: int) -> int:
        """The session of a host that is in; 0 when it is not. LOCAL."""
        return self._in[node_rank][0] if node_rank in self._in else 0

    def heard(self, node_rank: int, now_s: float) -> None:
        """A host that is in said something. LOCAL."""
        self._in[node_rank][1].heard(now_s)

    def silent(self, now_s: float) -> list[int]:
        """Hosts that have been silent for too long. LOCAL."""
        return [node for node, (_, silence) in self._in.items() if silence.is_over(now_s)]

    def left(self, node_rank: int) -> None:
        """A host is no longer in. LOCAL."""
        self._in.pop(node_rank, None)


def next_incarnation(last: int | None, met: bool) -> int:
    """The incarnation of a rank's next process. last: the one before; None: there was none. met: the ranks have met for
    the first time, so that whoever comes now asks to be let in, which incarnation 0 never does. LOCAL."""
    if last is None:
        return 1 if met else 0
    return last + 1
