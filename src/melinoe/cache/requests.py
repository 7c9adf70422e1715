"""Turn the rows of a trace into the requests that each forward pass makes of every layer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Count cells per block: 2 M int64 are 16 MB, and a block's passes share one numpy pass.
_BLOCK_CELLS = 1 << 21


class ForwardPass(NamedTuple):
    """
    One forward pass.

    Attributes:
        phase: 1 completion if some row is a completion token and none is a prompt token, else 0
            prompt; so a pass of padding alone belongs to the prompt that it pads.
        tokens: Rows, padding included.
        sequences: Whose rows, ascending.
        requests: Per layer the distinct experts, ascending, and how many (token, choice) pairs
            picked each.
        scores: Per layer the router's weight of each of them (see `mean_scores`), or None.
        guesses: Per layer the choices of its router one layer early (see `merge_guesses`), or None.
    """

    phase: int
    tokens: int
    sequences: list[int]
    requests: list[tuple[list[int], list[int]]]
    scores: list[list[float]] | None = None
    guesses: list[list[int]] | None = None


def mean_scores(ids: np.ndarray, weights: np.ndarray, rows: int, num_experts: int) -> np.ndarray:
    """
    Average the router's weights of each expert over the rows of one pass, absent ones as 0.

    The simulator and a runtime both call this, in the same order of rows and with weights rounded
    to float16, so that they hand a policy the same numbers.

    Args:
        ids: Any integers (pairs,) in ``[0, num_experts)``: the choices, row by row.
        weights: (pairs,), the router's weight of each choice.
        rows: Of the pass, padding and rows without a choice too.
        num_experts: Experts of the layer; or cells, where several requests are counted at once.

    Returns:
        float64 (num_experts,).
    """
    rounded = weights.astype(np.float16).astype(np.float64)
    return np.bincount(ids, weights=rounded, minlength=num_experts) / rows


def merge_guesses(rows: Sequence[Sequence[int]]) -> list[int]:
    """
    Merge the guesses for all rows of a pass, the most wanted first.

    The more rows guess an expert, the more it is wanted; of equally wanted ones the one that
    stands further in front in some row, then the lower id. The simulator and the runtime both
    call this, so that both prefetch in the same order.

    Args:
        rows: Of each row ids, the most wanted first; negative ones mean none.
    """
    if len(rows) == 1:
        return [expert for expert in dict.fromkeys(rows[0]) if expert >= 0]
    count: dict[int, int] = {}
    place: dict[int, int] = {}
    for row in rows:
        for at, expert in enumerate(dict.fromkeys(row)):
            if expert >= 0:
                count[expert] = count.get(expert, 0) + 1
                place[expert] = min(place.get(expert, at), at)
    return sorted(count, key=lambda expert: (-count[expert], place[expert], expert))


def forward_passes(
    experts: np.ndarray,
    forward: np.ndarray,
    sequence: np.ndarray,
    is_prompt: np.ndarray,
    is_completion: np.ndarray,
    num_experts: int,
    scores: np.ndarray | None = None,
    guesses: np.ndarray | None = None,
) -> Iterator[ForwardPass]:
    """
    Group rows by forward pass and count who was picked.

    Padding rows count: the model computed them, so it needed their experts. Ids of -1 do not.

    Args:
        experts: int16 (rows, layers, top_k), -1 for no expert.
        forward: int32 (rows,), never decreasing.
        sequence: int32 (rows,).
        is_prompt: bool (rows,).
        is_completion: bool (rows,); rows that are neither are padding.
        num_experts: Experts of each layer.
        scores: float16, as *experts*: the router's weight of each choice.
        guesses: int16, as *experts*: see `melinoe.cache.trace.Trace`.
    """
    rows, layers, _ = experts.shape
    if not rows:
        return
    sequences = int(sequence.max()) + 1
    starts = np.flatnonzero(np.diff(forward, prepend=forward[0] - 1))
    bounds = np.append(starts, rows)
    step = max(1, _BLOCK_CELLS // (layers * num_experts))
    for first in range(0, len(starts), step):
        last = min(first + step, len(starts))
        low, high = int(bounds[first]), int(bounds[last])
        tokens = np.diff(bounds[first : last + 1])
        owner = np.repeat(np.arange(last - first), tokens)

        cells = _cells(experts[low:high], owner, num_experts)
        ids, uses, ends = _count(cells, (last - first) * layers, num_experts)
        wanted: list[float] = []
        if scores is not None:
            weights = scores[low:high][experts[low:high] >= 0]
            total = mean_scores(cells, weights, 1, (last - first) * layers * num_experts)
            wanted = total[np.unique(cells)].tolist()
        pairs = np.unique(owner * sequences + sequence[low:high])
        whose = (pairs % sequences).tolist()
        whose_ends = np.cumsum(np.bincount(pairs // sequences, minlength=last - first)).tolist()
        prompts = np.bincount(owner, weights=is_prompt[low:high], minlength=last - first)
        completions = np.bincount(owner, weights=is_completion[low:high], minlength=last - first)
        phases = ((prompts == 0) & (completions > 0)).astype(int).tolist()

        start = whose_start = position = 0
        for number, count in enumerate(tokens.tolist()):
            requests, weighed = [], []
            for end in ends[position : position + layers]:
                requests.append((ids[start:end], uses[start:end]))
                if wanted:
                    weighed.append([value / count for value in wanted[start:end]])
                start = end
            position += layers
            whose_end = whose_ends[number]
            early = None
            if guesses is not None:
                begin, end = int(bounds[first + number]), int(bounds[first + number + 1])
                early = _guesses_of(guesses[begin:end])
            yield ForwardPass(
                phases[number],
                count,
                whose[whose_start:whose_end],
                requests,
                None if scores is None else weighed,
                early,
            )
            whose_start = whose_end


def _guesses_of(guesses: np.ndarray) -> list[list[int]]:
    """Each layer's guesses for the rows of one pass, merged."""
    if guesses.size and guesses.max() < 0:  # a prompt, or a pass of too many rows
        return [[] for _ in range(guesses.shape[1])]
    return [merge_guesses(layer) for layer in guesses.transpose(1, 0, 2).tolist()]


def _cells(experts: np.ndarray, owner: np.ndarray, num_experts: int) -> np.ndarray:
    """A number for each choice of an expert, which is the same for the same pass, layer and id."""
    layers = experts.shape[1]
    cell = (owner[:, None, None] * layers + np.arange(layers)[None, :, None]) * num_experts
    return (cell + experts)[experts >= 0]


def _count(
    cells: np.ndarray, requests: int, num_experts: int
) -> tuple[list[int], list[int], list[int]]:
    """Distinct ids and uses, by pass, layer, id; and where each (pass, layer) ends."""
    counts = np.bincount(cells, minlength=requests * num_experts)
    picked = np.flatnonzero(counts)
    distinct = np.count_nonzero(counts.reshape(-1, num_experts), axis=1)
    return (picked % num_experts).tolist(), counts[picked].tolist(), np.cumsum(distinct).tolist()
