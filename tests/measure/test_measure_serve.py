"""Records: their numbers worked by hand, and equal to the simulator's on the recorded trace."""

import json

import numpy as np
import pytest
import torch
from small_olmoe import EXPERTS, LAYERS, PROMPT_TEXT, always, tiny_model, words_tokenizer
from two_sequences import small_trace

from melinoe import attach
from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.prefetch import Listed, Predicted
from melinoe.cache.simulator import simulate
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import DataError
from melinoe.evaluate import Perplexity, quality_record
from melinoe.generate import Generation, trace_prompts
from melinoe.measure import (
    curve_record,
    locality_record,
    machine,
    serve,
    serve_record,
    side_by_side,
    write_json,
)
from melinoe.predictor import Comparison
from melinoe.report.records import check
from melinoe.stats import bootstrap

PROMPTS = [PROMPT_TEXT, "w7 w8 w9", "w20 w2", "w30 w11 w12 w13 w14"]


def generation(decoded, seconds=2.0, ttft_s=0.5):
    """
    One layer, top-2: a prompt of 3 tokens with 4 loads after a prefetch of 2, then decoding.

    *decoded* lists, for each forward pass of the completion, how many of its 2 uses missed.
    """
    counters = Counters(1)
    counters.add_prefetch(0, 2)
    counters.begin_forward(PROMPT, 3)
    counters.add_request(0, uses=6, hits=2, loads=4)
    counters.end_forward()
    for misses in decoded:
        counters.begin_forward(COMPLETION, 1)
        counters.add_request(0, uses=2, hits=2 - misses, loads=misses)
        counters.end_forward()
    ids = list(range(len(decoded) + 1))
    return Generation("", ids, [1, 2, 3], counters, ttft_s, seconds, 0.02)


def test_the_metrics_of_a_record_are_worked_by_hand():
    """Two prompts: passes that miss 0, 1, 2 and 0 of 2 uses; then a single pass that misses 1."""
    runs = [generation([0, 1, 2, 0]), generation([1], seconds=1.0, ttft_s=0.75)]
    record = serve_record(runs, kind="serve", model="m")
    means = {
        name: record[name]["mean"]
        for name in record
        if isinstance(record[name], dict) and "mean" in record[name]
    }
    assert means == pytest.approx(
        {
            "hit_rate": (5 + 1) / (8 + 2),
            "adjusted_hit_rate": 1 - (3 + 1 + 2 + 2) / (8 + 2),
            "zero_miss_tokens": 2 / 5,
            "transfers_per_token": (3 + 1) / 5,
            "prefetch_transfers_per_token": (2 + 2) / 5,
            "computed_there_per_token": 0,
            "prefill_transfers": 4,
            "tokens_per_s": (5 + 2) / (2.0 + 1.0),
            "tpot_s": (1.5 + 0.25) / 5,
            "ttft_s": (0.5 + 0.75) / 2,
            "stall_ms_per_token": (20 + 20) / 5,
        }
    )
    assert record["per_prompt"]["loads"] == [3, 1]
    assert record["per_prompt"]["new_tokens"] == [5, 2]
    assert record["hit_rate"]["n"] == 2
    assert (record["kind"], record["model"]) == ("serve", "m")


def test_prompts_that_end_at_once_have_no_rates():
    """No second token in any prompt: nothing was decoded."""
    with pytest.raises(DataError, match="second token"):
        serve_record([generation([])])


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("wanted", [None, [6, 1, 4]])
def test_a_served_record_counts_what_the_simulator_counts(policy, cold, wanted):
    """Every count of every prompt equals the simulation of a trace recorded apart."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=EXPERTS) as handle:
        trace = trace_prompts(model, handle, tokenizer, PROMPTS, 6)
    ahead = Predicted(always(model, wanted)) if wanted else None
    with attach(model, slots=3, policy=policy) as handle:
        record = serve(
            model, handle, tokenizer, PROMPTS, 6, prefetch=ahead, label="tiny", cold=cold
        )
    simulated = simulate(
        trace,
        3,
        policy,
        reset_between_sequences=cold,
        prefetch=Listed(dict.fromkeys(range(len(PROMPTS)), [wanted] * LAYERS)) if wanted else None,
    ).per_sequence
    found = record["per_prompt"]
    assert found["uses"] == [int(one.uses[COMPLETION].sum()) for one in simulated]
    assert found["hits"] == [int(one.hits[COMPLETION].sum()) for one in simulated]
    assert found["loads"] == [int(one.loads[COMPLETION].sum()) for one in simulated]
    assert found["prefill_loads"] == [int(one.loads[PROMPT].sum()) for one in simulated]
    assert found["prefetch_loads"] == [int(one.prefetch_loads.sum()) for one in simulated]
    assert found["zero_miss"] == [int(one.zero_miss_tokens[COMPLETION]) for one in simulated]
    assert sum(found["loads"]) > 0


def test_a_record_states_its_configuration_and_survives_json(tmp_path):
    """Slots, sizes, policy, store, link, prompts and the start of each are in the file."""
    model, tokenizer = tiny_model(), words_tokenizer()
    link = EmulatedLink(2e9, 5e-6)
    with attach(model, slots=3, link=link) as handle:
        record = serve(
            model,
            handle,
            tokenizer,
            PROMPTS,
            4,
            label="tiny",
        )
    write_json(tmp_path / "record.json", record)
    again = json.loads((tmp_path / "record.json").read_text())
    assert again == json.loads(json.dumps(record))
    wanted = {
        "kind": "serve",
        "model": "tiny",
        "strategy": "lfu",
        "prefetch": "none",
        "slots": 3,
        "num_experts": EXPERTS,
        "top_k": 2,
        "layers": LAYERS,
        "policy": "lfu",
        "store": "ram",
        "link": {"bandwidth_gb_s": 2.0, "latency_us": 5.0, "emulated": True},
        "cold": True,
        "prompts": 4,
        "max_new_tokens": 4,
    }
    assert {name: again[name] for name in wanted} == wanted
    assert again["machine"]["versions"]["torch"] == torch.__version__


def test_with_every_expert_resident_nothing_is_waited_for():
    """Eight slots, warm, all experts loaded for the first completion: hit rate 1, no transfer."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=EXPERTS) as handle:
        record = serve(
            model,
            handle,
            tokenizer,
            PROMPTS,
            4,
            prefetch=Predicted(always(model, list(range(EXPERTS)))),
            label="tiny",
            cold=False,
        )
    assert record["hit_rate"]["mean"] == record["zero_miss_tokens"]["mean"] == 1
    assert record["transfers_per_token"]["mean"] == 0
    before, ahead = (record["per_prompt"][name] for name in ("prefill_loads", "prefetch_loads"))
    assert before[0] + ahead[0] == LAYERS * EXPERTS
    assert before[1:] == ahead[1:] == [0, 0, 0]


def test_one_token_decodes_nothing_to_measure():
    """That is the caller's mistake."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle, pytest.raises(ValueError):
        serve(model, handle, tokenizer, PROMPTS, label="tiny", max_new_tokens=1)


def test_no_prompts_are_refused():
    """There is nothing to take a mean over."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle, pytest.raises(DataError, match="no prompts"):
        serve(model, handle, tokenizer, [], label="tiny")


def test_the_report_accepts_every_kind_of_record():
    """What is measured here is what is checked there, field by field."""
    perplexity = Perplexity(np.asarray([2.0, 1.0]), np.asarray([2.0, 1.0]))
    half = bootstrap([0.5, 0.5])
    recall = {name: half for name in ("empty", "popularity", "prefill", "learned")}
    comparison = Comparison(4, recall, ceiling=half, gain=bootstrap([0.0, 0.0]))
    records = [
        serve_record(
            [generation([0, 1])], kind="serve", model="m", strategy="lru", slots=3, num_experts=8
        ),
        quality_record(perplexity, "m", "gsm8k", True),
        locality_record(small_trace(), "m"),
        curve_record(small_trace(), "m", "belady", [1, 2]),
        comparison.to_record("m"),
    ]
    for record in records:
        assert check(json.loads(json.dumps(record)), "here") == record["kind"]


def test_the_machine_is_described_without_naming_it():
    """What matters to a number is there; host and user names are not."""
    import getpass
    import platform

    facts = machine()
    assert facts["cores"] >= 1 and facts["threads"] == 1 and facts["memory_gib"] > 0
    assert facts["cpu"] and facts["versions"]["melinoe"] and facts["date"].endswith("+00:00")
    text = json.dumps({**facts, "commit": None})
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_servings_side_by_side_take_turns():
    """Each round runs one prompt of every serving, and begins with another serving."""
    ran = []

    def serving(name):
        for prompt in range(3):
            ran.append((name, prompt))
            yield
        return {"name": name}

    records = side_by_side([serving("a"), serving("b")])
    assert records == [{"name": "a"}, {"name": "b"}]
    assert [prompt for _, prompt in ran] == [0, 0, 1, 1, 2, 2]
    assert [name for name, _ in ran] == ["b", "a", "a", "b", "b", "a"]
