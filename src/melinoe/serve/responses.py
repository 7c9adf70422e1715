"""Answer `/v1/responses`: transformers' events over our batches; no state is kept."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from openai.types.responses import ResponseCompletedEvent, ResponseIncompleteEvent
from openai.types.responses.response import IncompleteDetails
from transformers.cli.serving.response import _ResponseStreamBuilder, compute_usage
from transformers.cli.serving.utils import ReasoningText, ToolCall

from melinoe.serve import structured
from melinoe.serve.batching import Running
from melinoe.serve.body import ApiError, Asked, Response, dumped, read, switches_of
from melinoe.serve.handlers import FAILED, Handler, Json


class Responses(Handler):
    """Answer `/v1/responses`: the next message of a chat, as a list of events."""

    route = "responses"
    prompt_field = "input"

    def _read(self, body: Json) -> tuple[Response, list[list[int]], Asked]:
        said = read(Response, body)
        form = said.text.format if said.text is not None else None
        grammar = structured.of_format(form and (form.type, form.schema_), "text")
        sampling = said.sampling(self.default, grammar=grammar)
        asked = Asked(said.max_output_tokens, sampling, priority=said.priority)
        effort = said.reasoning.effort if said.reasoning is not None else None
        switches = switches_of(said, effort)
        return said, [self.templated(dumped(said.input), self.tools(said), switches)], asked

    async def _deltas(self, at: int, one: Running, said: Response) -> AsyncIterator[str]:
        builder = _ResponseStreamBuilder(
            request_id=one.id,
            response_defaults={
                "id": f"resp_{one.id}", "created_at": time.time(), "object": "response",
                "model": one.asked.adapter or self.name, "tools": [], "tool_choice": "auto",
                "parallel_tool_calls": bool(said.parallel_tool_calls),
            },
        )  # fmt: skip
        output: list[Any] = []  # in the order in which it was written
        lines = builder.start_response()

        def close() -> None:
            if builder.reasoning_open:
                lines.extend(builder.finish_reasoning())
                output.append(builder.reasoning_item)
            if builder.message_open:
                lines.extend(builder.finish_message())
                output.append(builder.message_item)
            # The builder knows of one thought and one message; each of ours is its own.
            builder.output_index, builder.content, builder.full_reasoning = len(output), "", ""
            builder.msg_id, builder.reasoning_id = (
                f"{kind}_{one.id}_{len(output)}" for kind in ("msg", "rs")
            )

        try:
            async for item in self.items(one, said):
                if isinstance(item, ToolCall):
                    close()
                    builder.output_index -= 1  # which it adds again
                    name = f"call_{one.id}_{len(output)}"
                    lines += builder.tool_call(name, item.name, item.arguments)
                    output.append(builder.tool_calls[-1])
                elif isinstance(item, ReasoningText):
                    if not builder.reasoning_open:
                        close()
                        lines += builder.start_reasoning()
                    lines += builder.reasoning_delta(item)
                else:
                    if not builder.message_open:
                        close()
                        lines += builder.start_message()
                    lines += builder.text_delta(item)
                yield "".join(lines)
                lines.clear()
        except Exception as error:
            yield "".join([*lines, *builder.error(getattr(error, "message", FAILED))])
            raise
        close()
        if not output:
            lines += builder.start_message()
            close()
        yield "".join(lines)
        yield self._last(builder, output, one)

    def _last(self, builder: Any, output: list[Any], one: Running) -> str:
        """Say in the last event what the expert cache did, and whether the text was cut."""
        usage = compute_usage(len(one.prompt), len(one.tokens))
        usage = usage.model_copy(update={"expert_cache": one.cost.usage()})
        if self.reason(one) != "length":
            made = builder._response("completed", output=output, usage=usage)
            return builder._emit(
                ResponseCompletedEvent(
                    type="response.completed", sequence_number=builder.seq, response=made
                )
            )
        if output[-1].type == "message":
            output[-1].status = "incomplete"
        made = builder._response(
            "incomplete", output=output, usage=usage,
            incomplete_details=IncompleteDetails(reason="max_output_tokens"),
        )  # fmt: skip
        return builder._emit(
            ResponseIncompleteEvent(
                type="response.incomplete", sequence_number=builder.seq, response=made
            )
        )

    def _answer(self, head: Json, deltas: list[list[Any]], choices: list[Running]) -> Json:
        return json.loads(deltas[0][-1].removeprefix("data: "))["response"]

    def _line(self, head: Json, delta: Any) -> str:
        return delta

    def _closing(self, head: Json, said: Any, choices: list[Running]) -> str:
        return ""

    def _broken(self, error: ApiError) -> str:
        return ""  # its event is among the deltas
