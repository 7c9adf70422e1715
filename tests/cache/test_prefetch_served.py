"""Every prefetch on real models: the same text, and counts that are simulated to the last one."""

import numpy as np
import pytest
import torch
from cache_traces import Early
from fast_attach import attach as attach_fast
from small_olmoe import tiny_model, words_tokenizer

from melinoe import attach
from melinoe.cache.locality import popularity
from melinoe.cache.prefetch import Given, Listed, Prefetcher, prefetcher, prefetcher_names
from melinoe.cache.residency import Residency, StreamedPrefill
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from melinoe.checkpoint import load_tokenizer
from melinoe.engine.load import load
from melinoe.errors import AttachError
from melinoe.generate import generate, prompt_ids, trace_prompts
from melinoe.shipped import TINY_OLMOE

PROMPTS = ["Natalia sold 48 clips in April.", "How many apples does Tom have?", "The river"]
TOKENS, SLOTS, EXPERTS = 8, 6, 32
OURS = prefetcher_names()[:5]


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
        trace = trace_prompts(model, handle, tokenizer, PROMPTS, TOKENS, guesses=True)
    ids = [prompt_ids(tokenizer, one) for one in PROMPTS]
    return model, tokenizer, texts, trace, ids


def made(name, shipped):
    return prefetcher(name, Given(popularity(shipped[3]), Stub()))


CASES = [(name, "lfu", SLOTS) for name in OURS]
CASES += [(name, "lru", 3) for name in ("popularity", "predictor")]
# Fewer slots in some layers than a token needs there.
CASES += [("next-router", "lru", [2, 1, 2, 1])]


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
    assert 0 <= counted.prefetch_used.sum() <= counted.prefetch_loads.sum()


def test_what_is_recorded_while_it_prefetches_replays_the_same(shipped):
    """The guesses of a run on few slots are those of the run on all of them."""
    model, tokenizer, _, trace, _ = shipped
    chosen = prefetcher("next-router")
    with attach(model, slots=SLOTS) as handle:
        own = trace_prompts(
            model, handle, tokenizer, PROMPTS, TOKENS, guesses=True, prefetch=chosen
        )
    assert (own.guesses == trace.guesses).all()
    prompts = trace.kind == 0
    assert (trace.guesses[prompts] == -1).all() and (trace.guesses[:, 0] == -1).all()
    assert (trace.guesses[~prompts][:, 1:] >= 0).all()


def test_a_guess_is_worth_more_than_chance(shipped):
    """Of the experts that the next layer's router names early, far more than 4 in 32 are chosen."""
    *_, trace, _ = shipped
    rows = trace.kind == 1
    early, chosen = trace.guesses[rows][:, 1:], trace.experts[rows][:, 1:]
    assert (early[..., :, None] == chosen[..., None, :]).any(-1).mean() > 0.3


def test_a_batch_is_prefetched_between_layers_and_simulated():
    """Three rows decode together, with padding; what all rows guess is merged, on both sides."""
    model = tiny_model()
    batch = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 9, 3, 4]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = (batch != 0).long()
    plain = model.generate(batch, attention_mask=mask, **options)
    chosen = prefetcher("next-router")
    with attach(model, slots=4, policy="lfu") as handle:
        with handle.record(guesses=True) as recorder, handle.prefetching(chosen):
            served = model.generate(batch, attention_mask=mask, **options)
        counted = handle.counters
    assert torch.equal(served, plain)
    assert simulate(recorder.trace(), 4, "lfu", prefetch=chosen).counters == counted
    assert counted.prefetch_loads[1] > 0


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
        generate(model, handle, tokenizer, [3, 4, 5], 4, prefetch=prefetcher("next-router"))
        before = handle.counters
        generate(model, handle, tokenizer, [3, 4, 5], 4)
        assert (handle.counters.minus(before).prefetch_loads == 0).all()
        assert not any(router._forward_pre_hooks for router in routers_of(model))


class Reader(Prefetcher):
    name, uses_ids = "reader", True


def routers_of(model):
    return [layer.mlp.gate for layer in model.model.layers]


def test_the_fast_engine_prefetches_for_prompts_and_refuses_between_layers():
    """Prefill and popularity count as simulated with streamed prompts; next-router is refused."""
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
        with pytest.raises(AttachError, match="reference"):
            generate(model, handle, tokenizer, [3], 2, prefetch=prefetcher("next-router"))


@pytest.mark.parametrize("engine", [attach, attach_fast])
def test_counters_that_were_reset_know_nothing_of_prefetches_before(engine):
    """Four experts of each layer are copied ahead, then counters are reset: no use of them counts,
    so what is wasted is 0 and not below it."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with engine(model, slots=4, policy="lfu") as handle:
        handle.prefetch([[0, 1, 2, 3]] * 2)
        handle.reset_counters()
        generate(model, handle, tokenizer, [3, 4], 4)
        assert handle.counters.hits.sum() > 0
        assert handle.counters.prefetch_unused.tolist() == [0, 0]


def test_what_was_copied_counts_where_a_later_answer_is_wrong():
    """Two of layer 0 are copied, then layer 1 is told of an expert that it does not have."""

    class Wrong(Prefetcher):
        name = "wrong"

        def before_prompt(self, prompt):
            return [[0, 1], [8]]

    with attach(tiny_model(), slots=4) as handle:
        with pytest.raises(ValueError, match="outside"), handle.prefetching(Wrong()):
            pass
        assert handle.counters.prefetch_loads.tolist() == [2, 0]
        with handle.prefetching(prefetcher("prefill")):  # the one before is gone
            pass


def two_texts():
    """Each of one prompt token and one more: 0 and 1, then 5 and 1."""
    builder = TraceBuilder(1, 8, 1)
    for sequence, chosen in enumerate(([0, 1], [5, 1])):
        for kind, expert in enumerate(chosen):
            builder.add_forward(np.array([[[expert]]]), sequence, kind)
    return builder.trace()


def test_what_a_text_did_not_use_is_its_waste_whoever_uses_it_later():
    """
    5 is copied for the first text, which does not use it; the second finds it there.

    So the first wasted one copy and the second none, and their sum is that of the whole.
    """
    done = simulate(two_texts(), 4, prefetch=Listed({0: [[5]]}))
    assert [one.hits.sum() for one in done.per_sequence] == [0, 2]
    assert [one.prefetch_unused.tolist() for one in done.per_sequence] == [[1], [0]]
    assert done.counters.prefetch_unused.tolist() == [1]
    assert done.counters.prefetch_precision() == 0.0


def test_no_text_wastes_less_than_nothing():
    """Random texts on a warm cache: each used at most what was copied for it."""
    rng = np.random.default_rng(1)
    builder = TraceBuilder(2, 8, 2)
    for sequence in range(6):
        builder.add_forward(rng.integers(0, 8, (3, 2, 2)), sequence, 0)
        for _ in range(4):
            builder.add_forward(rng.integers(0, 8, (1, 2, 2)), sequence, 1)
    trace, spared = builder.trace(), 0
    wanted = {sequence: rng.permuted([range(8)] * 2, axis=1)[:, :3] for sequence in range(6)}
    for kind in (Early, Listed):
        done = simulate(trace, 5, "lfu", prefetch=kind(wanted))
        assert all((one.prefetch_unused >= 0).all() for one in done.per_sequence)
        spared += done.counters.prefetch_used.sum()
    assert spared > 0


def test_forgetting_can_spare_some():
    """Of 1, 2 and 3 only 2 is remembered."""
    residency = Residency(4, 4)
    residency.prefetch([1, 2, 3])
    residency.forget_prefetches(but=[2])
    assert residency.request([1, 2, 3]).first_uses == 1


@pytest.mark.parametrize("engine", [attach, attach_fast])
def test_each_answer_counts_the_waste_that_was_simulated_for_it(engine):
    """Three answers on a warm cache, of both engines: counter by counter those of its sequence."""
    model, tokenizer = tiny_model(), words_tokenizer()
    prompts = [[3, 4, 5], [9], [20, 21]]

    class Always(Prefetcher):
        def before_prompt(self, prompt):
            return [[7, 6, 5, 4]] * 2

    chosen = Always()
    with engine(model, slots=4, policy="lfu") as handle:
        with handle.record() as recorder:
            said = [generate(model, handle, tokenizer, one, 4, prefetch=chosen) for one in prompts]
        counted, trace = handle.counters, recorder.trace()
        prefill = getattr(handle, "prefill", None)
    assert isinstance(prefill, StreamedPrefill) == (engine is attach_fast)
    done = simulate(trace, 4, "lfu", prefetch=chosen, prefill=prefill)
    assert done.counters == counted
    assert [one.counters for one in said] == done.per_sequence
    assert counted.prefetch_loads.sum() > counted.prefetch_used.sum() > 0


@pytest.mark.parametrize("engine", [attach, attach_fast])
def test_a_prefetch_by_hand_is_charged_to_the_text_that_comes_next(engine):
    """Eight experts are copied before the second of two answers: its loads, and its uses."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with engine(model, slots=8, policy="lfu") as handle:
        handle.prefetch([[0, 1, 2, 3]] * 2)
        first = generate(model, handle, tokenizer, [3], 2).counters
        left = [8 - len(layer) for layer in handle.resident()]
        handle.prefetch([list(range(8))] * 2)
        second = generate(model, handle, tokenizer, [9, 8, 7, 11], 6).counters
    assert first.prefetch_loads.tolist() == [4, 4]
    assert second.prefetch_loads.tolist() == left and min(left) > 0
    for one in (first, second):
        assert (one.prefetch_unused >= 0).all() and one.prefetch_used.sum() > 0


def test_a_model_that_is_called_begins_a_text_too():
    """Outside `generate` as well: what was copied for the first call is not the second one's."""
    model = tiny_model()
    with attach(model, slots=8) as handle, torch.no_grad():
        with handle.record() as recorder:
            for ids in ([3], [9, 8]):
                handle.prefetch([[0, 1, 2, 3]] * 2)
                model(torch.tensor([ids]))
        counted, trace = handle.counters, recorder.trace()
    wanted = dict.fromkeys((0, 1), [[0, 1, 2, 3]] * 2)
    assert simulate(trace, 8, prefetch=Early(wanted)).counters == counted
    assert counted.prefetch_used.sum() < 8
