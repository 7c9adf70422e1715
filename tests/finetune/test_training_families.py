"""Every family whose experts transformers decorates takes two steps of fine-tuning."""

import math
import types

import pytest
import tiny
import torch
from transformers.modeling_outputs import CausalLMOutput

from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded
from melinoe.errors import UnsupportedModelError
from melinoe.finetune import train
from melinoe.finetune.head import logits_of, model_outputs, run_to_head
from melinoe.losses import next_token, next_token_loss
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers

# It fills a block of masked tokens at once: there is no next token to learn.
DIFFUSION = "diffusion_gemma"
FAMILIES = [f for f in tiny.families() if f not in tiny.CANNOT and f != DIFFUSION]
# Built here without a language-model head: one tied to the embeddings is put on.
HEADLESS = ("muse_spark", "openai_privacy_filter", "qwen3_omni_moe")

SETTINGS = FinetuneSettings(
    lambda_replay=0.0,
    capacity=0.5,
    steps=2,
    batch_size=4,
    learning_rate=1e-2,  # so that two steps lower the misses by more than chance moves them
    schedule="constant",
    warmup=0.0,
    lora_rank=2,
    log_every=1,
)


def examples():
    """Four sequences of forty tokens: the default cache term counts misses, few would be noise."""
    ids = torch.randint(3, tiny.VOCAB, (4, 40), generator=torch.Generator().manual_seed(0))
    return [Encoded(row, [False] * 2 + [True] * 38) for row in ids.tolist()]


def with_head(model):
    """Let a base model say logits, as its family's language model would."""
    hidden = model.forward

    def forward(self, input_ids=None, attention_mask=None, **options):
        options.pop("use_cache", None)
        states = hidden(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=states @ self.get_input_embeddings().weight.T)

    model.forward = types.MethodType(forward, model)
    return model


def total(row):
    return row["eval_nll"] + SETTINGS.lambda_cache * row["eval_cache"]


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_lower_the_combined_loss_and_move_routers_and_experts(family):
    """Measured on the batch that is trained on; every router and every layer's experts move."""
    model = tiny.tiny_model(family)
    if family in HEADLESS:
        with_head(model)
    routers, layers = find_routers(model), find_experts(model)
    with torch.no_grad():
        for one in routers:  # as decided as a trained one, or rounding would choose the experts
            one.weight.normal_(std=0.5)
    before = [one.weight.detach().clone() for one in routers]
    stacks = [layer.module.get_parameter("down_proj").detach().clone() for layer in layers]
    data = examples()
    done = train(model, data, SETTINGS, pad_token_id=0, eval_data=data)
    rows, skipped = done.rows, done.skipped_steps
    measured = [row for row in rows if "eval_nll" in row]
    assert skipped == 0 and all(math.isfinite(total(row)) for row in measured)
    assert total(measured[-1]) < total(measured[0])
    for one, weight in zip(routers, before, strict=True):
        assert torch.equal(one.weight, weight) == (".vision_" in one.name)  # text alone was given
    for layer, stack in zip(layers, stacks, strict=True):
        kept = torch.equal(layer.module.get_parameter("down_proj"), stack)
        assert kept == (".vision_" in layer.name)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_through_the_head_by_parts_is_that_of_all_logits(family, monkeypatch):
    """Value and gradients of routers, seven tokens at a time, whatever stands around its head."""
    monkeypatch.setattr(next_token, "LOGITS_AT_ONCE", 7 * tiny.VOCAB)
    model = tiny.tiny_model(family).eval()
    if family in HEADLESS:
        with_head(model)
    batch = Collator(0)(examples())
    weights = [one.weight for one in find_routers(model) if ".vision_" not in one.name]
    found = []
    whole = logits_of(model, model_outputs(model, batch))
    made = run_to_head(model, batch)
    assert (made.head is None) == (family in HEADLESS)
    assert made.vocabulary == whole.shape[-1]
    for given in (
        (whole, batch["labels"]),
        (made.states, batch["labels"], made.head, made.vocabulary),
    ):
        loss = next_token_loss(*given)
        found.append((loss, *torch.autograd.grad(loss, weights)))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_family_whose_routers_cannot_be_trained_is_refused_by_name(family):
    """A block that routes in another way has no weight of a row per expert."""
    model = tiny.tiny_model(family)
    for module in model.modules():
        for name in ("gate", "router"):
            if hasattr(module, "experts") and hasattr(module, name):
                setattr(module, name, torch.nn.Identity())
    with pytest.raises(UnsupportedModelError, match=f"no trainable router.*{family}"):
        train(model, examples(), SETTINGS, pad_token_id=0)


@pytest.mark.filterwarnings("default")
def test_a_model_without_a_language_model_head_is_refused_by_name():
    """It has routers and experts, but no next-token loss."""
    model = tiny.tiny_model("openai_privacy_filter")
    with pytest.raises(UnsupportedModelError, match="OpenAIPrivacyFilterModel gives hidden states"):
        train(model, examples(), SETTINGS, pad_token_id=0)


@pytest.mark.filterwarnings("default")
def test_a_model_that_predicts_no_next_token_is_refused_by_name():
    """A block-diffusion model gives logits for its canvas, not for its input."""
    model = tiny.tiny_model(DIFFUSION)
    with pytest.raises(UnsupportedModelError, match=r"DiffusionGemma.*no next-token loss"):
        train(model, examples(), SETTINGS, pad_token_id=0)
