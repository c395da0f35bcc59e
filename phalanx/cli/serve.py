"""`phalanx serve MODEL`: the service, from one command."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import click
from click.core import ParameterSource

from phalanx.cli import aliases
from phalanx.config import ELEMENT_BYTES, Backup, Device, Dtype, LoadFormat, Quantization, ServeConfig, VaultTransport
from phalanx.errors import PhalanxError

log = logging.getLogger("phalanx.launcher")

DEFAULT = {name: value for name, value in zip(ServeConfig.__struct_fields__[-len(ServeConfig.__struct_defaults__) :],
                                              ServeConfig.__struct_defaults__, strict=True)}  # fmt: skip


DEVICE = click.Choice(list(dict.fromkeys((*get_args(Device), *aliases.DEVICES_ELSEWHERE))))
"""Those that we do not have are refused with a reason."""


def _option(flag: str, help: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option whose default is ServeConfig's, so that both say the same. A flag in seconds has a field in `_s`."""
    name = flag.removeprefix("--").replace("-", "_")
    field = name if name in DEFAULT else f"{name}_s"
    return click.option(flag, field, default=DEFAULT[field], show_default=True, help=help, **kwargs)


@click.command(
    context_settings={"show_default": True},
    epilog="SGLang's and vLLM's names of flags are understood, too: docs/operations.md has the table.",
)
@click.argument("model", type=click.Path(), required=False)
@_option("--served-model-name", "The model's name in the API; by default the directory's.")
@_option("--dtype", "What weights and activations are computed in.", type=click.Choice(get_args(Dtype)))
@_option(
    "--load-format",
    "auto: the checkpoint's weights. dummy: random ones of its shape, for benchmarks; MODEL needs no weights then.",
    type=click.Choice(get_args(LoadFormat)),
)
@_option(
    "--quantization", "fp8: halve the experts' weights as they are read.", type=click.Choice(get_args(Quantization))
)
@_option("--device", "Where to compute.", type=DEVICE, metavar="|".join(get_args(Device)))
@click.option("--deterministic", is_flag=True, help="On cuda: the same tokens whatever the batch (on cpu always).")
@_option("--cuda-graph-max-bs", "Largest batch of decodes with a CUDA graph (0: no graphs at all).", type=int)
@_option("--cuda-graph-max-tokens", "Most tokens of a step with prefills that has a CUDA graph (0: none).", type=int)
@_option("--chat-template", "A Jinja file to use instead of the model's chat template.", type=click.Path())
@_option("--seed", "Seeds the requests that bring no seed of their own (0: each at random).", type=int)
@_option("--ep-size", "Expert-parallel ranks.", type=int)
@_option("--max-ep-size", "Ranks that the service can be scaled up to while it serves (0: --ep-size).", type=int)
@_option("--min-ranks", "Answer 503 when fewer ranks live.", type=int)
@_option("--num-redundant-experts", "Replicas a layer beyond one for each expert.", type=int)
@_option("--slots-per-rank", "Expert slots a rank and layer (0: enough for --min-ranks to hold all).", type=int)
@click.option("--enable-eplb", is_flag=True, help="Move experts while serving, so that the ranks' loads are even.")
@_option("--eplb-window", "Steps over which the experts' load is counted.", type=int)
@_option("--eplb-interval", "Steps from one plan of --enable-eplb to the next (0: none).", type=int)
@_option("--eplb-min-gain", "Part of the experts' time that a plan must save to be carried out.", type=float)
@_option("--expert-backup", "Where lost experts are restored from.", type=click.Choice(get_args(Backup)))
@_option("--vault-copies", "Hosts whose vaults hold an expert, with several hosts.", type=int)
@_option("--vault-transport", "How other hosts' vaults are read.", type=click.Choice(get_args(VaultTransport)))
@_option("--ib-device", "RDMA devices for --vault-transport mooncake, separated by commas.")
@click.option("--elastic/--no-elastic", default=True, help="Go on without a rank that dies, or end with an error.")
@_option("--max-restarts", "Times a dead rank is started again within --restart-window (0: never).", type=int)
@_option("--restart-window", "Seconds over which the restarts of a rank are counted.", type=float)
@_option("--threads-per-rank", "Compute threads a rank; more than one pays only with idle cores.", type=int)
@_option("--max-model-len", "Tokens of prompt and answer together (0: the model's limit).", type=int)
@_option("--max-num-seqs", "Sequences a rank runs at once.", type=int)
@_option("--max-num-batched-tokens", "Tokens a rank computes in one step.", type=int)
@_option("--block-size", "Tokens a KV block.", type=int)
@_option("--num-kv-blocks", "KV blocks a rank (0: from --kv-cache-memory-mb).", type=int)
@click.option(
    "--enable-prefix-caching/--no-enable-prefix-caching",
    default=True,
    help="Reuse the KV of prompts' common beginnings.",
)
@_option("--kv-cache-memory-mb", "Memory a rank for its KV cache (0: 512; on cuda what is left).", type=int)
@_option("--mem-fraction-static", "On cuda: part of a device for weights and KV cache.", type=float)
@_option("--max-queued-requests", "Requests waiting in the service; more are answered 429.", type=int)
@_option("--peer-timeout", "Seconds a silent rank is waited for before it is suspected.", type=float)
@_option("--roll-call-timeout", "Seconds the living wait for a suspected rank to answer.", type=float)
@_option("--restore-timeout", "Seconds to restore experts in a recovery.", type=float)
@_option("--warmup-timeout", "Seconds from the first rank's start to the last one's readiness.", type=float)
@_option("--heartbeat-interval", "Seconds between empty steps of an idle service.", type=float)
@_option("--drain-timeout", "Seconds for streams to finish when the service is asked to stop.", type=float)
@_option("--request-patience", "Seconds a request waits while no rank can serve it.", type=float)
@_option("--nnodes", "Hosts over which the ranks are spread.", type=int)
@_option("--node-rank", "Which of them this one is; 0 has the HTTP server and must live.", type=int)
@_option("--dist-init-addr", "HOST:PORT of the first host, at which the others find it.")
@_option("--node-host", "Address under which other hosts reach this one (by default the one used towards the first).")
@_option("--cluster-token-file", "File with the secret that all hosts share.", type=click.Path())
@click.option("--elastic-ep-rejoin", is_flag=True, help="Come back to a running cluster: an error when there is none.")
@_option("--host", "Address to listen on.")
@_option("--port", "Port to listen on (0: any free one).", type=int)
@click.option("--api-key", default="", envvar="PHALANX_API_KEY", help="Key that clients must send.", show_default=False)
@click.option("--enable-chaos", is_flag=True, help="Let `phalanx chaos` make ranks fail.")
@_option("--log-level", "How much to log.", type=click.Choice(["debug", "info", "warning", "error"]))
@_option("--log-format", "Lines for people or for machines.", type=click.Choice(["text", "json"]))
@_option("--events-file", "Append one JSON line for each recovery to this file.", type=click.Path())
@aliases.options
@click.pass_context
def serve(context: click.Context, /, **options: Any) -> None:
    """Serve MODEL, a Hugging Face checkpoint directory, over an OpenAI-compatible API."""
    try:
        config, notes = understood(context, options)
        sys.exit(_serve(config, notes))
    except PhalanxError as error:
        click.echo(f"phalanx serve: {error}", err=True)
        sys.exit(2)


def understood(context: click.Context, options: dict[str, Any]) -> tuple[ServeConfig, list[str]]:
    """What a parsed command line asks for, other servers' flags included, and how those were read. Raises BadConfig for
    what cannot be had. LOCAL."""
    given = aliases.taken_from(options)
    unsaid = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    chosen = {name: value for name, value in options.items() if context.get_parameter_source(name) not in unsaid}
    translated, notes = aliases.translate(given, chosen)
    options |= translated
    aliases.refuse_device(options["device"], get_args(Device))
    if not options["model"]:
        raise click.UsageError("name one model directory: phalanx serve MODEL")
    return ServeConfig(**options), notes


def _serve(config: ServeConfig, notes: Sequence[str] = ()) -> int:
    """Check all that can be checked before anything listens, then run the launcher. LOCAL, blocks.

    notes: what the log is to say about how the flags were read."""
    from phalanx.observe.log import set_up_logging

    config.check()
    _check_device(config)
    model = _check_model(config)
    from phalanx.agent import Agent
    from phalanx.launcher import Launcher
    from phalanx.server_process import bind
    from phalanx.testing import faults

    planned = faults.from_environment(device=config.device, places=config.places) if config.enable_chaos else ""
    set_up_logging(
        config.log_level, config.log_format, f"launcher {config.node_rank}" if config.nnodes > 1 else "launcher"
    )
    for note in notes:
        log.info("%s", note)
    if config.node_rank:
        return Agent(config, planned, model=model).run()
    return Launcher(config, bind(config), planned, model=model).run()


def _check_device(config: ServeConfig) -> None:
    """Raise when this host has not what `--device` asks for. LOCAL."""
    if config.device != "cpu":
        from phalanx.backend import check_device

        check_device(config)


def _check_model(config: ServeConfig) -> str:
    """Raise for all that ranks and server would find wrong with the model, or with these flags for it; else a digest of
    its shape, which is to be the same on each host. LOCAL."""
    from phalanx.elastic.vault.fabric import check_devices, chosen, rdma_devices
    from phalanx.elastic.vault.room import check_memory
    from phalanx.model.known import open_model
    from phalanx.observe.events import EventLog
    from phalanx.server.text import ModelText

    checkpoint = open_model(config)
    model = checkpoint.config
    if config.device != "cpu":
        from phalanx.backend import check_model

        check_model(model)
    check_memory(config, checkpoint)
    config.expert_slots(model.num_experts)
    config.context_length(model.max_position)
    config.kv_blocks(model.kv_bytes(config.block_size, ELEMENT_BYTES[config.dtype]))
    chosen(config)
    check_devices(config, rdma_devices())
    ModelText(config.model, config.chat_template)
    EventLog(config.events_file).close()
    return hashlib.sha256(repr(model).encode()).hexdigest()
