"""/v1/chat/completions over a real server, with the openai client."""

from __future__ import annotations

import openai
import pytest
from fake_cluster import Cluster


@pytest.fixture
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="letters", messages=user("say:[Bonjour, çava?]"))
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Bonjour, çava?")
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


def test_the_template_makes_the_prompt(cluster: Cluster, client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "U"}]}]
    client.chat.completions.create(model="letters", messages=messages, max_tokens=1)
    sent = cluster.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert sent in [s.prompt_ids for s in cluster.submitted()]
    text = cluster.http.post("/detokenize", json={"tokens": sent}).json()["prompt"]
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_streaming_gives_the_role_then_the_text_then_the_reason_then_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="letters", messages=user("say:[abc def]"), stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = list(stream)
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == "abc def"
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == 16
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


def test_logprobs_come_in_the_chat_format(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="letters", messages=user("say:[é]"), logprobs=True, top_logprobs=2, max_completion_tokens=2
    )
    content = answer.choices[0].logprobs.content
    assert [c.bytes for c in content] == [[0xC3], [0xA9]]
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.5]


def test_no_top_logprobs_means_an_empty_list(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="letters", messages=user("say:[a]"), logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []


def test_the_answer_may_be_as_long_as_the_model_allows(cluster: Cluster, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="letters", messages=user("go on"))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 512


def test_max_completion_tokens_bounds_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="letters", messages=user("go on"), max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5


def test_a_last_message_can_be_continued(cluster: Cluster) -> None:
    messages = [*user("hi"), {"role": "assistant", "content": "Once upon"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    tokens = cluster.http.post("/tokenize", json=body).json()["tokens"]
    text = cluster.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nOnce upon")


REFUSED = [
    ({"messages": [{"role": "weather", "content": "x"}]}, "messages", "no weather here"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "no string in its field text"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "no place for tools"),
    ({"tool_choice": "required"}, "tool_choice", "not"),
    ({"response_format": {"type": "json_object"}}, "response_format", "only {'type': 'text'}"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "operator"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "greater"),
]


@pytest.mark.parametrize(("change", "param", "message"), REFUSED, ids=[r[1] + "-" + r[2][:12] for r in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(cluster: Cluster, change: dict, param: str, message: str) -> None:
    answer = cluster.http.post("/v1/chat/completions", json={"model": "letters", "messages": user("x")} | change)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_message_of_tool_calls_alone_has_an_empty_text(cluster: Cluster) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*user("x"), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "a", "content": "5"}]  # fmt: skip
    ids = cluster.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = cluster.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n5<|im_end|>" in text
