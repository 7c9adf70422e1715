"""Fit a predictor to a trace: KL to the shares of use, stopped early by held-out recall."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from melinoe.cache.simulator import check_prompts
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.errors import DataError
from melinoe.predictor.model import Predictor, PredictorNetwork, features_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FEWEST_PROMPTS = 10


@dataclass(frozen=True)
class FitSettings:
    """Settings of the fit: of the network, of AdamW, and of the early stopping."""

    hidden: int = 256
    dropout: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 128  # prompts
    epochs: int = 300  # at most
    patience: int = 40  # epochs without a better held-out recall before it stops
    held_out: float = 0.2  # share of the prompts that only decide when to stop


def fit(
    trace: Trace,
    prompts: Sequence[Sequence[int]],
    embeddings: torch.Tensor,
    slots: int,
    seed: int = 0,
    settings: FitSettings | None = None,
) -> Predictor:
    """
    Learn which experts the completion of a prompt will use.

    The network starts as the global popularity, and the pass with the best recall on held-out
    prompts is kept.

    Args:
        trace: Of the model that will be served; its sequences are *prompts*, token ids, in order.
        embeddings: The model's token embeddings ``(vocabulary, hidden)``, not copied.
        slots: Experts per layer that the cache will hold: recall is taken at this number.
        seed: Decides the split, the start and the order; equal seeds give equal predictors.

    Raises:
        DataError: fewer than 10 usable prompts (not empty, with a completion).
        TraceError: the prompts are not the trace's.

    Source:
        A two-layer network on a prompt embedding with one distribution per layer and a KL loss:
            arXiv:2602.11192, which embeds prompts with a second model; we do not.
    """
    target, _ = completion_shares(trace, prompts)
    return fit_shares(target, prompts, embeddings, slots, trace.fingerprint, seed, settings)


def fit_shares(
    target: Floats,
    prompts: Sequence[Sequence[int]],
    embeddings: torch.Tensor,
    slots: int,
    fingerprint: str,
    seed: int = 0,
    settings: FitSettings | None = None,
    features: torch.Tensor | None = None,
) -> Predictor:
    """
    Fit to shares of use ``(sequences, layers, num_experts)`` instead of a trace; else as `fit`.

    *features* are those of all prompts, if known already; equal prompts are all fitted to or all
    held out.
    """
    settings = settings or FitSettings()
    if not 1 <= slots <= target.shape[-1]:
        raise ValueError(f"slots must be in [1, {target.shape[-1]}], got {slots}")
    kept = usable(target, prompts)
    goal = torch.from_numpy(target[kept]).float()
    if features is None:
        given = features_of(embeddings, [prompts[index] for index in kept])
    else:
        given = features[kept]
    if not given.isfinite().all():
        raise DataError("the features of a prompt are no numbers; look at the embeddings")
    learn, stop = _split(same_prompts(prompts)[kept], settings.held_out, seed)
    popularity = goal[learn].mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = target.shape[1:]
        network = PredictorNetwork(given.shape[1], settings.hidden, shape, settings.dropout)
        network.mean.copy_(given[learn].mean(0))
        network.scale.copy_(given[learn].std(0).clamp_min(1e-6))
        torch.nn.init.zeros_(network.output.weight)
        with torch.no_grad():
            # A little more than was seen, so that no expert is impossible.
            network.output.bias.copy_((popularity + 1e-4).log().flatten())
        _train(network, given, goal, learn, stop, slots, settings)
    return Predictor(network, embeddings, popularity.numpy(), fingerprint, slots)


def usable(target: Floats, prompts: Sequence[Sequence[int]]) -> Ints:
    """
    Return the sequences with a prompt and a completion; DataError if they are too few.

    Layers that no sequence uses (of a model that sends images through other experts) are not asked
    for.
    """
    used = target.sum(axis=-1) > 0
    teaches = used.any(axis=-1) & (used | ~used.any(axis=0)).all(axis=-1)
    found = np.flatnonzero(teaches & [len(prompt) > 0 for prompt in prompts])
    if found.size < FEWEST_PROMPTS:
        raise DataError(
            f"a predictor needs at least {FEWEST_PROMPTS} prompts with a completion and the "
            f"trace has {found.size}; trace more prompts"
        )
    return found


def same_prompts(prompts: Sequence[Sequence[int]]) -> Ints:
    """Number prompts, equal ones alike: int64 ``(prompts,)``."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.asarray([numbers.setdefault(tuple(one), len(numbers)) for one in prompts], np.int64)


def _split(groups: Ints, held_out: float, seed: int) -> tuple[Ints, Ints]:
    """Rows to learn from, and rows that only decide when to stop; no group is in both."""
    names, group = np.unique(groups, return_inverse=True)
    if names.size < 2:  # one prompt over and over: there is nothing that could be kept apart
        group = np.arange(groups.size)
    rank = np.argsort(np.random.default_rng(seed).permutation(group.max() + 1))[group]
    order = np.argsort(rank, kind="stable")
    held = max(1, round(held_out * groups.size))
    # Whole groups up to that many rows, but always one to stop by and one to learn from.
    cut = int((rank <= min(rank[order[held - 1]], rank.max() - 1)).sum())
    return order[cut:], order[:cut]


def _train(
    network: PredictorNetwork,
    features: torch.Tensor,
    goal: torch.Tensor,
    learn: Ints,
    stop: Ints,
    slots: int,
    settings: FitSettings,
) -> None:
    """Descend, and leave the state of the best pass in *network*."""
    held_goal = goal[stop].double().numpy()

    def judged() -> tuple[float, dict[str, torch.Tensor]]:
        network.eval()
        with torch.inference_mode():
            scores = network(features[stop]).double().numpy()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        return float(recall_at(held_goal, scores, slots).mean()), state

    optimizer = torch.optim.AdamW(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    (best, state), waited = judged(), 0
    for _ in range(settings.epochs):
        network.train()
        for rows in torch.from_numpy(learn)[torch.randperm(len(learn))].split(settings.batch_size):
            loss = torch.nn.functional.kl_div(
                network(features[rows]).log_softmax(-1), goal[rows], reduction="sum"
            ) / (len(rows) * goal.shape[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now, reached = judged()
        if now > best + 1e-9:
            best, state, waited = now, reached, 0
        elif (waited := waited + 1) >= settings.patience:
            break
    network.load_state_dict(state)


# --- what is learned, and how a guess is judged ---------------------------------------------------


def use_counts(trace: Trace, kind: int, num_sequences: int | None = None) -> Floats:
    """
    Count how often each sequence chose each expert in rows of one *kind* of `cache.trace`.

    float64 ``(sequences, layers, num_experts)``, of *num_sequences* if they are more than the trace
    has.
    """
    rows, layers = trace.kind == kind, np.arange(trace.num_layers)[:, None]
    chosen, sequence = trace.experts[rows].astype(np.int64), trace.sequence[rows]
    there = chosen >= 0
    shape = (num_sequences or trace.num_sequences, trace.num_layers, trace.num_experts)
    at = np.broadcast_arrays(sequence[:, None, None], layers, chosen)
    cells = np.ravel_multi_index(tuple(one[there] for one in at), shape)
    return np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)


def completion_shares(trace: Trace, prompts: Sequence[Sequence[int]]) -> tuple[Floats, Floats]:
    """
    Return each expert's share of the uses of the completion, and of those of the prompt.

    Two float64 ``(sequences, layers, num_experts)``; TraceError if the prompts are not its own.
    """
    check_prompts(trace, prompts)
    after, own = (use_counts(trace, kind, len(prompts)) for kind in (COMPLETION_ROW, PROMPT_ROW))
    # A layer without uses stays 0.
    return after / after.sum(-1, keepdims=True).clip(1), own / own.sum(-1, keepdims=True).clip(1)


def recall_at(target: Floats, scores: Floats, slots: int) -> Floats:
    """
    Return the share of uses that the *slots* best-scored experts of each layer would serve.

    Mean over the layers that the sequence used; nan without. *target* are shares ``(sequences,
    layers, num_experts)``, each layer summing to 1, or to 0 where it is not used; *scores*
    broadcast to it. Ties go to the lower id.
    """
    order = np.argsort(-np.broadcast_to(scores, target.shape), axis=-1, kind="stable")
    served = np.take_along_axis(target, order[..., :slots], axis=-1).sum(axis=-1).sum(axis=-1)
    used = (target.sum(axis=-1) > 0).sum(axis=-1)
    return np.where(used > 0, served, np.nan) / np.maximum(used, 1)
