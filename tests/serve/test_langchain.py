"""LangChain's OpenAI class against a server process, unchanged: what its users call."""

from typing import Literal

import pytest
from pydantic import BaseModel


class Weather(BaseModel):
    """What a text says of the weather; all of its values are short."""

    city: Literal["Oslo", "Rome"]
    rain: bool


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"dry in {city}"


@pytest.fixture(scope="module")
def model(server):
    """Greedy, with room for a call's JSON at a token a character."""
    pytest.importorskip("llguidance")
    made = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=64,
        max_retries=0, stream_usage=True,
    )  # fmt: skip
    yield made
    made.root_client.close()  # LangChain leaves that to the end of the process


@pytest.fixture(scope="module")
def writer(server):
    """Its class for plain text, greedy."""
    made = pytest.importorskip("langchain_openai").OpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=12,
        max_retries=0,
    )  # fmt: skip
    yield made
    made.client._client.close()


def joined(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def test_it_answers_and_streams_the_same_text(model, offline):
    """The template's text, and its tokens in the usage that both bring."""
    expected = offline[0]("system: Be kind\nuser: Tell me of the sea\nassistant:", 40)
    chat = [("system", "Be kind"), ("human", "Tell me of the sea")]
    short = model.bind(max_tokens=40)
    for answer in (short.invoke(chat), joined(short.stream(chat))):
        assert answer.content == expected
        assert answer.response_metadata["finish_reason"] == "length"
        assert answer.usage_metadata["output_tokens"] == 40


def test_its_class_for_plain_text_answers_streams_and_takes_many_prompts(writer, offline):
    """`OpenAI` asks `/v1/completions`: one prompt, whole and streamed, and two in one request."""
    prompts = ["The sea was", "def f(x):"]
    expected = [offline[0](prompt, 12) for prompt in prompts]
    assert writer.invoke(prompts[0]) == "".join(writer.stream(prompts[0])) == expected[0]
    made = writer.generate(prompts)
    assert [one.text for (one,) in made.generations] == expected
    assert made.llm_output["token_usage"]["completion_tokens"] == 24


def test_many_prompts_at_once_are_answered_each(model, offline):
    """A batch of three, each cut before its first full stop."""
    asked = ["One", "Two", "Three"]
    answers = model.bind(stop=["."], max_tokens=8).batch(asked)
    for said, answer in zip(asked, answers, strict=True):
        assert answer.content == offline[0](f"user: {said}\nassistant:", 8).split(".")[0]


def test_a_demanded_tool_is_called_and_its_result_read(model):
    """Its arguments are those of its schema; the next turn holds the call and what came of it."""
    bound = model.bind_tools([weather], tool_choice="weather")
    said = bound.invoke("What is the weather in Oslo?")
    (call,) = said.tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Oslo", "Rome")
    assert said.response_metadata["finish_reason"] == "tool_calls"
    (streamed,) = joined(bound.stream("What is the weather in Oslo?")).tool_calls
    assert streamed["args"] == call["args"]
    result = {"role": "tool", "content": weather(**call["args"]), "tool_call_id": call["id"]}
    answer = model.bind_tools([weather]).invoke([("human", "Rain?"), said, result])
    assert answer.content and answer.usage_metadata["input_tokens"] > 10


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_has_the_fields_that_were_asked_for(model, method):
    """Whatever so small a model would write by itself."""
    held = model.with_structured_output(Weather, method=method)
    answer = held.invoke("Does it rain in Oslo?")
    assert isinstance(answer, Weather)
