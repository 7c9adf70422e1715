"""
Captured decode steps inside transformers' generate, with the graph played by a tape.

What is tested is that generate asks for them, that every input reaches its buffer, that the cache
a step knows is the one in use, that nothing of a step is left to Python, and what happens when it
cannot be had. That a GPU replays what was captured is for tests/gpu.
"""

import copy
import itertools
from contextlib import nullcontext

import pytest
import tape
import tiny
import torch
from small_olmoe import tiny_model
from transformers import CompileConfig
from transformers.cache_utils import StaticCache

import melinoe.fast.graphs as graphs_module
from melinoe.fast.attach import attach as attach_fast
from melinoe.fast.fingerprint import fingerprint
from melinoe.generate import generate as generate_text
from melinoe.runtime.attach import attach as attach_reference

BATCH = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 9, 3, 4], [2, 3, 4, 5]])


def attach(model, **options):
    handle = attach_fast(model, **options)
    tape.play(handle)
    return handle


@pytest.fixture(scope="module")
def original():
    return tiny_model()


@pytest.fixture
def model(original):
    yield original
    original.__dict__.pop("_previous_max_cache_length", None)


def static(model, ids, tokens=8, **options):
    """Generate as on a GPU, where a static cache makes generate ask for a compiled forward."""
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    return model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=everywhere,
        **options,
    )


def plain(model, ids, tokens=8):
    with attach_reference(model, slots=8):
        return model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
        )


@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_replayed_steps_give_the_same_tokens(model, batch):
    """Batches with padding; the first step of a kind runs as it is, the second is captured."""
    ids = torch.cat([(BATCH + 5 * n) * (BATCH > 0) % 32 for n in range(4)])[:batch]
    expected = plain(model, ids)
    with attach(model, slots=8, graphs=True) as handle:
        assert torch.equal(static(model, ids), expected)
        assert (handle.graphs.captured, handle.graphs.replayed) == (1, 6)
        # Later calls find it captured: all seven steps are replayed, on the kept cache.
        for _ in range(2):
            assert torch.equal(static(model, ids), expected)
        assert (handle.graphs.captured, handle.graphs.replayed) == (1, 20)
        assert handle.counters.forwards.tolist() == [3, 21]
        assert handle.counters.tokens.tolist() == [3 * 4 * batch, 21 * batch]


def test_steps_that_need_the_host_are_never_captured(model):
    """Four tokens of two choices into four slots."""
    expected = plain(model, BATCH)
    with attach(model, slots=4, graphs=True) as handle:
        assert torch.equal(static(model, BATCH), expected)
        assert (handle.graphs.captured, handle.fallbacks) == (0, 7)


def test_another_prompt_or_batch_size_is_another_kind(model):
    """Longer texts get a new cache and a new capture; shorter ones use the kept one."""
    with attach(model, slots=8, graphs=True) as handle:
        for ids, tokens in ((BATCH[:1], 8), (BATCH[:2], 8), (BATCH[1:2], 14), (BATCH[1:2], 5)):
            expected_rows = static(model, ids, tokens)
            with handle.graphs.paused():
                assert torch.equal(static(model, ids, tokens), expected_rows)
        assert handle.graphs.captured >= 3
        assert handle.graphs.reason is None


def test_a_cache_that_the_caller_keeps_is_left_alone(model):
    """The next call gets another one."""
    with attach(model, slots=8, graphs=True) as handle:
        first = static(model, BATCH[:1], return_dict_in_generate=True)
        assert isinstance(first.past_key_values, StaticCache)
        keys = first.past_key_values.layers[0].keys.clone()
        second = static(model, BATCH[1:2])
        assert torch.equal(first.past_key_values.layers[0].keys, keys)
        assert handle.graphs._kept._cache() is not first.past_key_values
        assert torch.equal(second, static(model, BATCH[1:2]))


def test_scores_that_the_caller_keeps_are_not_overwritten(model):
    """Logits of every step, replayed, equal those of the reference engine."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    with attach_reference(model, slots=8):
        expected = model.generate(
            BATCH[1:2], max_new_tokens=6, do_sample=False, cache_implementation="static", **options
        ).logits
    with attach(model, slots=8, graphs=True) as handle:
        found = static(model, BATCH[1:2], tokens=6, **options).logits
        assert handle.graphs.replayed > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_inference_mode_and_no_grad_may_take_turns(model):
    """A cache made in one cannot be written in the other, so it is not kept."""
    with attach(model, slots=8, graphs=True) as handle:
        expected = static(model, BATCH[:1])
        with torch.inference_mode():
            assert torch.equal(static(model, BATCH[:1]), expected)
            assert torch.equal(static(model, BATCH[:1]), expected)
        assert torch.equal(static(model, BATCH[:1]), expected)
        assert handle.graphs.reason is None


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


def test_a_window_that_fills_up_is_another_kind(monkeypatch):
    """Eight tokens, four of them the prompt's; then every step rolls it. Two kinds, no more."""
    model = tiny.tiny_model("gpt_oss", sliding_window=8)
    expected = plain(model, BATCH, 12)
    with attach(model, slots=8, graphs=True) as handle:
        for _ in range(2):
            assert torch.equal(static(model, BATCH, 12), expected)
        # Of eleven steps four fill the window; the first step of each kind runs as it is.
        assert (handle.graphs.captured, handle.graphs.replayed) == (2, 9 + 11)
        assert handle.counters.tokens.tolist() == [2 * 16, 2 * 44]
    # Were the count left to Python, the window would never seem full to a replayed step.
    monkeypatch.setattr(graphs_module.cache_state, "set_counts", lambda *_: None)
    with attach(model, slots=8, graphs=True), pytest.raises(IndexError):
        static(model, BATCH, 12)


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


def test_constants_are_made_outside_the_graph(monkeypatch):
    """A full window makes a tensor of a number in each step, which a GPU could not capture."""
    model = tiny.tiny_model("gpt_oss", sliding_window=4)
    monkeypatch.setattr(graphs_module.Constants, "giving", lambda self: nullcontext())
    with attach(model, slots=8, graphs=True) as handle:
        static(model, BATCH[1:2])
        assert "CPU and CUDA tensors" in handle.graphs.reason


def test_recording_sees_every_step(model):
    """Replays have no hooks, so steps run as they are while a trace is recorded."""
    with attach(model, slots=8, graphs=True) as handle:
        static(model, BATCH[:1])
        replayed = handle.graphs.replayed
        with handle.record() as recorder:
            static(model, BATCH[:1])
        assert handle.graphs.replayed == replayed
        assert recorder.trace().num_forwards == 8


def test_a_prefetch_for_the_completion_comes_before_the_first_replay(model):
    """Even though a replayed step calls no hook."""
    with attach(model, slots=8, graphs=True, admit=0) as handle:
        static(model, BATCH[:1])
        handle.reset_cache()
        handle.prefetch([[7, 6, 5]] * 2, at="completion")
        static(model, BATCH[:1])
        assert handle.counters.prefetch_loads.sum() > 0
        assert handle._passes.before_completion is None


def test_at_most_so_many_kinds_are_kept(model, monkeypatch):
    """The oldest goes first."""
    monkeypatch.setattr(graphs_module, "_MOST_KINDS", 2)
    with attach(model, slots=8, graphs=True) as handle:
        step = handle.graphs
        for length in (10, 11, 12):
            cache = StaticCache(config=model.config, max_cache_len=length)
            with torch.no_grad():
                model(BATCH[1:2], past_key_values=cache)
                for _ in range(3):
                    step.step(input_ids=BATCH[:1, -1:], past_key_values=cache, return_dict=True)
        assert (step.captured, len(step._steps)) == (3, 2)


def test_our_generate_runs_on_it(model):
    """`melinoe.generate.generate` with a static cache: text, counters of the call alone."""
    from small_olmoe import PROMPT_TEXT, words_tokenizer

    with attach(model, slots=4, graphs=True) as handle:
        result = generate_text(
            model, handle, words_tokenizer(), PROMPT_TEXT, max_new_tokens=5,
            cache_implementation="static",
        )  # fmt: skip
        assert result.counters.tokens.tolist() == [4, 4]


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
                graphs._unasked(False)  # as each of its steps tells
            said = [r for r in caplog.records if "not as CUDA graphs" in r.getMessage()]
            assert len(said) == (on_gpu and expected is None)
            undo()
            assert network.generation_config.cache_implementation == before


def test_steps_of_a_model_that_has_changed_are_captured_anew(original):
    """Another head, a hook, an adapter's switch: the text is that of the model as it is now."""
    model = copy.deepcopy(original)
    ids = BATCH[1:2]
    with attach(model, slots=8, graphs=True) as handle:
        before = static(model, ids)
        own = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(own.detach().flip(0))
        with handle.graphs.paused():
            expected = static(model, ids)
        assert not torch.equal(expected, before)
        for _ in range(2):
            assert torch.equal(static(model, ids), expected)
        assert handle.graphs.captured == 2
        model.lm_head.weight = own
        assert torch.equal(static(model, ids), before)
        seen = []
        hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
        static(model, ids)
        assert seen
        hook.remove()
        captured = handle.graphs.captured
        static(model, ids)
        model.lm_head.weight.data.mul_(1)  # in place: what was captured reads it anew
        static(model, ids)
        assert handle.graphs.captured == captured + 1


def test_memory_of_graphs_that_are_gone_is_not_captured_into_again(model, monkeypatch):
    """What libraries keep in it outlives them; each new set of graphs has a pool of its own."""
    pools = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    with attach(model, slots=8, graphs=True) as handle:
        graphs, used = handle.graphs, []
        make = graphs._make
        graphs._stream = "its own"

        def noted(run, pool, stream):
            used.append((pool, stream))
            return make(run, pool, stream)

        monkeypatch.setattr(graphs, "_make", noted)
        for batch, tokens in ((1, 6), (1, 6), (1, 9), (2, 9)):
            static(model, BATCH[1 : 1 + batch], tokens)
        assert used == [(0, "its own"), (1, "its own"), (2, "its own")]


def test_a_prefetch_for_the_completion_is_not_made_while_capturing(model, monkeypatch):
    """It asks the device who is resident, which no capture can."""
    with attach(model, slots=8, graphs=True, admit=0) as handle:
        static(model, BATCH[:1], 2)  # one step, as it is: the next one is captured
        assert handle.graphs.captured == 0
        pulls, make = [], handle.graphs._make
        pull = handle._who.pull

        def capture(run, pool, stream):
            with monkeypatch.context() as strict:
                strict.setattr(handle._who, "pull", lambda layer: pulls.append(layer))
                return make(run, pool, stream)

        handle.graphs._make = capture
        handle.reset_cache()
        handle.prefetch([[7, 6, 5]] * 2, at="completion")
        static(model, BATCH[:1], 2)
        assert handle.graphs.captured == 1 and not pulls
        assert handle.counters.prefetch_loads.sum() > 0
        assert handle._who.pull == pull


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


def test_two_kinds_share_a_constant_in_one_memory():
    """The first captured step knows where it lies, so learning it again must not move it."""
    model = tiny.tiny_model("gpt_oss", sliding_window=4)
    with attach(model, slots=8, graphs=True) as handle:
        made = handle.graphs._constants._made
        static(model, BATCH[1:2], return_dict_in_generate=True)
        before = {key: one.data_ptr() for key, one in made.items()}
        static(model, BATCH[1:3])
        assert handle.graphs.captured == 2 and before
        assert {key: made[key].data_ptr() for key in before} == before


def test_a_prompt_in_chunks_is_a_prompt_to_its_end(model):
    """Its last chunk is one token, as a step is; it is streamed, counted and not captured."""
    ids, chunks = torch.tensor([[5, 6, 7, 8, 9]]), {"prefill_chunk_size": 4}
    expected = plain(model, ids)
    with attach(model, slots=8, graphs=True) as handle:
        for replayed in (6, 6 + 7):
            handle.reset_counters()
            assert torch.equal(static(model, ids, **chunks), expected)
            assert handle.counters.tokens.tolist() == [5, 7]
            assert handle.graphs.replayed == replayed and handle.graphs.captured == 1


def test_outputs_that_a_replay_would_overwrite_are_not_replayed(model, caplog):
    """Which is said."""
    with attach(model, slots=8, graphs=True) as handle:
        static(model, BATCH[1:2], output_hidden_states=True, return_dict_in_generate=True)
        assert handle.graphs.captured == 0
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "output_hidden_states is asked for" in said[0]


def test_what_a_model_is_shows_in_its_fingerprint():
    """Memory, hooks, modes, adapters and attention; not values that change where they lie."""
    network = tiny_model()
    seen = [fingerprint(network)]

    def changed():
        now = fingerprint(network)
        new = now != seen[-1]
        seen.append(now)
        return new

    network.lm_head.weight.data.add_(1)
    assert not changed()
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    assert changed()
    hook = network.model.layers[0].register_forward_pre_hook(lambda *_: None)
    assert changed()
    hook.remove()
    assert changed() and seen[-1] == seen[-3]
    network.train()
    assert changed()
    network.lm_head.scaling = {"default": 0.5}
    assert changed()
    network.lm_head.scaling["default"] = 0.7
    assert changed()
    network.set_attn_implementation("eager")
    assert changed()


def test_two_caches_of_the_callers_are_two_kinds(model):
    """A captured step knows one memory; the other cache must not be served by it."""
    with attach(model, slots=8, graphs=True) as handle, torch.no_grad():
        caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
        for cache, ids in zip(caches, (BATCH[1:2], BATCH[3:4]), strict=True):
            model(ids, past_key_values=cache)
        mask = (torch.arange(12) <= 4)[None, None, None]
        found = []
        for _ in range(3):
            for cache in caches:
                step = {"input_ids": BATCH[1:2, :1], "position_ids": torch.tensor([[4]]),
                        "attention_mask": mask, "past_key_values": cache}  # fmt: skip
                found.append(handle.graphs.step(**step).logits.clone())
                for layer in cache.layers:  # back to the prompt's end
                    layer.cumulative_length.fill_(4)
        assert handle.graphs.captured == 2
    assert all(torch.equal(one, found[place % 2]) for place, one in enumerate(found))
    assert not torch.equal(found[0], found[1])


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
