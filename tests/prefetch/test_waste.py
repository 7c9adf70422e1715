"""What a prefetch wasted is said of the text that it was made for, on a warm cache too."""

import numpy as np
import pytest
import torch
from fast_attach import attach as attach_fast

from melinoe import attach
from melinoe.cache.prefetch import Given, prefetcher
from melinoe.cache.residency import Residency, StreamedPrefill
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from melinoe.generate import generate
from tests.small_olmoe import tiny_model, words_tokenizer


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
    done = simulate(two_texts(), 4, prefetch={0: [[5]]})
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
    for at in ("prompt", "completion"):
        done = simulate(trace, 5, "lfu", prefetch=wanted, prefetch_at=at)
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
    chosen = prefetcher("popularity", Given([[1, 2, 3, 4, 5, 6, 7, 8]] * 2, at="prompt"))
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
    wanted = lambda _: [[0, 1, 2, 3]] * 2  # noqa: E731
    assert simulate(trace, 8, prefetch=wanted, prefetch_at="prompt").counters == counted
    assert counted.prefetch_used.sum() < 8
