"""Answer chat completions and completions, streamed or whole."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    build_response_parser,
    parse_assistant_message,
    response_events_to_chunks,
)

from melinoe.serve.batching import Batches, Cost, Piece, Running
from melinoe.serve.body import ApiError, Asked, Sampling, messages_of, read, switches_of
from melinoe.serve.metrics import Metrics
from melinoe.serve.text import Text

_log = logging.getLogger("melinoe.serve")
# How often a request that is answered whole looks whether its client is still there.
_LOOK_S = 0.25

Gone = Callable[[], bool]


class Handler:
    """
    Read, admit, stream and account for a request; shared by both routes.

    Args:
        batches: Computes.
        metrics: Counts.
        tokenizer: Of the model; its chat template writes chats.
        name: The model's name, as clients ask for it.
        gone: Whether the client of the request at hand has left.
    """

    route: str
    chat: bool

    def __init__(
        self, batches: Batches, metrics: Metrics, tokenizer: Any, name: str, gone: Gone
    ) -> None:
        self.batches, self.metrics, self.tokenizer = batches, metrics, tokenizer
        self.name, self.gone = name, gone
        self.default = default_sampling(batches.model.generation_config)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """
        Answer *body*; transformers' application calls it for each request.

        Raises:
            ApiError: what is asked for is wrong or not served.
        """
        choices: list[Running] = []
        status = "error"
        try:
            adapter = self.adapter_of(body)
            vocabulary = self.batches.model.config.get_text_config().vocab_size
            asked = read(body, self.chat, vocabulary, self.default)
            prompts = self._prompts(body)
            limits = self.batches.limits
            if len(prompts) * asked.choices > limits.running + limits.waiting:
                raise ApiError(
                    f"{len(prompts) * asked.choices} texts are asked for, and at most "
                    f"{limits.running + limits.waiting} have room at once; send fewer prompts",
                    param="prompt" if len(prompts) > 1 else "n",
                )
            asked = replace(self._within(asked, max(map(len, prompts))), adapter=adapter)
            for prompt in prompts:
                for at in range(asked.choices):
                    choices.append(self._submit(prompt, asked, at, request_id))
            if asked.stream:
                status = "streaming"
                return StreamingResponse(
                    self._stream(request_id, body, asked, choices),
                    media_type="text/event-stream",
                )
            answer = await self._whole(request_id, body, asked, choices)
            status = "ok"
            return JSONResponse(answer)
        except ApiError as error:
            status = str(error.status)
            raise
        finally:
            if status != "streaming":
                self._done(request_id, status, choices)

    # --- reading --------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names by which clients may ask: the model's and its adapters'."""
        adapters = self.batches.adapters
        return [self.name, *(adapters.names if adapters is not None else ())]

    def adapter_of(self, body: dict[str, Any]) -> str | None:
        """
        Give the adapter that *body* asks for; None: the model as it is.

        Raises:
            ApiError: no model of that name.
        """
        wanted = body.get("model")
        if wanted is not None and wanted not in self.names:
            raise ApiError(
                f"there is no model {wanted!r} here; ask for {' or '.join(map(repr, self.names))}",
                404, "model", "model_not_found",
            )  # fmt: skip
        return None if wanted in (None, self.name) else wanted

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        """Token ids of each prompt of the request."""
        raise NotImplementedError

    def _within(self, asked: Asked, longest: int) -> Asked:
        """Hold *asked* to the limits, given its longest prompt."""
        limits = self.batches.limits
        context = min(limits.context, limits.cache_tokens)
        room = context - longest
        if room < 1:
            raise ApiError(
                f"the prompt has {longest} tokens, and prompt and text together may have "
                f"{context}; shorten it", param="messages" if self.chat else "prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        most = min(room, limits.max_tokens)
        wanted = asked.max_tokens
        if wanted is None:
            wanted = min(most, limits.unasked or (most if self.chat else 16))
        elif wanted > room:
            raise ApiError(
                f"the prompt has {longest} tokens, so at most {room} can follow; lower max_tokens",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        elif wanted > most:
            raise ApiError(
                f"this server writes at most {most} tokens; lower max_tokens", param="max_tokens"
            )
        return replace(asked, max_tokens=min(wanted, most))

    def _submit(self, prompt: list[int], asked: Asked, at: int, request_id: str) -> Running:
        seed = asked.sampling.seed
        if seed is not None and at:  # choices of one seed differ, and come again with it
            asked = replace(asked, sampling=replace(asked.sampling, seed=seed + at))
        return self.batches.submit(prompt, asked, request_id)

    # --- pieces ---------------------------------------------------------------------------------

    async def _pieces(self, one: Running) -> AsyncIterator[Piece]:
        """
        Give the pieces of a choice until it ends, its client leaves, or its time is over.

        Raises:
            ApiError: it ended for a reason of ours.
        """
        limit = one.began + self.batches.limits.seconds
        while True:
            if self.gone():
                raise ApiError("the client has left", 499, code="client_left")
            if time.perf_counter() > limit:
                raise ApiError(
                    f"the request ran for {self.batches.limits.seconds:g} s, which is the limit; "
                    "ask for fewer tokens",
                    504,
                    code="timeout",
                )
            try:
                piece = await asyncio.wait_for(one.pieces.get(), _LOOK_S)
            except TimeoutError:
                self.batches.check_alive()
                if one.id not in self.batches.running and one.pieces.empty():
                    raise ApiError("the model failed; try again", 500, code="failed") from None
                continue
            if piece.error is not None:
                if self.batches.draining:
                    raise ApiError(f"{piece.error}; ask another one", 503, code="stopping")
                raise ApiError(f"the request was lost: {piece.error}", 500, code="failed")
            yield piece
            if piece.done:
                return

    def _reason(self, one: Running, text: Text) -> str:
        """Say why a choice ended, in OpenAI's word."""
        if text.stopped or (one.tokens and one.tokens[-1] in self.batches.ends):
            return "stop"
        return "length"

    def _usage(self, choices: list[Running]) -> dict[str, Any]:
        prompt = sum(len(one.prompt) for one in choices[:: max(1, choices[0].asked.choices)])
        written = sum(len(one.tokens) for one in choices)
        total = Cost()
        for one in choices:
            for name, value in vars(one.cost).items():
                setattr(total, name, getattr(total, name) + value)
        return {
            "prompt_tokens": prompt, "completion_tokens": written,
            "total_tokens": prompt + written, "expert_cache": total.usage(),
        }  # fmt: skip

    def _done(
        self, request_id: str, status: str, choices: list[Running], route: str | None = None
    ) -> None:
        for one in choices:
            self.batches.cancel(one)
        self.metrics.request_done(route or self.route, status, choices)
        _log.info(
            json.dumps(
                {
                    "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "request": request_id,
                    "route": route or self.route, "status": status,
                    "prompt_tokens": sum(len(one.prompt) for one in choices),
                    "completion_tokens": sum(len(one.tokens) for one in choices),
                }
            )
        )  # fmt: skip

    async def _text(self, one: Running, text: Text) -> str:
        """Read one choice to its end, or to its stop string."""
        written = ""
        async for piece in self._pieces(one):
            written += text.add(piece.tokens)
            if text.stopped:
                self.batches.cancel(one)
                break
        return written + text.rest()

    async def _whole(
        self, request_id: str, body: dict[str, Any], asked: Asked, choices: list[Running]
    ) -> dict[str, Any]:
        texts = [Text(self.tokenizer, asked.stop, self.chat) for _ in choices]
        written = await asyncio.gather(*map(self._text, choices, texts))
        answers = [
            self._choice(at, one, text, found, body)
            for at, (one, text, found) in enumerate(zip(choices, texts, written, strict=True))
        ]
        return {
            "id": request_id, "object": self.object, "created": int(time.time()),
            "model": asked.adapter or self.name, "choices": answers, "usage": self._usage(choices),
        }  # fmt: skip

    object: str

    def _choice(
        self, at: int, one: Running, text: Text, written: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    async def _stream(
        self, request_id: str, body: dict[str, Any], asked: Asked, choices: list[Running]
    ) -> AsyncIterator[str]:
        status = "client left"
        events: asyncio.Queue[dict[str, Any] | ApiError | None] = asyncio.Queue()
        head = {
            "id": request_id, "object": self.chunk_object, "created": int(time.time()),
            "model": asked.adapter or self.name,
        }  # fmt: skip

        async def follow(at: int, one: Running) -> None:
            try:
                async for choice in self._deltas(at, one, asked, body):
                    events.put_nowait({**head, "choices": [choice]})
                events.put_nowait(None)
            except ApiError as error:
                events.put_nowait(error)
            except Exception as error:  # such as a tool call that no parser can read
                _log.error("a stream failed", exc_info=error)
                events.put_nowait(ApiError("the server failed; its log says why", 500))

        tasks = [asyncio.create_task(follow(at, one)) for at, one in enumerate(choices)]
        try:
            left = len(tasks)
            while left:
                event = await events.get()
                if isinstance(event, ApiError):
                    status = str(event.status)
                    yield f"data: {json.dumps(event.body())}\n\n"
                    return
                if event is None:
                    left -= 1
                else:
                    yield f"data: {json.dumps(event)}\n\n"
            if asked.stream_usage:
                usage = {**head, "choices": [], "usage": self._usage(choices)}
                yield f"data: {json.dumps(usage)}\n\n"
            yield "data: [DONE]\n\n"
            status = "ok"
        finally:
            for task in tasks:
                task.cancel()
            self._done(request_id, status, choices)

    chunk_object: str

    def _deltas(
        self, at: int, one: Running, asked: Asked, body: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """Choices of a stream's events."""
        raise NotImplementedError

    def _word(self, token: int) -> dict[str, Any]:
        """A token as text and as bytes."""
        text = self.tokenizer.decode([token])
        return {"token": text, "bytes": list(text.encode("utf-8", "replace"))}


class CompletionHandler(Handler):
    """Answer `/v1/completions`: text that follows a prompt."""

    route, chat = "completions", False
    object = chunk_object = "text_completion"

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        asked = body.get("prompt")
        many = asked if isinstance(asked, list) and asked and not _ids(asked) else [asked]
        vocabulary = self.batches.model.config.get_text_config().vocab_size
        prompts = []
        for one in many:
            if isinstance(one, str):
                ids = self.tokenizer(one)["input_ids"]
            elif isinstance(one, list) and _ids(one) and all(i < vocabulary for i in one):
                ids = list(one)
            else:
                raise ApiError("prompt must be text or token ids, or a list of them",
                               param="prompt")  # fmt: skip
            if not ids:
                raise ApiError("the prompt has no token; give some text", param="prompt")
            prompts.append(ids)
        return prompts

    def _logprobs(self, one: Running, first: int = 0) -> dict[str, Any] | None:
        if one.asked.sampling.alternatives is None:
            return None
        chosen = one.chosen[first:]
        words = [self.tokenizer.decode([c.token]) for c in chosen]
        return {
            "tokens": words,
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [
                {self.tokenizer.decode([i]): value for i, value in c.alternatives} for c in chosen
            ],
        }

    def _choice(
        self, at: int, one: Running, text: Text, written: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "index": at, "text": written, "finish_reason": self._reason(one, text),
            "logprobs": self._logprobs(one),
        }  # fmt: skip

    async def _deltas(
        self, at: int, one: Running, asked: Asked, body: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        text, told = Text(self.tokenizer, asked.stop), 0
        async for piece in self._pieces(one):
            shown = text.add(piece.tokens)
            logprobs = self._logprobs(one, told)
            told = len(one.chosen)
            if shown or logprobs:
                yield {"index": at, "text": shown, "finish_reason": None, "logprobs": logprobs}
            if text.stopped:
                self.batches.cancel(one)
                break
        yield {
            "index": at, "text": text.rest(), "finish_reason": self._reason(one, text),
            "logprobs": None,
        }  # fmt: skip


class ChatHandler(Handler):
    """Answer `/v1/chat/completions`: the next message of a chat."""

    route, chat = "chat", True
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        messages = messages_of(body)
        if not self.tokenizer.chat_template:
            raise ApiError(
                "this model has no chat template; ask /v1/completions, or start the server with "
                "--chat-template plain", code="no_chat_template",
            )  # fmt: skip
        switches = switches_of(body, body.get("reasoning_effort"))
        tools = body.get("tools")
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(one, dict) for one in tools)
        ):
            raise ApiError("tools must be a list of objects", param="tools")
        try:
            ids = self.tokenizer.apply_chat_template(
                messages,
                tools=self._tools(body),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **switches,
            )["input_ids"]
        except TemplateError as error:
            raise ApiError(f"the chat template refuses: {error}", param="messages") from error
        except Exception as error:  # a template is a program, and this chat made it fail
            raise ApiError(
                f"the chat template cannot write this chat: {error}", param="messages"
            ) from error
        return [list(ids)]

    @staticmethod
    def _tools(body: dict[str, Any]) -> list[dict[str, Any]] | None:
        return None if body.get("tool_choice") == "none" else body.get("tools") or None

    def _logprobs(self, one: Running, first: int = 0) -> dict[str, Any] | None:
        if one.asked.sampling.alternatives is None:
            return None
        return {
            "content": [
                {
                    **self._word(c.token), "logprob": c.logprob,
                    "top_logprobs": [
                        {**self._word(i), "logprob": value} for i, value in c.alternatives
                    ],
                }
                for c in one.chosen[first:]
            ]
        }  # fmt: skip

    def _choice(
        self, at: int, one: Running, text: Text, written: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        ids = one.tokens
        if text.stopped:  # a parser must not read what comes after the stop string
            ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        plain = self.tokenizer.decode(ids, skip_special_tokens=True)
        content, reasoning, calls = parse_assistant_message(
            self.tokenizer, self.batches.model, ids, one.prompt, plain, tools=self._tools(body)
        )
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if not calls:
            message["content"] = content
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [_tool_call(one.id, i, call) for i, call in enumerate(calls)]
        return {
            "index": at, "message": message, "logprobs": self._logprobs(one),
            "finish_reason": "tool_calls" if calls else self._reason(one, text),
        }  # fmt: skip

    async def _deltas(
        self, at: int, one: Running, asked: Asked, body: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        parser = build_response_parser(
            self.tokenizer, self.batches.model, one.prompt, tools=self._tools(body)
        )
        text, told, calls = Text(self.tokenizer, asked.stop, parser is not None), 0, 0

        def event(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            nonlocal told
            logprobs = self._logprobs(one, told)
            told = len(one.chosen)
            return {"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

        def parsed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
            nonlocal calls
            deltas: list[dict[str, Any]] = []
            for item in response_events_to_chunks(events):
                if isinstance(item, ToolCall):
                    call = {"index": calls, **_tool_call(one.id, calls, item)}
                    deltas.append({"tool_calls": [call]})
                    calls += 1
                elif isinstance(item, ReasoningText):
                    deltas.append({"reasoning_content": str(item)})
                else:
                    deltas.append({"content": item})
            return deltas

        yield event({"role": "assistant", "content": ""})
        if parser is not None:
            for delta in parsed(parser.initial_events):
                yield event(delta)
        async for piece in self._pieces(one):
            shown = text.add(piece.tokens)
            if piece.done or text.stopped:
                shown += text.rest()
            if parser is None:
                deltas = [{"content": shown}] if shown else []
            else:
                deltas = parsed(parser.feed(shown)) if shown else []
            for delta in deltas:
                yield event(delta)
            if text.stopped:
                self.batches.cancel(one)
                break
        if parser is not None:
            try:
                for delta in parsed(parser.finalize()[1]):
                    yield event(delta)
            except (ValueError, RuntimeError):
                pass  # the text ended inside a tool call: what was whole of it has been sent
        yield event({}, "tool_calls" if calls else self._reason(one, text))


def default_sampling(config: Any) -> Sampling:
    """Give what the model's own generation config says about sampling; OpenAI's defaults else."""
    if not getattr(config, "do_sample", False):
        return Sampling()
    top_k = getattr(config, "top_k", None)
    return Sampling(
        temperature=float(config.temperature if config.temperature is not None else 1.0),
        top_p=float(config.top_p if config.top_p is not None else 1.0),
        top_k=top_k if top_k else None,
    )


def _tool_call(request: str, at: int, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{request}_{at}", "type": "function", "function": function}


def _ids(values: list[Any]) -> bool:
    return bool(values) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in values
    )
