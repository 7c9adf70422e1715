"""What holds a model's hidden states near another's: their relative squared difference."""

from collections.abc import Mapping

import torch
from torch import Tensor

from melinoe.losses.select import mean


def match_loss(
    hidden: Mapping[int, Tensor],
    theirs: Mapping[int, Tensor],
    positions: Tensor,
    *,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """
    ``|h - t|^2 / |t|^2`` of each token, a mean over tokens and over places in the model.

    Relative, because the length of hidden states differs by place and family; per token, because a
    few tokens (the first of a sequence) have states many times longer than all others.

    Args:
        hidden: Place to this model's hidden states ``(tokens, features)``, with gradient.
        theirs: The teacher's, on the same tokens; never differentiated.
        positions: int64, the tokens that count, as `completion_positions` gives them.
        denominator: What sums over tokens are divided by; default: the tokens that count.

    Returns:
        A float32 scalar; 0 where the models agree, 1 where ours says nothing.

    Raises:
        ValueError: the two have other places.

    Source:
        Hints for hidden layers, Romero et al., arXiv:1412.6550; relative and without a regressor,
        since student and teacher are one model with other updates.
    """
    if hidden.keys() != theirs.keys() or not hidden:
        raise ValueError(f"places differ: {sorted(hidden)} here, {sorted(theirs)} of the teacher")
    total = torch.zeros((), device=positions.device)
    for place, states in hidden.items():
        ours = states.index_select(0, positions).float()
        target = theirs[place].detach().index_select(0, positions).float()
        length = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        total = total + mean((ours - target).square().sum(-1) / length, denominator)
    return total / len(hidden)
