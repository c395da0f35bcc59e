"""What `phalanx serve` makes of the flags of SGLang and vLLM: a table, and how it is read.

Commands that are written down for those two run here with the program's name replaced. Each of their flags is the same
as one of ours (`alias`), says what is always so here or changes nothing but speed (`accepted`, a line of log tells), or
asks for something else (`refused`, with the reason). FOREIGN is the whole truth: the options that the command line
knows and the table in docs/operations.md are made from it (`python -m phalanx.cli.aliases` prints the latter).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click

from phalanx.errors import BadConfig

Kind = Literal["alias", "accepted", "refused"]
Reading = Literal["same", "ranks", "shared"]
Given = Sequence[tuple[str, Any]]
"""Foreign flags as the user wrote them, with their values; True for a switch."""


@dataclass(frozen=True)
class Foreign:
    """One flag of another server.

    names: all its spellings. says: what it means here, or why it is refused. takes: "" for a switch, else what follows
    it ("int", "float" or "text").
    target: for an alias our own flag, "MODEL" for the argument. value: what the target becomes; None: what was given.
    reading: how an alias's number becomes ours: the same; a number of ranks, on which all such flags must agree; or
    shared, a sum over all ranks of which each rank gets its part, rounded up.
    only: the values that this kind is for; with any other the flag is refused, because of `otherwise`.
    """

    names: tuple[str, ...]
    kind: Kind
    says: str
    takes: Literal["", "int", "float", "text"] = ""
    target: str = ""
    value: str | bool | int | None = None
    reading: Reading = "same"
    only: tuple[str, ...] = ()
    otherwise: str = ""

    @property
    def field(self) -> str:
        """The parameter of `phalanx serve` that an alias sets."""
        return self.target.removeprefix("--").removeprefix("no-").replace("-", "_").lower()

    def ours(self, value: object) -> str:
        """Our way to say it. LOCAL."""
        return self.target if self.takes == "" and isinstance(value, bool) else f"{self.target} {value}"


_EACH_RANK = "a rank is one attention replica and one share of the experts, so this is the number of ranks"
_OWN_KERNELS = "kernels are Phalanx's own"
_BY_ITSELF = "the service starts its new ranks itself: --max-ep-size, and POST /scale_elastic_ep when it is time"
_ONE_KIND = "every rank does prefill and decode"

FOREIGN: tuple[Foreign, ...] = (
    # the model
    Foreign(("--model-path", "--model"), "alias", "the checkpoint's directory", "text", target="MODEL"),
    Foreign(("--trust-remote-code",), "accepted", "no code that comes with a checkpoint is ever run"),
    Foreign(("--context-length",), "alias", "tokens of prompt and answer together", "int", target="--max-model-len"),
    Foreign(("--random-seed",), "alias", "for requests that bring no seed", "int", target="--seed"),
    Foreign(("--speculative-algorithm",), "refused", "each token is computed by the model itself", "text"),
    # ranks
    Foreign(("--tp", "--tp-size", "--tensor-parallel-size"), "alias", _EACH_RANK, "int", target="--ep-size",
            reading="ranks"),
    Foreign(("--dp", "--dp-size", "--data-parallel-size"), "alias", _EACH_RANK, "int", target="--ep-size",
            reading="ranks"),
    Foreign(("--ep", "--expert-parallel-size"), "alias", "the number of ranks", "int", target="--ep-size",
            reading="ranks"),
    Foreign(("--data-parallel-size-local", "--elastic-ep-initial-size"), "alias", "the number of ranks at the start",
            "int", target="--ep-size", reading="ranks"),
    Foreign(("--pp-size", "--pipeline-parallel-size", "--attention-context-parallel-size"), "accepted",
            "every rank has all layers, and whole sequences", "int", only=("1",),
            otherwise="layers and sequences are not split over ranks"),
    Foreign(("--enable-dp-attention",), "accepted", "each rank always has its own requests and KV cache"),
    Foreign(("--enable-dp-lm-head",), "accepted", "each rank always computes the logits of its own requests"),
    Foreign(("--moe-dense-tp-size",), "accepted", "dense layers are always whole on each rank", "int", only=("1",),
            otherwise="dense layers are not split over ranks"),
    Foreign(("--enable-expert-parallel",), "accepted", "experts are always sharded over all ranks"),
    Foreign(("--data-parallel-backend",), "accepted", "the launcher starts the ranks", "text"),
    Foreign(("--load-balance-method",), "accepted",
            "a request goes to the rank with the fewest requests, then the fewest tokens, then in turn", "text",
            only=("auto", "round_robin", "total_requests", "total_tokens", "shortest_queue", "minimum_tokens"),
            otherwise="the router knows no other way"),
    Foreign(("--disaggregation-mode",), "accepted", _ONE_KIND, "text", only=("null",),
            otherwise="prefill and decode are not separated"),
    # elasticity
    Foreign(("--elastic-ep-backend",), "alias",
            "ranks may die and come back; the transport is Phalanx's own, whichever is named", "text",
            target="--elastic", value=True, only=("mooncake", "nixl"),
            otherwise="known are mooncake and nixl; --no-elastic has the service end with the first rank that dies"),
    Foreign(("--enable-elastic-ep",), "alias", "ranks may die and come back", target="--elastic", value=True),
    Foreign(("--enable-elastic-expert-backup",), "alias", "all weights in host memory", target="--expert-backup",
            value="dram"),
    Foreign(("--mooncake-ib-device",), "alias",
            "devices for transfers between hosts; no effect where there is one host", "text", target="--ib-device"),
    Foreign(("--elastic-ep-join-mode",), "alias",
            "for a whole host; a single rank that died is started again by the service itself", "text",
            target="--elastic-ep-rejoin", value=True, only=("recover",), otherwise=_BY_ITSELF),
    Foreign(("--elastic-ep-join-rank-offset",), "refused", _BY_ITSELF, "int"),
    # experts
    Foreign(("--ep-num-redundant-experts",), "alias", "replicas beyond one of each expert", "int",
            target="--num-redundant-experts"),
    Foreign(("--eplb-rebalance-num-iterations",), "alias", "steps from one plan to the next", "int",
            target="--eplb-interval"),
    Foreign(("--eplb-algorithm",), "accepted", "there is one planner, and it minds failures", "text"),
    Foreign(("--eplb-config",), "refused",
            "say it with --eplb-window, --eplb-interval and --num-redundant-experts", "text"),
    Foreign(("--ep-dispatch-algorithm",), "accepted", "replicas of an expert take turns by position", "text",
            only=("static", "dynamic"), otherwise="only static and dynamic leave the text as it is"),
    Foreign(("--moe-a2a-backend",), "accepted", "dispatch and combine are Phalanx's own, whichever is named", "text",
            only=("mooncake", "nixl", "deepep"),
            otherwise="known are mooncake, nixl and deepep; experts are always sharded, so tokens always travel"),
    Foreign(("--all2all-backend",), "accepted", "dispatch and combine are Phalanx's own, whichever is named", "text"),
    Foreign(("--deepep-mode",), "accepted", "one dispatch, of the low-latency kind, does prefill and decode", "text",
            only=("low_latency", "auto"), otherwise="there is no other dispatch"),
    Foreign(("--moe-runner-backend", "--attention-backend", "--sampling-backend"), "accepted", _OWN_KERNELS, "text"),
    Foreign(("--disable-custom-all-reduce",), "accepted", "there is no all-reduce"),
    # how much at once
    Foreign(("--chunked-prefill-size",), "alias", "counted over all ranks, of which each gets its part", "int",
            target="--max-num-batched-tokens", reading="shared"),
    Foreign(("--max-running-requests",), "alias", "counted over all ranks, of which each gets its part", "int",
            target="--max-num-seqs", reading="shared"),
    Foreign(("--page-size",), "alias", "tokens a KV block", "int", target="--block-size"),
    Foreign(("--gpu-memory-utilization",), "alias",
            "of a device, for weights and KV cache; no effect on the CPU, where --kv-cache-memory-mb says it", "float",
            target="--mem-fraction-static"),
    Foreign(("--disable-radix-cache",), "alias", "no KV is kept for later prompts",
            target="--no-enable-prefix-caching", value=False),
    Foreign(("--enable-two-batch-overlap",), "accepted", "no effect: a batch is computed in one piece"),
    Foreign(("--disable-overlap-schedule",), "accepted", "no effect: the same tokens, with steps ahead or without"),
    Foreign(("--cuda-graph-max-bs-decode",), "alias", "the largest batch of decodes with a CUDA graph", "int",
            target="--cuda-graph-max-bs"),
    Foreign(("--disable-cuda-graph", "--enforce-eager"), "alias", "nothing is captured in CUDA graphs",
            target="--cuda-graph-max-bs", value=0),
    Foreign(("--piecewise-cuda-graph-max-tokens",), "alias", "the most tokens of a step with prefills in a CUDA graph",
            "int", target="--cuda-graph-max-tokens"),
    Foreign(("--disable-piecewise-cuda-graph",), "alias", "steps with prefills are launched eagerly",
            target="--cuda-graph-max-tokens", value=0),
    Foreign(("--cuda-graph-backend-decode", "--cuda-graph-backend-prefill"), "accepted",
            "whole steps are captured, up to --cuda-graph-max-bs and --cuda-graph-max-tokens", "text"),
    # around it
    Foreign(("--enable-metrics",), "accepted", "/metrics is always there"),
)  # fmt: skip
"""Every foreign flag that is known. Those that we have under the same name (`--host`, say) are ours."""

DEVICES_ELSEWHERE = ("cuda", "xpu", "hpu", "npu", "musa", "tpu")
"""Values of `--device` that others have; refused with a reason where we do not."""

_TYPES: Mapping[str, Any] = {"int": int, "float": float, "text": str}


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command all foreign flags, unseen in its help; `taken_from` finds what was given. LOCAL."""
    for entry in FOREIGN:
        for name in entry.names:
            kind = {"is_flag": True} if not entry.takes else {"type": _TYPES[entry.takes]}
            command = click.option(name, _parameter(name), default=None, hidden=True, **kind)(command)
    return command


def taken_from(parameters: dict[str, Any]) -> Given:
    """Take the foreign flags out of a command's parameters. LOCAL."""
    values = [(name, parameters.pop(_parameter(name))) for entry in FOREIGN for name in entry.names]
    return [(name, value) for name, value in values if value is not None]


def translate(given: Given, chosen: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the foreign flags `given` mean: parameters to set, and a line for each flag that tells how it was read.

    chosen: our own parameters that the user set, by name.
    Raises BadConfig for what is refused and for contradictions. LOCAL."""
    found: dict[str, tuple[Any, str]] = {name: (value, _said(name, value)) for name, value in chosen.items()}
    known = [(name, value, _entry(name)) for name, value in given]
    size = _size([(name, value) for name, value, entry in known if entry.reading == "ranks"], chosen)
    _refuse_sharded_attention(dict(given))
    notes = []
    for name, value, entry in known:
        _refuse(name, value, entry)
        if entry.kind != "alias":
            notes.append(f"{_as_written(name, value)}: {entry.says}")
            continue
        mine = _value(entry, name, value, size or 1)
        before, said = found.setdefault(entry.field, (mine, _as_written(name, value)))
        if before != mine:
            raise BadConfig(f"{_as_written(name, value)} contradicts {said}: it is the same as {entry.ours(mine)} here")
        notes.append(f"{_as_written(name, value)} is {entry.ours(mine)} here: {entry.says}")
    return {field: value for field, (value, _) in found.items() if field not in chosen}, notes


def refuse_device(device: str, here: Collection[str]) -> None:
    """Raise BadConfig for a device on which this version does not compute. LOCAL."""
    if device not in here:
        raise BadConfig(f"--device {device}: ranks of this version compute on {' or '.join(here)} only")


def table() -> str:
    """The table of docs/operations.md, in Markdown. LOCAL."""
    lines = ["| Flag | Here | Meaning |", "| --- | --- | --- |"]
    for entry in FOREIGN:
        names = ", ".join(f"`{name}`" for name in entry.names)
        lines.append(f"| {names} | {_here(entry)} | {_meaning(entry)} |")
    return "\n".join(lines) + "\n"


# --- parts


def _parameter(name: str) -> str:
    return "foreign_" + name.removeprefix("--").replace("-", "_")


def _entry(name: str) -> Foreign:
    return next(entry for entry in FOREIGN if name in entry.names)


def _as_written(name: str, value: object) -> str:
    return name if value is True else f"{name} {value}"


def _said(field: str, value: object) -> str:
    if field == "model":
        return f"MODEL {value}"
    flag = field.replace("_", "-")
    return f"--{'' if value is not False else 'no-'}{flag}" + ("" if isinstance(value, bool) else f" {value}")


def _refuse(name: str, value: object, entry: Foreign) -> None:
    if entry.only and str(value) not in entry.only:
        raise BadConfig(f"{_as_written(name, value)} cannot be had: {entry.otherwise}")
    if entry.kind == "refused":
        raise BadConfig(f"{_as_written(name, value)} cannot be had: {entry.says}")
    if entry.kind == "alias" and entry.takes == "int" and entry.reading != "same" and int(str(value)) < 1:
        raise BadConfig(f"{name} must be at least 1, not {value}")


def _size(said: Given, chosen: Mapping[str, Any]) -> int:
    """The number of ranks on which all flags agree; 0 when none says anything. A 1 for attention that is not sharded,
    or not replicated, says nothing as long as another flag does."""
    sizes = list(said)
    if "ep_size" in chosen:
        sizes.append(("--ep-size", chosen["ep_size"]))
    weak = {name for entry in FOREIGN if entry.says == _EACH_RANK for name in entry.names}
    strong = [(name, size) for name, size in sizes if size != 1 or name not in weak] or sizes
    for name, size in strong[1:]:
        if size != strong[0][1]:
            raise BadConfig(
                f"{strong[0][0]} {strong[0][1]} contradicts {name} {size}: every rank is one attention replica and one "
                "share of the experts, so both are the number of ranks; give one of them, or the same to both"
            )
    return int(strong[0][1]) if strong else 0


def _refuse_sharded_attention(given: Mapping[str, Any]) -> None:
    """vLLM multiplies the two sizes, for it shards each replica's attention; SGLang's are the same number."""
    tensor, data = given.get("--tensor-parallel-size", 1), given.get("--data-parallel-size", 1)
    if "--enable-expert-parallel" in given and tensor > 1 and data > 1:
        raise BadConfig(
            f"--tensor-parallel-size {tensor} with --data-parallel-size {data}: attention is not sharded over ranks; "
            f"for as many ranks as that makes: --data-parallel-size {tensor * data}"
        )


def _value(entry: Foreign, name: str, value: Any, ranks: int) -> Any:
    if entry.value is not None:
        return entry.value
    if entry.reading == "ranks":
        return ranks
    if entry.reading == "shared":
        return math.ceil(value / max(1, ranks))
    return value


def _here(entry: Foreign) -> str:
    if entry.kind != "alias":
        return entry.kind
    own = entry.target if entry.value is None or isinstance(entry.value, bool) else f"{entry.target} {entry.value}"
    return f"`{own}`"


def _meaning(entry: Foreign) -> str:
    if not entry.only:
        return entry.says
    values = " or ".join(f"`{value}`" for value in entry.only)
    return f"{values}: {entry.says}. Anything else is refused: {entry.otherwise}"


if __name__ == "__main__":
    click.echo(table(), nl=False)
