"""Answer completions and chat completions: read, admit, stream and account for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    build_response_parser,
    response_events_to_chunks,
)

from melinoe.serve import structured
from melinoe.serve.batching import Batches, Cost, Piece, Running
from melinoe.serve.body import ApiError, Asked, Chat, Completion, Sampling, read, switches_of
from melinoe.serve.metrics import Metrics
from melinoe.serve.text import Text

_log = logging.getLogger("melinoe.serve")
FAILED = "the server failed; its log says why"

Json = dict[str, Any]


class Handler:
    """
    Hold what all routes share.

    Args:
        batches: Computes.
        metrics: Counts.
        tokenizer: Of the model; its chat template writes chats.
        name: The model's name, as clients ask for it.
    """

    route: str
    object = chunk_object = ""
    default_tokens: int | None = None  # where a request sets no limit; None: as many as may be

    def __init__(self, batches: Batches, metrics: Metrics, tokenizer: Any, name: str) -> None:
        self.batches, self.metrics, self.tokenizer, self.name = batches, metrics, tokenizer, name
        self.default = Sampling.of_model(batches.model.generation_config)
        self.vocabulary = batches.model.config.get_text_config().vocab_size

    def _read(self, body: Json) -> tuple[Any, list[list[int]], Asked]:
        """Give the body as it was read, the token ids of each prompt, and what else is asked."""
        raise NotImplementedError

    def _deltas(self, at: int, one: Running, body: Any) -> AsyncIterator[Any]:
        """Give what a stream says of choice *at*, event by event."""
        raise NotImplementedError

    def _whole(self, deltas: Sequence[Any]) -> Json:
        """Give a choice of an answer that is not streamed: all its events in one."""
        raise NotImplementedError

    def _answer(self, head: Json, answers: list[Json], choices: list[Running]) -> Json:
        return {**head, "choices": answers, "usage": self.usage(choices)}

    def _line(self, head: Json, delta: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': [delta]})}\n\n"

    def _closing(self, head: Json, body: Any, choices: list[Running]) -> str:
        line = ""
        if body.stream_options is not None and body.stream_options.include_usage:
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
            limits = self.batches.limits
            texts, room = len(prompts) * asked.choices, limits.running + limits.waiting
            if texts > room:
                raise ApiError(
                    f"{texts} texts are asked for, and at most {room} have room at once; send "
                    "fewer prompts", param="prompt" if len(prompts) > 1 else "n",
                )  # fmt: skip
            adapter = self.adapter_of(said.model)
            asked = replace(self.within(asked, max(map(len, prompts))), adapter=adapter)
            for prompt in prompts:
                for at in range(asked.choices):  # one by one: a later one may find no room
                    choices.append(self.submit(prompt, asked, at, request_id))
            self.log(request_id, "begun", choices)
            head = {
                "id": request_id, "object": self.chunk_object if said.stream else self.object,
                "created": int(time.time()), "model": adapter or self.name,
            }  # fmt: skip
            if said.stream:
                status = "streaming"
                events = self._stream(request_id, said, head, choices)
                await anext(events)  # begun, so that it also ends if its client has left already
                return StreamingResponse(events, media_type="text/event-stream")
            answers = await asyncio.gather(
                *(self._collect(at, one, said) for at, one in enumerate(choices))
            )
            status = "ok"
            return JSONResponse(self._answer(head, answers, choices))
        except Exception as error:
            status = str(getattr(error, "status", 500))
            raise
        finally:
            if status != "streaming":
                self.done(request_id, status, choices)

    # --- admission ------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names by which clients may ask: the model's and its adapters'."""
        adapters = self.batches.adapters
        return [self.name, *(adapters.names if adapters is not None else ())]

    def adapter_of(self, wanted: str | None) -> str | None:
        """
        Give the adapter that a client asks for; None: the model as it is.

        Raises:
            ApiError: no model of that name.
        """
        if wanted is not None and wanted not in self.names:
            raise ApiError(
                f"there is no model {wanted!r} here; ask for {' or '.join(map(repr, self.names))}",
                404, "model", "model_not_found",
            )  # fmt: skip
        return None if wanted == self.name else wanted

    def within(self, asked: Asked, longest: int) -> Asked:
        """Hold *asked* to the limits, given its longest prompt."""
        limits = self.batches.limits
        context = min(limits.context, limits.cache_tokens)
        room = context - longest
        code = "context_length_exceeded"
        if room < 1:
            raise ApiError(
                f"the prompt has {longest} tokens, and prompt and text together may have "
                f"{context}; shorten it", param="prompt" if self.route == "completions"
                else "messages", code=code,
            )  # fmt: skip
        if any(token >= self.vocabulary for token, _ in asked.sampling.logit_bias):
            raise ApiError("logit_bias names a token that does not exist", param="logit_bias")
        wanted, most = asked.max_tokens, min(room, limits.max_tokens)
        if wanted is not None and wanted > room:
            raise ApiError(
                f"the prompt has {longest} tokens, so at most {room} can follow; lower max_tokens",
                param="max_tokens", code=code,
            )  # fmt: skip
        if wanted is not None and wanted > most:
            raise ApiError(
                f"this server writes at most {most} tokens; lower max_tokens", param="max_tokens"
            )
        return replace(
            asked, max_tokens=min(most, wanted or limits.unasked or self.default_tokens or most)
        )

    def templated(
        self,
        messages: list[Json],
        tools: list[Json] | None,
        switches: Json,
        param: str,
        forced: bool = False,
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
            ids = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=True,
                return_dict=True, **switches,
            )["input_ids"]  # fmt: skip
            return list(ids)

        silent = [{name: one[name] for name in one if name != "tool_calls"} for one in messages]
        try:
            ids = written(messages, tools)
            unseen = tools and not forced and ids == written(messages, None)
            lost = "tools" if unseen else None
            if silent != messages and ids == written(silent, tools):
                lost = "tool_calls"
        except TemplateError as error:
            raise ApiError(f"the chat template refuses: {error}", param=param) from error
        except Exception as error:  # a template is a program, and this chat made it fail
            raise ApiError(
                f"the chat template cannot write this chat: {error}", param=param
            ) from error
        if lost is not None:
            raise ApiError(
                f"the model's chat template does not write {lost}, so it would not know of them; "
                "leave them out", param=lost,
            )  # fmt: skip
        return ids

    def submit(self, prompt: list[int], asked: Asked, at: int, request_id: str) -> Running:
        """Put choice *at* of a request into the queue."""
        seed = asked.sampling.seed
        if seed is not None and at:  # choices of one seed differ, and come again with it
            asked = replace(asked, sampling=replace(asked.sampling, seed=seed + at))
        return self.batches.submit(prompt, asked, request_id)

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

    async def items(self, one: Running, parser: Any = None) -> AsyncIterator[Any]:
        """Give a choice's text as it comes; with a parser also `ReasoningText` and `ToolCall`."""
        text = Text(self.tokenizer, one.asked.stop, parser is not None)
        for item in response_events_to_chunks(parser.initial_events) if parser else ():
            yield item
        async for piece in self.pieces(one):
            shown = text.add(piece.tokens)
            if piece.done or text.stopped:
                shown += text.rest()
            if shown:
                for item in response_events_to_chunks(parser.feed(shown)) if parser else [shown]:
                    yield item
            if text.stopped:
                one.stopped = True
                self.batches.cancel(one)
                break
        if parser is not None:
            with suppress(ValueError, RuntimeError):  # the text ended inside a tool call
                for item in response_events_to_chunks(parser.finalize()[1]):
                    yield item

    def reason(self, one: Running) -> str:
        """Say why a choice ended, in OpenAI's word."""
        ended = one.stopped or (one.tokens and one.tokens[-1] in self.batches.ends)
        return "stop" if ended else "length"

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
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "request": request_id,
            "route": self.route, "status": status,
            "prompt_tokens": sum(len(one.prompt) for one in choices),
            "completion_tokens": sum(len(one.tokens) for one in choices),
        }  # fmt: skip
        _log.info(json.dumps(line))

    async def _collect(self, at: int, one: Running, body: Any) -> Json:
        return self._whole([delta async for delta in self._deltas(at, one, body)])

    async def _stream(
        self, request_id: str, body: Any, head: Json, choices: list[Running]
    ) -> AsyncIterator[str]:
        status = "client left"
        events: asyncio.Queue[str | ApiError | None] = asyncio.Queue()

        async def follow(at: int, one: Running) -> None:
            try:
                async for delta in self._deltas(at, one, body):
                    events.put_nowait(self._line(head, delta))
                events.put_nowait(None)
            except ApiError as error:
                events.put_nowait(error)
            except Exception as error:  # such as a tool call that no parser can read
                _log.error("a stream failed", exc_info=error)
                events.put_nowait(ApiError(FAILED, 500))

        tasks = [asyncio.create_task(follow(at, one)) for at, one in enumerate(choices)]
        try:
            yield ""
            left = len(tasks)
            while left:
                event = await events.get()
                if isinstance(event, ApiError):
                    status = str(event.status)
                    yield self._broken(event)
                    return
                if event is None:
                    left -= 1
                else:
                    yield event
            yield self._closing(head, body, choices)
            status = "ok"
        finally:
            for task in tasks:
                task.cancel()
            self.done(request_id, status, choices)


class CompletionHandler(Handler):
    """Answer `/v1/completions`: text that follows a prompt."""

    route = "completions"
    object = chunk_object = "text_completion"
    default_tokens = 16  # OpenAI's own

    def _read(self, body: Json) -> tuple[Completion, list[list[int]], Asked]:
        said = read(Completion, body)
        prompts = [
            self.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in said.prompt
        ]
        if not all(prompts):
            raise ApiError("the prompt has no token; give some text", param="prompt")
        if any(id >= self.vocabulary for one in prompts for id in one):
            raise ApiError("the prompt has a token that does not exist", param="prompt")
        return said, prompts, said.asked(self.default, said.logprobs)

    def _logprobs(self, one: Running) -> Json | None:
        """Give the log-probabilities of the tokens that were not told yet."""
        chosen = one.untold()
        if one.asked.sampling.alternatives is None:
            return None
        words = self.tokenizer.decode
        return {
            "tokens": [words([c.token]) for c in chosen],
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [{words([i]): value for i, value in c.alternatives} for c in chosen],
        }

    async def _deltas(self, at: int, one: Running, body: Completion) -> AsyncIterator[Json]:
        async for shown in self.items(one):
            logprobs = self._logprobs(one)
            yield {"index": at, "text": shown, "finish_reason": None, "logprobs": logprobs}
        reason = self.reason(one)
        yield {"index": at, "text": "", "finish_reason": reason, "logprobs": self._logprobs(one)}

    def _whole(self, deltas: Sequence[Json]) -> Json:
        logprobs = deltas[0]["logprobs"]
        if logprobs is not None:
            logprobs = {
                name: [one for delta in deltas for one in delta["logprobs"][name]]
                for name in logprobs
            }
        text = "".join(delta["text"] for delta in deltas)
        return {**deltas[-1], "text": text, "logprobs": logprobs}


class ChatHandler(Handler):
    """Answer `/v1/chat/completions`: the next message of a chat."""

    route = "chat"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def _read(self, body: Json) -> tuple[Chat, list[list[int]], Asked]:
        said = read(Chat, body)
        alternatives = (said.top_logprobs or 0) if said.logprobs else None
        asked = said.asked(self.default, alternatives, said.max_completion_tokens)
        grammar = structured.of_tools(said.tool_choice, self._tools(said) or [])
        if grammar is None and said.response_format is not None:
            form = said.response_format
            schema = form.json_schema.schema_ if form.json_schema is not None else {}
            grammar = structured.of_format((form.type, schema), "response_format")
        asked = replace(asked, sampling=replace(asked.sampling, grammar=grammar))
        messages = [{"content": "", **one.model_dump(exclude_none=True)} for one in said.messages]
        switches = switches_of(said, said.reasoning_effort)
        forced = said.tool_choice not in (None, "auto", "none")
        ids = self.templated(messages, self._tools(said), switches, "messages", forced)
        return said, [ids], asked

    @staticmethod
    def _tools(body: Chat) -> list[Json] | None:
        if body.tool_choice == "none" or not body.tools:
            return None
        return [one.model_dump(exclude_unset=True) for one in body.tools]

    def _logprobs(self, one: Running) -> Json | None:
        """Give the log-probabilities of the tokens that were not told yet."""
        chosen = one.untold()
        if one.asked.sampling.alternatives is None:
            return None

        def word(token: int, logprob: float) -> Json:
            text = self.tokenizer.decode([token])
            return {"token": text, "bytes": list(text.encode("utf-8", "replace")),
                    "logprob": logprob}  # fmt: skip

        return {
            "content": [
                {**word(c.token, c.logprob), "top_logprobs": [word(*one) for one in c.alternatives]}
                for c in chosen
            ]
        }  # fmt: skip

    async def _deltas(self, at: int, one: Running, body: Chat) -> AsyncIterator[Json]:
        calls = 0

        def event(delta: Json, reason: str | None = None) -> Json:
            logprobs = self._logprobs(one)
            return {"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

        yield event({"role": "assistant", "content": ""})
        async for item in self._items_of(one, body):
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

    async def _items_of(self, one: Running, body: Chat) -> AsyncIterator[Any]:
        """Read a text that a grammar held to one tool's call as that call, unless it was cut."""
        if body.tool_choice in (None, "auto", "none"):
            parser = None
            if one.asked.sampling.grammar is None:
                parser = build_response_parser(
                    self.tokenizer, self.batches.model, one.prompt, tools=self._tools(body)
                )
            async for item in self.items(one, parser):
                yield item
            return
        text = "".join([item async for item in self.items(one)])
        try:
            call = json.loads(text)
            yield ToolCall(call["name"], json.dumps(call["arguments"]))
        except ValueError:
            yield text

    def _whole(self, deltas: Sequence[Json]) -> Json:
        said = [one["delta"] for one in deltas]
        calls = [
            {name: value for name, value in call.items() if name != "index"}
            for one in said
            for call in one.get("tool_calls", ())
        ]
        text = "".join(one.get("content", "") for one in said)
        message: Json = {"role": "assistant", "content": text if text or not calls else None}
        if reasoning := "".join(one.get("reasoning_content", "") for one in said):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        last = deltas[-1]
        logprobs = last["logprobs"]
        if logprobs is not None:
            logprobs = {"content": [c for one in deltas for c in one["logprobs"]["content"]]}
        return {
            "index": last["index"], "message": message, "logprobs": logprobs,
            "finish_reason": last["finish_reason"],
        }  # fmt: skip
