"""Answer `/v1/responses` with transformers' own handler over our batches."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.response import UNUSED_RESPONSE_FIELDS, ResponseHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    Modality,
    _StreamError,
    response_events_to_chunks,
)

from melinoe.serve.batching import Running
from melinoe.serve.body import ApiError, Asked, read, refuse, switches_of
from melinoe.serve.handlers import ChatHandler
from melinoe.serve.text import Text

_log = logging.getLogger("melinoe.serve")

_SERVED = {
    "input", "instructions", "model", "stream", "temperature", "top_p", "max_output_tokens",
    "tools", "chat_template_kwargs", "seed", "metadata", "user", "store", "service_tier",
    "parallel_tool_calls", "reasoning", "text", "tool_choice", "truncation", "include",
}  # fmt: skip
# What OpenAI's client may send of the fields that transformers' handler ignores, and that change
# nothing.
_HARMLESS: dict[str, Any] = {
    "store": (None, False), "service_tier": (None, "auto", "default"), "include": (None, []),
    "tool_choice": (None, "auto"), "truncation": (None, "disabled"), "user": None,
    "text": (None, {"format": {"type": "text"}}),
}  # fmt: skip


class Responses(ResponseHandler, BaseGenerateManager):
    """
    Transformers' handler, given the model that is loaded and the batches that compute it.

    Args:
        chat: Reads, admits and counts as it does for chats.
    """

    def __init__(self, chat: ChatHandler) -> None:
        self.chat, self.chat_template_kwargs = chat, {}
        self._asked: dict[str, Asked] = {}
        self._ran: dict[str, Running] = {}
        stands_for: Any = self
        self.model_manager = self.generation_state = stands_for

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """
        Answer *body*; a stream only if it asks for one.

        Raises:
            ApiError: what is asked for is wrong or not served.
        """
        if unknown := sorted(set(body) - _SERVED):
            raise ApiError(f"{unknown[0]} is not supported here; leave it out", param=unknown[0])
        for name in sorted(set(body) & UNUSED_RESPONSE_FIELDS):
            allowed = _HARMLESS.get(name)
            if allowed is not None and body[name] not in allowed:
                raise ApiError(f"{name} cannot be {body[name]!r} here; leave it out", param=name)
        if "input" not in body:
            raise ApiError("input must be text or a list of items", param="input")
        refuse(body)
        adapter = self.chat.adapter_of(body)
        if not self.chat.tokenizer.chat_template:
            self.chat._prompts({"messages": [{"role": "user", "content": ""}]})
        reasoning = body.get("reasoning") or {}
        if not isinstance(reasoning, dict) or set(reasoning) - {"effort"}:
            raise ApiError("of reasoning only the effort is served", param="reasoning")
        switches = switches_of(body, reasoning.get("effort"))
        tools = body.get("tools") or []
        if not isinstance(tools, list) or not all(
            isinstance(one, dict) and one.get("type") == "function" for one in tools
        ):
            raise ApiError("tools must be a list of functions", param="tools")
        model = self.chat.batches.model
        shared = {name: body.get(name) for name in ("temperature", "top_p", "seed", "stream")}
        read_so_far = read(
            {"max_tokens": body.get("max_output_tokens"), **shared}, True,
            model.config.get_text_config().vocab_size, self.chat.default,
        )  # fmt: skip
        self._asked[request_id] = replace(read_so_far, adapter=adapter)
        asked = {**body, "stream": bool(body.get("stream")), "chat_template_kwargs": switches}
        try:
            return await super().handle_request(asked, request_id)
        except TemplateError as error:
            raise ApiError(f"the chat template refuses: {error}", param="input") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ApiError(f"input cannot be read as a chat: {error}", param="input") from error
        finally:
            self._asked.pop(request_id, None)

    def _validate_request(self, body: dict) -> None:
        """Done already, and more strictly."""

    # --- what transformers' handler asks of its model manager and its generation state -----------

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        return body.get("model") or self.chat.name, self.chat.batches.model, self.chat.tokenizer

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        """Text alone is served."""
        return Modality.LLM

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        """Prompts are given as lists of token ids."""
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """Give what computes."""
        return self

    def _build_generation_config(
        self, body: dict, model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        return model_generation_config  # the request's own settings are in its Asked

    # --- what transformers' answers do not say ----------------------------------------------------

    async def _non_streaming(self, request_id: str, *args: Any, **kwargs: Any) -> JSONResponse:
        try:
            answer = await super()._non_streaming(request_id, *args, **kwargs)
            return JSONResponse(self._accounted(json.loads(bytes(answer.body)), request_id))
        finally:
            self._ran.pop(request_id, None)

    def _streaming(self, request_id: str, *args: Any, **kwargs: Any) -> StreamingResponse:
        answer = super()._streaming(request_id, *args, **kwargs)
        answer.body_iterator = self._last_event(answer.body_iterator, request_id)
        return answer

    async def _last_event(self, events: Any, request_id: str) -> AsyncIterator[str]:
        """Pass on *events*, and complete the last of them."""
        try:
            async for event in events:
                lines = event.split("\n\n")
                yield "\n\n".join(self._completed(line, request_id) for line in lines)
        finally:
            await events.aclose()
            self._ran.pop(request_id, None)

    def _completed(self, line: str, request_id: str) -> str:
        if '"type":"response.completed"' not in line:
            return line
        event = json.loads(line.removeprefix("data: "))
        event["response"] = self._accounted(event["response"], request_id)
        event["type"] = f"response.{event['response']['status']}"
        return f"data: {json.dumps(event)}"

    def _accounted(self, answer: dict[str, Any], request_id: str) -> dict[str, Any]:
        """Add to *answer* what the expert cache did, and whether the text was cut."""
        one = self._ran[request_id]
        answer["usage"]["expert_cache"] = one.cost.usage()
        if one.tokens and one.tokens[-1] not in self.chat.batches.ends:
            answer["status"] = "incomplete"
            answer["incomplete_details"] = {"reason": "max_output_tokens"}
            for item in answer["output"]:
                if item["type"] == "message":
                    item["status"] = "incomplete"
        return answer

    # --- what it asks of what computes ------------------------------------------------------------

    def stop(self) -> None:
        """Nothing of its own runs."""

    def _submit(self, request_id: str, prompt: list[int]) -> Running:
        asked = self.chat._within(self._asked.pop(request_id), len(prompt))
        self._ran[request_id] = self.chat._submit(list(prompt), asked, 0, request_id)
        return self._ran[request_id]

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:  # fmt: skip
        """Give a queue of text, reasoning and tool calls, and whom to tell that nobody reads it."""
        one = self._submit(request_id, inputs["input_ids"])
        queue: asyncio.Queue = asyncio.Queue()
        streamer = _Streamer(self, one)
        streamer.task = asyncio.get_running_loop().create_task(
            self._follow(one, queue, response_parser, request_id)
        )
        return queue, streamer

    async def _follow(
        self, one: Running, queue: asyncio.Queue, parser: Any, request_id: str
    ) -> None:
        text, status = Text(self.chat.tokenizer, (), parser is not None), "client left"
        try:
            for item in response_events_to_chunks(parser.initial_events) if parser else ():
                queue.put_nowait(item)
            async for piece in self.chat._pieces(one):
                shown = text.add(piece.tokens)
                items = [shown] if shown else []
                if parser is not None and shown:
                    items = response_events_to_chunks(parser.feed(shown))
                for item in items:
                    queue.put_nowait(item)
            if parser is not None:
                try:
                    for item in response_events_to_chunks(parser.finalize()[1]):
                        queue.put_nowait(item)
                except (ValueError, RuntimeError):
                    pass  # the text ended inside a tool call
            queue.put_nowait(None)
            status = "ok"
        except ApiError as error:
            status = str(error.status)
            queue.put_nowait(_StreamError(error.message))
        except Exception as error:
            _log.error("a stream failed", exc_info=error)
            status = "500"
            queue.put_nowait(_StreamError("the server failed; its log says why"))
        finally:
            self.chat._done(request_id, status, [one], route="responses")

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Give the text, the prompt's length and the token ids."""
        one, status = self._submit(request_id, inputs["input_ids"]), "error"
        try:
            async for _ in self.chat._pieces(one):
                pass
            status = "ok"
        except ApiError as error:
            status = str(error.status)
            raise
        finally:
            self.chat._done(request_id, status, [one], route="responses")
        text = processor.decode(one.tokens, skip_special_tokens=True)
        return text, len(one.prompt), one.tokens


class _Streamer:
    """Whom transformers' handler asks how much was written, and tells that nobody reads."""

    def __init__(self, handler: Responses, one: Running) -> None:
        self._handler, self._one = handler, one
        self.task: asyncio.Task | None = None

    @property
    def total_tokens(self) -> int:
        return len(self._one.tokens)

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
