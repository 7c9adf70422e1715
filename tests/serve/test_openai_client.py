"""OpenAI's client against a server process: what it gets, streamed, whole, and when it errs."""

import json
import threading
import time
import urllib.error
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from serving import ask

PROMPTS = [
    "The history of the island begins with",
    "Question: Tom has 3 apples and buys 4 more. How many has he?",
    "def area(x):\n    return",
    "Once upon a time there was a river that ran",
]


def completion(client, prompt, **options):
    return client.completions.create(
        model="tiny", prompt=prompt, **{"max_tokens": 12, "temperature": 0, **options}
    )


def chat(client, content, **options):
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        **{"max_tokens": 8, "temperature": 0, **options},
    )


def test_greedy_text_is_the_plain_models_alone_and_beside_others(client, offline):
    """Four prompts at once, then one alone: each as transformers writes it with all experts."""
    write = offline[0]
    expected = [write(prompt, 12) for prompt in PROMPTS]
    got = [None] * len(PROMPTS)

    def ask(at):
        got[at] = completion(client, PROMPTS[at]).choices[0].text

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(PROMPTS))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert got == expected
    assert completion(client, PROMPTS[2]).choices[0].text == expected[2]


def test_a_chat_is_the_templates_text_and_streams_the_same(client, offline):
    """A whole answer, its stream joined, and the offline text after the template's prompt."""
    expected = offline[0]("user: Tell me of the sea\nassistant:", 8)
    whole = chat(client, "Tell me of the sea")
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    events = list(
        chat(client, "Tell me of the sea", stream=True, stream_options={"include_usage": True})
    )
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == expected
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens == 8
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"


def test_usage_says_what_the_expert_cache_did(client):
    """Loads, hits and bytes of a request that runs alone are what the counters grew by."""
    before = metrics(client)
    usage = completion(client, "An account of the expert cache").usage
    after = metrics(client)
    cost = usage.model_extra["expert_cache"]
    loads = after["melinoe_expert_loads_total"] - before["melinoe_expert_loads_total"]
    uses = after["melinoe_expert_uses_total"] - before["melinoe_expert_uses_total"]
    hits = after["melinoe_expert_hits_total"] - before["melinoe_expert_hits_total"]
    assert cost["experts_loaded"] == loads > 0
    assert cost["hit_rate"] == pytest.approx(hits / uses, abs=1e-4)
    moved = after["melinoe_transferred_bytes_total"] - before["melinoe_transferred_bytes_total"]
    assert cost["transferred_bytes"] == moved
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert sum(after[f'melinoe_resident_experts{{layer="{i}"}}'] for i in range(4)) == 32


def metrics(client):
    text = ask(str(client.base_url).replace("/v1/", "/metrics"))[2]
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_choices_of_one_seed_differ_and_come_again(client):
    """Two samples of one prompt; the same seed gives both again, another one does not."""
    first = completion(client, PROMPTS[0], n=2, temperature=1.0, seed=7, max_tokens=10)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1] and len(set(texts)) == 2
    again = completion(client, PROMPTS[0], n=2, temperature=1.0, seed=7, max_tokens=10)
    assert [choice.text for choice in again.choices] == texts
    other = completion(client, PROMPTS[0], n=2, temperature=1.0, seed=8, max_tokens=10)
    assert [choice.text for choice in other.choices] != texts
    assert first.usage.completion_tokens == 20


def test_logprobs_are_the_models_own(client, offline):
    """Of each greedy token, and of its rivals, as a plain forward pass has them."""
    import torch

    _, model, tokenizer = offline
    answer = completion(client, PROMPTS[3], max_tokens=4, logprobs=3)
    told = answer.choices[0].logprobs
    ids = tokenizer(PROMPTS[3])["input_ids"]
    for at, (token, value) in enumerate(zip(told.tokens, told.token_logprobs, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        expected = torch.log_softmax(logits, -1)
        best = int(expected.argmax())
        assert tokenizer.decode([best]) == token
        assert value == pytest.approx(float(expected[best]), abs=0.05)
        assert len(told.top_logprobs[at]) == 3
        ids.append(best)
    content = chat(client, "Hi", max_tokens=2, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert [len(one.top_logprobs) for one in content.content] == [2, 2]


def test_a_text_ends_before_a_stop_string_that_spans_tokens(client, offline):
    """The stop string is cut out of the middle of what is written without it."""
    whole = offline[0](PROMPTS[0], 12)
    stop = whole[9:14]
    expected = whole[: whole.find(stop)]
    answer = completion(client, PROMPTS[0], stop=[stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    parts = list(completion(client, PROMPTS[0], stop=[stop], stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert idle(client)


def idle(client, seconds=120.0):
    """Wait until nothing runs; False if that never comes."""
    until = time.monotonic() + seconds
    url = str(client.base_url).replace("/v1/", "/status")
    while time.monotonic() < until:
        state = json.loads(ask(url)[2])
        if state["running"] == state["waiting"] == 0:
            return True
        time.sleep(0.05)
    return False


def test_a_client_that_leaves_frees_its_place(client):
    """Streams closed after a token, more of them than there are places; then all is idle."""
    for _ in range(6):
        stream = completion(client, PROMPTS[1], max_tokens=64, stream=True)
        next(iter(stream))
        stream.close()
    assert idle(client)


def test_tools_their_results_and_the_templates_switch_reach_the_template(client, offline):
    """What the template makes of them is the prompt: its length says which parts came."""
    count = lambda text: len(offline[2](text)["input_ids"])  # noqa: E731
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"id": "c1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}  # fmt: skip
    answer = client.chat.completions.create(
        model="tiny", max_tokens=1, temperature=0, tools=[tool],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "dry"},
        ],
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )  # fmt: skip
    prompt = ("user: Rain?\nassistant: [weather Oslo]\ntool: dry\ntools: weather \nbe quick\n"
              "assistant:")  # fmt: skip
    assert answer.usage.prompt_tokens == count(prompt)
    without = chat(client, "Rain?", max_tokens=1, tools=[tool], tool_choice="none")
    assert without.usage.prompt_tokens == count("user: Rain?\nassistant:")


class Weather(BaseModel):
    """What a text says of the weather; all of its values are short."""

    city: Literal["Oslo", "Rome"]
    rain: bool


def test_a_text_is_held_to_a_schema_on_both_routes(client):
    """Greedy and drawn, whole and streamed: what the client's own `parse` reads."""
    pytest.importorskip("llguidance")
    chat_ = {"model": "tiny", "messages": [{"role": "user", "content": "Oslo?"}], "max_tokens": 40}
    for temperature in (0, 1.5):
        answer = client.chat.completions.parse(
            **chat_, response_format=Weather, temperature=temperature, seed=3
        )
        assert isinstance(answer.choices[0].message.parsed, Weather)
        assert answer.choices[0].finish_reason == "stop"
    said = client.responses.parse(
        model="tiny", input="Oslo?", max_output_tokens=40, text_format=Weather
    )
    assert isinstance(said.output_parsed, Weather)
    events = chat(client, "A list", max_tokens=6, stream=True,
                  response_format={"type": "json_object"})  # fmt: skip
    assert "".join(e.choices[0].delta.content or "" for e in events).startswith("{")


def test_a_demanded_call_takes_no_argument_that_its_tool_does_not_declare(client):
    """Though its schema forbids none: what else so small a model would write has no end."""
    pytest.importorskip("llguidance")
    parameters = {"type": "object", "properties": {"rain": {"type": "boolean"}}}
    tool = {"type": "function", "function": {"name": "w", "parameters": parameters}}
    for choice in ("required", {"type": "function", "function": {"name": "w"}}):
        answer = chat(client, "Rain?", max_tokens=60, tools=[tool], tool_choice=choice).choices[0]
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and call.function.name == "w"
        assert set(json.loads(call.function.arguments)) <= {"rain"}


def test_a_schema_that_is_none_is_refused(client):
    """With llguidance's own words, or that it is not installed."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match=r"response_format|llguidance"):
        chat(client, "Hi", response_format=form)


def test_responses_are_answered_by_the_same_model(client, offline):
    """The text after the template's prompt, whole and streamed."""
    expected = offline[0]("system: Be brief\nuser: Tell me of the sea\nassistant:", 8)
    asked = {"model": "tiny", "input": "Tell me of the sea", "instructions": "Be brief",
             "max_output_tokens": 8, "temperature": 0}  # fmt: skip
    answer = client.responses.create(**asked)
    assert answer.output_text == expected and answer.usage.output_tokens == 8
    events = list(client.responses.create(**asked, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected
    # Eight tokens are not the end of the text, and both answers say so, and what they cost.
    for told in (answer, events[-1].response):
        assert told.status == "incomplete" and told.output[0].status == "incomplete"
        assert told.incomplete_details.reason == "max_output_tokens"
        assert told.usage.expert_cache["experts_loaded"] >= 0
    assert events[-1].type == "response.incomplete"


BAD = [
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, None),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 100000}, 400, "max_tokens"),
    ({"n": 99}, 400, "n"),
    ({"stop": ["a"] * 9}, 400, "stop"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias.x"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tool_choice": {"function": "x"}}, 400, "tool_choice"),
    ({"parallel_tool_calls": False}, 400, "parallel_tool_calls"),
    ({"frobnicate": 1}, 400, "frobnicate"),
    ({"model": "other"}, 404, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "SHOUT"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content"),
    ({"messages": [{"role": "user", "content": "half \ud83d"}]}, 400, None),
    ({"user": "\udcff"}, 400, None),
    ({"tools": "none"}, 400, "tools"),
    ({"seed": 1e300}, 400, "seed"),
    ({"chat_template_kwargs": {"return_tensors": "pt"}}, 400, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs"),
    ({"chat_template_kwargs": "x"}, 400, "chat_template_kwargs"),
    ({"reasoning_effort": 3}, 400, "reasoning_effort"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, 400, "logit_bias"),
    ({"n": 8}, 400, "n"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "param"), BAD)
def test_a_wrong_request_gets_its_status_and_a_sentence(server, change, status, param):
    """The field that is wrong is named, and the server answers the next request."""
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
    got, _, answer = ask(f"{server.url}/v1/chat/completions", {**body, **change})
    assert got == status
    error = json.loads(answer)["error"]
    assert (param is None or error["param"] == param) and error["message"]
    assert json.loads(ask(f"{server.url}/health")[2]) == {"status": "ok"}


def test_the_templates_own_words_reach_the_client(client):
    """A system message that it refuses."""
    with pytest.raises(openai.BadRequestError, match="no shouting here"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "system", "content": "SHOUT"}]
        )


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"input": 3, "prompt": 3}',
             b'{"input": [3], "prompt": [-1], "messages": [3]}',
             b'{"input": {"a": 1}, "prompt": [[]], "messages": "x"}']
)  # fmt: skip
def test_a_body_of_another_kind_is_a_clients_error(server, route, body):
    """Not one of them is the server's."""
    status, _, answer = ask(f"{server.url}/v1/{route}", body)
    assert 400 <= status < 500 and json.loads(answer)["error"]["message"]


def test_a_body_without_end_is_not_read(server):
    """Five MiB, said and unsaid."""
    url = f"{server.url}/v1/completions"
    for body in (b"x" * (5 << 20), iter([b"x" * (1 << 20)] * 5)):
        try:
            assert ask(url, body)[0] == 413
        except urllib.error.URLError as error:  # it hung up before all was sent
            assert isinstance(error.reason, BrokenPipeError | ConnectionResetError)
    assert ask(f"{server.url}/health")[0] == 200


def test_responses_refuse_as_chats_do(client):
    """The template's words, and what would be ignored."""
    for wrong, words in (
        ({"instructions": "SHOUT"}, "no shouting here"),
        ({"parallel_tool_calls": False}, "one tool call"),
        ({"tools": [{"type": "web_search"}]}, "should be 'function'"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary is not supported"),
        ({"extra_body": {"chat_template_kwargs": "x"}}, "valid dictionary"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.responses.create(model="tiny", input="Hi", max_output_tokens=2, **wrong)


def test_an_unknown_route_is_refused_in_the_same_form(server):
    """404 and 405 come with OpenAI's error object."""
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        got, _, answer = ask(server.url + path)
        assert got == status and json.loads(answer)["error"]["message"]


def test_the_older_name_of_the_limit_holds_where_the_newer_is_null(client):
    """Four tokens, not the server's own limit."""
    answer = chat(client, "Hi", max_tokens=4, extra_body={"max_completion_tokens": None})
    assert answer.usage.completion_tokens == 4


def test_a_full_queue_says_when_to_come_again(client):
    """Five have room; of nine streams that begin together some are told 429 with a time."""
    answers, gate = [], threading.Barrier(9)

    def ask():
        gate.wait()
        try:
            for _ in completion(client, PROMPTS[0], max_tokens=60, stream=True):
                pass
            answers.append(200)
        except openai.RateLimitError as error:
            assert error.response.headers["retry-after"] == "1"
            answers.append(429)

    threads = [threading.Thread(target=ask) for _ in range(9)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert answers.count(200) >= 5 and answers.count(429) >= 1 and len(answers) == 9
    assert idle(client)


def test_the_list_of_models_is_the_one_that_runs(client):
    """By the name it was given; other models' routes are gone."""
    assert [one.id for one in client.models.list()] == ["tiny"]
    url = str(client.base_url)
    assert ask(url.replace("/v1/", "/load_model"), {"model": "x"})[0] == 404
    assert ask(url + "audio/transcriptions", {})[0] == 404


def test_a_request_keeps_its_own_name_or_is_given_one(server, client):
    """In the header of the answer, a stream's too, and as the answer's id."""
    body = {"model": "tiny", "prompt": "The sea", "max_tokens": 2}
    ask = client.completions.with_raw_response.create
    named = ask(**body, extra_headers={"x-request-id": "mine-7"})
    assert named.headers.get_list("x-request-id") == ["mine-7"] and named.parse().id == "mine-7"
    streamed = ask(**body, stream=True, extra_headers={"x-request-id": "mine-8"})
    assert streamed.headers["x-request-id"] == "mine-8"
    assert {part.id for part in streamed.parse()} == {"mine-8"}
    made = {ask(**body).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2 and all(len(name) == 36 for name in made)


def test_the_log_holds_no_text_of_a_request(server, client):
    """Neither the prompt's words nor the answer's."""
    completion(client, "Zebra xylophone quartz")
    assert "Zebra" not in server.log.read_text()
    assert '"route": "completions"' in server.log.read_text()
