"""Describe bodies of the writing routes at `/openapi.json`; `body.py` takes some more."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from melinoe.serve.batching import Limits
from melinoe.serve.body import MOST_ALTERNATIVES, MOST_BIASES, MOST_CHOICES, MOST_STOPS

_FLAG = {"type": "boolean"}
_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}


def _whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high}


def _list(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **bounds}


def _fields(values: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object", "properties": values, "required": list(required),
        "additionalProperties": False,
    }  # fmt: skip


def bodies(models: list[str], vocabulary: int, limits: Limits) -> dict[str, dict[str, Any]]:
    """Give the JSON schema of each route's body."""
    most = _whole(1, limits.max_tokens)
    ids = _list(_whole(0, vocabulary - 1), minItems=1)
    drawn = {
        "model": {"enum": models}, "stream": _FLAG, "seed": _whole(-(1 << 63), (1 << 63) - 1),
        "temperature": _number(0, 2), "top_p": _number(0, 1),
    }  # fmt: skip
    shared = {
        **drawn, "max_tokens": most, "n": _whole(1, MOST_CHOICES), "top_k": _whole(1, vocabulary),
        "presence_penalty": _number(-2, 2), "frequency_penalty": _number(-2, 2),
        "logit_bias": {
            "type": "object", "maxProperties": MOST_BIASES,
            "propertyNames": {"pattern": f"^[0-9]{{1,{len(str(vocabulary))}}}$"},
            "additionalProperties": _number(-100, 100),
        },
        "stop": {"anyOf": [
            {**_TEXT, "minLength": 1},
            _list({**_TEXT, "minLength": 1}, maxItems=MOST_STOPS),
        ]},
        "stream_options": _fields({"include_usage": _FLAG}),
        "priority": _whole(-1000, 1000), "user": _TEXT,
    }  # fmt: skip
    function = _fields({"name": _TEXT, "description": _TEXT, "parameters": _OBJECT}, "name")
    arguments = {**_TEXT, "contentMediaType": "application/json"}
    call = _fields(
        {"id": _TEXT, "type": {"enum": ["function"]},
         "function": _fields({"name": _TEXT, "arguments": arguments}, "name")},
        "function",
    )  # fmt: skip
    message = _fields(
        {"role": {"enum": ["system", "user", "assistant", "tool"]}, "name": _TEXT,
         "content": {"anyOf": [
             _TEXT, _list(_fields({"type": {"enum": ["text"]}, "text": _TEXT}, "type", "text")),
         ]},
         "tool_call_id": _TEXT, "reasoning_content": _TEXT, "tool_calls": _list(call)},
        "role", "content",
    )  # fmt: skip
    tool = _fields({"type": {"enum": ["function"]}, "function": function}, "type", "function")
    switches = {"chat_template_kwargs": _fields({"enable_thinking": _FLAG})}
    return {
        "/v1/chat/completions": _fields(
            {**shared, **switches, "messages": _list(message, minItems=1),
             "max_completion_tokens": most, "logprobs": _FLAG,
             "reasoning_effort": {"enum": ["none", "low", "medium", "high"]},
             "tools": _list(tool), "tool_choice": {"enum": ["auto", "none"]}},
            "messages",
        ),
        "/v1/completions": _fields(
            {**shared, "logprobs": _whole(0, MOST_ALTERNATIVES),
             "prompt": {"anyOf": [{**_TEXT, "minLength": 1}, ids]}},
            "prompt",
        ),
        "/v1/responses": _fields(
            {**drawn, **switches, "max_output_tokens": most, "instructions": _TEXT,
             "input": {"anyOf": [_TEXT, _list(_fields(
                 {"role": {"enum": ["system", "user", "assistant"]}, "content": _TEXT},
                 "role", "content"), minItems=1)]},
             "tools": _list(_fields(
                 {"type": {"enum": ["function"]}, **function["properties"]}, "type", "name")),
             "reasoning": _fields({"effort": {"enum": ["none", "low", "medium", "high"]}})},
            "input",
        ),
    }  # fmt: skip


def describe(app: FastAPI, schemas: dict[str, dict[str, Any]]) -> None:
    """Let *app* describe the body of each route of *schemas*, which transformers leaves open."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        made = plain()
        for path, schema in schemas.items():
            made["paths"][path]["post"]["requestBody"] = {
                "required": True, "content": {"application/json": {"schema": schema}},
            }  # fmt: skip
        return made

    app.openapi = openapi  # type: ignore[method-assign]
