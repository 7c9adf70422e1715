"""Prefetch rules: who is named, when, under which name, and what it costs; by hand."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from cache_traces import Early
from outside import installed_package
from typer.testing import CliRunner

from melinoe.cache.prefetch import (
    Given,
    LoadsAhead,
    NextRouter,
    Popularity,
    Prefetcher,
    Prefill,
    Prompt,
    Route,
    merge_guesses,
    prefetcher,
    prefetcher_class,
    prefetcher_names,
    register,
)
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace, TraceBuilder
from melinoe.errors import MelinoeError, TraceError


def decoding(chosen, guessed, num_experts=4, top_k=1):
    """Passes of one row: per pass and layer the ids chosen, and those guessed for layer 1."""
    builder = TraceBuilder(2, num_experts, top_k)
    for layers, guess in zip(chosen, guessed, strict=True):
        early = np.full((1, 2, top_k), -1)
        early[0, 1] = guess
        builder.add_forward(np.array([layers]), 0, 1, guesses=early)
    return builder.trace()


def test_prefill_names_what_the_prompt_used_most():
    """Uses 2, 0, 5, 2 and two slots: 2 first, then of 0 and 3 the lower id; 1 never."""
    uses = np.array([[2, 0, 5, 2], [0, 0, 0, 1]])
    named = Prefill().before_completion(Prompt((2, 2), 4, uses=uses))
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


OURS = ["none", "popularity", "prefill", "predictor", "next-router"]


def test_four_strategies_and_none_of_them_can_be_named():
    """Each class has the name it is found by."""
    assert prefetcher_names()[:5] == OURS
    assert prefetcher("none") is None
    assert all(prefetcher_class(name).name == name for name in OURS[1:])


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
    with pytest.raises(MelinoeError, match="next-router"):
        prefetcher("psychic")


def test_when_it_loads_is_told_for_records():
    """By what it answers; several with a plus."""
    assert Prefill().when == "completion" and NextRouter().when == "layers"
    assert Both().when == "completion+layers" and Prefetcher().when is None


OUTSIDE = '''
"""The expert whose number follows that of each chosen one: a strategy from outside."""
from melinoe.cache.prefetch import Prefetcher


class Successor(Prefetcher):
    name = "successor"

    def after_router(self, layer, chosen, guess):
        return [expert + 1 for expert in chosen if expert + 1 < 4]


class Impostor:
    name = "impostor"
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with entry points, installed by its metadata in a directory on sys.path."""
    points = (
        "[melinoe.prefetchers]\n"
        "successor = outside_prefetch:Successor\n"
        "impostor = outside_prefetch:Impostor\n"
        "broken = outside_prefetch:Nowhere\n"
        "prefill = outside_prefetch:Successor\n"
    )
    yield from installed_package(tmp_path, monkeypatch, "outside_prefetch", OUTSIDE, points)


@pytest.mark.usefixtures("installed")
def test_a_prefetch_from_outside_works_on_the_command_line(tmp_path):
    """`melinoe simulate --prefetch successor`: two of three successors are what layer 1 asks."""
    from melinoe.cli.app import app

    path = tmp_path / "t.safetensors"
    decoding([[[0], [1]], [[1], [2]], [[0], [3]]], [[-1]] * 3).save(path)
    result = CliRunner().invoke(
        app,
        ["simulate", str(path), "--policy", "lru", "--slots", "1", "--prefetch", "none",
         "--prefetch", "successor", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["prefetch"] for row in rows] == ["none", "successor"]
    assert [row["prefetch_precision"] for row in rows] == [None, 2 / 3]


@pytest.mark.usefixtures("installed")
def test_what_a_package_declares_is_checked_and_takes_no_name_of_ours():
    """Not a prefetcher, not there, and one that would be prefill."""
    assert "successor" in prefetcher_names() and prefetcher_names().count("prefill") == 1
    assert prefetcher_class("prefill").__module__ == "melinoe.cache.prefetch"
    with pytest.raises(MelinoeError, match="no prefetcher of that name"):
        prefetcher_class("impostor")
    with pytest.raises(MelinoeError, match="cannot be loaded"):
        prefetcher_class("broken")
    for name in ("prefill", "none", ""):
        with pytest.raises(ValueError, match="name of its own"):
            register(type("Other", (Prefetcher,), {"name": name}))


def test_the_prefetch_on_the_page_of_traces_works():
    """The class in docs/traces.md, run as it stands: of 1, 1, 2, 2, 2, 4, 5 it names 2, 1."""
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    block = page[page.index("    from melinoe.cache.prefetch import Prefetcher") :]
    code = textwrap.dedent(block[: block.index("\nDeclare it")])
    scope: dict = {}
    exec(code, scope)
    builder = TraceBuilder(1, 8, 1)
    for chunk in ([1, 1, 2, 2, 2], [4, 5]):  # the second leaves nothing of the first
        builder.add_forward(np.array(chunk)[:, None, None], 0, 0)
    builder.add_forward(np.array([[[1]]]), 0, 1)
    trace, named = builder.trace(), scope["Repeated"]()
    assert named.before_completion(Prompt((8,), 8, uses=np.array([[0, 2, 3, 0, 1, 0, 0, 0]]))) == [
        [2, 1]
    ]
    counters = simulate(trace, 2, prefetch=named).counters
    assert (counters.prefetch_loads.tolist(), counters.prefetch_used.tolist()) == ([2], [[0], [1]])


def test_a_prefetch_spares_what_it_is_told_to_and_drops_what_finds_no_slot():
    """Slots hold 0, 1, 2; sparing 0 and 1, of the wanted 5 and 6 only 5 comes, over 2."""
    residency = Residency(8, 3)
    residency.request([0, 1, 2])
    decision = residency.prefetch([5, 6], spare=[0, 1])
    assert [(load.expert, load.evicted) for load in decision.loads] == [(5, 2)]
    assert residency.prefetch([6, 7], spare=[0, 1, 5]).loads == ()
    assert residency.prefetch([1, 6], spare=[0, 5]).loads == ()  # 1 is wanted itself
    residency.check_invariants()


class Both(Prefetcher):
    """Names 3 before the completion, and 2 between layers."""

    name = "both"

    def before_completion(self, prompt):
        return [[], [3]]

    def after_router(self, layer, chosen, guess):
        return [2]


def test_what_was_named_for_a_layer_stays_until_that_layer_has_asked():
    """One slot: 3, brought for the completion, is not evicted for 2 before layer 1 has run."""
    trace = decoding([[[0], [1]], [[0], [2]]], [[-1], [-1]])
    done = simulate(trace, 1, prefetch=Both(), steps=True)
    assert done.steps.ahead.tolist() == [[0, 1], [0, 0]]
    assert done.steps.between.tolist() == [[0, 0], [0, 1]]
    assert done.counters.prefetch_used.sum() == 1  # 2, in the second pass


def test_many_rows_are_not_asked_about():
    """Nine sequences decode together: one more than a prefetch between layers looks at."""
    for rows, loads in ((8, 8), (9, 0)):
        builder = TraceBuilder(2, 16, 1)
        early = np.full((rows, 2, 1), -1)
        early[:, 1, 0] = np.arange(rows)
        builder.add_forward(np.zeros((rows, 2, 1), int), np.arange(rows), 1, guesses=early)
        counters = simulate(builder.trace(), 16, prefetch=NextRouter()).counters
        assert counters.prefetch_loads.tolist() == [0, loads]


def test_between_layers_a_prompt_is_not_asked_about():
    """It hears of the completion's passes, of layers that ran, and never of the last."""
    builder = TraceBuilder(3, 4, 1)
    builder.add_forward(np.array([[[0], [1], [2]]]), 0, 0)
    builder.add_forward(np.array([[[0], [-1], [2]]]), 0, 1)
    heard = []

    class Ear(Prefetcher):
        def after_router(self, layer, chosen, guess):
            heard.append((layer, list(chosen), list(guess)))
            return ()

    simulate(builder.trace(), 2, prefetch=Ear())
    assert heard == [(0, [0], [])]


def test_wishes_must_name_every_layer():
    """One list for two layers is the prefetcher's mistake."""
    ahead = LoadsAhead(Popularity(np.ones((1, 4))), Route(2), 2, lambda *_: 0)
    with pytest.raises((ValueError, MelinoeError), match="layer"):
        ahead.before_completion(Prompt((2, 2), 4))


def test_precision_recall_waste_and_adjusted_hit_rate_by_hand():
    """
    One slot a layer, three tokens; guesses for layer 1: right, wrong, and of a resident.

    Layer 0 loads 0, then 1, then hits. Layer 1: 0 comes ahead and is used; 3 comes ahead over it
    and leaves unused for 2, on demand; 2 is guessed where it is already. So of two copied ahead
    one was used; of four misses one was spared; five copies for six uses.
    """
    trace = decoding([[[0], [0]], [[1], [2]], [[1], [2]]], [[0], [3], [2]])
    counters = simulate(trace, 1, prefetch=NextRouter()).counters
    assert counters.prefetch_loads.tolist() == [0, 2]
    assert counters.prefetch_used.tolist() == [[0, 0], [0, 1]]
    assert counters.loads[1].tolist() == [2, 1]
    assert counters.prefetch_precision() == 1 / 2
    assert counters.prefetch_recall() == 1 / 4
    assert counters.prefetch_unused.tolist() == [0, 1]
    assert counters.prefetch_waste_per_token() == 1 / 3
    assert counters.adjusted_hit_rate("completion") == pytest.approx(1 - 5 / 6)


def test_what_waits_for_its_first_use_is_not_used_yet():
    """Four prefetched before the prompt, which uses two: precision 1/2, and recall is of others."""
    builder = TraceBuilder(1, 8, 1)
    builder.add_forward(np.array([[[0]], [[1]]]), 0, 0)
    builder.add_forward(np.array([[[5]]]), 0, 1)
    done = simulate(builder.trace(), 4, prefetch=Early({0: [[0, 1, 2, 3]]}))
    assert done.prefetch == "listed"
    assert done.counters.prefetch_used.tolist() == [[2], [0]]
    assert (done.counters.prefetch_precision(), done.counters.prefetch_recall()) == (0.5, 0.0)
    nothing = simulate(builder.trace(), 4).counters
    assert (nothing.prefetch_precision(), nothing.prefetch_unused.tolist()) == (None, [0])


def test_a_use_is_first_only_once_and_a_load_on_demand_is_none():
    """2 is prefetched and used twice; then evicted and loaded on demand: one first use in all."""
    residency = Residency(4, 1)
    residency.prefetch([2])
    decisions = [residency.request([expert]) for expert in (2, 2, 0, 2)]
    assert [decision.first_uses for decision in decisions] == [1, 0, 0, 0]
    residency.check_invariants()


@pytest.mark.parametrize(
    ("rows", "merged"),
    [
        ([[5, 2, 9]], [5, 2, 9]),
        ([[5, -1, 9]], [5, 9]),
        ([[5, 2], [2, 7]], [2, 5, 7]),  # 2 twice; 5 stands first in a row, 7 second
        ([[4, 1], [3, 1], [-1, -1]], [1, 3, 4]),  # 3 and 4 are alike, so by id
        ([[-1, -1]], []),
        ([], []),
    ],
)
def test_guesses_of_several_rows_are_ranked_by_how_many_share_them(rows, merged):
    """Then by their place in a row, then by id."""
    assert merge_guesses(rows) == merged


def test_a_trace_without_guesses_or_prompts_is_refused_by_what_needs_them():
    """The sentence says what to record or to give; prompts of other lengths are refused too."""
    builder = TraceBuilder(1, 4, 1)
    builder.add_forward(np.array([[[1]], [[2]]]), 0, 0)
    trace = builder.trace()

    class Reader(Prefetcher):
        name, uses_ids = "reader", True

        def before_prompt(self, prompt):
            return [[prompt.ids[0]]]

    with pytest.raises(TraceError, match="record one with guesses"):
        simulate(trace, 2, prefetch=NextRouter())
    with pytest.raises(TraceError, match="give the prompts"):
        simulate(trace, 2, prefetch=Reader())
    for prompts in ([[1]], [[1, 2], [3, 4]]):
        with pytest.raises(TraceError, match="in their order"):
            simulate(trace, 2, prefetch=Reader(), prompts=prompts)
    done = simulate(trace, 2, prefetch=Reader(), prompts=[[3, 0]])
    assert done.counters.prefetch_loads.tolist() == [1]


def test_guesses_are_kept_in_a_trace_of_version_3(tmp_path):
    """Round trip and selection; without guesses the file is of version 1."""
    trace = decoding([[[0], [0]], [[1], [2]]], [[0], [3]])
    trace.save(tmp_path / "t")
    again = Trace.load(tmp_path / "t")
    assert np.array_equal(again.guesses, trace.guesses) and again.guesses.dtype == np.int16
    assert b'version\\": 3' in (tmp_path / "t").read_bytes()
    assert np.array_equal(trace.select([0]).guesses, trace.guesses)
    plain = TraceBuilder(2, 4, 1)
    plain.add_forward(np.array([[[0], [1]]]), 0, 1)
    plain.trace().save(tmp_path / "p")
    assert b'version\\": 1' in (tmp_path / "p").read_bytes()
    with pytest.raises(TraceError, match="guesses ids from -1 to 9"):
        Trace(**{**vars(trace), "guesses": np.where(trace.guesses == 3, 9, trace.guesses)})
