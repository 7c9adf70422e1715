"""Read request bodies by pydantic, and refuse in OpenAI's form what a route does not take."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.response import ResponseHandler


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
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Sampling:
    """
    How one request's tokens are chosen, in the words of OpenAI's API.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: So many of the likeliest tokens are kept; None keeps all.
        seed: Of this request's own random numbers; None draws one.
        alternatives: Likeliest tokens whose log-probabilities are told; None tells none.
        grammar: What the text must match, as llguidance writes it; None: nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    alternatives: int | None = None
    grammar: str | None = None

    @classmethod
    def of_model(cls, config: Any) -> Sampling:
        """Give what a model's own generation config says; OpenAI's defaults else."""
        if not getattr(config, "do_sample", False):
            return cls()
        given = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k")}
        given["top_k"] = given["top_k"] or None  # transformers keeps all by 0, too
        return cls(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Asked:
    """
    Hold what a request asks for besides its prompt.

    Attributes:
        max_tokens: Written at most by each choice; None: as many as the server allows.
        choices: Texts for the one prompt.
        stop: The text ends before the first of these.
        priority: Those with a lower number go first.
        adapter: The adapter that writes; None: the model as it is.
    """

    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    choices: int = 1
    stop: tuple[str, ...] = ()
    priority: int = 0
    adapter: str | None = None

    def choice(self, at: int) -> Asked:
        """Give what choice *at* asks: those of one seed differ, and come again with it."""
        seed = self.sampling.seed
        if seed is None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=seed + at))


# --- what JSON must be ---------------------------------------------------------------------------


def _json(value: Any) -> Any:
    try:
        return json.loads(value or "{}") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError("arguments of a tool call must be JSON") from error


def _joined(content: Any) -> Any:
    """Give the text of a message, which may come in parts."""
    if not isinstance(content, list):
        return "" if content is None else content
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise ValueError("only text is read; leave other content out")
    return "".join(found)


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value or []


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _prompts(value: Any) -> Any:
    """Give a list of prompts, each text or token ids."""
    many = value if isinstance(value, list) and value and not _ids(value) else [value]
    if not all(isinstance(one, str) or (_ids(one) and one) for one in many):
        raise ValueError("prompt must be text or token ids, or a list of them")
    return many


def _messages(value: Any, info: ValidationInfo) -> Any:
    """Give the messages of an input: text, parts of one message, or items of earlier answers."""
    if value == []:
        raise ValueError("input is empty; give text, or messages")
    try:
        items: Any = value
        if isinstance(value, list):
            items = []
            for item, after in zip(value, [*value[1:], {}], strict=True):
                items.append(item)
                # transformers reads a thought as the next message's, and a call is none.
                if (item.get("type"), after.get("type")) == ("reasoning", "function_call"):
                    items.append({"role": "assistant", "content": ""})
        return ResponseHandler._normalize_input({**info.data, "input": items})
    except Exception as error:  # transformers refuses some, and trips over others
        why = getattr(error, "detail", error)
        raise ValueError(f"input cannot be read as a chat: {why}") from error


# What `apply_chat_template` itself takes: no client may set these.
_NOT_OF_THE_TEMPLATE = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
) - {"kwargs"}


def _switches(value: Any) -> Any:
    if isinstance(value, dict) and (wrong := sorted(set(value) & _NOT_OF_THE_TEMPLATE)):
        raise ValueError(f"{wrong[0]} is no switch of a template; leave it out")
    return value


def _never_one(parallel: Any) -> Any:
    if parallel is False:
        raise ValueError("a model cannot be held to one tool call; leave parallel_tool_calls out")
    return parallel


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Open(_Fields):
    """Let a client say more than is read."""

    model_config = ConfigDict(extra="allow")


class _Function(_Open):
    name: str
    arguments: Annotated[Any, BeforeValidator(_json)] = {}


class _Call(_Open):
    function: _Function


class _Described(_Open):
    name: str
    parameters: dict[str, Any] | None = None


class _Tool(_Open):
    type: Literal["function"] = "function"
    function: _Described


class _Message(_Fields):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: Annotated[str, BeforeValidator(_joined)] = ""
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Schema(_Open):
    schema_: dict[str, Any] = Field({}, alias="schema")


class _Format(_Open):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: _Schema | None = None


class _StreamOptions(_Open):
    include_usage: bool = False


class _Reasoning(_Fields):
    effort: str | None = None


_Count = Annotated[int, Field(ge=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Alternatives = Annotated[int, Field(ge=0, le=20)]
_TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Stop = Annotated[str, Field(min_length=1)]
_Switches = Annotated[dict[str, Any], BeforeValidator(_switches)]


class _Body(_Fields):
    """Fields of all routes; those that are `Any` change nothing of what is written."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    metadata: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    user: Any = None

    def sampling(self, default: Sampling, **more: Any) -> Sampling:
        """Give how tokens are chosen, where it says nothing as *default* does."""
        return Sampling(
            default.temperature if self.temperature is None else self.temperature,
            default.top_p if self.top_p is None else self.top_p,
            **{"top_k": default.top_k, "seed": self.seed, **more},
        )


class _Written(_Body):
    """Fields of both completions."""

    max_tokens: _Count | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[_TokenId, _Bias], Field(max_length=1024)] | None = None
    stop: Annotated[
        list[_Stop],
        BeforeValidator(_stops, json_schema_input_type=str | list[str] | None),
        Field(max_length=4),
    ] = []
    stream_options: _StreamOptions | None = None
    service_tier: Any = None
    store: Any = None

    def asked(self, default: Sampling, alternatives: int | None, limit: int | None = None) -> Asked:
        """Give what it asks for."""
        sampling = self.sampling(
            default,
            top_k=default.top_k if self.top_k is None else max(0, self.top_k) or None,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(id), bias) for id, bias in (self.logit_bias or {}).items()),
            alternatives=alternatives,
        )
        limit = self.max_tokens if limit is None else limit
        return Asked(limit, sampling, self.n or 1, tuple(self.stop), self.priority)


class Completion(_Written):
    """The body of `/v1/completions`."""

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(
            _prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
        ),
    ]
    logprobs: _Alternatives | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None


class Chat(_Written):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Alternatives | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    response_format: _Format | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: _Switches | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("parallel_tool_calls")
    @classmethod
    def _many(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        # A tool that is demanded is called once.
        return _never_one(value) if info.data.get("tool_choice") in (None, "auto") else value

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs: true")
        return value


class _TextFormat(_Schema):
    type: Literal["text", "json_object", "json_schema"]


class _TextOptions(_Fields):
    format: _TextFormat | None = None


class _FunctionTool(_Open):
    type: Literal["function"]


class Response(_Body):
    """The body of `/v1/responses`; no state is kept, and `Literal`s say what else is served."""

    instructions: str | None = None
    input: Annotated[
        list[_Message],
        BeforeValidator(_messages, json_schema_input_type=str | list[dict[str, Any]]),
    ]
    max_output_tokens: _Count | None = None
    tools: list[_FunctionTool] | None = None
    tool_choice: Literal["auto"] | None = None
    parallel_tool_calls: Annotated[bool, BeforeValidator(_never_one)] | None = None
    reasoning: _Reasoning | None = None
    chat_template_kwargs: _Switches | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    text: _TextOptions | None = None


ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/responses": Response,
}
B = TypeVar("B", bound=BaseModel)


def read(kind: type[B], body: Mapping[str, Any]) -> B:
    """
    Read *body*.

    Raises:
        ApiError: a field that is unknown, not served, or of a value that cannot be.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()  # tokenizers and templates trip over others
        return kind.model_validate(body)
    except (UnicodeEncodeError, RecursionError) as error:
        why = "half of a character" if isinstance(error, ValueError) else "too many levels"
        raise ApiError(f"the request has {why}; mend or remove it") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path: list[str] = []
        inside: Any = body
        for part in first["loc"]:  # which also names the alternatives that pydantic tried
            try:
                inside = inside[part]
            except (KeyError, IndexError, TypeError):
                if first["type"] != "missing":
                    continue
            path.append(str(part))
        name = ".".join(path)
        words = first["msg"][0].lower() + first["msg"][1:]
        message = f"{name}: {words}"
        if first["type"] == "extra_forbidden":
            message = f"{name} is not supported here; leave it out"
        elif first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        raise ApiError(message, param=name) from None


def dumped(messages: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """Give messages as chat templates read them."""
    return [one.model_dump(exclude_none=True) for one in messages]


def switches_of(body: Any, effort: str | None) -> dict[str, Any]:
    """Give what the chat template is told besides the chat; effort ``none`` ends thinking."""
    given = body.chat_template_kwargs or {}
    if effort is None:
        return given
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}
