"""Learning rates where none is named: by the model's width, for each kind of part."""

import pytest
import torch
from small_runs import examples, settings
from tiny import tiny_model

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune import train
from melinoe.finetune.rates import Rates, default_rank
from melinoe.moe.routing import Router


def router(width):
    """One whose weight has so many inputs."""
    module = torch.nn.Linear(width, 8, bias=False, device="meta")
    return Router(0, "gate", module, "", module, 8, 8, 2)


@pytest.mark.parametrize(
    ("width", "routers", "low_rank"),
    [(128, 4.30e-3, 4.28e-3), (2048, 2.69e-4, 4.91e-4), (4096, 1.34e-4, 2.86e-4)],
)
def test_rates_fall_with_the_width(width, routers, low_rank):
    """Worked by hand from the two rules: the shipped model's width, OLMoE's, Mixtral's."""
    rates = Rates.of([router(width)], FinetuneSettings())
    assert rates.routers == pytest.approx(routers, rel=5e-3)
    assert rates.low_rank == pytest.approx(low_rank, rel=5e-3)


@pytest.mark.parametrize(
    ("top_k", "rank"), [(1, 32), (2, 32), (4, 32), (6, 20), (8, 16), (10, 12), (64, 4)]
)
def test_the_rank_is_shared_out_over_the_experts_of_a_token(top_k, rank):
    """128 over the experts per token, in fours, from 4 to 32; a rank that is named is taken."""
    assert default_rank(top_k) == rank
    assert Rates.of([router(128)], FinetuneSettings(lora_rank=7)).rank == 7


def test_a_rate_that_is_named_is_taken():
    """One alone is that of all parts; the low-rank updates may have their own."""
    both = Rates.of([router(128)], FinetuneSettings(learning_rate=1e-3))
    assert (both.routers, both.low_rank) == (1e-3, 1e-3)
    own = Rates.of([router(128)], FinetuneSettings(lora_learning_rate=1e-3))
    assert own.routers == pytest.approx(0.55 / 128) and own.low_rank == 1e-3
    with pytest.raises(TrainingError, match="lora_learning_rate cannot be 0"):
        FinetuneSettings(lora_learning_rate=0.0)


def test_the_parts_train_at_their_own_rates():
    """AdamW's first step moves each entry by its rate: routers by theirs, updates by theirs."""
    model = tiny_model("olmoe")
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "gate." in name}

    chosen = settings(steps=1, learning_rate=None)
    done = train(model, examples(), chosen, pad_token_id=0)
    routers = [(one["weight"] - start[f"{n}.weight"]) for n, one in done.adapter.routers.items()]
    assert max(float(one.abs().max()) for one in routers) == pytest.approx(
        done.rates.routers, rel=1e-3
    )
    b = [up for own in done.adapter.factors.values() for _, up in own.values()]  # starts at 0
    assert max(float(one.abs().max()) for one in b) == pytest.approx(done.rates.low_rank, rel=1e-3)
    assert done.rates.routers != done.rates.low_rank
