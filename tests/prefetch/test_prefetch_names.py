"""Prefetches by name: ours, and those that an installed package declares."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from prefetch_traces import decoding
from typer.testing import CliRunner

from melinoe.cache.prefetch import (
    Given,
    Popularity,
    Prefetcher,
    Prompt,
    prefetcher,
    prefetcher_class,
    prefetcher_names,
    register,
)
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from melinoe.errors import MelinoeError
from tests.outside import installed_package

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


def test_a_moment_is_for_those_that_have_a_choice():
    """Prefill and next-router load when they know; an unknown name lists the known ones."""
    for name in ("prefill", "next-router"):
        with pytest.raises(MelinoeError, match="moment of its own"):
            prefetcher(name, Given(at="prompt"))
    given = Given(popularity=np.ones((1, 2)), at="prompt")
    assert prefetcher("popularity", given).when == "prompt"
    with pytest.raises(ValueError, match="prompt or completion"):
        Popularity(np.ones((1, 2)), "later")
    with pytest.raises(MelinoeError, match="next-router"):
        prefetcher("psychic")


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
