"""Answer `/v1/responses` with transformers' own handler over our batches."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseGenerateManager, Modality, _StreamError

from melinoe.serve import structured
from melinoe.serve.batching import Running
from melinoe.serve.body import ApiError, Asked, Response, read, switches_of
from melinoe.serve.handlers import FAILED, ChatHandler

_log = logging.getLogger("melinoe.serve")


class Responses(ResponseHandler, BaseGenerateManager):
    """
    Transformers' handler, given the model that is loaded and the batches that compute it.

    It stands for its own model manager and generation state, too.

    Args:
        chat: Admits and counts as it does for chats.
    """

    def __init__(self, chat: ChatHandler) -> None:
        self.chat, self.chat_template_kwargs = chat, {}
        self._asked: dict[str, Asked] = {}
        self._ran: dict[str, Running] = {}
        self._streams: dict[str, asyncio.Task] = {}
        stands_for: Any = self
        self.model_manager = self.generation_state = stands_for

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """
        Answer *body*; a stream only if it asks for one.

        Raises:
            ApiError: what is asked for is wrong or not served.
        """
        said = read(Response, body)
        adapter = self.chat.adapter_of(said.model)
        self.chat.check_template()
        form = said.text.format if said.text is not None else None
        grammar = structured.of_format(form and (form.type, form.schema_), "text")
        sampling = said.sampling(self.chat.default, grammar=grammar)
        self._asked[request_id] = Asked(
            said.max_output_tokens, sampling, priority=said.priority, adapter=adapter
        )
        effort = said.reasoning.effort if said.reasoning is not None else None
        switches = switches_of(said, effort)
        asked = {**body, "stream": bool(said.stream), "chat_template_kwargs": switches}
        try:
            answer: Any = await super().handle_request(asked, request_id)
            if said.stream:
                await anext(answer.body_iterator)  # begun; as chats do
            return answer
        except TemplateError as error:
            raise ApiError(f"the chat template refuses: {error}", param="input") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ApiError(f"input cannot be read as a chat: {error}", param="input") from error
        finally:
            self._asked.pop(request_id, None)

    # --- what transformers' handler asks of its model manager and its generation state -----------

    def _validate_request(self, body: dict) -> None:
        pass  # done already, and more strictly

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

    def _build_generation_config(self, body: dict, config: Any, use_cb: bool = False) -> Any:
        return config  # the request's own settings are in its Asked

    def stop(self) -> None:
        """Nothing of its own runs."""

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
            yield ""
            async for event in events:
                lines = event.split("\n\n")
                yield "\n\n".join(self._completed(line, request_id) for line in lines)
        finally:
            await events.aclose()
            self._streams.pop(request_id).cancel()
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
        if one.tokens and self.chat.reason(one) == "length":
            answer["status"] = "incomplete"
            answer["incomplete_details"] = {"reason": "max_output_tokens"}
            for item in answer["output"]:
                if item["type"] == "message":
                    item["status"] = "incomplete"
        return answer

    # --- what it asks of what computes ------------------------------------------------------------

    def _submit(self, request_id: str, prompt: list[int]) -> Running:
        asked = self.chat.within(self._asked.pop(request_id), len(prompt))
        self._ran[request_id] = self.chat.submit(list(prompt), asked, 0, request_id)
        self.chat.log(request_id, "begun", [self._ran[request_id]], "responses")
        return self._ran[request_id]

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:  # fmt: skip
        """Give a queue of text, reasoning and tool calls, and whom to tell that nobody reads it."""
        one = self._submit(request_id, inputs["input_ids"])
        queue: asyncio.Queue = asyncio.Queue()

        async def follow() -> None:
            status = "client left"
            try:
                async for item in self.chat.items(one, response_parser):
                    queue.put_nowait(item)
                queue.put_nowait(None)
                status = "ok"
            except ApiError as error:
                status = str(error.status)
                queue.put_nowait(_StreamError(error.message))
            except Exception as error:
                _log.error("a stream failed", exc_info=error)
                status = "500"
                queue.put_nowait(_StreamError(FAILED))
            finally:
                self.chat.done(request_id, status, [one], route="responses")

        self._streams[request_id] = asyncio.get_running_loop().create_task(follow())
        return queue, _Streamer(one, self._streams[request_id])

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Give the text, the prompt's length and the token ids."""
        one, status = self._submit(request_id, inputs["input_ids"]), "client left"
        try:
            async for _ in self.chat.pieces(one):
                pass
            status = "ok"
        except Exception as error:
            status = str(getattr(error, "status", 500))
            raise
        finally:
            self.chat.done(request_id, status, [one], route="responses")
        text = processor.decode(one.tokens, skip_special_tokens=True)
        return text, len(one.prompt), one.tokens


class _Streamer:
    """Whom transformers' handler asks how much was written, and tells that nobody reads."""

    def __init__(self, one: Running, task: asyncio.Task) -> None:
        self._one, self.cancel = one, task.cancel

    @property
    def total_tokens(self) -> int:
        return len(self._one.tokens)
