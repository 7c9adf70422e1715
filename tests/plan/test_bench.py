"""`melinoe bench`: what is simulated is what is then counted, strategy by strategy."""

import json

import numpy as np
import pytest

from melinoe.engine.misses import Misses
from melinoe.errors import BudgetError, MelinoeError
from melinoe.plan.bench import (
    ALL_RESIDENT,
    ON_DEMAND,
    ON_THE_CPU,
    machine_of,
    seconds_of,
    strategies,
)
from melinoe.report import render_table
from tests.small_olmoe import EXPERTS, always, tiny_model, words_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny OLMoE, prompts for it, and a predictor that always names experts 3, 5 and 1."""
    root = tmp_path_factory.mktemp("bench")
    model = tiny_model()
    model.save_pretrained(root / "model")
    words_tokenizer().save_pretrained(root / "model")
    always(model, [3, 5, 1]).save(root / "predictor")
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": "w5"} for i in range(2, 20)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def bench(melinoe, place, *more):
    return melinoe(
        "bench", place / "model", "--data", place / "prompts.jsonl", "--limit", 2,
        "--max-new-tokens", 5, "--device", "cpu", *more,
    )  # fmt: skip


def test_all_combinations_between_the_two_extremes():
    """2 slots x 2 policies x 2 prefetches, between loading everything and holding everything."""
    chosen = strategies(8, [2, 4], ["lru", "lfu"], ["none", "predictor"])
    assert len(chosen) == 2 + 8
    assert (chosen[0].name, chosen[0].slots) == (ON_DEMAND, 1)
    assert (chosen[-1].name, chosen[-1].slots, chosen[-1].warm) == (ALL_RESIDENT, 8, True)
    assert len({(one.name, one.slots) for one in chosen}) == len(chosen)


def test_a_cache_that_stays_warm_is_shared_with_none_that_is_emptied(melinoe, place):
    """All experts as slots too: one run empties its cache before each prompt, one does not."""
    chosen = strategies(8, [8], ["lru", "lfu"])
    warm = {one.cache for one in chosen if one.warm}
    assert warm.isdisjoint(one.cache for one in chosen if not one.warm)
    code, _, err = bench(melinoe, place, "--slots", EXPERTS, "--policy", "lru", "--json")
    assert code == 0, err


def test_what_cannot_be_served_is_refused():
    """More slots than experts, an unknown policy, and one that needs the future."""
    with pytest.raises(BudgetError, match="1 to 8"):
        strategies(8, [9], ["lru"])
    with pytest.raises(MelinoeError, match="lru"):
        strategies(8, [2], ["fifo-ish"])
    with pytest.raises(MelinoeError, match="future"):
        strategies(8, [2], ["belady"])


@pytest.mark.parametrize(
    ("slots", "policies"),
    [([4], ["lfu"]), ([2, 4], ["lfu", "lfru"])],
)
def test_simulated_counts_equal_measured_ones_for_every_strategy(slots, policies, melinoe, place):
    """Policies x slots x prefetches on a real model, prompt by prompt, to the last load."""
    code, out, _ = bench(
        melinoe, place, *(word for n in slots for word in ("--slots", n)),
        *(word for one in policies for word in ("--policy", one)),
        "--predictor", place / "predictor", "--json",
    )  # fmt: skip
    assert code == 0
    records = json.loads(out)["records"]
    assert len(records) == 2 + len(slots) * len(policies) * 3
    for record in records:
        assert record["predicted"]["counts_that_differ"] == [], record["strategy"]
        # Prompts x tokens after the first x layers x top-2.
        assert sum(record["per_prompt"]["uses"]) == 2 * 4 * 2 * 2
    by_name = {(one["strategy"], one["slots"]): one for one in records}
    assert sum(by_name[ALL_RESIDENT, EXPERTS]["per_prompt"]["loads"]) <= 2 * EXPERTS
    ahead = by_name["lfu + predictor prefetch", 4]["per_prompt"]["prefetch_loads"]
    assert sum(ahead) > 0 and by_name["lfu", 4]["prefetch"] == "none"


def test_misses_are_a_dimension_of_strategies():
    """2 policies: both wait, split and compute beside a prefetch; without one the CPU's are one."""
    chosen = strategies(8, [2], ["lru", "lfu"], ["none", "popularity"], ["wait", "cpu", "split"])
    assert len(chosen) == 2 + 4 + 4 + (2 + 1)
    assert [one.miss for one in chosen].count("cpu") == 3
    assert len({one.name for one in chosen}) == len(chosen)
    assert len({one.cache for one in chosen}) == 2 + 3 * 2  # prefetches share runtimes
    both = strategies(8, [2], ["lru"], misses=["wait", "cpu"], engines=["reference", "fast"])
    fast = [one for one in both if one.engine == "fast"]
    assert [(one.slots, one.miss, one.warm) for one in fast] == [
        (2, "wait", False),
        (8, "wait", True),
    ]
    with pytest.raises(MelinoeError, match="--engine reference"):
        strategies(8, [2], ["lru"], misses=["split"], engines=["fast"])


def test_computed_misses_are_counted_as_simulated(melinoe, place):
    """On the CPU, split by measured costs, and beside a prefetch: to the last expert."""
    code, out, err = bench(
        melinoe, place, "--slots", 3, "--policy", "lru", "--miss", "cpu", "--miss", "split",
        "--predictor", place / "predictor", "--prefetch", "none", "--prefetch", "predictor",
        "--link", "0.001GB/s", "--link-latency", "50us", "--json",
    )  # fmt: skip
    assert code == 0, err
    done = json.loads(out)
    records = {one["strategy"]: one for one in done["records"]}
    assert len(records) == 2 + 2 + 2
    for record in records.values():
        assert record["predicted"]["counts_that_differ"] == [], record["strategy"]
    alone = records[ON_THE_CPU]["per_prompt"]
    assert alone["elsewhere"] == alone["uses"] and not any(alone["loads"] + alone["hits"])
    helped = records["lru + predictor prefetch, misses by the CPU"]
    assert helped["hit_rate"]["mean"] > 0 and helped["miss"] == "cpu"
    split = records["lru, misses split"]
    assert split["miss_figures"]["machine"]["link_bytes_per_s"] == 1e6
    # At 1 MB/s an expert takes milliseconds: the CPU computes what it can meanwhile.
    assert sum(split["per_prompt"]["elsewhere"]) > 0


def test_the_fast_engine_is_refused_where_it_cannot_run(melinoe, place, monkeypatch):
    """In one sentence, before a model is read; with an unknown engine the known ones."""
    from melinoe.engine.device import support

    code, _, err = bench(melinoe, place, "--engine", "both", "--link", "1GB/s")
    assert code == 1 and "no emulated link" in err
    monkeypatch.setattr(support, "why_not", lambda device: f"it needs a GPU, not the {device}")
    for engine in ("fast", "both"):
        code, out, err = bench(melinoe, place, "--slots", 2, "--engine", engine)
        assert (code, out) == (1, "") and "not the cpu; give --engine reference" in err
    code, _, err = bench(melinoe, place, "--engine", "warp")
    assert code == 2 and "both" in err


def test_both_engines_stand_in_one_table_and_count_as_simulated(melinoe, place):
    """The device engine streams prompts, which the simulator is told; kernels interpreted."""
    code, out, err = bench(
        melinoe, place, "--slots", 4, "--policy", "lru", "--engine", "both", "--json"
    )
    assert code == 0, err
    records = json.loads(out)["records"]
    names = [(one["strategy"], one["engine"]) for one in records]
    assert names == [
        (ON_DEMAND, "reference"),
        ("lru", "reference"),
        (ALL_RESIDENT, "reference"),
        ("lru, fast engine", "fast"),
        (f"{ALL_RESIDENT}, fast engine", "fast"),
    ]
    assert all(one["predicted"]["counts_equal"] for one in records)
    assert sum(records[3]["per_prompt"]["loads"]) > 0


def test_a_count_that_differs_is_an_error(melinoe, place, monkeypatch):
    """If the simulator were wrong by one load, the command would say where, and exit with 1."""
    import melinoe.plan.bench as module

    honest = module.counts_of

    def wrong(done):
        counts = honest(done)
        counts["loads"][-1] += 1
        return counts

    monkeypatch.setattr(module, "counts_of", wrong)
    code, _, err = bench(melinoe, place, "--slots", 2, "--policy", "lru")
    assert code == 1
    assert "counts differ" in err and "lru at 2" in err


def test_the_records_make_a_report(melinoe, place, tmp_path):
    """The table shows predicted beside measured, and the file holds what `report` reads."""
    out = tmp_path / "runs.jsonl"
    code, text, _ = bench(
        melinoe, place, "--slots", 2, "--policy", "lru", "--link", "0.01GB/s", "--link-latency",
        "50us", "--out", out,
    )  # fmt: skip
    assert code == 0
    for words in (ON_DEMAND, ALL_RESIDENT, "counts are equal", "predicted (ms)", "emulated link"):
        assert words in text
    assert "of the measured one" in text or "from the measured one" in text
    kinds = [json.loads(line).get("kind", "benchmark") for line in out.read_text().splitlines()]
    assert kinds == ["serve"] * 3 + ["timeline", "benchmark"]
    assert "lru" in render_table([out], "text", 200)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--slots", "99"), 1, "1 to 8"),
        (("--policy", "belady"), 1, "future"),
        (("--policy", "fifo-ish"), 1, "lru"),
        (("--link", "25TB/s"), 1, "check the unit"),
        (("--prefetch", "predictor"), 1, "--predictor"),
        (("--prefetch", "popularity"), 1, "--popularity"),
        (("--prefetch", "psychic"), 2, "popularity"),
        (("--miss", "hope"), 2, "split"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(more, code, words, melinoe, place):
    """Slots, policies, links and prefetches that cannot be."""
    found, out, err = bench(melinoe, place, *more)
    assert (found, out) == (code, "")
    assert words in err


def test_a_link_s_transfers_are_predicted_by_hand():
    """Passes of 1 ms, loads of 2 ms: the prompt loads in both layers, 5 ms; the token in one, 3."""
    from melinoe.cache.simulator import simulate
    from melinoe.cache.timing import Work
    from melinoe.cache.trace import TraceBuilder

    builder = TraceBuilder(2, 4, 1)
    builder.add_forward(np.array([[[0], [0]]]), 0, 0)
    builder.add_forward(np.array([[[0], [1]]]), 0, 1)
    done = simulate(builder.trace(), 2, "lru", steps=True, engine="residency")

    class Link:
        bandwidth_bytes_per_s, latency_s = 1e6, 1e-3

    class Handle:
        link = Link()
        layers = (None, None)
        misses = Misses()

        class store:
            kind = "disk"
            num_layers = 2

            @staticmethod
            def block_bytes(layer):
                return 1000

    resident = {
        "decode_s": [0.001], "stall_ms": [0.0], "tokens": [1], "ttft_s": [0.001],
        "predictor_s": [0.0], "prompt_stall_ms": [0.0], "prompt_tokens": [1],
    }  # fmt: skip
    machine = machine_of(Handle, 1e-5, resident)
    before, after = seconds_of(done, machine, Work(expert_bytes=1000))
    assert before[0] == pytest.approx(0.001 + 2 * 0.002)
    assert after[0] == pytest.approx(0.001 + 0.002)
