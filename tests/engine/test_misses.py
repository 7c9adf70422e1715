"""A miss may be computed where the expert is: same bits, no transfer, counted as simulated."""

import json
from contextlib import nullcontext

import pytest
import tiny
import torch
from test_attach import BATCH, GREEDY, MASK, PROMPT, WAYS, block_floats, generate

import melinoe
from melinoe import attach
from melinoe.cache.prefetch import Listed
from melinoe.cache.simulator import simulate
from melinoe.cache.timing import Machine, Work
from melinoe.engine.misses import HostExperts, Misses, measure_misses
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import AttachError
from melinoe.moe.experts import find_experts
from melinoe.stores.ram_store import RamStore
from melinoe.stores.weights import give_weights_back

# A load takes 3 s, the host 2 s an expert and .1 s each further row: of three missing it gets two,
# and of a prompt's much used ones hardly any.
EVEN = Misses(
    "split",
    Machine(link_bytes_per_s=1.0, dram_bytes_per_s=1.5, host_row_s=0.1),
    Work(expert_bytes=3.0),
)
MISSES = {"cpu": Misses("cpu", EVEN.machine, EVEN.work), "split": EVEN}


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("miss", MISSES)
def test_tokens_and_logits_equal_all_resident(model, bf16_model, slots, dtype, miss):
    """Where an expert is computed changes no bit: tokens, logits of many rows, and of one."""
    model = model if dtype == "float32" else bf16_model
    tokens = generate(model, "greedy")
    with torch.no_grad():
        logits, one = model(tokens).logits, model(PROMPT[:, :1]).logits
    with attach(model, slots=slots, miss=MISSES[miss]) as handle, torch.no_grad():
        handle.prefetch([[0, 3, 5]] * 2)
        assert torch.equal(generate(model, "greedy"), tokens)
        assert torch.equal(model(tokens).logits, logits)
        assert torch.equal(model(PROMPT[:, :1]).logits, one)
        counted = handle.counters
    if slots < 8 or miss == "cpu":
        assert counted.on_host.sum() > 0
    assert counted.loads.sum() == 0 if miss == "cpu" else counted.loads.sum() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batched_products_agree_up_to_rounding(model, bf16_model, dtype):
    """`batched_mm` takes another kernel for other numbers of pairs: the tokens, near logits."""
    model = model if dtype == "float32" else bf16_model
    before = model.config._experts_implementation
    model.set_experts_implementation("batched_mm")
    try:
        tokens = generate(model, "greedy")
        with torch.no_grad():
            logits = model(tokens).logits
        with attach(model, slots=2, miss=MISSES["cpu"]), torch.no_grad():
            assert torch.equal(generate(model, "greedy"), tokens)
            within = {"atol": 1e-6, "rtol": 1e-5} if dtype == "float32" else {}
            torch.testing.assert_close(model(tokens).logits, logits, **within)
    finally:
        model.set_experts_implementation(before)


def test_an_expert_that_answers_for_its_neighbour_shows(model, monkeypatch):
    """The control: with the host taking the next block, the logits are others."""
    with torch.no_grad():
        expected = model(PROMPT).logits
    views = RamStore.views
    monkeypatch.setattr(RamStore, "views", lambda s, n, e: views(s, n, (e + 1) % 8))
    with attach(model, slots=2, miss=MISSES["cpu"]), torch.no_grad():
        assert (model(PROMPT).logits - expected).abs().max() > 1e-3
    monkeypatch.undo()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("miss", MISSES)
def test_simulated_counts_equal_measured_counts(model, way, policy, miss):
    """Told the same rule, the simulator loads and leaves the same experts, prefetches included."""
    expected = generate(model, way)
    wanted = [[3, 1], [2, 7]]
    alone = len(WAYS[way]["inputs"]) == 1  # a prefetch is one sequence's
    with attach(model, slots=3, policy=policy, miss=MISSES[miss]) as handle:
        ahead = handle.prefetching(Listed({None: wanted})) if alone else nullcontext()
        with handle.record() as recorder, ahead:
            assert torch.equal(generate(model, way), expected)
        counted, rule = handle.counters, handle.misses.rule
    listed = Listed({0: wanted} if alone else {})
    simulated = simulate(recorder.trace(), 3, policy, load=rule, prefetch=listed)
    assert simulated.counters == counted
    assert counted.on_host.sum() > 0 and counted.requests.sum() > 0


def test_measured_costs_decide_alike_in_runtime_and_simulator(model):
    """Figures measured at attach, whatever they are, are kept and give the simulator's counts."""
    with attach(model, slots=2, miss="split", link=EmulatedLink(2e8, 1e-5)) as handle:
        with handle.record() as recorder:
            generate(model, "batch with padding")
        counted, misses = handle.counters, handle.misses
    assert simulate(recorder.trace(), 2, load=misses.rule).counters == counted
    figures = json.loads(json.dumps(misses.to_dict()))
    assert figures["machine"]["link_bytes_per_s"] == 2e8
    assert figures["work"]["expert_bytes"] == 4 * block_floats(model)
    assert figures["work"]["activation_bytes"] == 4 * model.config.hidden_size
    again = Misses(figures["kind"], Machine(**figures["machine"]), Work(**figures["work"]))
    assert simulate(recorder.trace(), 2, load=again.rule).counters == counted
    with attach(model, slots=2, miss=misses) as handle:  # by another runtime's figures
        generate(model, "batch with padding")
        assert handle.counters == counted


def test_over_a_slow_link_activations_go_and_weights_stay(model, clock):
    """
    At 100 kB/s an expert of 6 kB would take 60 ms: 2 layers x 2 misses x 8 passes are 2 s of link.

    Only activations travel: a token's row goes over and one comes back for each expert it chose.
    """
    link = EmulatedLink(1e5, 1e-3)
    assert 4 * block_floats(model) / 1e5 > 0.05
    with attach(model, slots=2, miss=MISSES["cpu"], link=link) as handle:
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).past_key_values
            handle.reset_counters()
            model(PROMPT[:, :1], past_key_values=cache)
        row = 4 * model.config.hidden_size
        assert handle.transferred_bytes == 0 == handle.counters.loads.sum()
        assert handle.engine.transfer.activation_bytes == 2 * (1 + 2) * row
        least = 2 * (2 * 1e-3 + 3 * row / 1e5)  # per layer: two ways, three rows
        assert handle.host_s == pytest.approx(least, rel=0.01)
        assert handle.stall_s == 0
        handle.reset_counters()
        assert handle.host_s == 0 == handle.engine.transfer.activation_bytes


def test_the_host_computes_while_experts_travel(model, monkeypatch, clock):
    """One load of 60 ms and one expert of 50 ms in each layer take about 60 ms, not 110."""
    compute = HostExperts.compute

    def slow(self, *arguments):
        clock.sleep(0.05)
        return compute(self, *arguments)

    monkeypatch.setattr(HostExperts, "compute", slow)
    link = EmulatedLink(4 * block_floats(model) / 0.06)
    even = Misses(
        "split", Machine(link_bytes_per_s=1.0, dram_bytes_per_s=1.0), Work(expert_bytes=1)
    )
    with attach(model, slots=2, miss=even, link=link) as handle, torch.no_grad():
        model(PROMPT[:, :1])
        assert (handle.counters.loads.sum(), handle.counters.on_host.sum()) == (2, 2)
        assert handle.host_s >= 0.1
        # Of 120 ms on the link a pass waits for what the host's time does not hide.
        assert handle.stall_s == pytest.approx(0.12 - handle.host_s, rel=0.02)


def test_a_store_on_disk_reads_into_a_buffer_and_not_into_a_slot(model, tmp_path):
    """The same tokens; nothing transferred, nobody evicted, one buffer of an expert's size."""
    model.save_pretrained(tmp_path)
    expected = generate(model, "greedy")
    loaded, handle = melinoe.load(tmp_path, slots=2, store="disk", miss="cpu", dtype="float32")
    assert torch.equal(generate(loaded, "greedy"), expected)
    assert handle.transferred_bytes == 0 == handle.counters.loads.sum()
    assert handle.counters.on_host.sum() > 0
    host = handle._caches[0].host
    assert sum(t.nbytes for t in host._buffer.values()) == handle.store.block_bytes(0)
    handle.detach()


def test_choices_of_no_expert_give_nothing(model):
    """A token's id beyond the experts is skipped; the other choice is computed on the host."""
    layer = find_experts(model)[0]
    hidden = torch.randn(3, model.config.hidden_size)
    index, weights = torch.tensor([[1, 8], [8, 8], [2, 3]]), torch.rand(3, 2)
    with attach(model, slots=2) as handle, torch.no_grad():
        expected = handle._caches[0](hidden, index, weights)
    with attach(model, slots=2, miss=MISSES["cpu"]) as handle, torch.no_grad():
        assert torch.equal(handle._caches[0](hidden, index, weights), expected)
        handle._caches[0](hidden, torch.full((3, 2), 8), weights)
        assert handle.counters.on_host.sum() == 3
    assert not expected[1].any() and layer.num_experts == 8


def test_costs_are_measured_where_something_rests_on_them(model):
    """An expert takes some time on the host, and to come; to wait rests on nothing."""
    layers = find_experts(model)
    store = RamStore.from_modules(layers)
    try:
        measured = measure_misses("cpu", layers, store, torch.device("cpu"), None)
        assert measured.machine.dram_bytes_per_s > 0 and measured.machine.copy_s > 0
        assert measure_misses("wait", layers, store, torch.device("cpu"), None) == Misses()
    finally:
        for layer in layers:
            give_weights_back(layer, store)


def test_what_cannot_be_is_refused_before_anything_moves(model):
    """An unknown way, and the engine that always waits."""
    with pytest.raises(AttachError, match="wait, cpu, split"):
        attach(model, slots=2, miss="hope")
    with pytest.raises(AttachError, match='engine="reference"'):
        melinoe.attach(model, engine="fast", slots=2, miss="cpu")
    assert model.config._experts_implementation != "melinoe"


def test_a_failure_on_the_host_leaves_no_half_made_cache(model, monkeypatch):
    """What was planned may not have come: the cache is emptied, and the next pass is right."""
    with torch.no_grad():
        expected = model(BATCH, attention_mask=MASK).logits
    with attach(model, slots=3, miss=EVEN) as handle, torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(HostExperts, "compute", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(BATCH, attention_mask=MASK)
        assert handle.resident()[0] == []
        assert torch.equal(model(BATCH, attention_mask=MASK).logits, expected)
    assert GREEDY["do_sample"] is False and tiny.TOP_K == 2


def test_layers_of_one_shape_read_into_one_buffer(tmp_path):
    """From disk an expert is read before the host computes it, one at a time."""
    tiny.tiny_model("olmoe").save_pretrained(tmp_path)
    _, handle = melinoe.load(tmp_path, "cpu", slots=2, store="disk", miss=MISSES["cpu"])
    assert len({id(cache.host._buffer) for cache in handle._caches}) == 1
