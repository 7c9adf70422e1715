"""
Captured decode steps inside transformers' generate, with the graph played by a tape.

What is tested is that generate asks for them, that every input reaches its buffer, that the cache
a step knows is the one in use, and that what generate does between two steps still works. That a
GPU replays what was captured is for tests/gpu.
"""

import pytest
import torch
from replayed import BATCH, attach, plain, static
from transformers.cache_utils import StaticCache

from melinoe import attach as attach_reference
from melinoe.cache.prefetch import Popularity
from melinoe.generate import generate as generate_text


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


def test_captured_kernels_are_replayed(model, interpreted):
    """The kernels themselves, in Triton's interpreter, are replayed, with loads on the way."""
    expected = plain(model, BATCH[:2])
    with attach(model, slots=4, graphs=True) as handle:
        assert torch.equal(static(model, BATCH[:2]), expected)
        assert (handle.graphs.captured, handle.graphs.replayed) == (1, 6)
        assert handle.counters.loads[1].sum() > 0


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
        with handle.prefetching(Popularity([range(8)] * 2)):
            static(model, BATCH[:1])
        assert handle.counters.prefetch_loads.sum() > 0
        assert handle._passes.before_completion is None


def test_our_generate_runs_on_it(model):
    """`melinoe.generate.generate` with a static cache: text, counters of the call alone."""
    from small_olmoe import PROMPT_TEXT, words_tokenizer

    with attach(model, slots=4, graphs=True) as handle:
        result = generate_text(
            model, handle, words_tokenizer(), PROMPT_TEXT, max_new_tokens=5,
            cache_implementation="static",
        )  # fmt: skip
        assert result.counters.tokens.tolist() == [4, 4]


def test_a_prefetch_for_the_completion_is_not_made_while_capturing(model, monkeypatch):
    """It asks the device who is resident, which no capture can."""
    with attach(model, slots=8, graphs=True, admit=0) as handle:
        static(model, BATCH[:1], 2)  # one step, as it is: the next one is captured
        assert handle.graphs.captured == 0
        pulls, make = [], handle.graphs._make
        pull = handle.engine.residencies.pull

        def capture(run, pool, stream):
            with monkeypatch.context() as strict:
                strict.setattr(handle.engine.residencies, "pull", lambda layer: pulls.append(layer))
                return make(run, pool, stream)

        handle.graphs._make = capture
        handle.reset_cache()
        with handle.prefetching(Popularity([range(8)] * 2)):
            static(model, BATCH[:1], 2)
        assert handle.graphs.captured == 1 and not pulls
        assert handle.counters.prefetch_loads.sum() > 0
        assert handle.engine.residencies.pull == pull


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
