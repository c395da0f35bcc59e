"""Chat templates: a conversation as the text that the model was trained on. Jinja2 in its immutable sandbox.

The functions that a template may call are those that Hugging Face's chat templates rely on: `raise_exception`,
`strftime_now`, `tojson`, loop controls, and `{% generation %}` blocks, which mean nothing here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phalanx.errors import BadCheckpoint, BadConfig, BadRequest


class _GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template and the special tokens it may name. `source` empty: the model has none."""

    def __init__(self, source: str, tokens: Mapping[str, str], named: Mapping[str, str] | None = None) -> None:
        """BadCheckpoint when it is not a valid template."""
        self.source, self._tokens = source, dict(tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        tool_source = (named or {}).get("tool_use", source)
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(tool_source)
        except TemplateError as error:
            raise BadCheckpoint(f"the chat template cannot be compiled: {error}") from None
        self.takes_tools = "tools" in tool_source

    @classmethod
    def read(cls, path: str, settings: Mapping[str, Any], tokens: Mapping[str, str], override: str) -> ChatTemplate:
        """The template at `override` if given, else chat_template.jinja, else that of tokenizer_config.json. LOCAL."""
        for file, error in ((override, BadConfig), (os.path.join(path, "chat_template.jinja"), BadCheckpoint)):
            if file and (file == override or os.path.isfile(file)):
                try:
                    with open(file, encoding="utf-8") as stream:
                        return cls(stream.read(), tokens)
                except (OSError, UnicodeDecodeError) as cause:
                    raise error(f"the chat template {file} cannot be read: {cause}") from None
        stored = settings.get("chat_template") or ""
        if isinstance(stored, list):  # several, by name
            try:
                named = {str(entry["name"]): str(entry["template"]) for entry in stored}
            except (TypeError, KeyError):
                raise BadCheckpoint("tokenizer_config.json: chat_template must list names and templates") from None
            return cls(named.get("default", ""), tokens, named)
        return cls(str(stored), tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one text. BadRequest when the template refuses it. LOCAL.

        continue_final_message: the text ends inside the last message, so that the model goes on with it."""
        if not self.source:
            raise BadRequest(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template",
                "messages",
            )
        if tools and not self.takes_tools:
            raise BadRequest("this model's chat template has no place for tools", "tools")
        template = self._tool_template if tools else self._template
        variables: dict[str, Any] = {**self._tokens, **(extra or {})}
        try:
            text = template.render(
                **variables | {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as error:
            raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from None
        return _cut(text, messages[-1]) if continue_final_message else text


def _cut(text: str, last: Mapping[str, Any]) -> str:
    content = str(last.get("content") or "").strip()
    at = text.rfind(content)
    if not content or at < 0:
        raise BadRequest("continue_final_message: the last message has no content to go on with", "messages")
    return text[: at + len(content)]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter this one escapes nothing for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
