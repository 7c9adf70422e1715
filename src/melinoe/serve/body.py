"""Read the body of a request: what is asked for, and what is refused because it is not served."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

# Choices, stop strings, alternatives and biased tokens that one request may ask for.
MOST_CHOICES, MOST_STOPS, MOST_ALTERNATIVES, MOST_BIASES = 8, 4, 20, 1024


class ApiError(Exception):
    """
    Refuse a request in the form in which OpenAI's servers do.

    Args:
        message: One sentence: what is wrong, and the way out.
        status: HTTP status.
        param: The field that is wrong, if one is.
        code: A word for programs, such as ``model_not_found``.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        """Give the JSON of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """
    How one request's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: The likeliest tokens with this share of the probability are kept.
        top_k: So many of the likeliest tokens are kept; None keeps all.
        seed: Of this request's own random numbers; None draws one.
        presence_penalty: Taken off the logit of each token that was written.
        frequency_penalty: Taken off for each time that it was written.
        logit_bias: Token id and what is added to its logit.
        alternatives: Likeliest tokens whose log-probabilities are told; None tells none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    alternatives: int | None = None


@dataclass(frozen=True)
class Asked:
    """
    Hold what a request asks for besides its prompt.

    Attributes:
        max_tokens: Written at most by each choice; None: as many as the server allows.
        choices: Texts for the one prompt.
        sampling: How tokens are chosen.
        stop: The text ends before the first of these.
        stream: Whether tokens are sent as they come.
        stream_usage: Whether a stream ends with what it cost.
        priority: Those with a lower number go first; 0 unless the client says else.
        adapter: The adapter that writes; None: the model as it is.
    """

    max_tokens: int | None
    choices: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool
    priority: int
    adapter: str | None = None


# Fields that change nothing of what is written.
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier",
                   "prompt_cache_key", "model"}  # fmt: skip
_SHARED = {
    "max_tokens", "n", "temperature", "top_p", "top_k", "seed", "presence_penalty",
    "frequency_penalty", "logit_bias", "stop", "stream", "stream_options", "logprobs", "priority",
}  # fmt: skip
_CHAT = {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
         "chat_template_kwargs", "reasoning_effort", "response_format",
         "parallel_tool_calls"}  # fmt: skip
_COMPLETION = {"prompt", "echo", "suffix", "best_of"}


def read(body: Mapping[str, Any], chat: bool, vocabulary: int, default: Sampling) -> Asked:
    """
    Check *body*, and give what it asks for.

    Args:
        body: The request's JSON object.
        chat: Whether it is a chat completion, else a completion.
        vocabulary: Number of token ids.
        default: What the model's own generation config says.

    Raises:
        ApiError: a field that is unknown, not served, or of a value that cannot be.
    """
    known = _SHARED | _WITHOUT_EFFECT | (_CHAT if chat else _COMPLETION)
    if unknown := sorted(set(body) - known):
        raise ApiError(f"{unknown[0]} is not supported here; leave it out", param=unknown[0])
    refuse(body)
    limit = body.get("max_completion_tokens") if chat else None
    limit = body.get("max_tokens") if limit is None else limit
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError("stream_options must be an object", param="stream_options")
    return Asked(
        max_tokens=_whole({"max_tokens": limit}, "max_tokens", 1, 1 << 24, None),
        choices=_whole(body, "n", 1, MOST_CHOICES, 1) or 1,
        sampling=_sampling(body, chat, vocabulary, default),
        stop=_stops(body.get("stop")),
        stream=_flag(body, "stream"),
        stream_usage=bool(options.get("include_usage")),
        priority=_whole(body, "priority", -1000, 1000, 0) or 0,
    )


def refuse(body: Mapping[str, Any]) -> None:
    """Refuse values of known fields that would change the text in a way that is not served."""
    form = body.get("response_format")
    if form is not None and form != {"type": "text"}:
        raise ApiError("only text is written; leave response_format out", param="response_format")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise ApiError("tool_choice is auto or none here", param="tool_choice")
    if body.get("parallel_tool_calls") is False:
        raise ApiError(
            "a model cannot be held to one tool call; leave parallel_tool_calls out",
            param="parallel_tool_calls",
        )
    for name in ("echo", "suffix"):
        if body.get(name):
            raise ApiError(f"{name} is not supported here; leave it out", param=name)
    if body.get("best_of") not in (None, 1, body.get("n")):
        raise ApiError("best_of is not supported here; use n", param="best_of")


def _sampling(body: Mapping[str, Any], chat: bool, vocabulary: int, default: Sampling) -> Sampling:
    if chat:
        alternatives = None
        if _flag(body, "logprobs"):
            alternatives = _whole(body, "top_logprobs", 0, MOST_ALTERNATIVES, 0)
        elif body.get("top_logprobs") is not None:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    else:
        alternatives = _whole(body, "logprobs", 0, MOST_ALTERNATIVES, None)
    bias = body.get("logit_bias") or {}
    if not isinstance(bias, dict):
        raise ApiError("logit_bias must be an object of token ids", param="logit_bias")
    if len(bias) > MOST_BIASES:
        raise ApiError(f"at most {MOST_BIASES} tokens are biased", param="logit_bias")
    pairs = []
    for token, value in bias.items():
        if not (str(token).isascii() and str(token).isdigit() and int(token) < vocabulary):
            raise ApiError(f"logit_bias: {token!r} is no token id", param="logit_bias")
        pairs.append((int(token), _number({"logit_bias": value}, "logit_bias", -100, 100, 0.0)))
    top_k = _whole(body, "top_k", -1, vocabulary, default.top_k)
    return Sampling(
        temperature=_number(body, "temperature", 0, 2, default.temperature),
        top_p=_number(body, "top_p", 0, 1, default.top_p),
        top_k=top_k if top_k is not None and top_k > 0 else None,
        seed=_whole(body, "seed", -(1 << 63), (1 << 63) - 1, None),
        presence_penalty=_number(body, "presence_penalty", -2, 2, 0.0),
        frequency_penalty=_number(body, "frequency_penalty", -2, 2, 0.0),
        logit_bias=tuple(pairs),
        alternatives=alternatives,
    )


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ApiError("stop must be a string or a list of strings", param="stop")
    if len(stops) > MOST_STOPS:
        raise ApiError(f"at most {MOST_STOPS} stop strings are served", param="stop")
    return tuple(stops)


def _number(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(f"{name} must be a number from {low} to {high}", param=name)
    return float(value)


def _whole(
    body: Mapping[str, Any], name: str, low: int, high: int, default: int | None
) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)
                                       and value == int(value))  # fmt: skip
    if isinstance(value, bool) or not whole or not low <= value <= high:
        raise ApiError(f"{name} must be a whole number from {low} to {high}", param=name)
    return int(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false", param=name)
    return bool(value)


# What `apply_chat_template` itself takes: no client may set these.
_NOT_OF_THE_TEMPLATE = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
) - {"kwargs"}


def switches_of(body: Mapping[str, Any], effort: Any) -> dict[str, Any]:
    """
    Give what the chat template is told besides the chat.

    Args:
        body: The request's; its ``chat_template_kwargs`` come last.
        effort: How much the model is to reason; ``none`` also sets ``enable_thinking`` to false.

    Raises:
        ApiError: not an object of names that only a template can know.
    """
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise ApiError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    if wrong := sorted(set(given) & _NOT_OF_THE_TEMPLATE):
        raise ApiError(
            f"{wrong[0]} is no switch of a template; leave it out", param="chat_template_kwargs"
        )
    if effort is None:
        return dict(given)
    if not isinstance(effort, str):
        raise ApiError("the reasoning effort must be a word", param="reasoning_effort")
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}


def messages_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Give the chat as a template takes it: text contents, and tool arguments as objects.

    Raises:
        ApiError: no chat, or a message of another kind than text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list of at least one message", param="messages")
    return [_message(one, f"messages.{at}") for at, one in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError("a message is an object with a role", param=place)
    made = {"role": message["role"], "content": _text(message.get("content"), place)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise ApiError(f"{name} must be text", param=f"{place}.{name}")
            made[name] = message[name]
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise ApiError("tool_calls must be a list", param=f"{place}.tool_calls")
        made["tool_calls"] = [_call(one, f"{place}.tool_calls") for one in calls]
    return made


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError("content must be text", param=f"{place}.content")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise ApiError("only text is read; leave other content out", param=f"{place}.content")
        parts.append(text)
    return "".join(parts)


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError("a tool call has a function with a name", param=place)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ApiError("arguments of a tool call must be JSON", param=place) from error
    return {**call, "function": {**function, "arguments": arguments}}
