"""The limits table of the method page, from published hyperparameters; every figure by hand."""

import json
from functools import cache
from pathlib import Path

import pytest

from benchmarks.limits import HIT_RATES, record, row
from benchmarks.tables import update_readme
from melinoe.plan.facts import known_models, model_facts
from tests.plan.conftest import PUBLISHED

# layers, experts, top-k, hidden size d, expert width f
SHAPES = {
    "OLMoE-1B-7B": (16, 64, 8, 2048, 1024),
    "Qwen3-30B-A3B": (48, 128, 8, 2048, 768),
    "Phi-3.5-MoE": (32, 16, 2, 4096, 6400),
    "Mixtral-8x7B": (32, 8, 2, 4096, 14336),
}
# As the project's description of the method prints them: expert MB, all experts GB, M GB, link
# roofs at 50 GB/s for the hit rates, memory roof of an H100.
PRINTED = {
    "OLMoE-1B-7B": ("12.58", "12.88", "1.611", ("31", "62", "155", "310", "621"), "1306"),
    "Qwen3-30B-A3B": ("9.44", "57.98", "3.624", ("14", "28", "69", "138", "276"), "500"),
    "Phi-3.5-MoE": ("157.3", "80.5", "10.07", ("5", "10", "25", "50", "99"), "252"),
    "Mixtral-8x7B": ("352.3", "90.2", "22.55", ("2.2", "4.4", "11", "22", "44"), "130"),
}


@cache
def facts_of(model):
    """Counted once for all tests."""
    return model_facts(model, context=1)


def as_printed(value, text):
    """Whether *value* is *text* up to one unit of its last digit."""
    places = len(text.partition(".")[2])
    return abs(value - float(text)) < 10**-places


@pytest.mark.parametrize("label", PRINTED)
def test_the_table_of_limits_is_reproduced(label, published):
    """An H100 SXM's 3.35 TB/s and a link of 50 GB/s give every figure that the page prints."""
    found = row(facts_of(str(published[label])), 50e9, 3.35e12)
    expert, experts, moved, links, memory = PRINTED[label]
    assert as_printed(found["expert (MB)"], expert)
    assert as_printed(found["all experts (GB)"], experts)
    assert as_printed(found["M (GB)"], moved)
    for rate, text in zip(HIT_RATES, links, strict=True):
        assert as_printed(found[f"link roof at hit rate {rate:g} (tokens/s)"], text)
    assert as_printed(found["memory roof (tokens/s)"], memory)


@pytest.mark.parametrize("label", SHAPES)
def test_experts_weigh_what_their_shape_says(label, published):
    """Three projections of d x f at two bytes; M is top-k of them in each layer."""
    layers, experts, top_k, d, f = SHAPES[label]
    facts = facts_of(str(published[label]))
    assert facts.layers[0].block_bytes == 3 * d * f * 2
    assert facts.expert_bytes == layers * experts * 3 * d * f * 2
    assert facts.active_expert_bytes == layers * top_k * 3 * d * f * 2
    assert (len(facts.layers), facts.num_experts, facts.top_k) == (layers, experts, top_k)


def test_the_backbone_of_olmoe_is_counted_to_the_last_parameter(published):
    """Table, head, and per layer four projections, the router and four norms; plus a last norm."""
    d = 2048
    layer = 4 * d * d + 64 * d + 4 * d
    facts = facts_of(str(published["OLMoE-1B-7B"]))
    assert facts.backbone_bytes == 2 * (2 * 50304 * d + 16 * layer + d)
    assert facts.read_bytes == facts.backbone_bytes - 2 * 50304 * d  # of the table, one row


@pytest.mark.parametrize("label", PUBLISHED)
def test_the_configs_that_ship_are_the_published_ones(label, published):
    """Facts of the shipped hyperparameters equal those of the ones stated in the tests."""
    shipped, stated = facts_of(label), facts_of(str(published[label]))
    for name in ("layers", "backbone_bytes", "read_bytes", "kv_bytes", "dtype", "decoder_layers"):
        assert getattr(shipped, name) == getattr(stated, name)


def test_a_shipped_model_answers_to_its_name_on_the_hub():
    """Whatever its case, and without a network."""
    name = known_models()["OLMoE-1B-7B"]["name"]
    assert model_facts(name.upper(), context=1).layers == facts_of("OLMoE-1B-7B").layers


def test_the_method_page_s_table_is_what_is_computed_now():
    """The committed record equals the computed one, and the page's table is made of it."""
    root = Path(__file__).parents[2]
    kept = root / "benchmarks" / "results" / "limits.json"
    assert json.loads(kept.read_text()) == json.loads(json.dumps(record()))
    defaults = kept.with_name("defaults.json")  # the page's other table
    assert update_readme(root / "docs" / "method.md", [kept, defaults], check=True) == []
