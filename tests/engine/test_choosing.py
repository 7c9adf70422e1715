"""Cache-aware choice on a running model: what it saves, what it leaves alone, how it leaves."""

import logging

import pytest
import torch
from small_olmoe import EXPERTS, TOP_K, tiny_model

from melinoe import attach
from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.simulator import simulate
from melinoe.errors import UnsupportedModelError
from melinoe.moe.choice import ChoiceSettings

PROMPT_IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
STRONG = ChoiceSettings("cache-prior", 0.5, keep=1)


def text(model, tokens=24):
    with torch.no_grad():
        output = model.generate(PROMPT_IDS, max_new_tokens=tokens, do_sample=False)
    return output[0].tolist()


def test_it_saves_transfers_and_exact_puts_everything_back():
    """Fewer loads while it lasts; afterwards the model's own text and counts again."""
    model = tiny_model()
    handle = attach(model, slots=3)

    def served():
        handle.reset_cache()
        handle.reset_counters()
        return text(model), int(handle.counters.loads[COMPLETION].sum())

    own, loads = served()
    handle.choose(STRONG)
    assert handle.choice == STRONG
    _, fewer = served()
    assert fewer < loads
    assert handle.changed_choices > 0
    handle.choose(ChoiceSettings())
    assert served() == (own, loads)
    assert handle.changed_choices == 0


def test_with_every_expert_resident_nothing_changes():
    """There is no missing expert to stand in for."""
    model = tiny_model()
    expected = text(model)
    handle = attach(model, slots=EXPERTS)
    handle.prefetch([list(range(EXPERTS))] * 2)
    handle.choose(ChoiceSettings("cache-prior", 5.0, keep=0))
    assert text(model) == expected
    assert handle.changed_choices == 0


def test_the_prompt_keeps_the_routers_choice():
    """The same prompt uses the same experts, whatever the setting: only decoding is touched."""
    model = tiny_model()
    handle = attach(model, slots=3)
    traces = []
    for settings in (ChoiceSettings(), ChoiceSettings("cache-prior", 1.0, keep=0)):
        handle.choose(settings)
        handle.reset_cache()
        with handle.record() as recorder:
            text(model)
        traces.append(recorder.trace())
    exact, changed = traces
    assert (exact.experts[exact.kind == 0] == changed.experts[changed.kind == 0]).all()
    assert (exact.experts[exact.kind == 1][:4] != changed.experts[changed.kind == 1][:4]).any()


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_simulation_of_what_ran_equals_the_counters(policy):
    """The trace holds the changed choices, so simulated counts are the measured ones."""
    model = tiny_model()
    handle = attach(model, slots=3, policy=policy)
    handle.choose(STRONG)
    handle.reset_counters()
    with handle.record() as recorder:
        text(model)
    assert simulate(recorder.trace(), 3, policy).counters == handle.counters


def test_a_trace_says_that_its_choices_were_changed():
    """Other slots would have made other choices, so whoever simulates them must be told."""
    model = tiny_model()
    handle = attach(model, slots=3)
    notes = []
    for settings in (ChoiceSettings(), STRONG):
        handle.choose(settings)
        with handle.record() as recorder:
            text(model)
        notes.append(recorder.trace("read").note)
    assert notes[0] == "read"
    assert "3 slots, lfu (cache-prior, strength 0.5, keep 1)" in notes[1]


def test_weights_are_those_the_router_would_have_given():
    """With all first choices kept but one, the output is OLMoE's own formula on the new choice."""
    model = tiny_model()
    handle = attach(model, slots=2)
    handle.choose(ChoiceSettings("cache-prior", 100.0, keep=0))
    seen = {}

    def see(module, args, output):
        seen["logits"] = output[0]

    model.model.layers[0].mlp.gate.register_forward_hook(see)
    cache = handle._caches[0]
    original = cache._forward

    def spy(stand_in, hidden, index, weights):
        seen["index"], seen["weights"] = index, weights
        return original(stand_in, hidden, index, weights)

    cache._forward = spy
    text(model, 3)
    slots = cache.residency.expert_of[seen["index"][0].tolist()]
    p = seen["logits"].softmax(-1)[0]
    assert seen["weights"].shape == (1, TOP_K)
    assert seen["weights"][0].tolist() == pytest.approx([float(p[int(e)]) for e in slots], rel=1e-5)


def test_it_is_never_silent(caplog):
    """The log says that results differ from the model's own."""
    handle = attach(tiny_model(), slots=3)
    with caplog.at_level(logging.WARNING, logger="melinoe"):
        handle.choose(STRONG)
    assert "results differ" in caplog.text


def test_detaching_ends_it():
    """The plain model says what it said before the runtime came."""
    model = tiny_model()
    expected = text(model)
    handle = attach(model, slots=3)
    handle.choose(STRONG)
    text(model)
    handle.detach()
    assert text(model) == expected


def test_a_router_of_an_unknown_rule_is_refused_by_the_first_pass():
    """No text is written with weights that were guessed."""
    model = tiny_model()
    handle = attach(model, slots=3)
    handle.choose(STRONG)
    gate = model.model.layers[0].mlp.gate

    def odd(module, args, output):
        logits, weights, index = output
        return logits, torch.rand_like(weights), index

    gate.register_forward_hook(odd)
    with pytest.raises(UnsupportedModelError, match="exact"):
        text(model)
    assert handle.counters.tokens[PROMPT] >= 0


def test_a_text_after_a_reset_is_decoded_as_if_it_came_first():
    """What another text's logits were like has no say in it: the same experts run again."""
    model = tiny_model()
    handle = attach(model, slots=3)
    handle.choose(STRONG)
    chosen = []
    for number in range(3):
        handle.reset_cache()
        if number == 2:  # a text in between, with logits far wider apart
            gates = [layer.mlp.gate.weight for layer in model.model.layers]
            with torch.no_grad():
                for gate in gates:
                    gate.mul_(8)
                text(model, 40)
                for gate in gates:
                    gate.div_(8)
            handle.reset_cache()
        with handle.record() as recorder:
            text(model)
        chosen.append(recorder.trace().experts.tolist())
    assert chosen[0] == chosen[1] == chosen[2]


def test_left_padding_changes_no_row_of_a_batch_of_one_text():
    """Two prompts of unlike length decode together: each row's loads and shapes stay in order."""
    model = tiny_model()
    handle = attach(model, slots=3)
    handle.choose(STRONG)
    ids = torch.tensor([[0, 0, 3, 4, 5], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with handle.record() as recorder, torch.no_grad():
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    trace = recorder.trace()
    assert (trace.kind == 2).sum() == 2
    assert handle.changed_choices > 0
    assert simulate(trace, 3).counters == handle.counters


def test_experts_that_run_without_their_router_are_refused():
    """Nothing tells what the router thought of these tokens; that is not passed over in silence."""
    model = tiny_model()
    handle = attach(model, slots=3)
    handle.choose(STRONG)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.zeros(1, model.config.hidden_size)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="same tokens"):
        experts(hidden, torch.tensor([[0, 1]]), torch.ones(1, 2) / 2)
