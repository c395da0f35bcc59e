"""Everything that is not generation: health, metrics, models, tokenizing, and the operator's and the chaos monkey's
hands on the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from phalanx import __version__
from phalanx import messages as m
from phalanx.elastic.vault.fabric import chosen
from phalanx.errors import BadConfig
from phalanx.server.answers import ServiceHere, json_answer
from phalanx.server.chat import prompt_of
from phalanx.server.generate import RETRY_AFTER_S, Service, check_ids, check_model, encode
from phalanx.server.protocol import (
    AbortRequest,
    ApiError,
    ApplyRequest,
    ChaosRequest,
    ChatRequest,
    DetokenizeRequest,
    TokenizeRequest,
    named,
)
from phalanx.server.roster import RankRecord
from phalanx.server.scale_api import scale_down
from phalanx.testing.faults import BY_ENVIRONMENT_ALONE, IN_COLLECTIVES, Fault, cannot_happen

OPEN_PATHS = frozenset(
    {"/health", "/ready", "/metrics", "/version", "/server_info", "/fault_tolerance/status", "/ping"}
)
"""What may be read without the API key: it changes nothing and costs nothing."""


def routes() -> APIRouter:
    """All routes of this file."""
    router = APIRouter()
    for register in (_observation, _models, _tokens, _operation):
        register(router)
    return router


def _observation(router: APIRouter) -> None:
    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        """The process lives and answers, whether or not ranks do."""
        return json_answer({"status": "ok"})

    @router.get("/ready")
    async def ready(service: ServiceHere) -> Response:
        """Whether new requests would be served."""
        why = service.router.why_not_ready()
        if why:
            raise ApiError(503, f"not ready: {why}", code="unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})
        return json_answer({"status": "ready"})

    @router.get("/metrics")
    async def metrics(service: ServiceHere) -> Response:
        return Response(service.metrics.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/version")
    async def version() -> Response:
        return json_answer({"version": __version__})

    @router.get("/server_info")
    async def server_info(service: ServiceHere) -> Response:
        """What this server runs with. The API key is not shown."""
        config = msgspec.to_builtins(service.config)
        config["api_key"] = "***" if service.config.api_key else ""
        roster = service.router.roster
        return json_answer(
            {
                "version": __version__,
                "model": service.config.name,
                "max_model_len": service.max_model_len,
                "started_at": service.started_at,
                "epoch": roster.epoch,
                "ep_size": roster.ep_size,
                "max_ep_size": roster.places,
                "ranks_alive": roster.alive,
                "rank_problems": roster.reasons(),
                "expert_balance": _balance(service),
                "vault_transport": chosen(service.config),
                "requests_in_flight": service.router.in_flight,
                "requests_held": service.router.held,
                "eos_token_ids": sorted(service.text.eos_ids),
                "sampling_defaults": service.text.sampling_defaults,
                "config": config,
            }
        )

    @router.get("/fault_tolerance/status")
    async def status(service: ServiceHere) -> Response:
        return json_answer(service.router.roster.status())


def _balance(service: Service) -> dict[str, Any]:
    balance, config = service.router.roster.balance, service.config
    return {
        "enabled": config.enable_eplb and config.eplb_interval > 0,
        "balancedness": balance.balancedness,
        "replicas": balance.replicas,
        "moves": balance.moves,
    }


def _models(router: APIRouter) -> None:
    def card(service: Service) -> dict[str, Any]:
        return {
            "id": service.config.name,
            "object": "model",
            "created": service.started_at,
            "owned_by": "phalanx",
            "root": service.config.model,
            "parent": None,
            "max_model_len": service.max_model_len,
        }

    @router.get("/v1/models")
    async def models(service: ServiceHere) -> Response:
        return json_answer({"object": "list", "data": [card(service)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str, service: ServiceHere) -> Response:
        check_model(service, name)
        return json_answer(card(service))


def _tokens(router: APIRouter) -> None:
    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest, service: ServiceHere) -> Response:
        check_model(service, request.model)
        if request.prompt is not None:
            [ids] = await encode(service, [request.prompt], special=request.add_special_tokens is not False)
        else:
            fields = request.model_dump(
                include={"messages", "tools", "continue_final_message", "chat_template_kwargs"}, exclude_unset=True
            )
            if "add_generation_prompt" in request.model_fields_set:
                fields["add_generation_prompt"] = request.add_generation_prompt
            chat = ChatRequest(**fields, add_special_tokens=bool(request.add_special_tokens))
            ids = await prompt_of(service, chat)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
        if request.return_token_strs:
            answer["token_strs"] = [service.text.token_text(i) for i in ids]
        return json_answer(answer)

    @router.get("/tokenizer_info")
    async def tokenizer_info(service: ServiceHere) -> Response:
        """What a client needs to use this server as its tokenizer, as vLLM gives it and lm-eval asks for it."""
        text = service.text
        return json_answer({**text.special_tokens, "chat_template": text.template.source or None,
                      "model_max_length": service.max_model_len})  # fmt: skip

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, service: ServiceHere) -> Response:
        check_model(service, request.model)
        check_ids(service, request.tokens, "tokens")
        return json_answer({"prompt": service.text.decode(request.tokens, skip_special=request.skip_special_tokens)})


def _operation(router: APIRouter) -> None:
    @router.post("/abort_requests")
    async def abort(request: AbortRequest, service: ServiceHere) -> Response:
        """End calls by the ids their clients see. They end with finish_reason "abort"."""
        wanted = None if request.request_ids == "all" else request.request_ids
        return json_answer({"aborted": service.link.abort(wanted)})

    @router.post("/fault_tolerance/apply")
    async def apply(request: ApplyRequest, service: ServiceHere) -> Response:
        """An operator's instruction. 202: it is on its way; `GET /fault_tolerance/status` shows what comes of it."""
        instructions: dict[str, Callable[[Service, dict[str, Any]], list[int]]] = {
            "mask_rank": _mask, "rejoin": _rejoin, "pause": _pause, "retry": _retry, "scale_down": scale_down,
        }  # fmt: skip
        carry_out = instructions.get(request.instruction)
        if carry_out is None:
            raise ApiError(
                400, f"instruction: {request.instruction!r} is none of {', '.join(instructions)}", param="instruction"
            )
        known = ("ranks", "new_ep_size", "drain_timeout") if carry_out is scale_down else ("rank",)
        if unknown := sorted(request.params.keys() - set(known)):
            # Without a rank an instruction may mean all of them: a slip of the pen must not.
            raise ApiError(400, f"params: {named(unknown[0])!r} is not known, only {', '.join(known)}",
                           param=f"params.{named(unknown[0])}")  # fmt: skip
        ranks = carry_out(service, request.params)
        return json_answer({"accepted": True, "instruction": request.instruction, "ranks": ranks}, 202)

    @router.post("/chaos")
    async def chaos(request: ChaosRequest, service: ServiceHere) -> Response:
        """Make a rank fail. Without at_step and where the launcher signals the process at once; with them the rank
        does it to itself at that point."""
        if not service.config.enable_chaos:
            raise ApiError(403, "faults can be injected only when the server was started with --enable-chaos",
                           code="chaos_disabled")  # fmt: skip
        record = _living(service, request.rank, "rank")
        signals: dict[str, Literal["SIGKILL", "SIGSTOP", "SIGCONT"]] = {
            "kill": "SIGKILL", "stop": "SIGSTOP", "cont": "SIGCONT",
        }  # fmt: skip
        immediate = request.at_step is None and request.where is None
        if request.kind == "cont" and not immediate:
            raise ApiError(400, "kind: a stopped rank cannot continue itself: at_step and where must be left out",
                           param="kind")  # fmt: skip
        if request.kind in signals and immediate:
            service.link.tell_launcher(m.Signal(rank=request.rank, name=signals[request.kind]))
        else:
            assert request.kind != "cont"
            where = request.where or "step"
            try:
                Fault(request.kind, where, request.at_step)
            except BadConfig as error:
                raise ApiError(400, f"where: {error}", param="where") from None
            if where in BY_ENVIRONMENT_ALONE:
                raise ApiError(400, f"where: a rank that runs never comes to {where}: name it in PHALANX_FAULTS when "
                               "the service is started", param="where")  # fmt: skip
            if why := cannot_happen(request.kind, where, service.config.device):
                field = "where" if where in IN_COLLECTIVES else "kind"
                raise ApiError(400, f"{field}: {why}", param=field)
            fault = m.InjectFault(kind=request.kind, at_step=request.at_step, where=where)
            service.link.tell_rank(record.identity, fault)
        return json_answer({"accepted": True, "kind": request.kind, "rank": request.rank,
                      "incarnation": record.identity.incarnation}, 202)  # fmt: skip


def _mask(service: Service, params: dict[str, Any]) -> list[int]:
    if "rank" not in params:
        raise ApiError(400, "params.rank: mask_rank needs the rank to take out", param="params.rank")
    record = _living(service, params["rank"], "params.rank")
    service.link.tell_launcher(m.MaskRank(rank=record.identity.rank))
    return [record.identity.rank]


def _rejoin(service: Service, params: dict[str, Any]) -> list[int]:
    """Start a dead rank again, also one that was masked or given up."""
    if "rank" not in params:
        raise ApiError(400, "params.rank: rejoin needs the rank to bring back", param="params.rank")
    rank = _rank(service, params["rank"], "params.rank")
    if service.router.roster.state(rank) != "dead":
        raise ApiError(400, f"params.rank: rank {rank} is not dead", param="params.rank")
    if service.router.roster.records[rank].leaving:
        raise ApiError(409, f"params.rank: rank {rank} is to leave: try again when the service has been scaled",
                       param="params.rank", code="cannot_rejoin_now")  # fmt: skip
    service.link.tell_launcher(m.StartRank(rank=rank))
    return [rank]


def _pause(service: Service, params: dict[str, Any]) -> list[int]:
    return service.link.pause(_named(service, params), paused=True)


def _retry(service: Service, params: dict[str, Any]) -> list[int]:
    return service.link.pause(_named(service, params), paused=False)


def _named(service: Service, params: dict[str, Any]) -> int | None:
    """The living rank that is named; None when none is, which means all."""
    if params.get("rank") is None:
        return None
    return _living(service, params["rank"], "params.rank").identity.rank


def _rank(service: Service, rank: object, param: str) -> int:
    shown = service.router.roster.shown()
    if not isinstance(rank, int) or isinstance(rank, bool) or rank not in shown:
        raise ApiError(400, f"{param}: {rank!r} is no rank: there are {', '.join(map(str, shown))}", param=param)
    return rank


def _living(service: Service, rank: object, param: str) -> RankRecord:
    record = service.router.roster.records.get(_rank(service, rank, param))
    if record is None or record.dead:
        raise ApiError(400, f"{param}: rank {rank} is not alive", param=param)
    return record
