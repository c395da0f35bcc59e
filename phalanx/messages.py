"""What the processes say to each other: msgspec structs, MessagePack on the wire, a tag for each type.

Server -> worker: `ToWorker`. Worker and launcher -> server: `ToServer`. Server -> launcher: `ToLauncher`.
A token is named by (request, attempt, index): the router takes it only if the attempt is the current one and the
index is the next, so a token can be neither lost nor doubled when a request moves.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from phalanx.testing.faults import Kind

Trigger = Literal["start", "failure", "join", "rebalance", "scale", "operator"]
RankState = Literal["healthy", "suspected", "dead", "recovering", "rejoining", "paused", "leaving"]
FinishReason = Literal["stop", "length", "abort"]
VaultPhase = Literal["off", "filling", "full", "short", "given_up"]
HostPhase = Literal["alive", "lost", "waiting"]


class Message(msgspec.Struct, tag=True, frozen=True, kw_only=True, omit_defaults=True):
    """Root of everything sent between processes."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the next token, with the meanings that vLLM and OpenAI give them.

    temperature 0 is greedy. top_k 0 or -1: off. The noise of position i is a function of (seed, i) alone, where i
    counts the request's output tokens from 0. `logprobs`: how many alternatives to report a token, None for no report.
    `prompt_logprobs` likewise for the prompt.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


# --- server -> worker


class Submit(Message, frozen=True):
    """Run a request. After a move, `output_ids` holds the tokens that the client already has: go on after them."""

    request_id: str
    attempt: int
    prompt_ids: list[int]
    sampling: SamplingParams
    output_ids: list[int] = []


class Abort(Message, frozen=True):
    request_id: str


class Pause(Message, frozen=True):
    """Schedule no request until `Resume`; empty steps go on, so that failures are still found."""


class Resume(Message, frozen=True):
    """Schedule again; a rank that cannot serve tries its recovery once more."""


class InjectFault(Message, frozen=True):
    """Fail on purpose (`testing.faults`): at the start of step `at_step`, or of the next one when it is None."""

    kind: Kind
    at_step: int | None = None
    where: str = "step"
    """The fault point: a name from `phalanx.testing.faults.POINTS`."""


class Stop(Message, frozen=True):
    """Finish the step in hand and exit 0."""


class Knock(Message, frozen=True):
    """A newcomer asks to be let in (`elastic.agree`): look at who asks, and meet. Sent by the newcomer itself, to
    members on its host directly, to others by way of the server; a hint, which may be lost or come twice."""

    rank: int
    incarnation: int


class Leave(Message, frozen=True):
    """The service is scaled down by this rank and others: propose a change of membership, and ask in it that they be
    left out. members: (rank, incarnation) of all who are to leave, so that one change does for them."""

    members: list[tuple[int, int]]


class Stay(Message, frozen=True):
    """`Leave` no longer holds."""


ToWorker = Submit | Abort | Pause | Resume | InjectFault | Stop | Knock | Leave | Stay


# --- worker -> server


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    rank: int
    """1 = the most likely token."""


class TokenOut(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """One committed token, or, with token_id -1, an end without one (an abort).

    index counts output tokens from 0. logprobs: the chosen token first, then the most likely ones.
    """

    request_id: str
    attempt: int
    index: int
    token_id: int
    finish_reason: FinishReason | None = None
    stop_token: bool = False
    """The token is an end-of-sequence or a stop token: its text is not shown."""
    logprobs: list[Logprob] | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """For each prompt token after the first, the token itself and then the most likely ones. Comes before index 0."""

    request_id: str
    attempt: int
    entries: list[list[Logprob]]


class Load(msgspec.Struct, frozen=True, array_like=True):
    """A rank's occupation, for the router's choice and the metrics."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    preemptions: int = 0
    """Since start."""
    prefix_queries: int = 0
    """Tokens of admitted requests, since start."""
    prefix_hits: int = 0
    """Those of them whose KV was found in the prefix cache."""


class Stepped(Message, frozen=True):
    """What one committed step produced on one rank."""

    rank: int
    incarnation: int
    epoch: int
    step: int
    tokens: list[TokenOut]
    prompt_logprobs: list[PromptLogprobs] = []
    load: Load = Load()
    prompt_tokens: int = 0
    """Prompt tokens computed in this step."""


class Rejected(Message, frozen=True):
    """This rank cannot ever run the request (it needs more KV blocks than there are, say)."""

    rank: int
    incarnation: int
    request_id: str
    attempt: int
    reason: str


class PhaseSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """How long each phase of a recovery took on one rank."""

    detect: float = 0.0
    agree: float = 0.0
    mask: float = 0.0
    replan: float = 0.0
    restore: float = 0.0
    replay: float = 0.0
    total: float = 0.0


class StepSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """What one step spent its time on, on one rank."""

    meet: float = 0.0
    """Until all peers had come to the step; to plan it included."""
    launch: float = 0.0
    """Lay it out and launch it; where the host computes, all of the computing."""
    meet_next: float = 0.0
    """The same of the step that is launched behind it, where one is."""
    launch_next: float = 0.0
    wait: float = 0.0
    """From then on until it had run."""
    commit: float = 0.0
    """Choose what tokens the device has not chosen, and count the step."""


class MemberInfo(msgspec.Struct, frozen=True):
    rank: int
    incarnation: int
    pid: int
    host: str
    device: str


class Adopted(Message, frozen=True):
    """This rank serves under a new World. Sent once `restore` is done, before the replay."""

    rank: int
    incarnation: int
    epoch: int
    members: list[MemberInfo]
    trigger: Trigger
    lost: list[int] = []
    causes: dict[int, str] = {}
    left: list[int] = []
    """Ranks that were in before and left because an operator wanted it; none of `lost`."""
    kv_tokens: int = 0
    """Tokens that this rank's KV cache holds: no request may be longer. 0: not said."""
    ranks_needed: int = 1
    """How many ranks' slots it takes to hold every expert."""


class Recovered(Message, frozen=True):
    """This rank committed its first step under `epoch`: the timeline of what that took."""

    rank: int
    incarnation: int
    epoch: int
    trigger: Trigger
    lost: list[int]
    seconds: PhaseSeconds
    bytes_restored: dict[str, int]
    """By source: peer, vault, disk."""
    seconds_restored: dict[str, float] = {}
    """What they took, by source, the check of the digests included."""
    steps_replayed: int = 0
    prepared: dict[str, float] = {}
    """Of a newcomer: seconds from its birth until it asked to be let in, by what it did."""
    first_step: StepSeconds = StepSeconds()
    """Of `seconds.replay`: the first step under `epoch`."""
    pace: float = 0.0
    """Seconds that a step took this rank before, in the median of the last ones; 0: it took too few."""


class Balance(Message, frozen=True):
    """How evenly the experts' load is spread, and what this rank did about it in the background."""

    rank: int
    incarnation: int
    epoch: int
    moves: int = 0
    """Experts that this rank staged since its last such message."""
    replicas: int = 0
    """Filled expert slots of the World, all layers and ranks; said by the lowest rank, 0: not said."""
    balancedness: float | None = None
    """Mean over max of the ranks' expected load, averaged over the layers; said by the lowest rank. None: not known."""


class CannotServe(Message, frozen=True):
    """This rank is alive but its view cannot serve (too few ranks or slots, experts lost). It stays and waits."""

    rank: int
    incarnation: int
    epoch: int
    reason: str
    members: list[MemberInfo] = []


class Paused(Message, frozen=True):
    rank: int
    incarnation: int
    paused: bool


# --- launcher -> server


class Spawned(Message, frozen=True):
    rank: int
    incarnation: int
    pid: int
    host: str = "localhost"


class Died(Message, frozen=True):
    """The process is gone. cause: exit | signal | exception | evicted | left (its place was no longer in use)
    | host (its host is lost)."""

    rank: int
    incarnation: int
    cause: str
    detail: str = ""


class GivenUp(Message, frozen=True):
    """The launcher does not start this rank again by itself; `reason` says why, and what an operator can do."""

    rank: int
    incarnation: int
    reason: str


class VaultState(Message, frozen=True):
    """How the vault of a host is. Its process sends it while it fills; the launcher when there is none any more.

    filled_bytes of total_bytes: weights. restarts: how often its process was started again. short: it waits, because
    the host has little memory left. node_rank: the host's number."""

    state: VaultPhase
    node_rank: int = 0
    pid: int = 0
    restarts: int = 0
    filled_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


class HostState(Message, frozen=True):
    """How a host is, with all its ranks. waiting: it was never there. lost: (rank, incarnation) of the processes that
    were alive on it; they died in one moment."""

    node_rank: int
    state: HostPhase
    ranks: list[int]
    host: str = ""
    reason: str = ""
    lost: list[tuple[int, int]] = []


class Suspected(Message, frozen=True):
    """A rank finds others silent; a roll call decides."""

    rank: int
    incarnation: int
    suspects: list[int]
    epoch: int


ToServer = (
    Stepped
    | Rejected
    | Adopted
    | Recovered
    | Balance
    | CannotServe
    | Paused
    | Spawned
    | Died
    | GivenUp
    | Suspected
    | VaultState
    | HostState
    | Knock
)


# --- server -> launcher


class Signal(Message, frozen=True):
    """Send a signal to a rank's process (chaos), by name: SIGKILL, SIGSTOP or SIGCONT."""

    rank: int
    name: Literal["SIGKILL", "SIGSTOP", "SIGCONT"]


class MaskRank(Message, frozen=True):
    """An operator takes a rank out: it is treated as dead from now on, and exits."""

    rank: int


class StartRank(Message, frozen=True):
    """An operator wants a dead rank back, whatever kept it out."""

    rank: int


class ViewChanged(Message, frozen=True):
    """The ranks agreed on who is in: (rank, incarnation) of each member. Who was in before and is not, is evicted."""

    epoch: int
    members: list[tuple[int, int]]
    serving: bool = True
    """They serve under it: nobody needs anything any more that a rank outside has."""


class UseRanks(Message, frozen=True):
    """The places that are to be in use from now on: processes are started where none is, and a dead one is started
    again nowhere else. A rank elsewhere is asked to end as soon as a view without it serves."""

    ranks: list[int]


class ShutDown(Message, frozen=True):
    """The server is going: stop everything."""

    reason: str = ""


ToLauncher = Signal | MaskRank | StartRank | ViewChanged | UseRanks | ShutDown


def encode(message: Message) -> bytes:
    """MessagePack bytes. LOCAL."""
    return msgspec.msgpack.encode(message)


to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
to_server_decoder = msgspec.msgpack.Decoder(ToServer)
to_launcher_decoder = msgspec.msgpack.Decoder(ToLauncher)
