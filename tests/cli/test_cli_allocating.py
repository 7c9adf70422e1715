"""`--allocate-from`: slots given to layers by a trace, where a model really runs."""

import json

import pytest
from data_rows import write
from small_olmoe import write_checkpoint

from melinoe.cache.curves import allocate, miss_curves
from melinoe.cache.trace import Trace
from melinoe.checkpoint import describe


@pytest.fixture
def traced(tmp_path, melinoe):
    """A tiny checkpoint, and a trace of it."""
    path, prompts, trace = tmp_path / "olmoe", tmp_path / "p.jsonl", tmp_path / "t.safetensors"
    write_checkpoint(path)
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": "w5"} for i in range(2, 12)]
    write(prompts, *rows)
    code, _, err = melinoe("trace", path, "--data", prompts, "--out", trace, "--max-new-tokens", 8)
    assert code == 0, err
    return path, trace


def generated(melinoe, path, *more):
    given = ("--max-new-tokens", 8, "--policy", "lfu", "--json", *more)
    code, out, err = melinoe("generate", path, "w2 w3 w4", *given)
    assert code == 0, err
    return json.loads(out)


def test_slots_go_where_the_trace_says_and_the_text_stays(traced, melinoe):
    """The best split of as many slots; the same number in each layer is no better."""
    path, trace = traced
    about, recorded = describe(str(path)), Trace.load(trace)
    layers, slots = about.moe_layers, recorded.top_k + 1
    budget = slots * layers
    cost = miss_curves(recorded, "lfu")[1]
    best = allocate(cost, budget, at_least=recorded.top_k)
    plain = generated(melinoe, path, "--slots", slots)
    one = generated(melinoe, path, "--slots", slots, "--allocate-from", trace)
    assert one["ids"] == plain["ids"]
    assert tuple(one.get("slots_by_layer", [one["slots"]] * layers)) == best
    assert one["expert_memory_bytes"] == sum(best) * about.bytes_per_expert
    even = sum(int(cost[layer][slots - 1]) for layer in range(layers))
    assert sum(int(cost[layer][count - 1]) for layer, count in enumerate(best)) <= even


def test_what_does_not_go_together_is_refused(traced, melinoe, tmp_path):
    """A budget below the top-k of each layer; another model's trace, of this shape or not."""
    path, trace = traced
    other = tmp_path / "other"
    write_checkpoint(other, 5)
    small = ("generate", path, "w2", "--slots", 1, "--allocate-from", trace)
    wrong = ("generate", other, "w2", "--slots", 3, "--allocate-from", trace)
    shape = ("generate", "tiny", "w2", "--slots", 3, "--allocate-from", trace)
    for command, said in (
        (small, "give at least"),
        (wrong, "trace this model"),
        (shape, "the trace is of another model"),
    ):
        code, _, err = melinoe(*command, "--max-new-tokens", 2)
        assert code == 1 and said in err
    for amount in (("--expert-memory", "1MiB"), ("--gpu-memory", "1GiB"), ()):
        code, _, err = melinoe("generate", path, "w2", *amount, "--allocate-from", trace)
        assert code == 2 and "say how many slots to share out" in " ".join(err.split())
