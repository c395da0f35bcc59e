"""`python -m phalanx.server --config PATH.json --run-dir DIR --fd N`: the server process; the launcher starts it.

Exit codes: 0 asked to stop; 1 a bug; 2 the model or a flag cannot be honoured; 3 the launcher is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from types import FrameType

import click
import msgspec
import uvicorn

from phalanx.config import ServeConfig
from phalanx.errors import BadConfig, PhalanxError
from phalanx.observe.events import EventLog
from phalanx.observe.log import set_up_logging
from phalanx.observe.metrics import Metrics
from phalanx.server.app import create_app
from phalanx.server.generate import Service
from phalanx.server.link import Link
from phalanx.server.router import Router
from phalanx.server.scaling import Scaler
from phalanx.server.text import ModelText

EXIT_LAUNCHER_GONE = 3

_LOOK_S = 0.1
"""How often a server that is to end looks whether anybody is left to finish its streams."""

log = logging.getLogger("phalanx.server")


class HttpServer(uvicorn.Server):
    """uvicorn, told by `stopping` when a signal asks it to end: it then accepts nothing and finishes its streams."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._stopping.set)


def build(config: ServeConfig, run_dir: str) -> Service:
    """Load the model's text side and bind the sockets; needs a running event loop. PhalanxError for a bad model."""
    text = ModelText(config.model, config.chat_template)
    max_model_len = config.max_model_len or text.max_positions
    if max_model_len < 2:
        raise BadConfig("the model's config.json does not say its context length: set --max-model-len")
    metrics = Metrics(config.name)
    router = Router(
        config.ep_size, max_running=config.max_num_seqs, max_queued=config.max_queued_requests,
        patience_s=config.request_patience_s, clock=time.monotonic, metrics=metrics, places=config.places,
    )  # fmt: skip
    link = Link(
        run_dir,
        router,
        Scaler(router, min_ranks=config.min_ranks, patience_s=config.warmup_timeout_s, clock=time.monotonic),
        EventLog(config.events_file),
        lambda: log.info("ready: %s on %d ranks", config.name, router.roster.alive),
    )
    seeds = random.Random(config.seed) if config.seed else random.SystemRandom()
    return Service(config, text, link, metrics, max_model_len, seeds, int(time.time()))


async def serve(config: ServeConfig, run_dir: str, listener: socket.socket, launcher_pid: int) -> int:
    """Serve until a signal or the launcher's end; the exit code."""
    service = build(config, run_dir)
    stopping, orphaned = asyncio.Event(), asyncio.Event()
    http = HttpServer(
        uvicorn.Config(
            create_app(service), log_config=None, lifespan="off", backlog=2048, server_header=False,
            timeout_keep_alive=60, timeout_graceful_shutdown=int(config.drain_timeout_s) + 2,
        ),
        stopping,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("listening on http://%s:%d", shown, port)
    tasks = [
        asyncio.create_task(work)
        for work in (
            service.link.listen(),
            service.link.tick(),
            _drain(service, stopping),
            _watch(launcher_pid, orphaned, http, service),
        )
    ]
    for task in tasks:
        task.add_done_callback(lambda done: _ended(done, http))
    try:
        await http.serve(sockets=[listener])
    finally:
        failed = [t for t in tasks if t.done() and not t.cancelled() and t.exception() is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.link.close()
    if orphaned.is_set():
        return EXIT_LAUNCHER_GONE
    return 1 if failed else 0


def _ended(task: asyncio.Task[None], http: uvicorn.Server) -> None:
    """A part of the server must not die unseen: the whole goes with it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the server cannot go on", exc_info=error)
        http.should_exit = http.force_exit = True


async def _drain(service: Service, stopping: asyncio.Event) -> None:
    """Once asked to stop: no new requests, and an end with an error for those that do not finish in time."""
    await stopping.wait()
    router, reason = service.router, "the server is shutting down"
    router.close(reason)
    service.link.scaler.close(reason)
    end = time.monotonic() + service.config.drain_timeout_s
    while time.monotonic() < end and router.roster.living():
        await asyncio.sleep(_LOOK_S)
    if not router.roster.living():
        reason = f"{reason}, and no rank is alive"
    elif router.in_flight:
        log.warning("%d requests did not finish in %.0f s", router.in_flight, service.config.drain_timeout_s)
    service.link.fail_all(reason)


async def _watch(launcher_pid: int, orphaned: asyncio.Event, http: uvicorn.Server, service: Service) -> None:
    """End when the launcher does: the ranks die with it, and nobody would restart them."""
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(launcher_pid) if os.getppid() == launcher_pid else None
    if pidfd is not None:
        loop.add_reader(pidfd, gone.set)
        await gone.wait()
        loop.remove_reader(pidfd)
        os.close(pidfd)
    log.error("the launcher is gone: ending")
    orphaned.set()
    service.router.close("the launcher is gone")
    service.link.scaler.close("the launcher is gone")
    service.link.fail_all("the launcher is gone")
    http.should_exit = True


@click.command()
@click.option("--config", "config_path", type=click.Path(exists=True), required=True, help="ServeConfig as JSON.")
@click.option("--run-dir", type=click.Path(exists=True, file_okay=False), required=True, help="Where the sockets are.")
@click.option("--fd", type=int, required=True, help="A bound TCP socket to listen on.")
@click.option("--launcher-pid", type=int, default=0, help="Ends when this parent ends; by default the parent at start.")
def main(config_path: str, run_dir: str, fd: int, launcher_pid: int) -> None:
    """The HTTP server of one Phalanx service."""
    launcher_pid = launcher_pid or os.getppid()
    try:
        with open(config_path, "rb") as file:
            config = msgspec.json.decode(file.read(), type=ServeConfig)
    except (OSError, msgspec.DecodeError) as error:
        click.echo(f"phalanx.server: --config {config_path}: {error}", err=True)
        sys.exit(2)
    set_up_logging(config.log_level, config.log_format, "server")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn handles them while it runs, and raises them again at its end
    listener = socket.socket(fileno=fd)
    try:
        code = asyncio.run(serve(config, run_dir, listener, launcher_pid))
    except PhalanxError as error:
        log.error("%s", error)
        code = 2
    with contextlib.suppress(OSError):
        listener.close()
    if code == EXIT_LAUNCHER_GONE:
        shutil.rmtree(run_dir, ignore_errors=True)  # its owner can no longer do it
    sys.exit(code)


if __name__ == "__main__":
    main()
