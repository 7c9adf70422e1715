"""Hold a text to a JSON schema, or to a call of a tool: llguidance says which tokens may follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from melinoe.serve.body import ApiError

llguidance: Any = None  # an extra; without it such requests are refused
with suppress(ImportError):
    llguidance = import_module("llguidance")
    import_module("llguidance.hf")


def of_format(asked: Any, param: str) -> str | None:
    """
    Give the grammar of a response format ``(type, schema)``; None for plain text.

    Raises:
        ApiError: a schema of a kind that is not served, or llguidance is not installed.
    """
    if asked is None or asked[0] == "text":
        return None
    return _grammar(asked[1] if asked[0] == "json_schema" else {"type": "object"}, param)


def of_tools(choice: Any, tools: list[dict[str, Any]]) -> str | None:
    """
    Give the grammar of a call of one of *tools*, where *choice* demands one; None where not.

    Raises:
        ApiError: a tool that is not there, or as `of_format`.
    """
    if choice in (None, "auto", "none"):
        return None
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    names = list(functions)
    if isinstance(choice, dict):
        function = choice.get("function")
        names = [function.get("name") if isinstance(function, dict) else None]
    if not names or not all(isinstance(one, str) and one in functions for one in names):
        raise ApiError(
            "tool_choice is auto, none, required, or names a function of tools", param="tool_choice"
        )
    calls = [
        {
            "type": "object", "additionalProperties": False, "required": ["name", "arguments"],
            "properties": {
                "name": {"const": name},
                "arguments": _declared(functions[name].get("parameters") or {"type": "object"}),
            },
        }
        for name in names
    ]  # fmt: skip
    return _grammar({"anyOf": calls}, "tool_choice")


def _declared(parameters: dict[str, Any]) -> dict[str, Any]:
    """Take no argument that a tool does not declare, unless it says that it takes others."""
    closed = {"additionalProperties": False} if "properties" in parameters else {}
    return {**closed, **parameters}


def _grammar(schema: dict[str, Any], param: str) -> str:
    if llguidance is None:
        raise ApiError(
            "this server cannot hold a text to a schema: llguidance is not installed", param=param
        )
    # Whitespace without end would be JSON, too.
    schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    if wrong := llguidance.LLMatcher.validate_grammar(grammar):
        raise ApiError(f"{param}: {wrong}", param=param)
    return grammar


def matchers(tokenizer: Any, vocabulary: int, ends: list[int]) -> Callable[[str], Any]:
    """Give what makes a matcher of a grammar; the first call reads the tokenizer."""

    @cache
    def known() -> Any:
        return llguidance.hf.from_tokenizer(tokenizer, vocabulary, ends)

    return lambda grammar: llguidance.LLMatcher(known(), grammar)


def allowed(matcher: Any, scores: Tensor) -> Tensor:
    """Give *scores* ``(vocabulary,)`` with minus infinity where the grammar cannot go on."""
    may = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0
    return scores.masked_fill(~may[: len(scores)].to(scores.device), -torch.inf)
