"""Answer `/v1/responses`: transformers' reading of its input and its events, over our batches."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.response import (
    ResponseHandler,
    _ResponseStreamBuilder,
    compute_usage,
)
from transformers.cli.serving.utils import (
    Modality,
    ReasoningText,
    ToolCall,
    build_response_parser,
)

from melinoe.serve import structured
from melinoe.serve.batching import Running
from melinoe.serve.body import ApiError, Asked, Response, read, switches_of
from melinoe.serve.handlers import FAILED, Handler, Json


class Responses(Handler):
    """Answer `/v1/responses`: the next message of a chat, as a list of events; no state is kept."""

    route = "responses"

    def _read(self, body: Json) -> tuple[Response, list[list[int]], Asked]:
        said = read(Response, body)
        form = said.text.format if said.text is not None else None
        grammar = structured.of_format(form and (form.type, form.schema_), "text")
        sampling = said.sampling(self.default, grammar=grammar)
        asked = Asked(said.max_output_tokens, sampling, priority=said.priority)
        try:
            messages = ResponseHandler.get_processor_inputs_from_messages(
                ResponseHandler._normalize_input(body), Modality.LLM
            )
        except (
            HTTPException, TypeError, ValueError, KeyError, AttributeError, IndexError,
        ) as error:  # fmt: skip
            why = getattr(error, "detail", error)
            raise ApiError(f"input cannot be read as a chat: {why}", param="input") from error
        effort = said.reasoning.effort if said.reasoning is not None else None
        switches = switches_of(said, effort)
        return said, [self.templated(messages, self._tools(said), switches, "input")], asked

    @staticmethod
    def _tools(body: Response) -> list[Json] | None:
        tools = [one.model_dump(exclude_unset=True) for one in body.tools or ()]
        return ResponseHandler._normalize_tools(tools) or None

    async def _deltas(self, at: int, one: Running, body: Response) -> AsyncIterator[str]:
        builder = _ResponseStreamBuilder(
            request_id=one.id,
            response_defaults={
                "id": f"resp_{one.id}", "created_at": time.time(), "object": "response",
                "model": one.asked.adapter or self.name, "tools": [], "tool_choice": "auto",
                "parallel_tool_calls": bool(body.parallel_tool_calls),
            },
        )  # fmt: skip
        parser = None
        if one.asked.sampling.grammar is None:
            parser = build_response_parser(
                self.tokenizer, self.batches.model, one.prompt, tools=self._tools(body)
            )
        lines, calls = builder.start_response(), 0
        try:
            async for item in self.items(one, parser):
                if builder.reasoning_open and not isinstance(item, ReasoningText):
                    lines += builder.finish_reasoning()
                if isinstance(item, ToolCall):
                    if builder.message_open:
                        lines += builder.finish_message()
                    lines += builder.tool_call(f"call_{one.id}_{calls}", item.name, item.arguments)
                    calls += 1
                elif isinstance(item, ReasoningText):
                    if not builder.reasoning_open:
                        lines += builder.start_reasoning()
                    lines += builder.reasoning_delta(item)
                else:
                    if not builder.message_open:
                        lines += builder.start_message()
                    lines += builder.text_delta(item)
                for line in lines:
                    yield line
                lines = []
        except Exception as error:
            for line in [*lines, *builder.error(getattr(error, "message", FAILED))]:
                yield line
            raise
        if builder.reasoning_open:
            lines += builder.finish_reasoning()
        if not builder.message_open and builder.message_item is None:
            lines += builder.start_message()
        if builder.message_open:
            lines += builder.finish_message()
        (last,) = builder.completed(compute_usage(len(one.prompt), len(one.tokens)))
        for line in [*lines, self._completed(last, one)]:
            yield line

    def _completed(self, line: str, one: Running) -> str:
        """Say in the last event what the expert cache did, and whether the text was cut."""
        event = json.loads(line.removeprefix("data: "))
        answer = event["response"]
        answer["usage"]["expert_cache"] = one.cost.usage()
        if self.reason(one) == "length":
            answer["status"] = "incomplete"
            answer["incomplete_details"] = {"reason": "max_output_tokens"}
            for item in answer["output"]:
                if item["type"] == "message":
                    item["status"] = "incomplete"
            event["type"] = "response.incomplete"
        return f"data: {json.dumps(event)}\n\n"

    def _whole(self, deltas: Sequence[Any]) -> Json:
        return json.loads(deltas[-1].removeprefix("data: "))["response"]

    def _answer(self, head: Json, answers: list[Json], choices: list[Running]) -> Json:
        return answers[0]

    def _line(self, head: Json, delta: Any) -> str:
        return delta

    def _closing(self, head: Json, body: Any, choices: list[Running]) -> str:
        return ""

    def _broken(self, error: ApiError) -> str:
        return ""  # its event is among the deltas
