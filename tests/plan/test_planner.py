"""Slots, hit rates, seconds and bottlenecks, each worked by hand on a small model."""

from dataclasses import replace

import numpy as np
import pytest
from trace_builder import TraceBuilder

from melinoe.cache.simulator import simulate
from melinoe.errors import BudgetError, HardwareError, TraceError
from melinoe.plan.facts import Layer, ModelFacts, model_facts
from melinoe.plan.planner import (
    after_fine_tuning,
    by_chance,
    distinct_experts,
    host_time,
    plan,
)

MIB = 2**20
# Ten layers of 16 experts of 1 MiB, top-4; 20 MiB of backbone, of which 15 are read; 5 MiB of keys.
FACTS = ModelFacts(
    name="by hand",
    source="a test",
    model_type="olmoe",
    dtype="bfloat16",
    decoder_layers=12,
    layers=(Layer(16, MIB, 4),) * 10,
    backbone_bytes=20 * MIB,
    read_bytes=15 * MIB,
    kv_bytes=5 * MIB,
    kv_source="a test",
    context=100,
    max_context=200,
)
MACHINE = {
    "link": "1GiB/s",
    "device_bandwidth": "100GiB/s",
    "disk": "0.5GiB/s",
    "reserve": "5MiB",
}


def by_hand(**changes):
    """A plan of the model above with 8 slots: 20 + 5 + 5 + 10 x 8 MiB."""
    return plan(FACTS, **({"gpu_memory": "110MiB"} | MACHINE | changes))


def trace_of(seed=0, layers=10, experts=16, top_k=4, tokens=40):
    """Two sequences of skewed choices, one prompt pass each."""
    rng = np.random.default_rng(seed)
    builder = TraceBuilder(layers, experts, top_k)
    for sequence in range(2):
        taste = rng.normal(0, 2, (layers, experts))
        for kind, count in ((0, 3), (1, 1)):
            for _ in range(1 if kind == 0 else tokens):
                noise = rng.gumbel(size=(count, layers, experts))
                rows = np.argsort(-(taste + noise), axis=-1)[..., :top_k]
                builder.add_forward(rows, sequence, kind)
    return builder.trace()


@pytest.mark.parametrize(("memory", "slots"), [(40, 1), (49, 1), (50, 2), (110, 8), (189, 15)])
def test_slots_are_what_is_left_over_one_slot_of_every_layer(memory, slots):
    """(memory - 20 backbone - 5 keys and values - 5 kept free) / 10 MiB, rounded down."""
    assert by_hand(gpu_memory=f"{memory}MiB").slots == slots
    assert by_hand(gpu_memory=f"{memory}MiB").slot_bytes == slots * 10 * MIB


def test_a_memory_too_small_is_refused_with_the_least_that_works():
    """39 MiB lack one; the sentence names 40 MiB, and with that it works."""
    with pytest.raises(BudgetError, match="give 40MiB") as caught:
        by_hand(gpu_memory="39MiB")
    assert "\n" not in str(caught.value)


def test_a_batch_keeps_keys_and_values_for_each_sequence():
    """Seven sequences more take 35 MiB more, so 3 slots of 10 MiB fewer and a half."""
    assert by_hand(batch=8).slots == 4


def test_chance_hits_slots_of_experts():
    """8 of 16; where layers differ, weighted by uses: (4 x 8/16 + 2 x 1) / 6."""
    assert by_hand().before.low == by_hand().before.high == 0.5
    mixed = by_chance((Layer(16, MIB, 4), Layer(8, MIB, 2)), 8)
    assert mixed.low == pytest.approx((4 * 0.5 + 2 * 1.0) / 6)


def test_fine_tuning_divides_misses_by_the_paper_s_falls():
    """727/240 is the largest of the four, 100/52 the smallest; .5 misses become .26 and .165."""
    after = after_fine_tuning(by_chance(FACTS.layers, 8))
    assert after.low == pytest.approx(1 - 0.5 * 52 / 100)
    assert after.high == pytest.approx(1 - 0.5 * 240 / 727)
    assert (
        "assumed" in after.source
        and "not measured" in after.source
        and "2602.11192" in after.source
    )


def test_seconds_of_each_tier_by_hand():
    """40 experts of 1 MiB a token: half missed is 20 MiB over 1 GiB/s; 15 + 5 + 40 MiB over 100."""
    tiers = by_hand().speed_before.tiers_high
    assert tiers.link == pytest.approx(20 / 1024)
    assert tiers.device == pytest.approx(60 / 102400)
    assert tiers.disk == 0
    # 12 decoder layers, and 20 loads: 1/15.15 - 1/37.84 s are those of 727 x 16 / 64 / 2.
    load = (1 / 15.15 - 1 / 37.84) / (727 * 16 / 64 / 2)
    assert tiers.host == pytest.approx(12 / (37.84 * 16) + 20 * load)


def test_both_ends_of_the_speed_by_hand():
    """Fast: the slowest tier alone. Slow: link, memory and host one after the other."""
    found = by_hand().speed_before
    assert found.high == pytest.approx(1024 / 20)
    layer, load = host_time()
    host = 12 * layer + 20 * load
    assert found.low == pytest.approx(1 / (20 / 1024 + 60 / 102400 + host))
    assert (found.bottleneck, found.slow_bottleneck) == ("link", "host")


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({}, "link"),
        ({"device_bandwidth": "2GiB/s"}, "device memory"),
        ({"link": "200GiB/s"}, "device memory"),
        ({"ram": "50MiB"}, "disk"),
    ],
)
def test_the_bottleneck_is_the_tier_that_takes_longest(changes, bottleneck):
    """A slow link, a slow memory, a fast link; host memory too small for the experts."""
    assert by_hand(**changes).speed_before.bottleneck == bottleneck


def test_experts_that_host_memory_does_not_hold_come_from_disk():
    """160 MiB of experts in 80 % of 100: all misses from disk at worst, half of them at best."""
    found = by_hand(ram="100MiB")
    assert found.fits_in_ram is False
    assert found.speed_before.tiers_low.disk == pytest.approx(20 / 512)
    assert found.speed_before.tiers_high.disk == pytest.approx(10 / 512)
    assert by_hand(ram="200MiB").fits_in_ram is True
    assert by_hand().fits_in_ram is None


def test_latency_counts_each_load():
    """20 of 40 experts are loaded, each 1 ms later: 20 ms more on the link."""
    late, early = by_hand(latency_s=1e-3), by_hand()
    more = late.speed_before.tiers_high.link - early.speed_before.tiers_high.link
    assert more == pytest.approx(0.020)


def test_fewer_bits_lighten_store_link_and_slots():
    """4.5 of 16 bits: 35 MiB hold 12 slots of 10 layers where 3 of 16 bits fit; bytes by hand."""
    four, full = (by_hand(bits=bits, gpu_memory="65MiB") for bits in (4, None))
    assert (four.slots, full.slots) == (12, 3)
    assert four.stored_bytes == full.stored_bytes * 4.5 / 16
    asked = 10 * 4 * MIB * 4.5 / 16  # of a token
    tiers = four.speed_before.tiers_low
    assert tiers.link == pytest.approx(asked * (1 - 12 / 16) / 2**30)
    assert tiers.device == pytest.approx((20 * MIB + asked) / (100 * 2**30))
    wide = plan(replace(FACTS, dtype="float32"), gpu_memory="110MiB", bits=4, **MACHINE)
    assert wide.stored_bytes == full.stored_bytes * 4.5 / 32
    wide = plan(replace(FACTS, dtype="float32"), gpu_memory="110MiB", bits=16, **MACHINE)
    assert wide.stored_bytes == full.stored_bytes / 2


def test_a_batch_asks_for_distinct_experts():
    """E (1 - (1 - K/E)^b): 4 for one token of 4 of 16, 7 for two, all for very many."""
    assert distinct_experts(Layer(16, 1, 4), 1) == 4
    assert distinct_experts(Layer(16, 1, 4), 2) == pytest.approx(7)
    assert distinct_experts(Layer(16, 1, 4), 1000) == pytest.approx(16)


def test_with_every_expert_resident_nothing_is_loaded():
    """190 MiB hold all: hit rate 1, no link, and fine-tuning changes nothing."""
    found = by_hand(gpu_memory="190MiB", trace=trace_of())
    assert found.all_resident and found.before == found.after and found.before.low == 1
    assert found.speed_before.tiers_low.link == 0
    assert found.speed_before.bottleneck == "device memory"
    assert any("Every expert fits" in note for note in found.notes)


def test_a_trace_s_hit_rates_are_the_simulator_s():
    """LRU and LFU at the slots that fit make the range, Belady bounds it."""
    trace = trace_of()
    found = by_hand(trace=trace).before
    rates = {
        policy: simulate(trace, 8, policy, reset_between_sequences=True).counters.hit_rate(
            "completion"
        )
        for policy in ("lru", "lfu", "belady")
    }
    assert found.by_policy == rates
    assert (found.low, found.high) == (
        min(rates["lru"], rates["lfu"]),
        max(rates["lru"], rates["lfu"]),
    )
    assert found.high <= rates["belady"]
    assert "weights were not compared" in found.source


def test_a_trace_of_the_fine_tuned_model_replaces_the_assumption():
    """Its own hit rates stand after fine-tuning, and say that they are simulated."""
    found = by_hand(trace=trace_of(0), tuned_trace=trace_of(1))
    assert found.after.by_policy and found.after.by_policy != found.before.by_policy
    assert not by_hand(trace=trace_of(0)).after.by_policy


@pytest.mark.parametrize("shape", [{"layers": 9}, {"experts": 17}, {"top_k": 3}])
def test_a_trace_of_another_model_is_refused(shape):
    """Other layers, experts or choices: one sentence with both shapes."""
    with pytest.raises(TraceError, match=r"another model.*10 layers of 16, top-4"):
        by_hand(trace=trace_of(**shape))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"gpu_memory": None}, BudgetError, "--gpu-memory or --card"),
        ({"gpu_memory": "-8GiB"}, BudgetError, "8GiB"),
        ({"gpu_memory": "0GiB"}, BudgetError, "no memory"),
        ({"gpu_memory": "8000TiB"}, HardwareError, "check the unit"),
        ({"gpu_memory": "48GiB", "card": "rtx4090"}, HardwareError, "rtx4090 has 24GiB"),
        ({"ram": "99999TB"}, HardwareError, "check the unit"),
        ({"context": 0}, BudgetError, "1 or more"),
        ({"batch": -1}, BudgetError, "1 or more"),
        ({"bits": 5}, BudgetError, "16, 8 or 4"),
        ({"card": "voodoo2"}, HardwareError, "h100"),
    ],
)  # fmt: skip
def test_an_impossible_machine_is_refused(changes, error, words):
    """Nothing, less than nothing, more than the card has, more than anybody has."""
    with pytest.raises(error, match=words):
        by_hand(**changes)


def test_what_is_not_known_is_said():
    """Unknown keys and values are counted as nothing, with a note; so is a context too long."""
    unknown = replace(FACTS, kv_bytes=None, kv_source="not known: a test", context=300)
    found = plan(unknown, gpu_memory="110MiB", **MACHINE)
    assert any("not known: a test" in note for note in found.notes)
    assert any("made for 200 tokens, not for 300" in note for note in found.notes)
    assert found.slots == 8  # 85 MiB left


def test_every_assumption_stands_with_its_source():
    """Each figure that nobody gave is named with where it comes from."""
    text = " ".join(plan(FACTS, gpu_memory="110MiB").assumed)
    for words in ("no card named", "rtx", "measured", "arXiv:2602.11192", "not given"):
        assert words in text


def test_the_paper_s_machine_is_within_the_planned_range(published):
    """OLMoE, 16 of 64 experts, 4 bits on an H100: 15.15 tokens/s, 23.35 fine-tuned on Dolly."""
    facts = model_facts(str(published["OLMoE-1B-7B"]), context=64)
    found = plan(facts, gpu_memory="2.75GiB", card="h100", bits=4, reserve="1GiB")
    assert found.slots == 16
    assert found.speed_before.low < 15.15 < found.speed_before.high
    assert found.speed_after.low < 23.35 < found.speed_after.high
