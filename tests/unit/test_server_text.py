"""Tokens to text without a torn character, stop strings without a leak, chat templates without a way out."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from phalanx.errors import BadCheckpoint, BadConfig, BadRequest
from phalanx.server.template import ChatTemplate
from phalanx.server.text import Detokenizer, ModelText, StopStrings


def save(path: Path, tokenizer: Tokenizer, **files: object) -> Path:
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in {"config": {"max_position_embeddings": 64}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def byte_level() -> Tokenizer:
    """Like Qwen's: byte-level, with two merged tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate(symbols)} | {"he": 256, "Ġw": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Mixtral's: spaces are part of tokens, a leading one is stripped, unknown characters become bytes."""
    words = ["<unk>", "<s>", "</s>", "▁Hello", "▁world", "a", "▁"]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    path = tmp_path_factory.mktemp("bytewise")
    return ModelText(str(save(path, byte_level(), tokenizer_config={"eos_token": {"content": "<eos>"}})))


@pytest.fixture(scope="module")
def wordwise(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return ModelText(str(save(tmp_path_factory.mktemp("wordwise"), byte_fallback())))


def pieces(text: ModelText, ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(text, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_the_pieces_of_any_text_are_the_text(bytewise: ModelText, text: str) -> None:
    ids = bytewise.encode(text)
    parts = pieces(bytewise, ids)
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 258), max_size=40))
def test_the_pieces_of_any_tokens_are_what_they_decode_to(bytewise: ModelText, ids: list[int]) -> None:
    assert "".join(pieces(bytewise, ids)) == bytewise.decode(ids)


def test_a_space_before_the_first_word_is_kept_after_a_prompt_and_stripped_without_one(wordwise: ModelText) -> None:
    assert "".join(pieces(wordwise, [4, 4], prompt=(1, 3))) == " world world"
    assert "".join(pieces(wordwise, [4, 4])) == "world world"


def test_bytes_after_half_a_character_in_the_prompt_do_not_break_the_stream(wordwise: ModelText) -> None:
    euro = [7 + b for b in "€".encode()]
    assert pieces(wordwise, [*euro[1:], 5], prompt=tuple(euro[:1]))[-2] == "a"


def test_special_tokens_are_hidden_or_shown(bytewise: ModelText) -> None:
    eos = bytewise.raw.token_to_id("<eos>")
    assert "".join(pieces(bytewise, [256, eos])) == "he"
    shown = Detokenizer(bytewise, (), skip_special=False)
    assert shown.push(256) + shown.push(eos) + shown.flush() == "he<eos>"


def test_a_token_has_the_text_it_has_inside_a_text_and_the_bytes_it_stands_for(
    bytewise: ModelText, wordwise: ModelText
) -> None:
    assert wordwise.token_text(4) == " world"
    assert bytewise.token_text(257) == " w"
    assert wordwise.token_bytes(7 + 0xE2) == b"\xe2"
    for token in range(256):
        assert len(bytewise.token_bytes(token)) == 1
    assert b"".join(bytewise.token_bytes(i) for i in bytewise.encode("né €")) == "né €".encode()


# --- stop strings


def feed(text: str, stops: list[str], cuts: list[int], include: bool = False) -> tuple[str, str | None]:
    matcher, given_out = StopStrings(stops, include=include), ""
    ends = [*sorted({c % (len(text) + 1) for c in cuts}), len(text)]
    start = 0
    for end in ends:
        given_out += matcher.push(text[start:end])
        start = end
        if matcher.found is not None:
            return given_out, matcher.found
    return given_out + matcher.flush(), None


@settings(deadline=None, max_examples=300)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
       st.lists(st.integers(0, 20), max_size=6))  # fmt: skip
def test_however_a_text_is_cut_nothing_of_a_stop_string_leaks_and_nothing_else_is_lost(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    shown, found = feed(text, stops, cuts)
    if found is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + found)
        assert not any(stop in shown for stop in stops)


@settings(deadline=None, max_examples=100)
@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4))
def test_letter_by_letter_it_stops_where_the_first_stop_string_ends(text: str, stop: str) -> None:
    shown, found = feed(text, [stop], list(range(21)))
    assert shown == (text.split(stop, 1)[0] if stop in text else text)
    assert (found is not None) == (stop in text)


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    stops = StopStrings(["STOP"])
    assert [stops.push(c) for c in "aSTxST"] == ["a", "", "", "STx", "", ""]
    assert stops.flush() == "ST"


def test_a_stop_string_can_be_kept() -> None:
    assert feed("xxENDyy", ["END"], list(range(8)), include=True) == ("xxEND", "END")


# --- templates

CHAT = [{"role": "user", "content": "hi"}]


def test_a_template_has_the_functions_that_models_rely_on() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}!{% endif %}",
        {"bos_token": "<s>"},
    )
    assert template.render(CHAT * 2) == '<s>hi{"a": "<é>"}4!'
    assert template.render(CHAT, add_generation_prompt=False).endswith("4")


def test_a_template_that_refuses_is_the_clients_error() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(BadRequest, match="roles must alternate"):
        template.render(CHAT)


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.__class__.__base__.__subclasses__() }}",
     "{{ messages[0].content.nothing.more }}", "{{ 1 // 0 }}"],
)  # fmt: skip
def test_a_template_cannot_leave_its_sandbox_or_crash_the_server(source: str) -> None:
    with pytest.raises(BadRequest):
        ChatTemplate(source, {}).render(CHAT)


def test_without_a_template_a_conversation_is_refused() -> None:
    with pytest.raises(BadRequest, match="no chat template"):
        ChatTemplate("", {}).render(CHAT)


def test_tools_go_to_a_template_that_takes_them_and_are_refused_otherwise() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    takes = ChatTemplate("{% if tools %}{{ tools[0].function.name }}{% endif %}", {})
    assert takes.render(CHAT, tools=tools) == "f"
    with pytest.raises(BadRequest, match="no place for tools"):
        ChatTemplate("{{ messages[0].content }}", {}).render(CHAT, tools=tools)


def test_a_last_message_is_continued_where_it_ends() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {})
    messages = [*CHAT, {"role": "assistant", "content": "so far"}]
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == "[hi][so far"


def test_the_operators_template_wins_then_the_file_then_the_config(tmp_path: Path) -> None:
    path = save(tmp_path, byte_level(), tokenizer_config={"chat_template": "config"})
    assert ModelText(str(path)).template.render(CHAT) == "config"
    (path / "chat_template.jinja").write_text("file")
    assert ModelText(str(path)).template.render(CHAT) == "file"
    own = tmp_path / "own.jinja"
    own.write_text("operator")
    assert ModelText(str(path), str(own)).template.render(CHAT) == "operator"
    with pytest.raises(BadConfig, match=r"missing\.jinja"):
        ModelText(str(path), str(tmp_path / "missing.jinja"))


def test_one_of_several_templates_is_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    text = ModelText(str(save(tmp_path, byte_level(), tokenizer_config={"chat_template": named})))
    assert text.template.render(CHAT) == "plain"
    assert text.template.render(CHAT, tools=[{}]) == "1 tools"


# --- model directories


def test_end_tokens_and_defaults_come_from_all_files_that_name_them(tmp_path: Path) -> None:
    path = save(
        tmp_path, byte_level(), tokenizer_config={"eos_token": "<eos>"},
        generation_config={"eos_token_id": [3, 4], "temperature": 0.6, "top_k": 20, "max_length": 5},
        config={"max_position_embeddings": 64, "eos_token_id": 5},
    )  # fmt: skip
    text = ModelText(str(path))
    assert text.eos_ids == {3, 4, 5, 258}
    assert text.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert text.max_positions == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("tokenizer.json", "{}", "tokenizer.json cannot be read"), ("config.json", "{", "config.json cannot be read"),
     ("config.json", "[]", "does not hold a JSON object"), ("tokenizer.json", None, "tokenizer.json is missing"),
     ("config.json", None, "config.json is missing"), ("chat_template.jinja", "{% if %}", "cannot be compiled")],
)  # fmt: skip
def test_a_broken_model_directory_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = save(tmp_path, byte_level())
    (path / name).unlink(missing_ok=True)
    if content is not None:
        (path / name).write_text(content)
    with pytest.raises(BadCheckpoint, match=message):
        ModelText(str(path))


def test_a_text_in_random_pieces_of_random_tokenizers_round_trips(bytewise: ModelText) -> None:
    rng = random.Random(7)
    for _ in range(50):
        text = "".join(rng.choice("héllo wörld €😀\n") for _ in range(30))
        assert "".join(pieces(bytewise, bytewise.encode(text), prompt=tuple(bytewise.encode("we ")))) == text


def test_a_long_text_is_tokenized_while_other_threads_go_on(tmp_path: Path) -> None:
    text = ModelText(str(save(tmp_path / "m", byte_level())))
    long, found = "hello world " * 100_000, []
    thread = threading.Thread(target=lambda: found.append(text.encode_long(long)))
    turns = 0
    thread.start()
    while thread.is_alive():
        turns += 1
        thread.join(0.001)
    assert turns > 10, "the interpreter was held all the while"
    assert found == [text.encode(long)]
