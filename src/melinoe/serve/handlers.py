"""Answer completions and chat completions: read, admit, stream and account for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    build_response_parser,
    response_events_to_chunks,
)

from melinoe.errors import TokenizerError
from melinoe.serve import structured
from melinoe.serve.batching import Batches, Cost, Piece, Running
from melinoe.serve.body import (
    ApiError,
    Asked,
    Chat,
    Completion,
    Sampling,
    dumped,
    read,
    switches_of,
)
from melinoe.serve.metrics import Metrics
from melinoe.serve.sampling import Chosen
from melinoe.serve.text import Text

_log = logging.getLogger("melinoe.serve")
FAILED = "the server failed; its log says why"

Json = dict[str, Any]


class _Stream(StreamingResponse):
    """End the events of a client that has left at once: garbage may be collected much later."""

    async def stream_response(self, send: Any) -> None:
        events: Any = self.body_iterator
        async with aclosing(events):
            await super().stream_response(send)


class Handler:
    """
    Hold what all routes share.

    Args:
        batches: Computes.
        metrics: Counts.
        tokenizer: Of the model; its chat template writes chats.
        name: The model's name, as clients ask for it.
        log_text: Whether the log holds prompts and answers.

    Raises:
        TokenizerError: the tokenizer is not a fast one.
    """

    route = object = chunk_object = ""
    prompt_field = "messages"
    default_tokens: int | None = None  # where a request sets no limit; None: as many as may be

    def __init__(
        self, batches: Batches, metrics: Metrics, tokenizer: Any, name: str, log_text: bool = False
    ) -> None:
        self.batches, self.metrics, self.tokenizer, self.name = batches, metrics, tokenizer, name
        self.log_text = log_text
        if not hasattr(tokenizer, "_tokenizer"):
            raise TokenizerError(
                "serving needs a fast tokenizer (tokenizer.json); use melinoe generate"
            )
        self.default = Sampling.of_model(batches.model.generation_config)
        self.vocabulary = batches.model.config.get_text_config().vocab_size
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)
        adapters = batches.adapters
        self.names = [name, *(adapters.names if adapters is not None else ())]

    def _read(self, body: Json) -> tuple[Any, list[list[int]], Asked]:
        """Give the body as it was read, the token ids of each prompt, and what else is asked."""
        raise NotImplementedError

    def _deltas(self, at: int, one: Running, said: Any) -> AsyncIterator[Any]:
        """Give what a stream says of choice *at*, event by event."""
        raise NotImplementedError

    def _told(self, chosen: list[Chosen]) -> Json:
        """Give log-probabilities in the form of the route."""
        raise NotImplementedError

    def _answer(self, head: Json, deltas: list[list[Any]], choices: list[Running]) -> Json:
        return {**head, "choices": list(map(_merged, deltas)), "usage": self.usage(choices)}

    def _line(self, head: Json, delta: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': [delta]})}\n\n"

    def _closing(self, head: Json, said: Any, choices: list[Running]) -> str:
        line = ""
        if said.stream_options is not None and said.stream_options.include_usage:
            line = f"data: {json.dumps({**head, 'choices': [], 'usage': self.usage(choices)})}\n\n"
        return f"{line}data: [DONE]\n\n"

    def _broken(self, error: ApiError) -> str:
        return f"data: {json.dumps(error.body())}\n\n"

    async def handle_request(self, body: Json, request_id: str) -> Response:
        """
        Answer *body*; transformers' application calls it for each request.

        Raises:
            ApiError: what is asked for is wrong or not served.
        """
        choices: list[Running] = []
        status = "client left"
        try:
            said, prompts, asked = self._read(body)
            asked = self._admitted(asked, said.model, prompts)
            for prompt in prompts:
                for at in range(asked.choices):  # one by one: a later one may find no room
                    choices.append(self.batches.submit(prompt, asked.choice(at), request_id))
            self.log(request_id, "begun", choices)
            head = {
                "id": request_id, "object": self.chunk_object if said.stream else self.object,
                "created": int(time.time()), "model": asked.adapter or self.name,
            }  # fmt: skip
            if said.stream:
                status = "streaming"
                events = self._stream(request_id, said, head, choices)
                await anext(events)  # begun, so that it also ends if its client has left already
                return _Stream(events, media_type="text/event-stream")
            deltas: list[list[Any]] = [[] for _ in choices]
            async with aclosing(self._all(said, choices)) as told:
                async for at, delta in told:
                    deltas[at].append(delta)
            status = "ok"
            return JSONResponse(self._answer(head, deltas, choices))
        except Exception as error:
            status = str(getattr(error, "status", 500))
            raise
        finally:
            if status != "streaming":
                self.done(request_id, status, choices)

    # --- admission ------------------------------------------------------------------------------

    def _admitted(self, asked: Asked, model: str | None, prompts: list[list[int]]) -> Asked:
        """
        Hold *asked* to the limits, and name the adapter that writes.

        Raises:
            ApiError: it is beyond them, or asks for a model that is not served.
        """
        limits, longest = self.batches.limits, max(map(len, prompts))
        texts, places = len(prompts) * asked.choices, limits.running + limits.waiting
        context = min(limits.context, limits.cache_tokens)
        room, wanted = context - longest, asked.max_tokens
        if model is not None and model not in self.names:
            raise ApiError(
                f"there is no model {model!r} here; ask for {' or '.join(map(repr, self.names))}",
                404, "model", "model_not_found",
            )  # fmt: skip
        if texts > places:
            raise ApiError(
                f"{texts} texts are asked for, and at most {places} have room at once; send fewer "
                "prompts", param="prompt" if len(prompts) > 1 else "n",
            )  # fmt: skip
        if room < 1:
            raise ApiError(
                f"the prompt has {longest} tokens, and prompt and text together may have "
                f"{context}; shorten it", 400, self.prompt_field, "context_length_exceeded",
            )  # fmt: skip
        if any(token >= self.vocabulary for token, _ in asked.sampling.logit_bias):
            raise ApiError("logit_bias names a token that does not exist", param="logit_bias")
        if wanted is not None and wanted > room:
            raise ApiError(
                f"the prompt has {longest} tokens, so at most {room} can follow; lower max_tokens",
                400, "max_tokens", "context_length_exceeded",
            )  # fmt: skip
        if wanted is not None and wanted > limits.max_tokens:
            raise ApiError(
                f"this server writes at most {limits.max_tokens} tokens; lower max_tokens",
                param="max_tokens",
            )
        most = min(room, limits.max_tokens)
        most = min(most, wanted or limits.unasked or self.default_tokens or most)
        return replace(asked, max_tokens=most, adapter=None if model == self.name else model)

    def check_length(self, characters: int) -> None:
        """
        Refuse a prompt of so many characters before its tokens are counted, which would take long.

        Raises:
            ApiError: it could not fit, were all of its tokens the vocabulary's longest.
        """
        context = min(self.batches.limits.context, self.batches.limits.cache_tokens)
        if characters > context * self._longest:
            raise ApiError(
                f"the prompt has more than {context} tokens, and prompt and text together may have "
                "no more; shorten it", 400, self.prompt_field, "context_length_exceeded",
            )  # fmt: skip

    def templated(
        self, messages: list[Json], tools: list[Json] | None, switches: Json, forced: bool = False
    ) -> list[int]:
        """
        Give the token ids of a chat, as the model's template writes it.

        Raises:
            ApiError: there is none, it refuses this chat, or it does not write its tools or calls;
                of tools only where no call is *forced*.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(
                "this model has no chat template; ask /v1/completions, or start the server with "
                "--chat-template plain", code="no_chat_template",
            )  # fmt: skip

        def written(messages: list[Json], tools: list[Json] | None) -> list[int]:
            return list(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=True, tokenize=True,
                    return_dict=True, **switches,
                )["input_ids"]
            )  # fmt: skip

        self.check_length(sum(len(one.get("content", "")) for one in messages))
        silent = [{name: one[name] for name in one if name != "tool_calls"} for one in messages]
        lost = None
        try:
            ids = written(messages, tools)
            if tools and not forced and ids == written(messages, None):
                lost = "tools"
            if silent != messages and ids == written(silent, tools):
                lost = "tool_calls"
        except Exception as error:  # a template is a program, and any chat may make it fail
            did = "refuses" if isinstance(error, TemplateError) else "cannot write this chat"
            raise ApiError(f"the chat template {did}: {error}", param=self.prompt_field) from error
        if lost is not None:
            raise ApiError(
                f"the model's chat template does not write {lost}, so it would not know of them; "
                "leave them out", param=lost,
            )  # fmt: skip
        return ids

    def tools(self, said: Any) -> list[Json] | None:
        """Give the tools of a request as chat templates read them."""
        if not said.tools or said.tool_choice == "none":
            return None
        given = [one.model_dump(exclude_unset=True) for one in said.tools]
        return ResponseHandler._normalize_tools(given)

    # --- what comes back ------------------------------------------------------------------------

    async def pieces(self, one: Running) -> AsyncIterator[Piece]:
        """
        Give the pieces of a choice until it ends.

        Raises:
            ApiError: its time is over, or the model or the server ended it.
        """
        seconds = self.batches.limits.seconds
        done = False
        while not done:
            left_s = one.began + seconds - time.perf_counter()
            try:
                if left_s <= 0:  # though a piece be there
                    raise TimeoutError
                async with asyncio.timeout(left_s):
                    tokens, done, error = await one.pieces.get()
            except TimeoutError:
                raise ApiError(
                    f"the request ran for {seconds:g} s, which is the limit; ask for fewer tokens",
                    504, code="timeout",
                ) from None  # fmt: skip
            if error is not None and self.batches.draining:
                raise ApiError(f"{error}; ask another one", 503, code="stopping")
            if error is not None:
                raise ApiError(f"the request was lost: {error}", 500, code="failed")
            yield Piece(tokens, done)

    async def items(self, one: Running, said: Any = None) -> AsyncIterator[Any]:
        """Give a choice's text as it comes; of a chat *said* also `ReasoningText`, `ToolCall`."""
        parser = None
        if said is not None and one.asked.sampling.grammar is None:
            parser = build_response_parser(
                self.tokenizer, self.batches.model, one.prompt, tools=self.tools(said)
            )
        text, ends = Text(self.tokenizer, one.asked.stop, parser is not None), self.batches.ends
        for item in response_events_to_chunks(parser.initial_events) if parser else ():
            if str(item).strip():  # a template that begins no thought may write an empty one
                yield item
        held, begun = "", parser is None  # text that no item has told yet; whether one has any
        async for piece in self.pieces(one):
            shown = text.add([id for id in piece.tokens if id not in ends])
            if piece.done or text.stopped:
                shown += text.rest()
            items: list[Any] = [shown] if shown else []
            if parser is not None:
                held += shown
                try:
                    items = response_events_to_chunks(parser.feed(shown))
                    if piece.done or text.stopped:
                        items += response_events_to_chunks(parser.finalize()[1])
                except (ValueError, KeyError, TypeError):  # such as a tool call that is no JSON
                    items, parser = [held], None
            for item in items:
                if not begun and type(item) is str:  # what parts a thought from the text
                    item = item.lstrip()
                    begun = bool(item)
                held = ""
                if item:
                    yield item
            if text.stopped:
                one.stopped = True
                self.batches.cancel(one)
                break

    def reason(self, one: Running) -> str:
        """Say why a choice ended, in OpenAI's word."""
        ended = one.stopped or (one.tokens and one.tokens[-1] in self.batches.ends)
        return "stop" if ended else "length"

    def logprobs(self, one: Running) -> Json | None:
        """Give the log-probabilities of the tokens that were not told yet."""
        chosen = one.untold()
        return None if one.asked.sampling.alternatives is None else self._told(chosen)

    def usage(self, choices: list[Running]) -> Json:
        """Say what a request's choices took: tokens, and work of the expert cache."""
        prompt = sum(len(one.prompt) for one in choices[:: choices[0].asked.choices])
        written = sum(len(one.tokens) for one in choices)
        return {
            "prompt_tokens": prompt, "completion_tokens": written,
            "total_tokens": prompt + written, "expert_cache": Cost.total(choices).usage(),
        }  # fmt: skip

    def done(self, request_id: str, status: str, choices: list[Running]) -> None:
        """Count and log a request that ended, however it did; nothing of it runs on."""
        for one in choices:
            self.batches.cancel(one)
        self.metrics.request_done(self.route, status, choices)
        self.log(request_id, status, choices)

    def log(self, request_id: str, status: str, choices: list[Running]) -> None:
        """Write a line that a request began or ended; one that only began was lost."""
        line: Json = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "request": request_id,
            "route": self.route, "status": status,
            "prompt_tokens": sum(len(one.prompt) for one in choices),
            "completion_tokens": sum(len(one.tokens) for one in choices),
        }  # fmt: skip
        if self.log_text:
            line["prompts"] = [self.tokenizer.decode(one.prompt) for one in choices]
            line["texts"] = [self.tokenizer.decode(one.tokens) for one in choices]
        _log.info(json.dumps(line))

    async def _all(
        self, said: Any, choices: list[Running]
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Give the number of a choice and what is said of it, as any choice comes on."""
        if len(choices) == 1:
            async for delta in self._deltas(0, choices[0], said):
                yield 0, delta
            return
        events: asyncio.Queue[Any] = asyncio.Queue()

        async def follow(at: int, one: Running) -> None:
            try:
                async for delta in self._deltas(at, one, said):
                    events.put_nowait((at, delta))
                events.put_nowait(None)
            except Exception as error:
                events.put_nowait(error)

        tasks = [asyncio.create_task(follow(at, one)) for at, one in enumerate(choices)]
        try:
            left = len(tasks)
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    left -= 1
                else:
                    yield event
        finally:
            for task in tasks:
                task.cancel()

    async def _stream(
        self, request_id: str, said: Any, head: Json, choices: list[Running]
    ) -> AsyncIterator[str]:
        status = "client left"
        try:
            yield ""
            async with aclosing(self._all(said, choices)) as told:
                async for _, delta in told:
                    yield self._line(head, delta)
            yield self._closing(head, said, choices)
            status = "ok"
        except Exception as error:
            if not isinstance(error, ApiError):
                _log.error("a stream failed", exc_info=error)
                error = ApiError(FAILED, 500)
            status = str(error.status)
            yield self._broken(error)
        finally:
            self.done(request_id, status, choices)


def _merged(deltas: Sequence[Json]) -> Json:
    """Give one event that says what many say in turn: texts and lists joined, else the last."""
    whole: Json = {}
    for name, value in (pair for delta in deltas for pair in delta.items()):
        had = whole.get(name)
        if isinstance(value, dict):
            value = _merged([had or {}, value])
        elif isinstance(value, str | list) and had is not None:
            value = had + value
        whole[name] = had if value is None else value
    return whole


class CompletionHandler(Handler):
    """Answer `/v1/completions`: text that follows a prompt."""

    route = "completions"
    object = chunk_object = "text_completion"
    prompt_field = "prompt"
    default_tokens = 16  # OpenAI's own

    def _read(self, body: Json) -> tuple[Completion, list[list[int]], Asked]:
        said = read(Completion, body)
        self.check_length(max(map(len, said.prompt)))
        prompts = [
            self.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in said.prompt
        ]
        if not all(prompts):
            raise ApiError("the prompt has no token; give some text", param="prompt")
        if any(id >= self.vocabulary for one in prompts for id in one):
            raise ApiError("the prompt has a token that does not exist", param="prompt")
        return said, prompts, said.asked(self.default, said.logprobs)

    def _told(self, chosen: list[Chosen]) -> Json:
        words = self.tokenizer.decode
        return {
            "tokens": [words([c.token]) for c in chosen],
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [{words([i]): value for i, value in c.alternatives} for c in chosen],
        }

    async def _deltas(self, at: int, one: Running, said: Completion) -> AsyncIterator[Json]:
        def event(text: str, reason: str | None = None) -> Json:
            told = self.logprobs(one)
            return {"index": at, "text": text, "finish_reason": reason, "logprobs": told}

        async for shown in self.items(one):
            yield event(shown)
        yield event("", self.reason(one))


class ChatHandler(Handler):
    """Answer `/v1/chat/completions`: the next message of a chat."""

    route = "chat"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def _read(self, body: Json) -> tuple[Chat, list[list[int]], Asked]:
        said = read(Chat, body)
        alternatives = (said.top_logprobs or 0) if said.logprobs else None
        asked = said.asked(self.default, alternatives, said.max_completion_tokens)
        grammar = structured.of_tools(said.tool_choice, self.tools(said) or [])
        if grammar is None and said.response_format is not None:
            form = said.response_format
            schema = form.json_schema.schema_ if form.json_schema is not None else {}
            grammar = structured.of_format((form.type, schema), "response_format")
        asked = replace(asked, sampling=replace(asked.sampling, grammar=grammar))
        forced = said.tool_choice not in (None, "auto", "none")
        switches = switches_of(said, said.reasoning_effort)
        ids = self.templated(dumped(said.messages), self.tools(said), switches, forced)
        return said, [ids], asked

    def _told(self, chosen: list[Chosen]) -> Json:
        def word(token: int, logprob: float) -> Json:
            text = self.tokenizer.decode([token])
            bytes_ = list(text.encode("utf-8", "replace"))
            return {"token": text, "bytes": bytes_, "logprob": logprob}

        return {
            "content": [
                {**word(c.token, c.logprob), "top_logprobs": [word(*one) for one in c.alternatives]}
                for c in chosen
            ]
        }

    async def _deltas(self, at: int, one: Running, said: Chat) -> AsyncIterator[Json]:
        calls = 0

        def event(delta: Json, reason: str | None = None) -> Json:
            told = self.logprobs(one)
            return {"index": at, "delta": delta, "logprobs": told, "finish_reason": reason}

        yield event({"role": "assistant", "content": ""})
        async for item in self._chat_items(one, said):
            if isinstance(item, ToolCall):
                call = {"index": calls, "id": f"call_{one.id}_{calls}", "type": "function",
                        "function": asdict(item)}  # fmt: skip
                calls += 1
                yield event({"tool_calls": [call]})
            elif isinstance(item, ReasoningText):
                yield event({"reasoning_content": str(item)})
            else:
                yield event({"content": item})
        yield event({}, "tool_calls" if calls else self.reason(one))

    async def _chat_items(self, one: Running, said: Chat) -> AsyncIterator[Any]:
        """Read a text that a grammar held to one tool's call as that call, unless it was cut."""
        if said.tool_choice in (None, "auto", "none"):
            async for item in self.items(one, said):
                yield item
            return
        text = "".join([item async for item in self.items(one)])
        try:
            call = json.loads(text)
            yield ToolCall(call["name"], json.dumps(call["arguments"]))
        except ValueError:
            yield text

    def _answer(self, head: Json, deltas: list[list[Any]], choices: list[Running]) -> Json:
        answer = super()._answer(head, deltas, choices)
        for choice in answer["choices"]:
            choice["message"] = message = choice.pop("delta")
            for call in message.get("tool_calls", ()):
                del call["index"]
                message["content"] = message["content"] or None
        return answer
