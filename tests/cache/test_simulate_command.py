"""`melinoe simulate`: every option reaches the simulator, and impossible ones are refused."""

import json

import pytest
from cache_traces import random_trace
from typer.testing import CliRunner

from melinoe.cache.locality import popularity
from melinoe.cache.prefetch import Prefill
from melinoe.cache.simulator import simulate
from melinoe.cache.timing import Machine, Work, loads_when, predict
from melinoe.cli.app import app
from melinoe.errors import MelinoeError, TraceError

TRACE = {"layers": 4, "num_experts": 12, "top_k": 2, "completion": 20}
TIMED = ("--link", "1GB/s", "--expert-size", "1MB", "--device-bandwidth", "10GB/s")


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.safetensors"
    random_trace(0, **TRACE).save(path)
    return path


def rows(*arguments):
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_slots_are_one_number_or_one_for_each_layer(trace):
    """8 and 2,3,4,5 in one call: two rows for the one policy, as the simulator counts."""
    loaded = random_trace(0, **TRACE)
    found = rows(trace, "--policy", "lfu", "--slots", 8, "--slots", "2,3,4,5")
    assert [row["slots"] for row in found] == [8, "2,3,4,5"]
    for row, slots in zip(found, (8, [2, 3, 4, 5]), strict=True):
        counters = simulate(loaded, slots, "lfu").counters
        assert row["hit_rate"] == counters.hit_rate("completion")
        assert row["transfers_per_token"] == counters.transfers_per_token()


def test_every_policy_of_ours_can_be_named(trace):
    """By the name that its rows then have."""
    names = ("belady", "lfu", "lru", "static")
    arguments = [word for name in names for word in ("--policy", name)]
    found = rows(trace, *arguments, "--slots", 4)
    assert [row["policy"] for row in found] == list(names)


def test_time_is_what_the_model_predicts(trace):
    """One link, three ways to handle misses: the numbers of `predict`."""
    loaded = random_trace(0, **TRACE)
    machine = Machine(link_bytes_per_s=1e9, device_bytes_per_s=1e10, dram_bytes_per_s=2e9)
    work = Work(expert_bytes=10**6)
    popular = popularity(loaded).argsort(axis=1, kind="stable")
    assert popular.shape == (4, 12)
    for miss in ("wait", "split"):
        (row,) = rows(
            trace, "--policy", "lru", "--slots", 4, *TIMED, "--dram", "2GB/s",
            "--miss", miss,
        )  # fmt: skip
        done = simulate(loaded, 4, "lru", load=loads_when(miss, machine, work), steps=True)
        want = predict(done, machine, work).metrics()
        assert {name: row[name] for name in want} == pytest.approx(want)
        free = (done.steps.loads + done.steps.on_host).sum(axis=1) == 0
        assert row["zero_miss_tokens"] == free[done.steps.phase == 1].mean()


def test_misses_on_the_cpu_keep_the_popular_where_they_are(trace):
    """Nothing is loaded on demand, the popular ones once for each sequence and layer at most."""
    (row,) = rows(
        trace, "--policy", "static", "--slots", 4, *TIMED, "--dram", "2GB/s",
        "--miss", "cpu", "--prefetch", "popularity",
    )  # fmt: skip
    assert row["transfers_per_token"] == 0 < row["hit_rate"]
    assert row["prefetch_per_token"] == 4 * 4 / 60  # 3 sequences, the same 4 experts: loaded once
    assert row["cpu_stall_ms_per_token"] > 0


def test_a_prefetch_can_come_from_prompts(trace):
    """The prompt's experts, as the simulator takes them."""
    (row,) = rows(trace, "--policy", "lru", "--slots", 4, "--prefetch", "prefill")
    counters = simulate(random_trace(0, **TRACE), 4, "lru", prefetch=Prefill()).counters
    assert row["prefetch_per_token"] == counters.prefetch_per_token() > 0
    assert row["hit_rate"] == counters.hit_rate("completion")


def test_popularity_may_come_from_elsewhere(trace, tmp_path):
    """Another trace of the same shape decides whom static keeps; of another, it is refused."""
    loaded, other = random_trace(0, **TRACE), random_trace(1, **TRACE)
    path = tmp_path / "other.safetensors"
    other.save(path)
    (row,) = rows(trace, "--policy", "static", "--slots", 4, "--popularity", path)
    options = {"popularity": popularity(other)}
    want = simulate(loaded, 4, "static", policy_options=options).counters
    assert row["hit_rate"] == want.hit_rate("completion")
    small = tmp_path / "small.safetensors"
    random_trace(1, **TRACE | {"num_experts": 11}).save(small)
    for wrong, words in ((small, "another model"), (tmp_path / "absent", "cannot be read")):
        asked = ["simulate", str(trace), "--policy", "static", "--popularity", str(wrong)]
        error = CliRunner().invoke(app, asked).exception
        assert isinstance(error, TraceError) and words in str(error)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--slots", 0), "at least 1"),
        (("--slots", 13), "at most 12"),
        (("--slots", "2,3"), "2 layers"),
        (("--policy", "fifo"), "choose one of lru, lfu"),
        (("--link", "25Gb/s", "--expert-size", "1MB"), "bits"),
        (("--link", "0GB/s", "--expert-size", "1MB"), "above 0"),
        (("--link", "9e9GB/s", "--expert-size", "1MB"), "not a bandwidth"),
        (("--link", "1GB/s"), "--expert-size"),
        (("--link", "1GB/s", "--expert-size", "1MB"), "how fast the model computes"),
        ((*TIMED, "--link-latency", "9s"), "no transfer waits"),
        ((*TIMED, "--miss", "split"), "host memory"),
        (("--link", "1GB/s", "--model", "tiny", "--pass-time", "5ms"), "another model"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(trace, arguments, text):
    """A user's mistakes are a MelinoeError, which the command line prints on one line."""
    result = CliRunner().invoke(app, ["simulate", str(trace), *map(str, arguments)])
    assert isinstance(result.exception, MelinoeError), result.output
    assert text in str(result.exception) and "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--miss", "hope"), "wait, cpu, split"),
        (("--slots", "many"), "neither a number"),
        (("--miss", "split"), "--link"),
        ((*TIMED, "--miss", "cpu"), "--prefetch popular"),
    ],
)
def test_wrong_usage_exits_with_two(trace, arguments, text):
    """Words that are not options' words are usage errors, with the known ones."""
    result = CliRunner().invoke(app, ["simulate", str(trace), *map(str, arguments)])
    assert result.exit_code == 2 and text in result.output
