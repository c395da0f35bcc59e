"""A request in flight, where its results go, and what the router may want done: the values that it works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from phalanx import messages as m
from phalanx.errors import PhalanxError
from phalanx.observe.events import Recovery
from phalanx.server.roster import Identity


class RouterError(PhalanxError):
    """Why a request is not taken, or cannot go on."""


class QueueFull(RouterError):
    """As many requests as may wait are waiting."""


class Unavailable(RouterError):
    """No rank can serve now; trying later may help."""


class RankRefused(RouterError):
    """A rank cannot ever run the request."""


class RequestBroken(RouterError):
    """Something failed that should not: a bug."""


class Sink(Protocol):
    """Where a request's results go. Calls are made in order; after `fail` or an end there are no more."""

    def prompt_logprobs(self, entries: list[list[m.Logprob]]) -> None:
        """The prompt's report; before the first token."""

    def token(self, token: m.TokenOut) -> bool:
        """The next token, or the end without one (token_id -1). True: the client needs no more."""
        ...

    def fail(self, error: RouterError) -> None:
        """The request ends here."""


@dataclass(frozen=True)
class Request:
    """What to run. `request_id` is unique; `group` names the client's call that it belongs to."""

    request_id: str
    group: str
    prompt_ids: list[int]
    sampling: m.SamplingParams
    sink: Sink = field(compare=False)


@dataclass(eq=False, slots=True)
class Flight:
    """A request in flight: what was accepted of it, and who has it. `at` None: held, no rank has it."""

    request: Request
    arrived_at: float
    output_ids: list[int] = field(default_factory=list)
    attempt: int = 0
    at: Identity | None = None
    submitted: bool = False
    has_prompt_logprobs: bool = False
    last_token_at: float = 0.0
    disturbed: int = 0
    """A change of membership came since its last token: the gap before its first token of this epoch is a stall."""
    gaps: int = 0

    @property
    def tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)


# --- what the router wants done


@dataclass(frozen=True)
class Connect:
    """A new process is there to be spoken to."""

    identity: Identity


@dataclass(frozen=True)
class Disconnect:
    """Nothing is said to this identity any more."""

    identity: Identity


@dataclass(frozen=True)
class ToRank:
    """Send a message to one identity."""

    identity: Identity
    message: m.ToWorker


@dataclass(frozen=True)
class Report:
    """A recovery is over: log it, keep it."""

    recovery: Recovery


@dataclass(frozen=True)
class Lost:
    """A rank was lost."""

    identity: Identity
    cause: str
    detail: str


@dataclass(frozen=True)
class NewView:
    """The ranks agreed on who is in: the launcher is to know."""

    epoch: int
    members: tuple[Identity, ...]
    serving: bool = True


@dataclass(frozen=True)
class ToLauncher:
    """Send a message to the launcher."""

    message: m.ToLauncher


Effect = Connect | Disconnect | ToRank | ToLauncher | Report | Lost | NewView
