"""Decode steps that are not captured: the same text, and one warning that says why."""

import pytest
import tape
import tiny
import torch
from replayed import BATCH, attach, plain, static
from transformers.cache_utils import StaticCache

from melinoe import attach as attach_reference


def test_steps_that_need_the_host_are_never_captured(model):
    """Four tokens of two choices into four slots."""
    expected = plain(model, BATCH)
    with attach(model, slots=4, graphs=True) as handle:
        assert torch.equal(static(model, BATCH), expected)
        assert (handle.graphs.captured, handle.fallbacks) == (0, 7)


def test_a_capture_that_fails_is_said_once_and_steps_go_on(model, caplog, monkeypatch):
    """The same tokens, launched step by step; no second attempt."""
    expected = plain(model, BATCH[:1])

    def failing(run, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nlong traceback")

    with attach(model, slots=8, graphs=True) as handle:
        monkeypatch.setattr(handle.graphs, "_make", failing)
        for _ in range(2):
            assert torch.equal(static(model, BATCH[:1]), expected)
        assert "operation not permitted" in handle.graphs.reason
        assert "traceback" not in handle.graphs.reason
        assert handle.counters.tokens.tolist() == [8, 14]
    said = [r for r in caplog.records if "not as CUDA graphs" in r.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING"


def test_a_failure_inside_a_capture_leaves_no_pass_open(model, monkeypatch):
    """The model itself raises while it is captured; the step is then run as it is."""
    expected = plain(model, BATCH[:1])

    def strike(*_):
        raise RuntimeError("no such luck")

    class Strict:
        def __init__(self, run, pool, stream):
            # Before any layer: capturing on a GPU executes nothing, here what ran would count.
            hook = model.model.embed_tokens.register_forward_pre_hook(strike)
            try:
                run()
            finally:
                hook.remove()

    with attach(model, slots=8, graphs=True) as handle:
        monkeypatch.setattr(handle.graphs, "_make", Strict)
        assert torch.equal(static(model, BATCH[:1]), expected)
        assert "no such luck" in handle.graphs.reason
        assert handle._passes.given is None
        assert handle.counters.tokens.tolist() == [4, 7]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen4_exp", "a step leaves other memory in StaticIndexedLayer"),
        ("unlimited_ocr", "asks its cache for a number of tokens"),
    ],
)
def test_what_no_graph_can_hold_is_named(family, why, caplog):
    """A history that grows, a length read in Python: the same tokens, step by step."""
    model = tiny.tiny_model(family)
    expected = plain(model, BATCH[1:2])
    with attach(model, slots=8, graphs=True) as handle:
        for _ in range(2):
            assert torch.equal(static(model, BATCH[1:2]), expected)
        assert (handle.graphs.captured, handle.graphs.replayed) == (0, 0)
    said = [r for r in caplog.records if "not as CUDA graphs" in r.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING" and why in said[0].getMessage()


def test_steps_that_nobody_asks_for_are_named(model, caplog):
    """generate captures nothing for beams; neither does a loop that calls the model."""
    with attach_reference(model, slots=8):
        expected = model.generate(
            BATCH[1:2], num_beams=2, max_new_tokens=8, do_sample=False,
            cache_implementation="static",
        )  # fmt: skip
    with attach(model, slots=8, graphs=True) as handle:
        static(model, BATCH[1:2])
        assert not caplog.records
        for _ in range(2):
            assert torch.equal(static(model, BATCH[1:2], num_beams=2), expected)
        assert handle.graphs.captured == 1
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "nobody asks for these, as with beams" in said[0]


def test_an_input_that_is_not_known_is_named(model, caplog):
    """A captured step would keep whatever it is."""
    with attach(model, slots=8, graphs=True) as handle:
        cache = StaticCache(config=model.config, max_cache_len=12)
        step = handle.graphs.step
        with torch.no_grad():
            for _ in range(3):
                step(input_ids=BATCH[1:2, :1], past_key_values=cache, other={1, 2})
        assert handle.graphs.captured == 0
    said = [r.getMessage() for r in caplog.records if "its input other, a set" in r.getMessage()]
    assert len(said) == 1


def test_generate_uses_a_static_cache_by_itself_only_where_there_is_one(model, monkeypatch, caplog):
    """On a GPU; elsewhere the model's own choice of cache stays, which is said."""
    for network, on_gpu, expected in (
        (model, True, "static"),
        (model, False, None),
        (tiny.tiny_model("gpt_oss"), True, "static"),
        (tiny.tiny_model("deepseek_v4"), True, None),
    ):
        caplog.clear()
        before = network.generation_config.cache_implementation
        with attach(network, slots=8, graphs=True) as handle:
            graphs = handle.graphs
            device = torch.device("cuda") if on_gpu else torch.device("cpu")
            monkeypatch.setattr(graphs, "_device", device)
            undo = graphs.plug_in()
            assert network.generation_config.cache_implementation == (expected or before)
            if expected is None and on_gpu:
                graphs._unasked()  # as each of its steps tells
            said = [r for r in caplog.records if "not as CUDA graphs" in r.getMessage()]
            assert len(said) == (on_gpu and expected is None)
            undo()
            assert network.generation_config.cache_implementation == before


def test_a_capture_without_room_is_tried_again(model, monkeypatch, caplog):
    """The request goes on, step by step; three in vain are enough."""
    expected = plain(model, BATCH[:1])
    with attach(model, slots=8, graphs=True) as handle:
        make, tries = handle.graphs._make, []

        def capture(run, pool, stream):
            tries.append(1)
            if len(tries) < 3:
                raise torch.OutOfMemoryError("out of memory")
            return make(run, pool, stream)

        monkeypatch.setattr(handle.graphs, "_make", capture)
        assert torch.equal(static(model, BATCH[:1]), expected)
        assert handle.graphs.captured == 1 and handle.graphs.reason is None
    said = [r for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("errors", [["memory"] * 3, ["memory", "other"], ["other"]])
def test_captures_that_go_on_failing_are_given_up(model, monkeypatch, errors):
    """For want of memory after three; for anything else at once; and until the model changes."""
    expected = plain(model, BATCH[:1], 16)
    kinds = {"memory": torch.OutOfMemoryError("no room"), "other": ValueError("no way")}
    left = list(errors)

    def failing(run, pool, stream):
        raise kinds[left.pop(0)]

    with attach(model, slots=8, graphs=True) as handle:
        monkeypatch.setattr(handle.graphs, "_make", failing)
        assert torch.equal(static(model, BATCH[:1], 16), expected)
        assert not left and handle.graphs.reason.endswith(str(kinds[errors[-1]]))
        hook = model.lm_head.register_forward_hook(lambda *_: None)
        tape.play(handle)
        assert torch.equal(static(model, BATCH[:1], 16), expected)
        assert handle.graphs.reason is None and handle.graphs.captured == 1
        hook.remove()


def test_outputs_that_a_replay_would_overwrite_are_not_replayed(model, caplog):
    """Which is said."""
    with attach(model, slots=8, graphs=True) as handle:
        static(model, BATCH[1:2], output_hidden_states=True, return_dict_in_generate=True)
        assert handle.graphs.captured == 0
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "output_hidden_states is asked for" in said[0]


def test_the_reason_of_a_failed_capture_is_what_came_first(model, monkeypatch):
    """Ending a capture that failed raises an error of its own on top."""

    def failing(run, pool, stream):
        try:
            raise ValueError("a tensor was asked what it holds")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with attach(model, slots=8, graphs=True) as handle:
        monkeypatch.setattr(handle.graphs, "_make", failing)
        static(model, BATCH[:1])
        assert handle.graphs.reason.endswith("a tensor was asked what it holds")
