"""Calls on several CUDA streams, seen through stand-ins: each waits for the call before it."""

import pytest
import torch
from small_olmoe import tiny_model

import melinoe
from melinoe.engine import handle as handle_module
from melinoe.engine.checks import stream_order


class Streams:
    """Which stream is the current one, and who was told to wait for whom."""

    def __init__(self, monkeypatch):
        self.current, self.waits, self.capturing = "first", [], False
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(self, self.current))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)


class Stream:
    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def __eq__(self, other):
        return self.name == other.name

    def wait_stream(self, other):
        self.streams.waits.append((self.name, other.name))


def test_a_call_on_another_stream_waits_for_the_one_before(monkeypatch):
    """first, first, second, first: two changes, two waits; a capture is left alone."""
    streams = Streams(monkeypatch)
    follow = stream_order(torch.device("cuda"))
    for name in ("first", "first", "second", "first"):
        streams.current = name
        follow()
    assert streams.waits == [("second", "first"), ("first", "second")]
    streams.current, streams.capturing = "third", True
    follow()
    assert len(streams.waits) == 2


def test_the_cpu_has_no_streams(monkeypatch):
    """Nothing of CUDA is asked."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    stream_order(torch.device("cpu"))()


@pytest.mark.parametrize("way", ["call", "generate", "layer"])
def test_every_way_into_the_slots_follows(monkeypatch, way):
    """A call of the model, a generate, whose replays call no module, and a layer by itself."""
    followed = []
    monkeypatch.setattr(handle_module, "stream_order", lambda _: lambda: followed.append(1))
    model = tiny_model()
    ids = torch.tensor([[2, 3, 4]])
    with melinoe.attach(model, slots=4), torch.no_grad():
        if way == "call":
            model(ids)
        elif way == "generate":
            model.generate(ids, max_new_tokens=3, do_sample=False)
        else:
            model.model.layers[0].mlp(torch.randn(1, 3, 16))
    # generate: once as it begins, then for the prompt and each step.
    assert len(followed) == {"call": 1, "generate": 4, "layer": 1}[way]
