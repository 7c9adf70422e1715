"""The weighting rule of every family's routers, read off a random model's forward pass."""

import pytest
import torch
from tiny import families, tiny_model

from melinoe.errors import UnsupportedModelError
from melinoe.moe.choice import find_weighting
from melinoe.moe.routing import RoutingRecorder, find_routers

# Their routers weigh by rules of their own: sparse mixing, and logits shared with other outputs.
REFUSED = {"inkling", "phimoe"}


def observed(model, routers, seed):
    """Logits, choices and weights of each layer in one pass over 12 random tokens."""
    weights = {}
    handles = []
    for router in routers:

        def see(module, args, kwargs, layer=router.index):
            weights[layer] = kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2]

        handles.append(router.experts.register_forward_pre_hook(see, with_kwargs=True))
    torch.manual_seed(seed)
    with torch.no_grad(), RoutingRecorder(routers) as recorder:
        model(input_ids=torch.randint(3, 30, (1, 12)))
        routings = recorder.take()
    for handle in handles:
        handle.remove()
    return [(r, weights[r.router.index].reshape(r.top_k_index.shape)) for r in routings]


@pytest.mark.parametrize("family", families())
def test_the_rule_of_a_family_is_found_and_holds_for_other_tokens(family):
    """Found on 12 tokens, it gives the weights of 12 others; two families are refused."""
    model = tiny_model(family)
    with torch.no_grad():  # large enough for one rule to differ from another
        for router in find_routers(model):
            router.weight.normal_(std=0.5)
    routers = find_routers(model)
    first, second = observed(model, routers, 0), observed(model, routers, 1)
    for (one, weights), (other, others) in zip(first, second, strict=True):
        experts = one.router.num_experts
        whole = (one.top_k_index < experts).all(-1)
        arguments = one.logits[whole], one.top_k_index[whole], weights[whole]
        if family in REFUSED:
            with pytest.raises(UnsupportedModelError):
                find_weighting(*arguments)
            continue
        rule = find_weighting(*arguments)
        whole = (other.top_k_index < experts).all(-1)
        assert rule.gives(other.logits[whole], other.top_k_index[whole], others[whole])
