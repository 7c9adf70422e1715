"""The compiled replay decides what the Residency decides, count by count."""

import numpy as np
import pytest
from cache_traces import random_trace

from melinoe.cache.prefetch import Listed
from melinoe.cache.simulator import COMPILED_FROM, simulate
from melinoe.errors import CacheTooSmallError, MelinoeError

RULES = ["lru", "lfu", "static", "belady"]


def outcome(simulation):
    """Everything it says, in values that compare."""
    steps = simulation.steps
    return (
        simulation.counters.to_dict(),
        [counters.to_dict() for counters in simulation.per_sequence],
        simulation.sequences,
        {name: getattr(steps, name).tolist() for name in vars(steps)},
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(30))
def test_compiled_counts_equal_the_residency_s(rule, seed):
    """Random shapes, prompts, batches, padding, absent ids, few slots and resets."""
    rng = np.random.default_rng(seed)
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(4, 40))
    trace = random_trace(
        seed,
        sequences=4,
        layers=layers,
        num_experts=experts,
        top_k=int(rng.integers(1, 5)),
        prompt=int(rng.integers(1, 30)),
        completion=20,
        batch=int(rng.integers(1, 4)),
    )
    slots = rng.integers(1, experts + 1, layers)
    settings = {
        "reset_between_sequences": bool(rng.integers(2)),
        "policy_options": {"gamma": 0.3} if rule == "lfu" and seed % 2 else None,
        "steps": True,
    }
    ours = simulate(trace, slots, rule, engine="residency", **settings)
    compiled = simulate(trace, slots, rule, engine="compiled", **settings)
    assert (ours.engine, compiled.engine) == ("residency", "compiled")
    assert outcome(ours) == outcome(compiled)


def test_compiled_lfu_rescales_as_the_class_does():
    """Gamma .001 leaves the doubles' range every 51 requests; 2,000 requests agree."""
    trace = random_trace(1, sequences=1, layers=1, completion=2000)
    options = {"policy_options": {"gamma": 0.001}, "steps": True}
    ours = simulate(trace, 3, "lfu", engine="residency", **options)
    assert outcome(ours) == outcome(simulate(trace, 3, "lfu", engine="compiled", **options))


def test_many_units_add_up_in_compiled_code():
    """Seventy sequences, summed at once instead of one by one: the same whole."""
    trace = random_trace(2, sequences=70, prompt=2, completion=2)
    ours = simulate(trace, 3, engine="residency", steps=True)
    assert outcome(ours) == outcome(simulate(trace, 3, engine="compiled", steps=True))


def test_the_engine_is_chosen_by_rule_and_size():
    """Compiled from 50,000 row-layers on, where all that is missing is loaded; else not."""
    small = random_trace(0)
    rows = COMPILED_FROM // 2 + 1
    large = random_trace(0, sequences=1, layers=2, completion=rows)
    assert simulate(small, 3).engine == "residency"
    assert simulate(large, 3).engine == "compiled"
    assert simulate(large, 3, load=len).engine == "residency"
    nothing = Listed({0: [[], []]})
    assert simulate(large.select([0]), 3, prefetch=nothing).engine == "residency"
    for special in ({"load": len}, {"prefetch": nothing}):
        with pytest.raises(ValueError, match="loading all"):
            simulate(small, 3, engine="compiled", **special)
    with pytest.raises(ValueError, match="engine must be"):
        simulate(small, 3, engine="fast")


def test_compiled_code_refuses_what_the_classes_refuse():
    """No slot, too many, an impossible decay: the same errors."""
    trace = random_trace(0)
    with pytest.raises(CacheTooSmallError, match="at least 1"):
        simulate(trace, 0, engine="compiled")
    with pytest.raises(MelinoeError, match="at most 8"):
        simulate(trace, 9, engine="compiled")
    with pytest.raises(ValueError, match="gamma"):
        simulate(trace, 3, "lfu", policy_options={"gamma": 2}, engine="compiled")


def test_an_empty_trace_costs_nothing_in_compiled_code_too():
    """No rows: no units, no counts."""
    simulation = simulate(random_trace(0, sequences=0), 2, engine="compiled", steps=True)
    assert simulation.per_sequence == [] and not simulation.counters.tokens.any()
    assert simulation.steps.loads.shape == (0, 2)
