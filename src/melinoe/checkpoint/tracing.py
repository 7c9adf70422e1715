"""
Find out which stored tensors a rule of transformers lays where, by running it on small stand-ins.

Some rules treat all experts of a layer at once, and their code does not say what becomes of one
expert. So each stored tensor is given a small stand-in whose every number occurs once, the rule is
run on those, and the result is read: where an expert's part turns out to be whole stored tensors,
one under the other, these can be read for it alone.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from melinoe.checkpoint.files import Place

Run = Callable[[dict[str, list[torch.Tensor]]], Mapping[str, torch.Tensor]]


def rows_by_trial(
    tensors: Mapping[str, Sequence[Place]], parameter: str, num_experts: int, run: Run
) -> list[list[Place]] | None:
    """
    The stored tensors that one expert after the other consists of.

    Args:
        tensors: Source pattern -> stored tensors, in transformers' order.
        parameter: The parameter that is asked for.
        num_experts: Of the parameter.
        run: The rule: source pattern -> tensors, to full parameter name -> tensor.

    Returns:
        Per position in an expert, the tensors of all experts in order; their rows, one position
        under the other, are the parameter. None where the rule does anything else, or cannot be
        run on stand-ins. A rule sees of a stand-in what it sees of the tensor, but for its size.
    """
    stand_ins, owner = _stand_ins(tensors)
    try:
        made = run(stand_ins)[parameter]
    except Exception:  # whatever a rule trips over that looks at sizes
        return None
    if made.dtype != torch.int64 or made.dim() < 2 or made.shape[0] != num_experts:
        return None
    found: list[list[Place]] = []
    for expert in made:
        parts, row = [], 0
        while row < expert.shape[0]:
            place, piece = owner.get(int(expert[row].reshape(-1)[0]), (None, None))
            if place is None or piece is None:
                return None
            rows = piece.shape[0]
            if not torch.equal(expert[row : row + rows], piece):
                return None
            parts.append(place)
            row += rows
        found.append(parts)
    if len({len(parts) for parts in found}) != 1:
        return None
    return [list(parts) for parts in zip(*found, strict=True)]


def _stand_ins(
    tensors: Mapping[str, Sequence[Place]],
) -> tuple[dict[str, list[torch.Tensor]], dict[int, tuple[Place, torch.Tensor]]]:
    """Small tensors of unique numbers for the stored ones, and whose each first number is."""
    sizes = sorted({n for places in tensors.values() for p in places for n in p.info.shape})
    # Sizes that were different stay different, and even: rules halve.
    small = {size: 2 * rank for rank, size in enumerate(sizes, start=1)}
    stand_ins: dict[str, list[torch.Tensor]] = {}
    owner: dict[int, tuple[Place, torch.Tensor]] = {}
    following = 0
    for pattern, places in tensors.items():
        stand_ins[pattern] = []
        for place in places:
            shape = [small[n] for n in place.info.shape]
            count = int(torch.tensor(shape).prod()) if shape else 1
            piece = torch.arange(following, following + count).reshape(shape)
            stand_ins[pattern].append(piece)
            if piece.dim():
                owner[following] = (place, piece)
            following += count
    return stand_ins, owner
