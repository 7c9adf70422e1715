"""Recomputed activations and accumulated batches change no term and no gradient."""

from types import SimpleNamespace

import pytest
import torch
from small_runs import examples, settings
from tiny import tiny_model
from transformers import TrainerCallback

from melinoe.errors import TrainingError
from melinoe.finetune import preparing, train
from melinoe.moe.experts import ExpertsLayer
from melinoe.moe.routing import find_routers, fingerprint


class CountPasses(TrainerCallback):
    """How often the first layer's experts ran, recomputed passes included."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.passes = 0
        module = find_routers(model)[0].experts
        module.register_forward_pre_hook(lambda *_: setattr(self, "passes", self.passes + 1))


def rows_and_passes(family, **changes):
    model, count = tiny_model(family), CountPasses()
    if hasattr(model.config, "router_jitter_noise"):
        model.config.router_jitter_noise = 0.0
    given = {"steps": 2, "log_every": 1, "lambda_cache": 0.7, **changes}
    rows = train(model, examples(8), settings(**given), pad_token_id=0, callbacks=[count]).rows
    return rows, count.passes


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {"gradient_accumulation": 2, "cache_loss": "clipped"}),
        ("gpt_oss", {}),
        ("qwen3_next", {}),
    ],
)
def test_recomputing_activations_changes_no_term_and_no_gradient(family, changes):
    """
    The layers run twice as often, and every row is the same.

    Rows hold each term and the gradient's norm, so a choice recorded twice, or a term cut from the
    graph, would show.
    """
    plain, passes = rows_and_passes(family, **changes)
    recomputed, more_passes = rows_and_passes(family, gradient_checkpointing=True, **changes)
    assert more_passes > passes
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert {"nll", "cache", "grad_norm"} <= plain[0].keys()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_large_activations_are_recomputed_without_being_asked_and_change_no_bit(
    family, monkeypatch
):
    """Above the limit the layers run again; every row of the log and the routers are the same."""
    logs, passes = [], []
    for limit in (1 << 60, 0):
        monkeypatch.setattr(preparing, "RECOMPUTED_BYTES", limit)
        model, count = tiny_model(family).to(torch.bfloat16), CountPasses()
        done = train(model, examples(8), settings(), pad_token_id=0, callbacks=[count])
        logs.append([*done.rows, fingerprint(model)])
        passes.append(count.passes)
    assert logs[0] == logs[1] and passes[1] > passes[0]


def test_what_is_large_is_counted_in_tokens_and_left_alone_where_told():
    """OLMoE at 512 tokens and 8 experts keeps 128 MiB a layer: 4096 rows of 8192 numbers."""
    layer = ExpertsLayer.__new__(ExpertsLayer)
    tensors = [SimpleNamespace(name="down_proj", shape=(2048, 1024))]
    object.__setattr__(layer, "tensors", tensors)
    model, cpu = SimpleNamespace(supports_gradient_checkpointing=True), torch.device("cpu")

    def asked(tokens, device=cpu, **changes):
        return preparing.recomputes(model, layer, settings(**changes), tokens, 8, device)

    assert asked(512) and asked(256) and not asked(255)
    assert not asked(512, torch.device("cuda")) and not asked(512, gradient_checkpointing=False)
    assert asked(1, gradient_checkpointing=True)


def test_recomputed_and_accumulated_is_still_the_same():
    """Two passes of two texts are one of four."""
    plain, _ = rows_and_passes("olmoe", batch_size=4)
    both, _ = rows_and_passes(
        "olmoe", batch_size=2, gradient_accumulation=2, gradient_checkpointing=True
    )
    for ours, theirs in zip(both, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_family_that_cannot_recompute_is_refused():
    """One sentence with the family's name."""
    model = tiny_model("olmoe")
    model.supports_gradient_checkpointing = False
    with pytest.raises(TrainingError, match="olmoe cannot recompute"):
        train(model, examples(), settings(gradient_checkpointing=True), pad_token_id=0)
