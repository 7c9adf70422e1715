"""`melinoe bench`: what is simulated is what is then counted, strategy by strategy."""

import json

import pytest

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


def test_every_size_policy_and_prefetch_is_served_beside_all_experts(melinoe, place):
    """2 sizes x 2 policies x 2 prefetches and all resident; counts are as simulated, or exit 1."""
    code, out, err = bench(
        melinoe, place, "--slots", 2, "--slots", 4, "--policy", "lfu", "--policy", "lru",
        "--predictor", place / "predictor", "--prefetch", "none", "--prefetch", "predictor",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    records = json.loads(out)
    names = [(one["strategy"], one["slots"]) for one in records]
    assert names[0] == ("all resident", EXPERTS) and len(set(names)) == len(names) == 9
    for record in records:  # prompts x tokens after the first x layers x top-2
        assert sum(record["per_prompt"]["uses"]) == 2 * 4 * 2 * 2
    by_name = dict(zip(names, records, strict=True))
    assert sum(by_name["lfu + predictor", 4]["per_prompt"]["prefetch_loads"]) > 0
    assert sum(by_name["lfu", 4]["per_prompt"]["loads"]) > 0
    assert sum(records[0]["per_prompt"]["loads"]) <= 2 * EXPERTS


def test_computed_misses_are_counted_as_simulated(melinoe, place):
    """Split by measured costs: at 1 MB/s the CPU computes what it can meanwhile."""
    code, out, err = bench(
        melinoe, place, "--slots", 3, "--policy", "lru", "--miss", "split", "--link",
        "0.001GB/s", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert sum(json.loads(out)[1]["per_prompt"]["elsewhere"]) > 0


def test_the_device_engine_counts_as_simulated(melinoe, place):
    """It streams prompts, which the simulator is told; kernels interpreted."""
    code, out, err = bench(
        melinoe, place, "--slots", 4, "--policy", "lru", "--engine", "fast", "--json"
    )
    assert code == 0, err
    assert sum(json.loads(out)[1]["per_prompt"]["loads"]) > 0


def test_a_count_that_differs_is_an_error(melinoe, place, monkeypatch):
    """If the simulator were wrong by one load, the command would say where, and exit with 1."""
    from melinoe.cli import bench as module

    honest = module._simulated

    def wrong(*given):
        counts = honest(*given)
        counts["loads"][-1] += 1
        return counts

    monkeypatch.setattr(module, "_simulated", wrong)
    code, _, err = bench(melinoe, place, "--slots", 2, "--policy", "lru")
    assert code == 1 and "counts differ" in err and "lru at 2" in err


def test_the_records_make_a_report(melinoe, place, tmp_path):
    """The command prints a table, and the file holds what `report` reads."""
    out = tmp_path / "runs.jsonl"
    code, text, _ = bench(melinoe, place, "--slots", 2, "--policy", "lru", "--out", out)
    assert code == 0 and "all resident" in text and "tokens / s" in text
    assert "lru" in render_table([out], "text")


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--slots", "99"), 1, "1 to 8"),
        (("--policy", "belady"), 2, "lfu"),
        (("--link", "25TB/s"), 1, "check the unit"),
        (("--prefetch", "predictor"), 1, "--predictor"),
        (("--prefetch", "psychic"), 2, "popularity"),
        (("--miss", "hope"), 2, "split"),
        (("--engine", "warp"), 1, "reference"),
    ],
)
def test_bad_input_is_refused(more, code, words, melinoe, place):
    """Sizes, policies, links, prefetches and engines that cannot be."""
    found, out, err = bench(melinoe, place, *more)
    assert (found, out) == (code, "")
    assert words in err
