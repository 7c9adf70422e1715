"""
Decode steps compiled by torch.compile: the same text and counts, and nothing lost where it fails.

Most tests compile with a backend that runs the traced graph as it is; one compiles with PyTorch's
own, on the CPU. Compiling takes a time for each layer, so most models have one.
That a GPU captures what was compiled is for tests/gpu.
"""

import gc
import weakref

import pytest
import tiny
import torch
from replayed import attach_rerun as attach
from replayed import static
from small_olmoe import tiny_model
from transformers import AutoModelForCausalLM

import melinoe.engine.device.compiled as compiled_module
from melinoe.cache.simulator import simulate
from melinoe.engine.device import static_cache
from melinoe.errors import AttachError
from melinoe.shipped import TINY_OLMOE

PROMPT = torch.arange(100, 112)[None]
IDS = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 9, 3, 4], [2, 3, 4, 5]])


@pytest.fixture
def as_it_is(monkeypatch):
    """Compile by running the graph as it was traced."""
    made = []

    def backend(graph, example_inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled_module, "backend", backend)
    yield made
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def shipped():
    """One of its layers: compiling takes a time for each."""
    model = AutoModelForCausalLM.from_pretrained(
        TINY_OLMOE, dtype=torch.bfloat16, num_hidden_layers=1
    )
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def generate(model, ids, tokens=8):
    """Token ids, and the logits of every step."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    found = static(model, ids, tokens, min_new_tokens=tokens, **options)
    return found.sequences, torch.stack(found.logits)


def test_compiled_steps_give_the_same_text_and_counts(as_it_is):
    """A step runs as it is, one is compiled, one captured; all later ones are replayed."""
    model, ids = tiny_model(num_hidden_layers=1), IDS
    with attach(model, slots=8, graphs=True) as handle:
        expected, logits = generate(model, ids)
        counted = handle.counters
    with attach(model, slots=8, graphs=True, compile=True) as handle:
        for _ in range(2):
            handle.reset_cache()
            handle.reset_counters()
            found, found_logits = generate(model, ids)
            assert torch.equal(found, expected)
            torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-5)
            assert handle.counters == counted
        assert handle.graphs.compiled.reason is None and len(as_it_is) == 1
        assert (handle.graphs.captured, handle.graphs.replayed) == (1, 5 + 7)


@pytest.mark.parametrize(("policy", "slots"), [("lru", 2), ("lfu", 4)])
def test_compiled_counts_are_the_simulators(as_it_is, policy, slots):
    """The routing is recorded on the way, uncompiled; the same text is then decoded compiled."""
    model = tiny_model()
    with attach(model, slots=slots, policy=policy, graphs=True, compile=True) as handle:
        with handle.record() as recorder:
            expected, _ = generate(model, IDS[:1])
        handle.reset_cache()
        handle.reset_counters()
        found, _ = generate(model, IDS[:1])
        assert handle.graphs.replayed == 5 and len(as_it_is) == 1
        counted, prefill = handle.counters, handle.prefill
    assert torch.equal(found, expected)
    assert counted.loads[1].sum() > 0
    assert simulate(recorder.trace(), slots, policy, prefill=prefill).counters == counted


def test_a_layer_is_one_operation_to_the_compiler(as_it_is):
    """It neither looks into what asks nobody, nor copies the slots to be safe."""
    model = tiny.tiny_model("olmoe", dtype=torch.bfloat16, num_hidden_layers=1)
    with attach(model, slots=8, graphs=True, compile=True):
        generate(model, IDS[1:2])
    called = [str(n.target) for n in as_it_is.pop().graph.nodes if n.op == "call_function"]
    assert len([one for one in called if "melinoe" in one]) == 1
    assert not any("grouped_mm" in one for one in called)


def test_another_batch_or_longer_cache_is_compiled_anew_and_shorter_texts_are_not(
    as_it_is, monkeypatch
):
    """Caches are multiples of a length; inference mode is another kind too."""
    monkeypatch.setattr(static_cache, "CACHE_STEP", 16)
    model = tiny_model(num_hidden_layers=1)
    with attach(model, slots=8, graphs=True, compile=True) as handle:
        for batch, tokens, kinds in ((1, 4, 1), (1, 9, 1), (2, 4, 2), (1, 14, 3)):
            with handle.graphs.paused():
                expected, _ = generate(model, IDS[1 : 1 + batch], tokens)
            assert torch.equal(generate(model, IDS[1 : 1 + batch], tokens)[0], expected)
            assert len(as_it_is) == kinds
        with torch.inference_mode():
            assert torch.equal(generate(model, IDS[1:2], 14)[0], expected)
        assert len(as_it_is) == 4
        assert handle.graphs.compiled.reason is None


def test_a_compile_that_fails_is_said_once_and_steps_are_captured_as_they_are(caplog, monkeypatch):
    """Nothing was computed then, so the same text and counts come of it."""

    def failing(graph, example_inputs):
        raise RuntimeError("no such instruction\nlong traceback")

    monkeypatch.setattr(compiled_module, "backend", failing)
    monkeypatch.setattr(static_cache, "CACHE_STEP", 1)  # the length shows in the last bits
    model = tiny_model(num_hidden_layers=1)
    with attach(model, slots=8, graphs=True) as handle:
        expected, logits = generate(model, IDS)
        counted = handle.counters
    with attach(model, slots=8, graphs=True, compile=True) as handle:
        found, found_logits = generate(model, IDS)
        assert torch.equal(found, expected) and torch.equal(found_logits, logits)
        assert handle.counters == counted and handle.graphs.captured == 1
        assert "no such instruction" in handle.graphs.compiled.reason
        assert "traceback" not in handle.graphs.compiled.reason
        assert torch.equal(generate(model, IDS)[0], expected)
    said = [r for r in caplog.records if "not compiled" in r.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING"
    torch._dynamo.reset()


def test_a_compiled_step_that_fails_half_way_fails_its_request_and_no_other(as_it_is, monkeypatch):
    """It has computed something that cannot be taken back; the next request is not compiled."""
    model = tiny_model(num_hidden_layers=1)

    def strikes(graph, example_inputs):
        def run(*arguments):
            graph.forward(*arguments)
            raise torch.OutOfMemoryError("out of memory")

        return run

    monkeypatch.setattr(compiled_module, "backend", strikes)
    with attach(model, slots=4, graphs=True) as handle:
        expected, _ = generate(model, IDS[:1])
    with attach(model, slots=4, graphs=True, compile=True) as handle:
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, IDS[:1])
        assert torch.equal(generate(model, IDS[:1])[0], expected)
        assert handle.graphs.captured == 1 and "memory" in handle.graphs.compiled.reason


def test_a_compiled_step_that_cannot_be_captured_is_captured_as_it_is(as_it_is, monkeypatch):
    """Capturing computes nothing, so the model's own can take its place."""
    model = tiny_model(num_hidden_layers=1)
    with attach(model, slots=8, graphs=True) as handle:
        expected, _ = generate(model, IDS)
    with attach(model, slots=8, graphs=True, compile=True) as handle:
        graphs, make = handle.graphs, handle.graphs._make

        def capture(run, pool, stream):
            if graphs.compiled.reason is None:
                raise RuntimeError("operation not permitted when stream is capturing")
            return make(run, pool, stream)

        monkeypatch.setattr(graphs, "_make", capture)
        assert torch.equal(generate(model, IDS)[0], expected)
        assert (graphs.captured, graphs.replayed, graphs.reason) == (1, 5, None)
        assert "not permitted" in graphs.compiled.reason


def test_detaching_leaves_nothing_compiled_behind(as_it_is):
    """The model's own forward, and no slot or model held by what torch keeps compiled."""
    model = tiny_model(num_hidden_layers=1)
    own = set(vars(model)) | {"_previous_max_cache_length"}
    handle = attach(model, slots=4, graphs=True, compile=True)
    generate(model, IDS[:1])
    assert len(as_it_is) == 1
    slots = weakref.ref(handle._caches[0].slots["down_proj"])
    handle.detach()
    assert set(vars(model)) <= own
    del handle
    as_it_is.clear()
    gc.collect()
    assert slots() is None
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_without_graphs_there_is_nothing_to_compile():
    """Refused before anything is moved."""
    with pytest.raises(AttachError, match="leave graphs on"):
        attach(tiny_model(num_hidden_layers=1), slots=4, compile=True)


def test_pytorchs_compiler_gives_bits_that_do_not_depend_on_the_slots(shipped, monkeypatch):
    """In few slots as all resident, both compiled; and the model's own but for rounding."""
    monkeypatch.setattr(static_cache, "CACHE_STEP", 1)  # the length shows in the last bits
    found = {}
    for name, slots, compiled in (("own", 32, False), ("few", 8, True), ("all", 32, True)):
        with attach(shipped, slots=slots, graphs=True, compile=compiled) as handle:
            found[name] = generate(shipped, PROMPT, 32)
            assert handle.graphs.replayed >= 29 and handle.graphs.reason is None
            assert not compiled or handle.graphs.compiled.reason is None
            loads = handle.counters.loads[1].sum()
        assert loads > 0 or slots == 32
    assert torch.equal(found["few"][1], found["all"][1])
    # Where two tokens are nearly as likely, rounding decides, and the texts part.
    agreed = (found["few"][0] == found["own"][0])[0, PROMPT.shape[1] :].long().cumprod(0).sum()
    assert agreed >= 8
    own, few = (found[name][1][: agreed + 1].float() for name in ("own", "few"))
    assert (few - own).norm() < 0.02 * own.norm()  # bfloat16 has 8 bits
    torch._dynamo.reset()
