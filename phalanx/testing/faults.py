"""Failing on purpose, in public: named points in the code at which a process can be made to die, stop or raise.

Code that can fail holds a `Faults` object and passes its points: `faults.point("restore")`. In production that is
NO_FAULTS, and a point costs one empty method call. With chaos enabled it is a `FaultInjector`, armed by an operator
(POST /chaos, `phalanx chaos`), by a test, or for a process that is only starting by the environment:

    PHALANX_FAULTS="kill@restore:rank=1:n=2"              rank 1 dies when it comes to its second restore
    PHALANX_FAULTS="stop@dispatch:rank=0:step=7,raise@commit:rank=2:incarnation=1"
    PHALANX_FAULTS='[{"kind": "kill", "where": "join", "rank": 3}]'

A rank on a CUDA device can fail in more ways (`DEVICE_KINDS`); how is `testing.device_faults`'s matter. The idea of a
public injector that tests and operators share is torchft's. Imports the standard library and `phalanx.errors` alone, so
that everything may import it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args

from phalanx.errors import BadConfig, PhalanxError

Kind = Literal["kill", "stop", "raise", "illegal-access", "device-assert", "out-of-memory", "hung-kernel"]

DEVICE_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "illegal-access": "a kernel stores where there is no memory: its CUDA context is of no use any more",
        "device-assert": "an assertion fails within a kernel: the same",
        "out-of-memory": "the device has not the memory that is asked for",
        "hung-kernel": "a kernel spins for ever: the rank falls silent, and its process lives",
    }
)
"""Kinds that need a CUDA device: name, and what happens to it."""

ENVIRONMENT_VARIABLE = "PHALANX_FAULTS"

POINTS: Mapping[str, str] = MappingProxyType(
    {
        "start": "a worker's process runs; nothing is loaded",
        "step": "a step begins",
        "schedule": "the step's batch is chosen",
        "prefill": "a batch with prompt tokens is about to run",
        "decode": "a batch without prompt tokens is about to run",
        "dispatch": "between what a dispatch sends and what it waits for",
        "combine": "between what a combine sends and what it waits for",
        "all_gather": "between what an all_gather sends and what it waits for",
        "half_sent": "a collective of any kind has told one peer and not yet the others",
        "half_framed": "half of a collective's part for a rank of another host is sent",
        "received": "a collective of any kind has heard everyone and is about to take what came",
        "commit": "the step was checked and is about to be committed",
        "roll_call": "this rank is about to answer a roll call",
        "publish": "the roll call is complete and the lowest rank is about to publish the new World",
        "replan": "the roll call's result was read",
        "restore": "an expert is about to be restored (once for each)",
        "stage": "an expert is about to be staged in the background (once for each)",
        "adopt": "every expert is restored, the new World is about to be adopted",
        "barrier": "between what a barrier sends and what it waits for",
        "join": "a newcomer asks to be let in",
        "vault_dense": "the vault's process is about to copy a dense tensor in",
        "vault_memory": "the vault's process looks how much memory is left; a raise stands for too little of it",
        "vault_fill": "the vault's process is about to copy an expert in",
        "vault_torn": "half of an expert's bytes are in the vault",
        "vault_publish": "an expert's bytes are in the vault, and nobody is told yet",
    }
)
"""Every fault point: its name, and where it is passed."""

WITHOUT_A_DEVICE = frozenset(name for name in POINTS if name == "start" or name.startswith("vault"))
"""Points that are passed where no device is in hand."""

BY_ENVIRONMENT_ALONE = WITHOUT_A_DEVICE | {"join"}
"""Points that no rank passes which runs and can be asked: only PHALANX_FAULTS reaches them."""

IN_COLLECTIVES = frozenset({"dispatch", "combine", "all_gather", "half_sent", "half_framed", "received"})
"""Points that only a CPU's communicator passes: on a device these moments lie within a kernel."""


class InjectedFault(PhalanxError):
    """The Python exception that a `raise` fault throws: a stand-in for any bug."""


@dataclass(frozen=True)
class Fault:
    """One planned failure.

    kind: kill (SIGKILL to this process), stop (SIGSTOP to this process), raise (InjectedFault), or one of DEVICE_KINDS.
    where: a name of POINTS. at_step: not before this step; None: at once. count: at the count-th pass from then on.
    """

    kind: Kind
    where: str = "step"
    at_step: int | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise BadConfig(f"fault kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.where not in POINTS:
            raise BadConfig(f"there is no fault point {self.where!r}: choose one of {', '.join(POINTS)}")
        if self.kind in DEVICE_KINDS and self.where in WITHOUT_A_DEVICE:
            raise BadConfig(f"a fault of the kind {self.kind} needs a device, and at {self.where} none is in hand")
        if self.count < 1:
            raise BadConfig(f"a fault's count must be at least 1, not {self.count}")


class Faults:
    """The object that production holds: its points do nothing, and it cannot be armed."""

    def arm(self, kind: Kind, at_step: int | None = None, where: str = "step", count: int = 1) -> None:
        """Plan a fault; see `Fault`. Raises BadConfig here, because chaos is off. LOCAL."""
        raise BadConfig("faults can be injected only in a service that was started with --enable-chaos")

    def point(self, name: str, step: int | None = None) -> None:
        """Pass the fault point `name`. `step`: the number of the step in hand, where it is known. LOCAL."""


NO_FAULTS = Faults()
"""The one to use where nothing is to fail; it holds no state."""


class FaultInjector(Faults):
    """Fails at the points it was armed for, once for each time it was armed. Not for several threads at once.

    Points that know no step (those inside a collective) count as part of the last step that a point named."""

    def __init__(self, *faults: Fault, on_device: Callable[[str], object] | None = None) -> None:
        """on_device: makes this process's device fail in one of DEVICE_KINDS; None: there is no device."""
        self._planned = list(faults)
        self._step = 0
        self.on_device = on_device

    @property
    def planned(self) -> tuple[Fault, ...]:
        """What is still to fail."""
        return tuple(self._planned)

    def arm(self, kind: Kind, at_step: int | None = None, where: str = "step", count: int = 1) -> None:
        self._planned.append(Fault(kind, where, at_step, count))

    def point(self, name: str, step: int | None = None) -> None:
        """Raises InjectedFault, or an error of the device, or does not return, when a fault is due."""
        if step is not None:
            self._step = step
        if not self._planned:
            return
        assert name in POINTS, f"no fault point is called {name!r}"
        waiting: list[Fault] = []
        due: Fault | None = None
        for fault in self._planned:
            if fault.where != name or (fault.at_step is not None and self._step < fault.at_step):
                waiting.append(fault)
            elif fault.count > 1:
                waiting.append(replace(fault, count=fault.count - 1))
            elif due is None:
                due = fault
            else:
                waiting.append(fault)
        self._planned = waiting
        if due is not None:
            self._fail(due)

    def _fail(self, fault: Fault) -> None:
        if fault.kind == "raise":
            raise InjectedFault(f"injected at {fault.where} in step {self._step}")
        if fault.kind in DEVICE_KINDS:
            if self.on_device is None:
                raise BadConfig(f"a fault of the kind {fault.kind} needs --device cuda")
            self.on_device(fault.kind)
            return
        os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


def from_environment(environ: Mapping[str, str] = os.environ, device: str = "", places: int | None = None) -> str:
    """What PHALANX_FAULTS asks for, checked but not yet meant for any rank; "" for nothing. LOCAL.

    The one who starts processes reads it, when chaos is enabled, and hands it on to them (`armed`). device: that of the
    service, "" for any. places: how many ranks it can have, None for any number.
    Raises BadConfig when it cannot be read, or names what cannot happen there."""
    text = environ.get(ENVIRONMENT_VARIABLE, "").strip()
    for entry in _read(text):
        if places is not None and entry.rank is not None and entry.rank >= places:
            raise BadConfig(f"{ENVIRONMENT_VARIABLE}: there is no rank {entry.rank}: this service has {places} places")
        if device and (why := cannot_happen(entry.fault.kind, entry.fault.where, device)):
            raise BadConfig(f"{ENVIRONMENT_VARIABLE}: {why}")
    return text


def cannot_happen(kind: str, where: str, device: str) -> str:
    """Why a fault cannot happen on `device`, cpu or cuda; "" when it can. LOCAL."""
    if kind in DEVICE_KINDS and device != "cuda":
        return f"{kind} is a failure of a CUDA device, and this service computes with --device {device}"
    if device == "cuda" and where in IN_COLLECTIVES:
        return (
            f"{where} lies within a kernel on --device cuda, where nothing can be made to fail: choose decode, prefill "
            "or commit, or leave it out"
        )
    return ""


def armed(text: str, rank: int, incarnation: int) -> FaultInjector:
    """An injector armed with those entries of `text` (as from `from_environment`) that are for this process. LOCAL.

    An entry without `rank` is for every rank, one without `incarnation` for each process that a rank ever has. What is
    to become of a device waits for `on_device` to be set."""
    return FaultInjector(*(entry.fault for entry in _read(text) if entry.is_for(rank, incarnation)))


@dataclass(frozen=True)
class _Entry:
    fault: Fault
    rank: int | None = None
    incarnation: int | None = None

    def is_for(self, rank: int, incarnation: int) -> bool:
        return self.rank in (None, rank) and self.incarnation in (None, incarnation)


def _read(text: str) -> list[_Entry]:
    if not text.startswith(("[", "{")):
        return [_entry(_compact(item.strip())) for item in text.replace(";", ",").split(",") if item.strip()]
    try:
        value = json.loads(text)
    except ValueError:
        raise _unreadable(text) from None
    return [_entry(item) for item in (value if isinstance(value, list) else [value])]


def _compact(item: str) -> dict[str, Any]:
    """`kind[@point][:rank=R][:incarnation=I][:step=N][:n=COUNT]`"""
    head, *settings = item.split(":")
    kind, _, where = head.partition("@")
    fields: dict[str, Any] = {"kind": kind, "where": where or "step"}
    names = {"rank": "rank", "incarnation": "incarnation", "step": "at_step", "n": "count"}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names or not value.isdecimal():
            raise _unreadable(item)
        fields[names[name]] = int(value)
    return fields


def _entry(fields: Any) -> _Entry:
    if not isinstance(fields, dict):
        raise _unreadable(json.dumps(fields))
    types = {"rank": (int, NoneType), "incarnation": (int, NoneType), "at_step": (int, NoneType), "count": (int,)}
    if any(type(value) not in types.get(name, (str,)) for name, value in fields.items()):
        raise _unreadable(json.dumps(fields))
    settings = dict(fields)
    rank, incarnation = settings.pop("rank", None), settings.pop("incarnation", None)
    try:
        return _Entry(Fault(**settings), rank, incarnation)
    except TypeError:
        raise _unreadable(json.dumps(fields)) from None
    except BadConfig as error:
        raise BadConfig(f"{ENVIRONMENT_VARIABLE}: {error}") from None


def _unreadable(text: str) -> BadConfig:
    return BadConfig(
        f"{ENVIRONMENT_VARIABLE}: cannot read {text!r}; write kind@point[:rank=R][:incarnation=I][:step=N][:n=COUNT]"
    )
