"""Policies by name: ours, and those that an installed package declares."""

import json
import textwrap
from pathlib import Path

import pytest
from cache_traces import random_trace, trace_of
from typer.testing import CliRunner

from melinoe import config
from melinoe.cache.policy import policy, policy_class, policy_names
from melinoe.cache.simulator import simulate
from melinoe.errors import MelinoeError
from tests.outside import installed_package

MRU = '''
"""Evict the expert used last: a policy somebody wrote outside melinoe."""
from melinoe.cache.policy import Policy


class Mru(Policy):
    name = "mru"

    def __init__(self, most=1):
        self.most = most

    def reset(self, num_experts):
        self.order = []

    def use(self, experts):
        self.order = [e for e in self.order if e not in experts] + list(experts)

    def victims(self, candidates, count):
        return sorted(candidates, key=self.order.index, reverse=True)[:count]


class Impostor:
    name = "impostor"
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with entry points, installed by its metadata in a directory on sys.path."""
    points = (
        "[melinoe.policies]\n"
        "mru = outside_policies:Mru\n"
        "impostor = outside_policies:Impostor\n"
        "broken = outside_policies:Nowhere\n"
    )
    yield from installed_package(tmp_path, monkeypatch, "outside_policies", MRU, points)


@pytest.mark.usefixtures("installed")
def test_an_installed_policy_is_found_by_name():
    """Two slots, {0} {1} {2} {0}: MRU gives up 1, so 0 is still there; LRU would have lost it."""
    trace = trace_of([[0]], [[1]], [[2]], [[0]], num_experts=3, top_k=1)
    assert "mru" in policy_names()
    assert simulate(trace, 2, "mru").counters.loads.sum() == 3
    assert simulate(trace, 2, "lru").counters.loads.sum() == 4
    assert policy("mru", most=2).most == 2  # type: ignore[attr-defined]


@pytest.mark.usefixtures("installed")
def test_an_installed_policy_can_be_a_setting():
    """Settings allow what the registry knows; a name that nobody declares is refused."""
    assert config.ServeSettings(policy="mru").policy == "mru"
    with pytest.raises(MelinoeError, match="mru"):
        config.ServeSettings(policy="fifo")


@pytest.mark.usefixtures("installed")
def test_an_installed_policy_works_on_the_command_line(tmp_path):
    """`melinoe simulate --policy mru` prints its row beside LRU's."""
    from melinoe.cli.app import app

    path = tmp_path / "t.safetensors"
    random_trace(0).save(path)
    result = CliRunner().invoke(
        app, ["simulate", str(path), "--policy", "mru", "--policy", "lru", "--slots", "3", "--json"]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["policy"] for row in rows] == ["mru", "lru"]
    want = simulate(random_trace(0), 3, "mru").counters.hit_rate("completion")
    assert rows[0]["hit_rate"] == want


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "text"), [("impostor", "no cache policy"), ("broken", "cannot be loaded")]
)
def test_an_entry_point_that_is_no_policy_is_refused(name, text):
    """The message names the package's object, and the way out."""
    with pytest.raises(MelinoeError, match=f"outside_policies.*{text}|{text}.*package"):
        policy_class(name)


def test_the_settings_name_ours_that_run_a_model_by_name_alone():
    """Of the built-in policies, exactly those that need no future and no data."""
    able = []
    for name in ("belady", "lfru", "lfu", "lru", "score", "static"):
        cls = policy_class(name)
        assert cls.name == name
        if cls.offline:
            continue
        try:
            cls.for_layer(0, 1)
        except (MelinoeError, TypeError):
            continue
        able.append(name)
    assert sorted(config.POLICIES) == able
    assert set(config.policies()) >= set(able)


def test_a_package_cannot_take_a_name_of_ours(tmp_path, monkeypatch):
    """An entry point named lru is not what lru means."""
    points = "[melinoe.policies]\nlru = usurper:Lru\n"
    for _ in installed_package(tmp_path, monkeypatch, "usurper", "Lru = None\n", points):
        assert policy_class("lru").__module__ == "melinoe.cache.policy"
        assert policy_names().count("lru") == 1


def test_the_policy_on_the_page_of_traces_works():
    """The class printed in docs/traces.md, run as it stands: it gives up the expert used last."""
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    block = page[page.index("    from melinoe.cache.policy import Policy") :]
    code = textwrap.dedent(block[: block.index("\nDeclare it")])
    scope: dict = {}
    exec(code, scope)
    trace = trace_of([[0]], [[1]], [[2]], [[0]], num_experts=3, top_k=1)
    assert simulate(trace, 2, scope["Mru"]).counters.loads.sum() == 3
