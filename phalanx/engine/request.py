"""A request as this rank has committed it: its tokens, how many of them are computed, and where their KV lies.

Only `Scheduler.commit` and what the engine accepts between steps change a request; a step that fails changes nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from phalanx.messages import FinishReason, Logprob, SamplingParams, Submit

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Ending:
    """What a new token does to its request. reason None: it goes on. stop_token: the token's text is not shown."""

    reason: FinishReason | None = None
    stop_token: bool = False


_GOES_ON = Ending()


@dataclass(eq=False, slots=True)
class Request:
    """One request on this rank.

    tokens: prompt and output together; the first `prompt_length` are the prompt. A request that moved here brings its
        output so far along and goes on after it, so it differs in nothing from one that was preempted.
    stop_ids: the tokens that end it, end-of-sequence included unless it is ignored.
    computed: how many of `tokens` have their KV in `blocks`, which is empty while the request waits.
    digests: for each full block of tokens what the prefix cache knows it by: a digest of all tokens up to its end.
    prompt_logprobs: one entry a prompt token after the first, as far as they are computed.
    """

    request_id: str
    attempt: int
    sampling: SamplingParams
    prompt_length: int
    stop_ids: frozenset[int]
    tokens: list[int]
    block_size: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[list[Logprob]] = field(default_factory=list)

    @classmethod
    def of(cls, submit: Submit, eos_ids: frozenset[int], block_size: int) -> Request:
        """What the server submitted, with nothing computed yet. LOCAL."""
        stop_ids = frozenset(submit.sampling.stop_token_ids)
        request = cls(
            request_id=submit.request_id,
            attempt=submit.attempt,
            sampling=submit.sampling,
            prompt_length=len(submit.prompt_ids),
            stop_ids=stop_ids if submit.sampling.ignore_eos else stop_ids | eos_ids,
            tokens=[*submit.prompt_ids, *submit.output_ids],
            block_size=block_size,
        )
        request._extend_digests()
        return request

    @property
    def running(self) -> bool:
        return bool(self.blocks)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens whose KV is not computed: more than one in prefill, one in decode."""
        return len(self.tokens) - self.computed

    @property
    def owes_prompt_logprobs(self) -> bool:
        """The client asked for them and they have not gone out: they come before output token 0."""
        return (
            self.sampling.prompt_logprobs is not None
            and self.output_length == 0
            and len(self.prompt_logprobs) < self.prompt_length - 1
        )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def ending(self, token_id: int, max_model_len: int) -> Ending:
        """How the request would stand with `token_id` as its next token. Changes nothing."""
        if token_id in self.stop_ids:
            return Ending("stop", stop_token=True)
        total = len(self.tokens) + 1
        if total - self.prompt_length >= self.sampling.max_tokens or total >= max_model_len:
            return Ending("length")
        return _GOES_ON

    def goes_on_for(self, tokens: int, max_model_len: int) -> bool:
        """Whether it takes so many tokens more, as long as none of them stops it."""
        output_length = self.output_length + tokens - 1
        return output_length < self.sampling.max_tokens and self.prompt_length + output_length < max_model_len

    def append(self, token_id: int) -> None:
        """Commit one output token."""
        self.tokens.append(token_id)
        self._extend_digests()

    def _extend_digests(self) -> None:
        while (len(self.digests) + 1) * self.block_size <= len(self.tokens):
            start = len(self.digests) * self.block_size
            parent = self.digests[-1] if self.digests else b""
            block = array("q", self.tokens[start : start + self.block_size]).tobytes()
            # A collision would serve another prompt's KV, so the digest is a cryptographic one.
            self.digests.append(hashlib.blake2b(parent + block, digest_size=_DIGEST_BYTES).digest())
