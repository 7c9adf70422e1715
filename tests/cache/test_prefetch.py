"""Prefetch rules: who is named, when, under which name, and what it costs; by hand."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
from trace_builder import TraceBuilder

from melinoe.cache.prefetch import (
    Given,
    Listed,
    Popularity,
    Prefetcher,
    Prefill,
    Prompt,
    load_ahead,
    prefetcher,
    prefetcher_names,
    register,
)
from melinoe.cache.simulator import simulate
from melinoe.errors import MelinoeError, TraceError


def test_prefill_names_what_the_prompt_used_most():
    """Uses 2, 0, 5, 2 and two slots: 2 first, then of 0 and 3 the lower id; 1 never."""
    uses = np.array([[2, 0, 5, 2], [0, 0, 0, 1]])
    named = Prefill().before_completion(Prompt((2, 2), 4, None, uses))
    assert named == [[2, 0], [3]]


def test_prefill_counts_a_prompt_s_own_tokens_alone():
    """Padding chose 7, the prompt 1 (twice) and 4; both come back once the prompt is over."""
    builder = TraceBuilder(1, 8, 1)
    builder.add_forward(np.array([[[7]], [[1]], [[4]], [[1]]]), 0, np.array([2, 0, 0, 0]))
    builder.add_forward(np.array([[[1]]]), 0, 1)
    asked = []

    class Listening(Prefill):
        def before_completion(self, prompt):
            asked.append(prompt.uses.tolist())
            return super().before_completion(prompt)

    simulate(builder.trace(), 2, prefetch=Listening())
    assert asked == [[[0, 2, 0, 0, 1, 0, 0, 0]]]


def test_popularity_of_another_model_is_refused():
    """Two layers of three experts do not fit a trace of one layer of eight."""
    builder = TraceBuilder(1, 8, 1)
    builder.add_forward(np.array([[[1]]]), 0, 1)
    with pytest.raises(MelinoeError, match="2 layers of 3 experts"):
        simulate(builder.trace(), 2, prefetch=Popularity(np.ones((2, 3))))


OURS = ["none", "popularity", "prefill", "predictor"]


def test_three_strategies_and_none_of_them_can_be_named():
    """Each class has the name it is found by; no other takes it."""
    given = Given(np.ones((1, 4)), object())
    assert prefetcher_names() == OURS
    assert prefetcher("none") is None
    assert all(prefetcher(name, given).name == name for name in OURS[1:])
    for name in ("prefill", "none", ""):
        with pytest.raises(ValueError, match="name of its own"):
            register(type("Other", (Prefetcher,), {"name": name}))


@pytest.mark.parametrize(
    ("name", "words"),
    [("popularity", "--popularity"), ("predictor", "predictor fit")],
)
def test_what_a_prefetch_is_made_of_must_be_given(name, words):
    """One sentence with the way out."""
    with pytest.raises(MelinoeError, match=words):
        prefetcher(name, Given())


def test_an_unknown_name_lists_the_known_ones():
    """One sentence."""
    with pytest.raises(MelinoeError, match="one of none, popularity"):
        prefetcher("psychic")


def test_the_prefetch_on_the_page_of_traces_works(monkeypatch):
    """The class in docs/traces.md, run as it stands: of 1, 1, 2, 2, 2, 4, 5 it names 2, 1."""
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    block = page[page.index("    from melinoe.cache.prefetch import Prefetcher") :]
    code = textwrap.dedent(block[: block.index("\n`register`")])
    monkeypatch.setattr("melinoe.cache.prefetch._known", {})
    exec(code, {})
    builder = TraceBuilder(1, 8, 1)
    for chunk in ([1, 1, 2, 2, 2], [4, 5]):  # the second leaves nothing of the first
        builder.add_forward(np.array(chunk)[:, None, None], 0, 0)
    builder.add_forward(np.array([[[1]]]), 0, 1)
    trace, named = builder.trace(), prefetcher("repeated")
    uses = np.array([[0, 2, 3, 0, 1, 0, 0, 0]])
    assert named.before_completion(Prompt((8,), 8, None, uses)) == [[2, 1]]
    counters = simulate(trace, 2, prefetch=named).counters
    assert counters.prefetch_loads.tolist() == [2]


def test_wishes_must_name_every_layer():
    """One list for two layers is the prefetcher's mistake."""
    prompt = Prompt((2, 2), 4, None, np.zeros((2, 4), int), 0)
    with pytest.raises(ValueError, match="names 1 layers of 2"):
        load_ahead(Listed({0: [[1]]}), prompt, lambda *_: 0)


def test_the_adjusted_hit_rate_by_hand():
    """
    Two slots; the prompt uses 6 and 7, then 0 and 1 are copied for the completion 0, 5, 5, 1.

    0 is used, 1 leaves for 5 as the least recent, and is loaded when it is asked for: four copies
    for four uses.
    """
    builder = TraceBuilder(1, 8, 1)
    builder.add_forward(np.array([[[6]], [[7]]]), 0, 0)
    for expert in (0, 5, 5, 1):
        builder.add_forward(np.array([[[expert]]]), 0, 1)
    done = simulate(builder.trace(), 2, prefetch=Listed({0: [[1, 0]]}), steps=True)
    counters = done.counters
    assert done.prefetch == "listed"
    assert done.steps.ahead.tolist() == [[0], [2], [0], [0], [0]]
    assert counters.loads[1].tolist() == [2]
    assert counters.adjusted_hit_rate("completion") == 1 - 4 / 4


def test_a_trace_without_prompts_is_refused_by_what_reads_them():
    """The sentence says what to give; prompts of other lengths are refused too."""
    builder = TraceBuilder(1, 4, 1)
    builder.add_forward(np.array([[[1]], [[2]]]), 0, 0)
    builder.add_forward(np.array([[[1]]]), 0, 1)
    trace = builder.trace()

    class Reader(Prefetcher):
        name, uses_ids = "reader", True

        def before_completion(self, prompt):
            return [[prompt.ids[0]]]

    with pytest.raises(TraceError, match="give the prompts"):
        simulate(trace, 2, prefetch=Reader())
    for prompts in ([[1]], [[1, 2], [3, 4]]):
        with pytest.raises(TraceError, match="in their order"):
            simulate(trace, 2, prefetch=Reader(), prompts=prompts)
    done = simulate(trace, 2, prefetch=Reader(), prompts=[[3, 0]])
    assert done.counters.prefetch_loads.tolist() == [1]
