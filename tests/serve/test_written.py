"""Thoughts and calls of tools as OpenAI's client gets them, whatever the model writes."""

import gc
import json
import socket
import time

import pytest
from scripted import client, scripted
from serving import ask

from melinoe.serve import app

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
FLAT = {"type": "function", **TOOL["function"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THINKS = f"<think>\nIs it wet there?\n</think>\n\n{CALL}"
ASKED = [{"role": "user", "content": "Rain in Oslo?"}]


def chat(url, messages=ASKED, **options):
    return client(url).chat.completions.create(model="tiny", messages=messages, **options)


def test_a_thought_and_a_call_are_told_apart_and_come_back_in_the_next_turn():
    """Three turns: a call, its result, an answer; the third prompt holds all that was said."""
    with scripted(THINKS, "<think>Dry.</think>It is dry.", "Goodbye") as (model, url):
        first = chat(url, tools=[TOOL]).choices[0]
        (call,) = first.message.tool_calls
        assert first.finish_reason == "tool_calls" and first.message.content is None
        assert first.message.reasoning_content.strip() == "Is it wet there?"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        turns = [*ASKED, first.message, {"role": "tool", "tool_call_id": call.id, "content": "dry"}]
        second = chat(url, turns, tools=[TOOL]).choices[0]
        assert (second.message.content, second.finish_reason) == ("It is dry.", "stop")
        assert second.message.tool_calls is None
        turns += [second.message, {"role": "user", "content": "Thanks"}]
        assert chat(url, turns, tools=[TOOL]).choices[0].message.content == "Goodbye"
    for said in ("<tool>weather</tool>", "Is it wet there?", "tool\ndry",
                 '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
                 "<think>Dry.</think>It is dry.", "user\nThanks"):  # fmt: skip
        assert said in model.prompts[2]
    assert not model.running


def test_a_stream_tells_thoughts_and_calls_as_the_whole_answer_does():
    """Deltas joined: the thought, then the text, then two calls, each whole."""
    text = f"<think>Hm</think>I will look.{CALL}{CALL.replace('Oslo', 'Rome')}"
    with scripted(text) as (_, url):
        events = [e.choices[0] for e in chat(url, tools=[TOOL], stream=True)]
    deltas = [one.delta for one in events]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm"
    assert "".join(d.content or "" for d in deltas) == "I will look."
    calls = [call for d in deltas for call in d.tool_calls or ()]
    assert [(c.index, json.loads(c.function.arguments)["city"]) for c in calls] == [
        (0, "Oslo"), (1, "Rome"),
    ]  # fmt: skip
    assert len({c.id for c in calls}) == 2 and events[-1].finish_reason == "tool_calls"


def test_responses_hold_a_thought_and_a_call_in_their_order_and_take_them_back():
    """Whole, and by the client's own reading of the stream; the next prompt holds all of it."""
    with scripted(THINKS, THINKS, "It is dry.") as (model, url):
        made = client(url).responses
        asked = {"model": "tiny", "input": "Rain in Oslo?", "tools": [FLAT]}
        whole = made.create(**asked)
        with made.stream(**asked) as stream:
            added = [e.output_index for e in stream if e.type == "response.output_item.added"]
            final = stream.get_final_response()
        assert added == [0, 1]
        for answer in (whole, final):
            thought, call = answer.output
            assert answer.status == "completed"
            assert thought.content[0].text.strip() == "Is it wet there?"
            assert (call.type, json.loads(call.arguments)) == ("function_call", {"city": "Oslo"})
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "dry"}
        turns = [*ASKED, *(one.model_dump() for one in whole.output), result]
        assert made.create(**{**asked, "input": turns}).output_text == "It is dry."
    asked, said, result = model.prompts[2].split("<|im_start|>")[1:4]
    assert "Rain in Oslo?" in asked and "tool\ndry" in result
    assert (
        "Is it wet there?" in said and '{"name": "weather", "arguments": {"city": "Oslo"}}' in said
    )


@pytest.mark.parametrize(
    "text",
    ["Well: <tool_call>\n{'city': Oslo\n</tool_call> so be it", "<tool_call>\n[3]\n</tool_call>"],
)
def test_a_call_that_cannot_be_read_is_told_as_text(text):
    """Small models write such; it is no failure of the server's, on any route, streamed or not."""
    with scripted(text, text, text, text) as (_, url):
        answer = chat(url, tools=[TOOL]).choices[0]
        assert (answer.message.content, answer.finish_reason) == (text, "stop")
        assert answer.message.tool_calls is None
        parts = [e.choices[0].delta.content or "" for e in chat(url, tools=[TOOL], stream=True)]
        assert "".join(parts) == text
        asked = {"model": "tiny", "input": "Rain?", "tools": [FLAT]}
        assert client(url).responses.create(**asked).output_text == text
        parts = [e.delta for e in client(url).responses.create(**asked, stream=True)
                 if e.type == "response.output_text.delta"]  # fmt: skip
        assert "".join(parts) == text


def test_a_call_that_was_cut_is_told_as_text():
    """The tokens were written, and paid for."""
    with scripted(CALL[:40], cut=True) as (_, url):
        answer = chat(url, tools=[TOOL]).choices[0]
    assert (answer.message.content, answer.finish_reason) == (CALL[:40], "length")


def test_a_thought_that_the_template_has_begun_or_left_out_is_read_so():
    """Switched off, the template itself writes an empty thought: what follows is text."""
    with scripted("Yes.", "Yes.") as (model, url):
        switches = (
            {"reasoning_effort": "none"},
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        )
        for switch in switches:
            message = chat(url, **switch).choices[0].message
            assert message.content == "Yes." and not hasattr(message, "reasoning_content")
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in model.prompts)


def test_the_log_holds_text_only_if_that_is_asked_for(caplog):
    """The prompt when a request begins, and the answer when it ends."""
    for asked in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "melinoe.serve"), scripted("Yes.", log_text=asked) as (_, url):
            chat(url)
        begun, ended = (json.loads(line) for line in caplog.messages)
        assert (begun["status"], ended["status"]) == ("begun", "ok")
        assert ("Rain in Oslo?" in str(begun), "Yes." in str(ended)) == (asked, asked)


def test_a_client_that_reads_nothing_is_given_up(monkeypatch, caplog):
    """Its answer is longer than what lies between; its place is free, garbage collected or not."""
    monkeypatch.setattr(app, "_UNREAD_S", 0.5)
    gc.disable()
    try:
        with (
            caplog.at_level("INFO", "melinoe.serve"),
            scripted("far away " * 60_000) as (model, url),
            socket.socket() as slow,
        ):
            host, port = url.removeprefix("http://").split(":")
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            body = b'{"prompt": "x", "stream": true}'
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n"
                         b"content-type: application/json\r\n\r\n" % len(body) + body)  # fmt: skip
            until = time.monotonic() + 60
            while not model.prompts or model.running:
                assert time.monotonic() < until
                time.sleep(0.05)
            assert ask(f"{url}/health")[0] == 200
    finally:
        gc.enable()
    ended = [json.loads(line) for line in caplog.messages if line.startswith("{")][-1]
    assert ended["status"] == "client left"


HALF = "\ud800"
WITH_HALF = [
    ("completions", {"prompt": HALF}),
    ("completions", {"prompt": "x", "stop": HALF}),
    ("completions", {"prompt": "x", "model": HALF}),
    ("completions", {"prompt": "x", HALF: 1}),
    ("completions", {"prompt": "x", "logit_bias": {HALF: 1}}),
    ("completions", {"prompt": "x", "user": HALF, "metadata": {HALF: HALF}}),
    ("chat/completions", {"messages": [{"role": HALF, "content": HALF}]}),
    ("chat/completions", {"messages": ASKED, "chat_template_kwargs": {HALF: HALF}}),
    ("chat/completions", {"messages": ASKED, "reasoning_effort": HALF}),
    ("chat/completions", {"messages": ASKED, "tools": [TOOL], "tool_choice": HALF}),
    ("chat/completions", {"messages": ASKED, "tools": [{"function": {"name": HALF}}]}),
    ("chat/completions", {"messages": ASKED, "response_format": {"type": "json_schema",
        "json_schema": {"schema": {"enum": [HALF]}}}}),
    ("responses", {"input": HALF}),
    ("responses", {"input": [{"type": HALF, "call_id": HALF}]}),
    ("responses", {"input": "x", "instructions": HALF}),
]  # fmt: skip


def test_half_a_character_is_a_clients_error():
    """JSON can hold what no text can, and tokenizers, templates and answers trip over it."""
    with scripted() as (_, url):
        for route, body in WITH_HALF:
            status, _, answer = ask(f"{url}/v1/{route}", body)
            assert status == 400 and "half of a character" in json.loads(answer)["error"]["message"]


def test_a_prompt_that_cannot_fit_is_refused_before_its_tokens_are_counted():
    """Counting those of four MB takes seconds, in which no stream would go on."""
    long = "word " * 500_000
    with scripted() as (_, url):
        for route, body in (
            ("completions", {"prompt": long}),
            ("chat/completions", {"messages": [{"role": "user", "content": long}]}),
            ("responses", {"input": long}),
        ):
            status, _, answer = ask(f"{url}/v1/{route}", body)
            error = json.loads(answer)["error"]
            assert status == 400 and error["code"] == "context_length_exceeded"
            assert "more than 4096 tokens" in error["message"]


def test_json_that_python_cannot_read_is_a_clients_error():
    """Nested too deeply, and a number of too many digits."""
    deep, long = b"[" * 200_000 + b"]" * 200_000, b"9" * 5000
    with scripted() as (_, url):
        for route in ("completions", "chat/completions", "responses"):
            for value in (deep, long):
                body = b'{"prompt": %b, "messages": %b, "input": %b}' % (value, value, value)
                status, _, answer = ask(f"{url}/v1/{route}", body)
                assert status == 400 and json.loads(answer)["error"]["message"]
