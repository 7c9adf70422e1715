"""Every other way to run a forward pass equals the model with all experts resident, or is refused.

`EQUAL` holds ways whose logits (or texts, or gradients) must be those of the same way on the plain
model, bit for bit, with right counters; `REFUSED` ways that end in one sentence. Compilers run
without a code generator of their own, so that equal means equal bits.
"""

import copy
import io
import pickle

import pytest
import torch
from fast_attach import attach as fast_attach
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from melinoe import attach
from melinoe.errors import AttachError
from melinoe.moe.choice import ChoiceSettings

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
OTHER = torch.tensor([[11, 12, 5, 80, 33, 2]])
GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
EAGER = {"backend": "eager"}


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(model):
    """Of two texts in turn, so that what a first pass left behind shows in the second."""
    model(OTHER)
    return model(PROMPT).logits


def compiled(model):
    return logits(torch.compile(model, **EAGER))


def compiled_for_autograd(model):
    return logits(torch.compile(model, backend="aot_eager"))


def compiled_in_place(model):
    model.compile(**EAGER)
    return logits(model)


class Wrapper(torch.nn.Module):
    """Somebody's own module around the model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, ids):
        return self.inner(ids).logits


def compiled_in_a_wrapper(model):
    wrapper = torch.compile(Wrapper(model), **EAGER)
    wrapper(OTHER)
    return wrapper(PROMPT)


def compiled_layers(model):
    for layer in model.model.layers:
        layer.compile(**EAGER)
    return logits(model)


def compiled_layer_in_the_list(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], **EAGER)
    return logits(model)


def compiled_blocks(model):
    for layer in model.model.layers:
        layer.mlp.compile(**EAGER)
    return logits(model)


def compiled_experts(model):
    for layer in model.model.layers:
        layer.mlp.experts.compile(**EAGER)
    return logits(model)


def swallowing(model):
    """Dynamo told to hide whatever goes wrong in it."""
    with torch._dynamo.config.patch(suppress_errors=True):
        return compiled(model) + compiled_blocks(model)


def few_recompilations(model):
    """Over the limit dynamo runs frames as they are, and those that they call."""
    with torch._dynamo.config.patch(recompile_limit=1):
        return compiled_layers(model) + compiled_blocks(model)


def generating_with_a_static_cache(model):
    return model.generate(PROMPT, **GREEDY, cache_implementation="static")


def generating_with_a_compiled_forward(model):
    model.forward = torch.compile(model.forward, **EAGER)
    return model.generate(PROMPT, **GREEDY, cache_implementation="static")


def generating_with_compiled_blocks(model):
    for layer in model.model.layers:
        layer.mlp.compile(**EAGER)
    return model.generate(PROMPT, **GREEDY)


def functional(model):
    own = dict(model.named_parameters())
    torch.func.functional_call(model, own, (OTHER,))
    return torch.func.functional_call(model, own, (PROMPT,)).logits


def autocast(dtype):
    def way(model):
        with torch.autocast("cpu", dtype):
            return logits(model)

    return way


def generating_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model.generate(PROMPT, **GREEDY)


def inference_mode(model):
    with torch.inference_mode():
        return logits(model).clone()


def counting_flops(model):
    with FlopCounterMode(display=False):
        return logits(model)


def another_default_device(model):
    """As after torch.set_default_device: what the runtime makes for the host must stay there."""
    with torch.device("meta"):
        return logits(model)


def training_mode(model):
    model.train()
    return logits(model)


def data_parallel(model):
    return logits(torch.nn.DataParallel(model))


def shallow_copy(model):
    return logits(copy.copy(model))


def gradient_of_the_head(model):
    """Nothing before the head asks for a gradient, so none goes through the experts."""
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with torch.enable_grad():
        model(OTHER, labels=OTHER).loss.backward()
        model(PROMPT, labels=PROMPT).loss.backward()
    return model.lm_head.weight.grad


EQUAL = {
    way.__name__: way
    for way in (
        compiled, compiled_for_autograd, compiled_in_place, compiled_in_a_wrapper, compiled_layers,
        compiled_layer_in_the_list, compiled_blocks, compiled_experts, swallowing,
        few_recompilations, generating_with_a_static_cache, generating_with_a_compiled_forward,
        generating_with_compiled_blocks, functional, generating_under_autocast, inference_mode,
        counting_flops, another_default_device, training_mode, data_parallel, shallow_copy,
        gradient_of_the_head,
    )
} | {"bf16": autocast(torch.bfloat16), "fp16": autocast(torch.float16)}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # what compilers think of transformers' code
@pytest.mark.parametrize(
    ("way", "slots"), [(way, 3) for way in EQUAL] + [("compiled_blocks", 8), ("bf16", 8)]
)
def test_another_way_equals_the_plain_model(model, way, slots):
    """
    Equal bits to the same way without a runtime, and each pass is counted once.

    There nothing need be compiled: by the compiler used here a graph has the model's own bits.
    """
    plain = copy.deepcopy(model)
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            expected = EQUAL[way](plain)
        handle = attach(model, slots=slots)
        found = EQUAL[way](model)
        assert torch.equal(found, expected)
        assert handle.audit() > 0
        counted = handle.counters
        # Two texts of six tokens, or one and two tokens of its own; some ways do all of it twice.
        times = 2 if way in ("swallowing", "few_recompilations") else 1
        generates = way.startswith("generating")
        assert counted.tokens.tolist() == ([6, 2] if generates else [12 * times, 0])
        assert counted.forwards.tolist() == ([1, 2] if generates else [2 * times, 0])


def test_packed_slots_with_another_default_device(model):
    """Few tokens for an expert and many, prefetches and slots with them."""
    many = torch.arange(60)[None]
    with torch.no_grad():
        with attach(copy.deepcopy(model), slots=3, format="int4") as handle:
            expected = logits(other := handle._model), other(many).logits
        with torch.device("meta"), attach(model, slots=3, format="int4"):
            assert torch.equal(logits(model), expected[0])
            assert torch.equal(model(many).logits, expected[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("engine", "way"),
    [("fast", "compiled"), ("fast", "compiled_blocks"), ("choosing", "compiled_blocks")],
)
def test_compiled_with_what_else_looks_on(model, way, engine):
    """The device engine; choices that are changed: as uncompiled."""
    texts = []
    for run in (logits, EQUAL[way]):
        one = copy.deepcopy(model)
        handle = (fast_attach if engine == "fast" else attach)(one, slots=4)
        if engine == "choosing":
            handle.choose(ChoiceSettings("cache-prior", 0.5))
        with torch.no_grad():
            run(one)
            tokens = one.generate(PROMPT, **GREEDY)
            texts.append((tokens, handle.changed_choices, handle.counters))
        handle.audit()
    (plain, looked, counted), (other, seen, measured) = texts
    assert torch.equal(plain, other)
    assert looked == seen and counted == measured


@pytest.mark.filterwarnings("ignore")
def test_a_graph_made_before_or_after_is_not_kept(model):
    """Compiled, then attached, then detached: each time the same compiled model is right."""
    compiled_model = torch.compile(model, **EAGER)
    model.model.layers[0].compile(**EAGER)
    with torch.no_grad():
        expected = compiled_model(PROMPT).logits
        for _ in range(2):
            with attach(model, slots=3) as handle:
                assert torch.equal(compiled_model(PROMPT).logits, expected)
                assert handle.counters.tokens.tolist() == [6, 0]
            assert torch.equal(compiled_model(PROMPT).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_says_that_it_is_not_compiled(model, caplog):
    """It changes the speed that was hoped for, so it is logged; once."""
    with torch.no_grad(), attach(model, slots=3), caplog.at_level("WARNING", "melinoe"):
        compiled(model)
    assert [r.message for r in caplog.records if "torch.compile leaves" in r.message] == [
        caplog.records[0].message
    ]


def embedded(model):
    return model.model.embed_tokens(PROMPT).detach()


def dual(model):
    with forward_ad.dual_level():
        inputs = embedded(model)
        model.config._attn_implementation = "eager"
        model(inputs_embeds=forward_ad.make_dual(inputs, torch.ones_like(inputs)))


def jvp(model):
    model.config._attn_implementation = "eager"
    inputs = embedded(model)
    torch.func.jvp(
        lambda given: model(inputs_embeds=given).logits, (inputs,), (torch.ones_like(inputs),)
    )


def on_fake_tensors(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(PROMPT))


def checkpointing(reentrant):
    def way(model):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.enable_grad():
            model(PROMPT, labels=PROMPT).loss.backward()

    return way


def other_weights(model):
    shape = model.model.layers[0].mlp.experts.gate_up_proj.shape[1:]
    model.model.layers[0].mlp.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(8, *shape))
    model(PROMPT)


def written_in_place(model):
    """As somebody who adds noise, or an average of weights: what is empty takes it silently."""
    model.model.layers[0].mlp.experts.down_proj.mul_(2.0)
    model(PROMPT)


def functional_with_other_weights(model):
    own = {name: p.detach() for name, p in model.named_parameters()}
    for name in own:
        if "experts" in name:
            own[name] = torch.zeros(8, *own[name].shape[1:])
    torch.func.functional_call(model, own, (PROMPT,))


def another_implementation(model):
    model.set_experts_implementation("eager")
    model(PROMPT)


def called_within_a_call(model):
    model.model.layers[1].register_forward_pre_hook(lambda *_: model(OTHER) and None)
    model(PROMPT)


def one_graph(part):
    """May leave nothing out."""

    def way(model):
        if part == "block":
            model.model.layers[0].mlp.compile(fullgraph=True, **EAGER)
            model(PROMPT)
        else:
            what = Wrapper(model) if part == "wrapper" else getattr(model, part, model)
            torch.compile(what, fullgraph=True, **EAGER)(PROMPT)

    return way


def no_break_allowed(model):
    with torch._dynamo.error_on_graph_break(True):
        torch.compile(model, **EAGER)(PROMPT)


def with_gradients(model):
    with torch.enable_grad():
        model(PROMPT)


REFUSED = {
    "vmap": lambda m: torch.func.vmap(lambda ids: m(ids).logits)(PROMPT[None]),
    "grad": lambda m: torch.func.grad(lambda x: m(inputs_embeds=x).logits.sum())(embedded(m)),
    "functionalize": lambda m: torch.func.functionalize(lambda ids: m(ids).logits)(PROMPT),
    "jvp": jvp,
    "dual numbers": dual,
    "export": lambda m: torch.export.export(Wrapper(m), (PROMPT,), strict=False),
    "export, strict": lambda m: torch.export.export(Wrapper(m), (PROMPT,), strict=True),
    "export of the model": lambda m: torch.export.export(m, (PROMPT,), strict=True),
    "one graph": one_graph("model_itself"),
    "one graph, forward": one_graph("forward"),
    "one graph, wrapper": one_graph("wrapper"),
    "one graph, block": one_graph("block"),
    "no break allowed": no_break_allowed,
    "jit.trace": lambda m: torch.jit.trace(Wrapper(m), (PROMPT,)),
    "make_fx": lambda m: make_fx(lambda ids: m(ids).logits)(PROMPT),
    "fake tensors": on_fake_tensors,
    "gradients": with_gradients,
    "checkpointing, reentrant": checkpointing(True),
    "checkpointing": checkpointing(False),
    "deepcopy": copy.deepcopy,
    "deepcopy of a part": lambda m: copy.deepcopy(m.model.layers[0]),
    "pickle": pickle.dumps,
    "torch.save": lambda m: torch.save(m, io.BytesIO()),
    "state_dict": lambda m: m.state_dict(),
    "replicas": lambda m: m.model.layers[0].mlp.experts._replicate_for_data_parallel(),
    "half": lambda m: m.half()(PROMPT),
    "meta": lambda m: m.to("meta")(PROMPT.to("meta")),
    "other weights": other_weights,
    "written in place": written_in_place,
    "functional, other weights": functional_with_other_weights,
    "another implementation": another_implementation,
    "called within a call": called_within_a_call,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("way", "engine"),
    [(way, "reference") for way in REFUSED] + [("vmap", "fast"), ("make_fx", "fast")],
)
def test_another_way_is_refused_in_one_sentence(model, way, engine):
    """And what comes after it is right again, with counters of whole passes only."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(PROMPT).logits
        handle = (fast_attach if engine == "fast" else attach)(model, slots=8)
        with pytest.raises(AttachError) as raised:
            REFUSED[way](model)
        assert str(raised.value).count(". ") == 0 and "\n" not in str(raised.value)
        handle.audit()
        if way in ("half", "meta", "other weights", "written in place", "another implementation",
                   "called within a call", "one graph, block"):  # fmt: skip
            return  # the model itself is another one now
        model.eval()
        model.config._attn_implementation = other.config._attn_implementation
        handle.reset_counters()
        assert torch.equal(model(PROMPT).logits, expected)
        assert handle.counters.tokens.tolist() == [6, 0]
