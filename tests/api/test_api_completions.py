"""/v1/completions over a real server, with the openai client where it has the field, and httpx where it has not."""

from __future__ import annotations

import math

import openai
import pytest
from fake_cluster import Cluster, alphabet


@pytest.fixture
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


def test_a_prompt_is_continued(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="letters", prompt="hello", max_tokens=8)
    assert answer.choices[0].text == alphabet("hello", 8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 8, 13)


def test_max_tokens_is_16_by_default(client: openai.OpenAI) -> None:
    assert client.completions.create(model="letters", prompt="x").usage.completion_tokens == 16


def test_the_default_of_max_tokens_never_exceeds_the_context(cluster: Cluster) -> None:
    answer = cluster.http.post("/v1/completions", json={"prompt": "x" * 509}).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (3, "length")


def test_the_end_of_sequence_ends_it_and_is_not_shown(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="letters", prompt="say:[yes]", max_tokens=50).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("yes", "stop", None)


def test_ignore_eos_goes_on(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    answer = client.completions.create(model="letters", prompt="say:[yes]", max_tokens=9, extra_body=extra)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9


def test_prompts_in_a_list_times_n_give_choices_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="letters", prompt=["a", "bb", "ccc"], n=2, max_tokens=3)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert [c.text for c in answer.choices] == [alphabet(p, 3) for p in ("a", "a", "bb", "bb", "ccc", "ccc")]
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 18


def test_token_ids_are_a_prompt_too(client: openai.OpenAI) -> None:
    one = client.completions.create(model="letters", prompt=list(b"hello"), max_tokens=4, echo=True)
    assert one.choices[0].text == "hello" + alphabet("hello", 4)
    two = client.completions.create(model="letters", prompt=[list(b"ab"), list(b"abc")], max_tokens=2)
    assert [c.text for c in two.choices] == [alphabet("ab", 2), alphabet("abc", 2)]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_text_is_scored_as_lm_eval_asks_for_it(client: openai.OpenAI, max_tokens: int) -> None:
    answer = client.completions.create(
        model="letters", prompt=[list(b"score me")], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1
    )
    choice = answer.choices[0]
    report = choice.logprobs
    assert choice.text == "score me" + alphabet("score me", max_tokens)
    assert report.tokens == list(choice.text)
    assert report.text_offset == list(range(8 + max_tokens))
    assert report.token_logprobs[0] is None
    assert report.top_logprobs[0] is None
    assert all(isinstance(value, float) for value in report.token_logprobs[1:])
    assert all(
        max(top.values()) == own for own, top in zip(report.token_logprobs[1:], report.top_logprobs[1:], strict=True)
    )
    assert answer.usage.completion_tokens == max_tokens
    assert choice.finish_reason == "length"


def test_a_prompt_of_one_token_has_no_logprob_to_report(client: openai.OpenAI) -> None:
    report = (
        client.completions.create(model="letters", prompt="a", echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    )
    assert (report.tokens, report.token_logprobs) == (["a"], [None])


def test_logprobs_name_the_alternatives_and_where_each_token_begins(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="letters", prompt="say:[né!]", logprobs=3, max_tokens=20).choices[0]
    report = choice.logprobs
    assert choice.text == "né!"
    assert report.tokens == ["n", "bytes:\\xc3", "bytes:\\xa9", "!", "<|im_end|>"]
    assert report.text_offset == [0, 1, 1, 2, 3]
    assert len(report.top_logprobs[0]) == 3
    assert math.isclose(report.top_logprobs[0]["n"], -0.5)


def test_streamed_text_is_the_same_text_and_usage_comes_last(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="letters", prompt="hello", max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == alphabet("hello", 40)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert all(c.usage is None for c in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["length"]


def test_a_streamed_echo_with_logprobs_begins_with_the_prompt(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="letters", prompt="hello", max_tokens=4, stream=True, echo=True, logprobs=0
    )
    chunks = [c.choices[0] for c in stream]
    assert "".join(c.text for c in chunks) == "hello" + alphabet("hello", 4)
    assert [o for c in chunks for o in c.logprobs.text_offset] == list(range(9))


def test_a_stream_is_server_sent_events_that_end_with_done(cluster: Cluster) -> None:
    body = {"model": "letters", "prompt": "x", "max_tokens": 3, "stream": True}
    with cluster.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_characters_of_several_tokens_are_never_torn(cluster: Cluster) -> None:
    body = {"prompt": "say:[naïve 漢字 😀 end]", "max_tokens": 60, "stream": True}
    with cluster.http.stream("POST", "/v1/completions", json=body) as answer:
        text = answer.read().decode()
    assert "\ufffd" not in text
    assert "\\ufffd" not in text
    whole = cluster.http.post("/v1/completions", json=body | {"stream": False}).json()
    assert whole["choices"][0]["text"] == "naïve 漢字 😀 end"


def test_broken_bytes_at_the_end_are_shown_as_such(cluster: Cluster) -> None:
    prompt = [*b"say:[ok", 0xE2, 0x82, *b"]"]
    answer = cluster.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 9}).json()
    assert answer["choices"][0]["text"] == "ok\ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    prompt = "say:[one two STOP three]"
    answer = client.completions.create(
        model="letters", prompt=prompt, max_tokens=99, stop=["STOP", "###"], stream=stream
    )
    choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    assert "".join(c.text for c in choices) == "one two "
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", "STOP")


def test_what_only_looked_like_a_stop_string_is_not_lost(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="letters", prompt="say:[ST STO STOX ST]", max_tokens=99, stop="STOP")
    assert answer.choices[0].text == "ST STO STOX ST"


def test_the_stop_string_is_shown_on_demand(client: openai.OpenAI) -> None:
    extra = {"include_stop_str_in_output": True}
    answer = client.completions.create(model="letters", prompt="say:[a.b]", max_tokens=9, stop=".", extra_body=extra)
    assert answer.choices[0].text == "a."


def test_text_within_min_tokens_cannot_stop_it(client: openai.OpenAI) -> None:
    extra = {"min_tokens": 4}
    answer = client.completions.create(model="letters", prompt="say:[.a.b.c]", max_tokens=9, stop=".", extra_body=extra)
    assert answer.choices[0].text == ".a.b"


def test_a_stop_token_names_itself(client: openai.OpenAI) -> None:
    extra = {"stop_token_ids": [ord("!")]}
    choice = client.completions.create(model="letters", prompt="say:[hi!you]", max_tokens=9, extra_body=extra).choices[
        0
    ]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hi", "stop", ord("!"))


def test_a_stop_string_ends_the_work_on_the_rank(cluster: Cluster, client: openai.OpenAI) -> None:
    client.completions.create(model="letters", prompt="zzz", max_tokens=400, stop="h")
    cluster.until(lambda: not any(f.running for f in cluster.alive.values()), "the rank stops")


def test_the_sampling_fields_reach_the_rank(cluster: Cluster) -> None:
    body = {
        "prompt": "sampling", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "presence_penalty": 0.3, "frequency_penalty": -0.2, "repetition_penalty": 1.1, "seed": 99, "n": 2,
        "logit_bias": {"65": -100, "66": 3}, "stop_token_ids": [7], "min_tokens": 1, "logprobs": 2,
        "user": "me", "service_tier": "auto", "no_such_field": 1,
    }  # fmt: skip
    assert cluster.http.post("/v1/completions", json=body).status_code == 200
    sent = [s.sampling for s in cluster.submitted() if s.prompt_ids == list(b"sampling")]
    assert sorted(s.seed for s in sent) == [99, 100]
    first = sent[0]
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.9, 7, 0.1)
    assert (first.presence_penalty, first.frequency_penalty, first.repetition_penalty) == (0.3, -0.2, 1.1)
    assert first.logit_bias == {65: -100, 66: 3}
    assert first.stop_token_ids == (7, 258)
    assert (first.min_tokens, first.logprobs, first.max_tokens) == (1, 2, 2)


def test_requests_without_a_seed_get_one_each(cluster: Cluster) -> None:
    for _ in range(3):
        cluster.http.post("/v1/completions", json={"prompt": "no seed given", "max_tokens": 1})
    seeds = [s.sampling.seed for s in cluster.submitted() if s.prompt_ids == list(b"no seed given")]
    assert len(set(seeds)) == 3


def test_token_ids_are_returned_on_demand(cluster: Cluster) -> None:
    body = {"prompt": "say:[né]", "max_tokens": 9, "return_token_ids": True}
    whole = cluster.http.post("/v1/completions", json=body).json()["choices"][0]
    assert whole["token_ids"] == [*"né".encode(), 258]
    assert whole["prompt_token_ids"] == list("say:[né]".encode())


def test_prompt_logprobs_are_reported_by_token_id(cluster: Cluster) -> None:
    body = {"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 0}
    report = cluster.http.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    assert report[0] is None
    assert report[1] == {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}


def test_the_last_tokens_of_a_prompt_can_be_kept_alone(cluster: Cluster) -> None:
    body = {"prompt": "0123456789", "truncate_prompt_tokens": 4, "max_tokens": 1, "echo": True}
    answer = cluster.http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"].startswith("6789")
    assert answer["usage"]["prompt_tokens"] == 4
