"""Perplexity token by token: equal to one pass where choices are exact, and what it counts."""

import numpy as np
import pytest
from small_olmoe import EXPERTS, tiny_model

from melinoe import attach
from melinoe.cache.simulator import simulate
from melinoe.data import Encoded
from melinoe.errors import AttachError, DataError
from melinoe.evaluate import decoded_perplexity, perplexity, price_of_choice
from melinoe.moe.choice import ChoiceSettings

TEXTS = [
    Encoded([3, 4, 5, 6, 7, 8, 9], [False, False, False, True, True, True, True]),
    Encoded([10, 11, 12, 13], [False, True, True, True]),
    # A chat: completion, then a turn of the user that does not count, then completion.
    Encoded([3, 9, 4, 8, 5, 7], [False, True, True, False, False, True]),
]


def test_it_equals_one_pass_over_the_text():
    """Plain, with every expert resident, and with two slots: the same loss per sequence."""
    model = tiny_model()
    expected = perplexity(model, TEXTS)
    for slots in (None, EXPERTS, 2):
        handle = attach(model, slots=slots) if slots else None
        found = decoded_perplexity(model, handle, TEXTS).perplexity
        assert found.nll == pytest.approx(expected.nll, rel=1e-5)
        assert found.tokens.tolist() == expected.tokens.tolist() == [4, 3, 3]
        if handle is not None:
            handle.detach()


def test_loads_are_the_simulators_on_the_recorded_trace():
    """From an empty cache each time; the prompt's loads are not among them."""
    model = tiny_model()
    handle = attach(model, slots=2)
    with handle.record() as recorder:
        found = decoded_perplexity(model, handle, TEXTS)
    done = simulate(recorder.trace(), 2, reset_between_sequences=True)
    assert found.loads.tolist() == [int(one.loads[1].sum()) for one in done.per_sequence]
    assert found.tokens.tolist() == [3, 2, 4]


def test_it_shows_what_a_cache_aware_choice_costs_and_saves():
    """Other losses and fewer loads than the exact choice."""
    model = tiny_model()
    handle = attach(model, slots=3)
    exact = decoded_perplexity(model, handle, TEXTS)
    handle.choose(ChoiceSettings("cache-prior", 2.0, keep=0))
    changed = decoded_perplexity(model, handle, TEXTS)
    assert changed.loads.sum() < exact.loads.sum()
    assert not np.allclose(changed.perplexity.nll, exact.perplexity.nll)


def test_nothing_to_predict_is_refused():
    """No texts, or none with a completion."""
    model = tiny_model()
    with pytest.raises(DataError):
        decoded_perplexity(model, None, [])
    with pytest.raises(DataError):
        decoded_perplexity(model, None, [Encoded([3, 4], [False, False])])


def test_a_text_without_a_completion_decodes_nothing():
    """Among others it counts no token and no pass, not fewer than none."""
    found = decoded_perplexity(tiny_model(), None, [*TEXTS, Encoded([3, 4], [False, False])])
    assert found.tokens.tolist() == [3, 2, 4, 0]
    assert found.perplexity.tokens.tolist() == [4, 3, 3, 0]


def test_the_price_of_a_choice_is_paired_with_the_exact_one():
    """Means and signs from the two readings themselves; choices are exact again afterwards."""
    model = tiny_model()
    handle = attach(model, slots=3)
    strong = ChoiceSettings("cache-prior", 2.0, keep=0)
    exact = decoded_perplexity(model, handle, TEXTS)
    handle.choose(strong)
    changed = decoded_perplexity(model, handle, TEXTS)
    record, (price, saving) = price_of_choice(model, handle, TEXTS, strong, "ours", "text")
    assert handle.choice.kind == "exact" and record["changed_choices"] > 0
    gap = (changed.perplexity.nll.sum() - exact.perplexity.nll.sum()) / 10
    assert price.change.mean == pytest.approx(np.expm1(gap))
    ratio = changed.loads.sum() / exact.loads.sum()
    assert saving.change.mean == pytest.approx(ratio - 1) and saving.change.mean < 0
    assert "ours, cache-prior 2 against ours" in saving.sentence
    assert record["choice"]["kind"] == "cache-prior"
    moved = {name: 9 * rate["mean"] for name, rate in record["transfers"].items()}
    assert moved == pytest.approx(
        {"ours": exact.loads.sum(), "ours, cache-prior 2": changed.loads.sum()}
    )


def test_exact_choices_have_no_price_and_without_transfers_none_are_compared():
    """The first is refused; with every expert resident only perplexity is compared."""
    model = tiny_model()
    handle = attach(model, slots=EXPERTS)
    with pytest.raises(AttachError, match="no price"):
        price_of_choice(model, handle, TEXTS, ChoiceSettings(), "ours", "text")
    prior = ChoiceSettings("cache-prior", 0.5)
    (record, found) = price_of_choice(model, handle, TEXTS, prior, "ours", "text")
    metrics = ["perplexity"] + ["transfers"] * (record["transfers"]["ours"]["mean"] > 0)
    assert [one.metric.split()[0] for one in found] == metrics
