"""Every prefetch on real models: the same text, and counts that are simulated to the last one."""

import pytest
import torch
from fast_attach import attach as attach_fast
from small_olmoe import tiny_model, words_tokenizer

from melinoe import attach
from melinoe.cache.locality import popularity
from melinoe.cache.prefetch import Given, Prefetcher, prefetcher, prefetcher_names
from melinoe.cache.residency import StreamedPrefill
from melinoe.cache.simulator import simulate
from melinoe.checkpoint import load_tokenizer
from melinoe.engine.load import load
from melinoe.errors import AttachError
from melinoe.generate import generate, prompt_ids, trace_prompts
from melinoe.shipped import TINY_OLMOE

PROMPTS = ["Natalia sold 48 clips in April.", "How many apples does Tom have?", "The river"]
TOKENS, SLOTS, EXPERTS = 8, 6, 32
OURS = prefetcher_names()


class Stub:
    """Stands for a predictor: names experts by a sum over the prompt."""

    def bind(self, model, tokenizer=None):
        pass

    def top(self, ids, slots):
        return [[(sum(ids) + 5 * i + layer) % EXPERTS for i in range(slots)] for layer in range(4)]


@pytest.fixture(scope="module")
def shipped():
    """The shipped model with every expert resident: its texts, a trace of them, and the prompts."""
    model, handle = load(TINY_OLMOE, "cpu", slots=EXPERTS)
    tokenizer = load_tokenizer(str(TINY_OLMOE), model.config)
    with handle:
        texts = [generate(model, handle, tokenizer, one, TOKENS).ids for one in PROMPTS]
        trace = trace_prompts(model, handle, tokenizer, PROMPTS, TOKENS)
    ids = [prompt_ids(tokenizer, one) for one in PROMPTS]
    return model, tokenizer, texts, trace, ids


def made(name, shipped):
    return prefetcher(name, Given(popularity(shipped[3]), Stub()))


CASES = [(name, "lfu", SLOTS) for name in OURS]
CASES += [(name, "lru", 3) for name in ("popularity", "predictor")]
# Fewer slots in some layers than a token needs there.
CASES += [("prefill", "lru", [2, 1, 2, 1])]


@pytest.mark.parametrize(("name", "policy", "slots"), CASES)
def test_the_text_stays_and_every_count_is_simulated(name, policy, slots, shipped):
    """A trace taken with all experts resident tells what any prefetch then costs, to the load."""
    model, tokenizer, texts, trace, ids = shipped
    chosen = made(name, shipped)
    with attach(model, slots=slots, policy=policy) as handle:
        served = [
            generate(model, handle, tokenizer, one, TOKENS, prefetch=chosen).ids for one in PROMPTS
        ]
        counted, moved = handle.counters, handle.transferred_bytes
        blocks = handle.store.block_bytes(0)
    assert served == texts
    done = simulate(trace, slots, policy, prefetch=chosen, prompts=ids)
    assert done.counters == counted
    assert (name == "none") == (counted.prefetch_loads.sum() == 0)
    assert moved == blocks * (counted.loads.sum() + counted.prefetch_loads.sum())


def test_several_prompts_at_once_are_refused_where_each_has_experts_of_its_own():
    """Prefill serves one sequence at a time, and says so rather than mix two prompts."""
    model = tiny_model()
    with (
        attach(model, slots=3) as handle,
        handle.prefetching(prefetcher("prefill")),
        pytest.raises(AttachError, match="one sequence at a time"),
    ):
        model.generate(torch.tensor([[5, 6], [7, 8]]), max_new_tokens=2, do_sample=False)


def test_one_prefetcher_is_at_work_at_a_time_and_leaves_nothing():
    """A second one is refused; then nothing is asked."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle:
        with (
            handle.prefetching(prefetcher("prefill")),
            pytest.raises(AttachError, match="at work already"),
            handle.prefetching(Prefetcher()),
        ):
            pass
        with pytest.raises(ValueError, match="reads prompts"), handle.prefetching(Reader()):
            pass
        generate(model, handle, tokenizer, [3, 4, 5], 4, prefetch=prefetcher("prefill"))
        before = handle.counters
        generate(model, handle, tokenizer, [3, 4, 5], 4)
        assert (handle.counters.minus(before).prefetch_loads == 0).all()


class Reader(Prefetcher):
    name, uses_ids = "reader", True


def test_the_device_engine_prefetches():
    """Prefill and popularity count as simulated with streamed prompts."""
    model, tokenizer = tiny_model(), words_tokenizer()
    prompts = [[3, 4, 5, 6], [9, 8]]
    with attach_fast(model, slots=4, policy="lfu") as handle:
        for name in ("prefill", "popularity"):
            chosen = prefetcher(name, Given([[1, 2, 3, 4, 5, 6, 7, 8]] * 2))
            handle.reset_cache()
            handle.reset_counters()
            trace = trace_prompts(model, handle, tokenizer, prompts, 4, prefetch=chosen)
            done = simulate(trace, 4, "lfu", prefetch=chosen, prefill=StreamedPrefill())
            assert done.counters == handle.counters
            # A streamed prompt leaves what it used most, so that nothing is left to bring back.
            assert (handle.counters.prefetch_loads.sum() > 0) == (name == "popularity")


def test_what_was_copied_counts_where_a_later_answer_is_wrong():
    """Two of layer 0 are copied, then layer 1 is told of an expert that it does not have."""

    class Wrong(Prefetcher):
        name = "wrong"

        def before_completion(self, prompt):
            left = [e for e in range(8) if e not in handle.resident()[0]]
            return [left[:2], [8]]

    with attach(tiny_model(), slots=4) as handle:
        with pytest.raises(ValueError, match="outside"), handle.prefetching(Wrong()):
            handle._model.generate(torch.tensor([[5]]), max_new_tokens=2, do_sample=False)
        assert handle.counters.prefetch_loads.tolist() == [2, 0]
        with handle.prefetching(prefetcher("prefill")):  # the one before is gone
            pass


@pytest.mark.parametrize("engine", [attach, attach_fast])
def test_each_answer_counts_what_was_simulated_for_it(engine):
    """Three answers on a warm cache, of both engines: counter by counter those of its sequence."""
    model, tokenizer = tiny_model(), words_tokenizer()
    prompts = [[3, 4, 5], [9], [20, 21]]
    loads = 0
    for half in ([7, 6, 5, 4], [0, 1, 2, 3]):

        class Always(Prefetcher):
            def before_completion(self, prompt, half=half):
                return [half] * 2

        chosen = Always()
        with engine(model, slots=4, policy="lfu") as handle:
            with handle.record() as recorder:
                said = [
                    generate(model, handle, tokenizer, one, 4, prefetch=chosen) for one in prompts
                ]
            counted, trace = handle.counters, recorder.trace()
            prefill = handle.prefill
        assert isinstance(prefill, StreamedPrefill) == (engine is attach_fast)
        done = simulate(trace, 4, "lfu", prefetch=chosen, prefill=prefill)
        assert done.counters == counted
        assert [one.counters for one in said] == done.per_sequence
        loads += counted.prefetch_loads.sum()
    assert loads > 0
