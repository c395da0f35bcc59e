"""The demo: a real model on four ranks, one of them killed in mid-stream, and every chat goes on to the same end.

It builds the model once (models/smollm2-moe), serves it, streams the chats without any failure to know what they
should say, streams them again and kills a rank with SIGKILL half-way, and then compares. Exit 0 only if every stream
ended, with the same text, and the service was ready afterwards. In a terminal the chats are shown as they grow,
elsewhere as lines.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from phalanx.cli.errors import talking_to
from phalanx.cli.make_model import progress_bar
from phalanx.cli.status import ranks_table, recovery_table
from phalanx.errors import PhalanxError
from phalanx.testing.service import Service, ServiceEnded, ends_on_sigterm
from phalanx.testing.streams import Stream, client, run_and_hurt, run_streams

SETTLED_S = 30.0
QUESTION = "What is the capital of France?"
CHATS = (
    "How do I learn to play the piano?",
    "Tell me a short story about a cat who finds a lighthouse.",
    "Explain in simple words why the sky is blue.",
    "Give me a recipe for pancakes.",
    "Write a short letter to a friend who has moved away.",
    "What should I see on a first visit to Rome?",
)
CHAT = "/v1/chat/completions"
READY_OR_DEAD = re.compile(r"ready: |(?P<dead>rank \S+ \(pid \d+\) ended)")


class DemoFailed(PhalanxError):
    """Something that the demo promises did not happen."""


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Path(path_type=Path), default="models/smollm2-moe", help="Built when it is absent.")
@click.option("--ep-size", type=click.IntRange(min=2), default=4, help="Ranks.")
@click.option("--chats", type=click.IntRange(1, len(CHATS)), default=len(CHATS), help="Chats at once.")
@click.option("--max-tokens", type=click.IntRange(min=8), default=80, help="Tokens a chat at most.")
@click.option("--kill-rank", type=click.IntRange(min=0), default=0, help="Who falls. There is no special rank.")
@click.option("--plain", is_flag=True, help="Lines instead of a live picture.")
def main(model: Path, ep_size: int, chats: int, max_tokens: int, kill_rank: int, plain: bool) -> None:
    """Serve a model on several ranks, kill one in mid-stream, and see that every chat goes on."""
    console = Console(highlight=False)
    try:
        if kill_rank >= ep_size:
            raise DemoFailed(f"--kill-rank {kill_rank}: the ranks are 0 to {ep_size - 1}")
        build(console, model)
        with ends_on_sigterm(), served(console, model, ep_size) as service:
            Demo(console, service, chats, max_tokens, kill_rank, live=console.is_terminal and not plain).run()
    except (PhalanxError, ServiceEnded, TimeoutError) as error:
        console.print(Text(f"demo: {error}", style="bold red"), soft_wrap=True)
        sys.exit(1)


def build(console: Console, model: Path) -> None:
    """Upcycle the model unless some model is there."""
    if (model / "config.json").is_file():
        console.print(f"model: {model} is there already")
        return
    from phalanx.testing.upcycle import make_upcycled  # imports torch

    console.print(f"model: building {model} from SmolLM2-135M-Instruct, 8 experts a layer (1.4 GB, once)")
    model.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("writing experts") as (started, advance):
        make_upcycled(model, started=started, progress=advance)


@contextmanager
def served(console: Console, model: Path, ep_size: int) -> Iterator[Service]:
    """The service, ready; it ends with the block."""
    service = Service(str(model), "--ep-size", str(ep_size), "--max-restarts", "0")  # who falls stays down
    begin = time.monotonic()
    console.print(f"$ phalanx serve {model} --ep-size {ep_size}")
    try:
        with console.status(f"{ep_size} ranks load their experts"):
            found = service.start().wait_for_line(READY_OR_DEAD, timeout_s=300)
        if found["dead"]:
            raise DemoFailed(f"the service did not come up; its log:\n{service.log}")
        console.print(f"ready after {time.monotonic() - begin:.1f} s at {service.url}\n")
        yield service
    finally:
        service.stop()


class Demo:
    """The two runs, and what is compared."""

    def __init__(
        self, console: Console, service: Service, chats: int, max_tokens: int, kill_rank: int, *, live: bool
    ) -> None:
        self._console, self._service, self._kill_rank, self._live = console, service, kill_rank, live
        self._questions = CHATS[:chats]
        self._max_tokens = max_tokens

    def run(self) -> None:
        """Raises DemoFailed when anything is not as promised."""
        expected = asyncio.run(self._unfailed())
        answer = self._answer()
        before = self._service.status()
        pid = next(rank["pid"] for rank in before["ranks"] if rank["rank"] == self._kill_rank)
        streams, killed_s, over = asyncio.run(self._with_a_death(expected, pid))
        after = self._settled(before)
        self._report(expected, streams, killed_s, over, after)
        self._check(expected, streams, over, before, after)
        if self._answer() != answer:
            raise DemoFailed(f"asked again, {QUESTION!r} gets another answer than {answer!r}")
        left = sum(rank["state"] == "healthy" for rank in after["ranks"])
        self._console.print(f"\n{left} ranks go on answering: {QUESTION} [bold]{escape(answer)}[/]")
        self._console.print("[bold green]Every chat went on to its end, with the same text.")

    # --- the runs

    async def _unfailed(self) -> list[Stream]:
        self._console.print("[bold]1. Without a failure[/], to know what each chat says")
        streams = self._fresh()
        with shown(self._console, streams, self._live, self._questions):
            async with client(self._service.url) as http:
                await run_streams(http, CHAT, self._bodies(), streams=streams)
        if broken := [stream for stream in streams if stream.error]:
            raise DemoFailed(f"chat {broken[0].name} fails without any failure: {broken[0].error}")
        self._console.print(f"   {sum(stream.tokens for stream in streams)} tokens\n")
        return streams

    async def _with_a_death(self, expected: Sequence[Stream], pid: int) -> tuple[list[Stream], float, frozenset[str]]:
        self._console.print(f"[bold]2. The same chats, and rank {self._kill_rank} gets SIGKILL in mid-stream[/]")
        streams = self._fresh()
        note = Text()

        async def kill() -> None:
            os.kill(pid, signal.SIGKILL)
            note.append(f"SIGKILL to rank {self._kill_rank} (pid {pid})", style="bold red")
            if not self._live:
                self._console.print(f"   {note}; tokens so far: {[stream.tokens for stream in streams]}")

        with shown(self._console, streams, self._live, self._questions, note):
            async with client(self._service.url) as http:
                done = await run_and_hurt(
                    http, CHAT, self._bodies(), streams=streams, hurt=kill,
                    after_tokens=sum(stream.tokens for stream in expected) * 2 // 5,
                )  # fmt: skip
        self._console.print()
        return streams, done.at_s, done.over

    def _fresh(self) -> list[Stream]:
        return [Stream(str(number + 1)) for number in range(len(self._questions))]

    def _bodies(self) -> list[dict[str, Any]]:
        """Every other chat is sampled, with a seed: those, too, must end with the same text."""
        return [
            {
                "messages": [{"role": "user", "content": question}],
                "max_tokens": self._max_tokens,
                "temperature": 0.0 if number % 2 == 0 else 0.7,
                "seed": number,
                "return_token_ids": True,
            }
            for number, question in enumerate(self._questions)
        ]

    # --- what came of it

    def _report(
        self,
        expected: list[Stream],
        streams: list[Stream],
        killed_s: float,
        over: frozenset[str],
        after: dict[str, Any],
    ) -> None:
        table = Table(title="The longest silence that each client saw")
        table.add_column("chat", no_wrap=True, max_width=28)
        for column in ("tokens", "kill to next token", "without a failure", "text"):
            table.add_column(column, justify="right")
        for mine, theirs, question in zip(streams, expected, self._questions, strict=True):
            silence = None if mine.name in over else mine.silence(killed_s)
            table.add_row(
                question,
                str(mine.tokens),
                f"{1000 * silence[1]:.0f} ms" if silence else "was over before",
                f"{1000 * max(theirs.gaps_s, default=0):.0f} ms",
                f"[red]{mine.error}" if mine.error else "[green]the same" if mine.same_as(theirs) else "[red]different",
            )
        self._console.print(table)
        if after["last_recovery"]:
            self._console.print(recovery_table(after["last_recovery"]))
        self._console.print(ranks_table(after, "the service", self._is_ready()))

    def _check(
        self, expected: list[Stream], streams: list[Stream], over: frozenset[str], before: dict[str, Any],
        after: dict[str, Any],
    ) -> None:  # fmt: skip
        if len(over) == len(streams):
            raise DemoFailed("every chat was over before the kill: raise --max-tokens")
        if failed := [stream for stream in streams if stream.error]:
            raise DemoFailed(f"{len(failed)} chats failed; chat {failed[0].name}: {failed[0].error}")
        if different := [mine.name for mine, theirs in zip(streams, expected, strict=True) if not mine.same_as(theirs)]:
            raise DemoFailed(f"chats {', '.join(different)} ended with another text")
        last = after["last_recovery"]
        if after["epoch"] <= before["epoch"] or not last or self._kill_rank not in last["lost"]:
            raise DemoFailed(f"the service knows of no recovery from the loss of rank {self._kill_rank}")
        if not self._is_ready():
            raise DemoFailed("the service is not ready after the recovery")

    def _settled(self, before: dict[str, Any]) -> dict[str, Any]:
        """The status when all ranks have told of the recovery: that may be a moment after the last token."""
        deadline = time.monotonic() + SETTLED_S
        while True:
            status = self._service.status()
            last, states = status["last_recovery"], {rank["state"] for rank in status["ranks"]}
            told = status["epoch"] > before["epoch"] and last and self._kill_rank in last["lost"]
            if (told and states <= {"healthy", "dead"}) or time.monotonic() > deadline:
                return status
            time.sleep(0.01)

    def _is_ready(self) -> bool:
        with talking_to(self._service.url):
            return httpx.get(f"{self._service.url}/ready", timeout=30).status_code == httpx.codes.OK

    def _answer(self) -> str:
        """What the service answers to one short question, without streaming."""
        messages = [{"role": "user", "content": QUESTION}]
        body = {"messages": messages, "max_tokens": 16, "temperature": 0.0}
        with talking_to(self._service.url):
            answer = httpx.post(f"{self._service.url}{CHAT}", json=body, timeout=60).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"]).strip()


@contextmanager
def shown(
    console: Console, streams: Sequence[Stream], live: bool, questions: Sequence[str], note: Text | None = None
) -> Iterator[None]:
    """Show the streams while they grow, or, without a terminal, each one's end."""
    chats = Chats(streams, questions, Text() if note is None else note)  # an empty Text is falsy
    if live:
        with Live(chats, console=console, refresh_per_second=8):
            yield
        return
    yield
    for stream, question in zip(streams, questions, strict=True):
        said = " ".join((stream.error or stream.text).split())
        console.print(Text(f"   {question} -> {said}"), no_wrap=True, overflow="ellipsis")


class Chats:
    """The streams as panels: the question, and the last lines of the answer so far."""

    def __init__(self, streams: Sequence[Stream], questions: Sequence[str], note: Text) -> None:
        self._streams, self._questions, self._note = streams, questions, note

    def __rich__(self) -> RenderableType:
        grid = Table.grid(expand=True)
        for _ in range(2):
            grid.add_column(ratio=1)
        panels = [
            self._panel(stream, question) for stream, question in zip(self._streams, self._questions, strict=True)
        ]
        for start in range(0, len(panels), 2):
            grid.add_row(*panels[start : start + 2])
        return Group(grid, self._note)

    def _panel(self, stream: Stream, question: str) -> Panel:
        colour = "red" if stream.error else "green" if stream.done else "blue"
        text = " ".join((stream.error or stream.text).split())
        return Panel(Text(text[-300:]), title=question, title_align="left", border_style=colour, height=7)


if __name__ == "__main__":
    main()
