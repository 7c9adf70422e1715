"""
A PEFT adapter put on an attached model: served where it touches no expert, else the way is named.

The error spoke of saving. Each order and way gives the text of the all-resident model with that
adapter, bit for bit, and counts it.
"""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import melinoe
from melinoe.errors import AttachError

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT thinks of stacked experts

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
SERVED = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "router": {"target_parameters": ["mlp.gate.weight"]},
    "head": {"target_modules": ["lm_head"]},
    "router saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}
EXPERTS = {
    "one": {"target_parameters": ["mlp.experts.down_proj"]},
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "all": {"target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def original():
    return tiny.tiny_model("olmoe")


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def adapted(model, settings, way):
    """*model* with an adapter that changes it, by one of PEFT's or transformers' ways."""
    torch.manual_seed(1)
    config = LoraConfig(**settings, init_lora_weights=False)
    if way == "add_adapter":
        model.add_adapter(config)
        return model.eval()
    return get_peft_model(model, config).eval()


def says(model):
    with torch.no_grad():
        return model(PROMPT).logits, model.generate(input_ids=PROMPT, **GREEDY)


@pytest.mark.parametrize("order", ["adapter last", "adapter first"])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("kind", SERVED)
def test_an_adapter_beside_the_experts_is_served(model, kind, way, order):
    """Logits and text; and both are counted as a call and a generation."""
    logits, text = says(adapted(copy.deepcopy(model), SERVED[kind], way))
    assert not torch.equal(says(model)[0], logits)  # the adapter does something
    if order == "adapter last":
        handle = melinoe.attach(model, slots=3)
        model = adapted(model, SERVED[kind], way)
    else:
        model = adapted(model, SERVED[kind], way)
        handle = melinoe.attach(model, slots=3)
    found, said = says(model)
    assert torch.equal(found, logits) and torch.equal(said, text)
    assert handle.counters.tokens.tolist() == [12, 3]
    assert handle.counters.forwards.tolist() == [2, 3]
    handle.audit()
    handle.detach()
    assert torch.equal(says(model)[0], logits)


def test_the_fast_engine_serves_an_adapter(model):
    """As far as a CPU shows it."""
    from fast_attach import attach

    logits, text = says(adapted(copy.deepcopy(model), SERVED["attention"], "get_peft_model"))
    handle = attach(model, slots=4)
    found, said = says(adapted(model, SERVED["attention"], "get_peft_model"))
    assert torch.equal(found, logits) and torch.equal(said, text)
    assert handle.counters.tokens.tolist() == [12, 3]


@pytest.mark.parametrize("way", ["load_adapter", "from_pretrained"])
def test_loading_an_adapter_from_files_comes_before_attaching(model, way, tmp_path):
    """Both libraries read the whole model's state for it; refused by the way, and served after."""
    plain = adapted(copy.deepcopy(model), SERVED["attention"], "get_peft_model")
    plain.save_pretrained(tmp_path)
    logits, text = says(plain)

    def loaded(onto):
        if way == "load_adapter":
            onto.load_adapter(str(tmp_path))
            return onto
        return PeftModel.from_pretrained(onto, str(tmp_path)).eval()

    with melinoe.attach(copy.deepcopy(model), slots=3) as handle:
        with pytest.raises(
            AttachError, match=r"load an adapter; call handle.detach\(\).*melinoe merge"
        ):
            loaded(handle._model)
        handle.audit()
    model = loaded(model)
    with melinoe.attach(model, slots=3) as handle:
        found, said = says(model)
        assert torch.equal(found, logits) and torch.equal(said, text)
        assert handle.counters.tokens.tolist() == [12, 3]


@pytest.mark.parametrize("order", ["adapter last", "adapter first"])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_an_adapter_on_the_experts_is_refused_by_the_way_out(model, kind, way, order):
    """Merged first, as the message says, it is served."""
    words = r"adapter.*experts.*merge.*melinoe merge"
    if order == "adapter last":
        handle = melinoe.attach(model, slots=3)
        wrapped = adapted(model, EXPERTS[kind], way)
        with pytest.raises(AttachError, match=words):
            says(wrapped)
        handle.audit()
        return
    wrapped = adapted(model, EXPERTS[kind], way)
    with pytest.raises(AttachError, match=words):
        melinoe.attach(wrapped, slots=3)
    if way == "get_peft_model":
        merged = wrapped.merge_and_unload()
        expected = says(merged)[0]
        with melinoe.attach(merged, slots=3):
            assert torch.equal(says(merged)[0], expected)
