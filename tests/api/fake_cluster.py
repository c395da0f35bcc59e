"""A real server process over fake ranks: they speak the real messages over the real sockets, and compute nothing.

What a fake rank says is a function of the prompt: `say:[TEXT]` makes it say TEXT and end; anything else makes it
say the alphabet, over and over, from a place that the prompt's length chooses. So every stream can be checked to the
letter, whoever wrote it and however often it moved.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import zmq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from warm_server import WarmServer

from phalanx import messages as m
from phalanx.config import ServeConfig
from phalanx.process import launcher_endpoint, server_endpoint, worker_endpoint

EOS = 258
MAX_MODEL_LEN = 512
UNLOVED = b"refuse me"
"""A prompt with these bytes is rejected, as one that no KV cache could hold would be."""

CHAT_TEMPLATE = (
    "{% if messages[0].role == 'weather' %}{{ raise_exception('no weather here') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(path: Path) -> Path:
    """The files that a server reads of a model: no weights."""
    path.mkdir()
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in plain]
    symbols = [chr(b) if b in plain else chr(0x100 + others.index(b)) for b in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    files = {
        "config.json": {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 259, "eos_token_id": EOS},
        "generation_config.json": {"eos_token_id": [EOS]},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


def says(prompt_ids: list[int], index: int) -> int:
    """The token that a fake rank gives at an index."""
    prompt = bytes(i for i in prompt_ids if i < 256)
    script = re.findall(rb"say:\[(.*?)\]", prompt, re.DOTALL)
    if not script:
        return ord("a") + (len(prompt_ids) + index) % 26
    return script[-1][index] if index < len(script[-1]) else EOS


def alphabet(prompt: str, count: int) -> str:
    """What a completion of `prompt` must be."""
    return "".join(chr(says(list(prompt.encode()), i)) for i in range(count))


@dataclass
class FakeRank:
    """One incarnation. `behave` may change what it sends; `deaf` makes it neither read nor speak."""

    rank: int
    incarnation: int
    inbox: zmq.Socket[bytes]
    outbox: zmq.Socket[bytes]
    epoch: int = 1
    deaf: bool = False
    endless: bool = False
    """It keeps the last token of each request to itself, so that no stream ends."""
    paused: bool = False
    step: int = 0
    running: dict[str, tuple[m.Submit, int]] = field(default_factory=dict)
    heard: list[m.ToWorker] = field(default_factory=list)
    behave: Callable[[m.Stepped], list[m.Stepped]] = lambda stepped: [stepped]

    def say(self, message: m.ToServer) -> None:
        self.outbox.send(m.encode(message))

    def hear(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                message = m.to_worker_decoder.decode(self.inbox.recv(zmq.NOBLOCK))
                self.heard.append(message)
                match message:
                    case m.Submit() if UNLOVED in bytes(i for i in message.prompt_ids if i < 256):
                        self.say(
                            m.Rejected(
                                rank=self.rank, incarnation=self.incarnation, request_id=message.request_id,
                                attempt=message.attempt, reason="too large for the KV cache",
                            )
                        )  # fmt: skip
                    case m.Submit():
                        self.running[message.request_id] = (message, len(message.output_ids))
                    case m.Abort():
                        self.running.pop(message.request_id, None)
                    case m.Pause() | m.Resume():
                        self.paused = isinstance(message, m.Pause)
                        self.say(m.Paused(rank=self.rank, incarnation=self.incarnation, paused=self.paused))

    def advance(self) -> None:
        """One step: a token for each request."""
        if self.paused or not self.running:
            return
        tokens, reports = [], []
        for submit, index in list(self.running.values()):
            if self.endless and index + 1 >= submit.sampling.max_tokens:
                continue
            if index == 0 and submit.sampling.prompt_logprobs is not None and len(submit.prompt_ids) > 1:
                k = submit.sampling.prompt_logprobs
                entries = [_logprobs(i, k) for i in submit.prompt_ids[1:]]
                reports.append(m.PromptLogprobs(submit.request_id, submit.attempt, entries))
            tokens.append(self._token(submit, index))
            self.running[submit.request_id] = (submit, index + 1)
            if tokens[-1].finish_reason:
                del self.running[submit.request_id]
        if not tokens:
            return
        self.step += 1
        load = m.Load(running=len(self.running), kv_blocks_used=len(self.running), kv_blocks_total=100)
        stepped = m.Stepped(rank=self.rank, incarnation=self.incarnation, epoch=self.epoch, step=self.step,
                            tokens=tokens, prompt_logprobs=reports, load=load)  # fmt: skip
        for message in self.behave(stepped):
            self.say(message)

    def _token(self, submit: m.Submit, index: int) -> m.TokenOut:
        token, params = says(submit.prompt_ids, index), submit.sampling
        finish: m.FinishReason | None = None
        stop = token in params.stop_token_ids and index + 1 > params.min_tokens
        if stop or index + 1 >= params.max_tokens:
            finish = "stop" if stop else "length"
        logprobs = None if params.logprobs is None else _logprobs(token, params.logprobs)
        return m.TokenOut(submit.request_id, submit.attempt, index, token, finish, stop, logprobs)


def _logprobs(token: int, k: int) -> list[m.Logprob]:
    """The token itself, always the likeliest, then k of the likeliest."""
    likeliest = [m.Logprob((token + i) % 256 if i else token, -0.5 - i, i + 1) for i in range(k)]
    return [m.Logprob(token, -0.5, 1), *likeliest]


class Cluster:
    """A server process, a fake launcher and fake ranks. Fakes run in one thread; tests act on them under `lock`."""

    def __init__(self, model: Path, run_dir: Path, ranks: int = 2, step_s: float = 0.0, **config: object) -> None:
        self.ranks, self.step_s = ranks, step_s
        self.config = ServeConfig(model=str(model), ep_size=ranks, port=0, **config)  # type: ignore[arg-type]
        self.dir = str(run_dir)
        self.lock = threading.Condition()
        self.alive: dict[int, FakeRank] = {}
        self.told: list[m.ToLauncher] = []
        self.epoch = 0
        self._endless = False
        self._zmq = zmq.Context()
        self._inbox = self._zmq.socket(zmq.PULL)
        self._inbox.bind(launcher_endpoint(self.dir))
        self._outbox = self._push()
        self._over = False
        self._config_file = run_dir / "config.json"
        self._config_file.write_bytes(msgspec.json.encode(self.config))

    # --- life

    def start(self, serve: bool = True) -> Cluster:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        arguments = ["--config", str(self._config_file), "--run-dir", self.dir]
        self.server = WarmServer(arguments, Path(self.dir, "server.log"), listener.fileno())
        listener.close()
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if serve:
            for rank in range(self.ranks):
                self.spawn(rank, 0)
            self.meet("start")
        return self

    def stop(self) -> int:
        """End the server as an operator would; its exit code."""
        if self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
        code = self.server.wait(60)
        with self.lock:
            self._over = True
        self._thread.join(10)
        self.http.close()
        self._zmq.destroy(linger=0)
        return code

    @property
    def log(self) -> str:
        return Path(self.dir, "server.log").read_text(errors="replace")

    def _run(self) -> None:
        while True:
            with self.lock:
                if self._over:
                    return
                for fake in self.alive.values():
                    if not fake.deaf:
                        fake.hear()
                        fake.advance()
                with contextlib.suppress(zmq.Again):
                    while True:
                        self.told.append(m.to_launcher_decoder.decode(self._inbox.recv(zmq.NOBLOCK)))
                busy = any(f.running and not f.deaf for f in self.alive.values())
                self.lock.notify_all()
            select.select([], [], [], max(0.0005, self.step_s if busy else 0.002))

    def _push(self) -> zmq.Socket[bytes]:
        out = self._zmq.socket(zmq.PUSH)
        out.setsockopt(zmq.LINGER, 0)
        out.connect(server_endpoint(self.dir))
        return out

    # --- what happens to ranks

    def spawn(self, rank: int, incarnation: int) -> FakeRank:
        """A new process; it serves when the ranks have met."""
        inbox = self._zmq.socket(zmq.PULL)
        inbox.bind(worker_endpoint(self.dir, rank, incarnation))
        fake = FakeRank(rank, incarnation, inbox, self._push())
        with self.lock:
            fake.endless = self._endless
            self.alive[rank] = fake
            self.tell(m.Spawned(rank=rank, incarnation=incarnation, pid=1000 + 10 * rank + incarnation))
        return fake

    def keep_open(self, open_: bool) -> None:
        """Whether no stream may end, whoever runs it: what happens meanwhile happens in mid-stream, on any machine."""
        with self.lock:
            self._endless = open_
            for fake in self.alive.values():
                fake.endless = open_

    def tell(self, message: m.ToServer) -> None:
        """Say something as the launcher."""
        self._outbox.send(m.encode(message))

    def meet(
        self, trigger: m.Trigger, lost: tuple[int, ...] = (), causes: dict[int, str] | None = None,
        left: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """The living agree on the next view and serve under it."""
        with self.lock:
            self.epoch += 1
            members = [
                m.MemberInfo(f.rank, f.incarnation, 1000 + 10 * f.rank + f.incarnation, "localhost", "cpu")
                for _, f in sorted(self.alive.items())
            ]
            for fake in self.alive.values():
                fake.epoch = self.epoch
                fake.say(m.Adopted(rank=fake.rank, incarnation=fake.incarnation, epoch=self.epoch, members=members,
                                   trigger=trigger, lost=list(lost), causes=causes or {}, left=list(left)))  # fmt: skip
                seconds = m.PhaseSeconds(detect=0.001 * (fake.rank + 1), total=0.05)
                fake.say(m.Recovered(rank=fake.rank, incarnation=fake.incarnation, epoch=self.epoch, trigger=trigger,
                                     lost=list(lost), seconds=seconds, bytes_restored={"peer": 100},
                                     steps_replayed=1))  # fmt: skip

    def kill(self, rank: int, cause: str = "signal", meet: bool = True) -> FakeRank:
        """The rank's process is gone; the others close up."""
        with self.lock:
            dead = self.alive.pop(rank)
            self.tell(m.Died(rank=rank, incarnation=dead.incarnation, cause=cause, detail="killed by SIGKILL"))
        if meet and self.alive:
            self.meet("failure", (rank,), {rank: "notice"})
        return dead

    def leave(self, *ranks: int) -> list[FakeRank]:
        """These ranks were told to: the others go on without them."""
        with self.lock:
            gone = [self.alive.pop(rank) for rank in ranks]
        self.meet("scale", left=ranks)
        return gone

    # --- waiting

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        """Wait until the fakes have seen something."""
        with self.lock:
            assert self.lock.wait_for(condition, timeout_s), f"{what}: not within {timeout_s} s\n{self.log}"

    def until_http(self, path: str, good: Callable[[httpx.Response], bool], timeout_s: float = 60) -> httpx.Response:
        """Ask until the answer is as wanted."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.ConnectError):
                answer = self.http.get(path)
                if good(answer):
                    return answer
            assert self.server.poll() is None, f"the server ended:\n{self.log}"
            assert time.monotonic() < deadline, f"{path} is not as wanted within {timeout_s} s\n{self.log}"
            select.select([], [], [], 0.01)

    def until_ready(self) -> Cluster:
        self.until_http("/ready", lambda answer: answer.status_code == 200)
        return self

    def submitted(self) -> list[m.Submit]:
        return [x for f in self.alive.values() for x in f.heard if isinstance(x, m.Submit)]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
                total += float(value)
        return total


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that is ready, and ended afterwards."""
    try:
        yield cluster.start().until_ready()
    finally:
        if cluster.server.poll() is None:
            cluster.stop()
