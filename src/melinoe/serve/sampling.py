"""Choose each request's next token by its own settings, inside one batch."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from melinoe.serve.body import Sampling
from melinoe.serve.structured import allowed

_COLDEST = 1e-5  # from which on the likeliest token is taken: float32 holds no such quotient


class Chosen(NamedTuple):
    """
    A token that was written, with the model's own log-probabilities.

    Attributes:
        token: Its id.
        logprob: Before temperature, penalties and cuts.
        alternatives: The likeliest ids with theirs, descending.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


class Sampler(ContinuousBatchingLogitsProcessor):
    """
    Leave one token of each row: transformers' loop, which takes the largest, then writes it.

    transformers' own processors share temperature, seed and penalties among all requests of a
    batch, or cannot be greedy for one of them. Here each request has its own random numbers, so
    that its text does not depend on its neighbours.
    """

    def __init__(self) -> None:
        self.supported_kwargs = {"request": object}
        self.ignored_kwargs = ()
        self._states: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Write zeros: settings do not travel in the tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Remember whose row is which."""
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Give *scores* ``(rows, vocabulary)`` with minus infinity but for one token a row."""
        requests = [state.logit_processor_kwargs["request"] for state in self._states]
        tokens, as_it_was = self._draw(scores, requests)
        finite = scores.amax(dim=-1).isfinite().tolist()
        for row, one in enumerate(requests):
            one.broken |= not finite[row]
            if one.matcher is not None:
                one.matcher.consume_token(int(tokens[row]))
            if (alternatives := one.asked.sampling.alternatives) is not None:
                one.drawn.append(_chosen(scores[row], int(tokens[row]), alternatives))
        if as_it_was:
            return scores
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, tokens[:, None], 0.0)

    def _draw(self, scores: Tensor, requests: list[Any]) -> tuple[Tensor, bool]:
        """Give a token for each row, and whether each is the likeliest of *scores* as they are."""
        shaped, settings = scores, [one.asked.sampling for one in requests]
        for row, own in enumerate(settings):
            if own.logit_bias or own.presence_penalty or own.frequency_penalty or own.grammar:
                shaped = scores.clone() if shaped is scores else shaped
                _penalise(self._states[row], shaped[row], own)
                if own.grammar is not None:
                    shaped[row] = allowed(requests[row].matcher, shaped[row])
        tokens = shaped.argmax(dim=-1)
        drawn = [row for row, own in enumerate(settings) if own.temperature > _COLDEST]
        if not drawn:
            return tokens, shaped is scores
        heat = shaped.new_tensor([settings[row].temperature for row in drawn])
        warm = shaped[drawn] / heat[:, None]
        for at, row in enumerate(drawn):
            warm[at] = _cut(warm[at], settings[row])
        # The token at which the probabilities add up to a random number of the request's own.
        sums = torch.softmax(warm, dim=-1).cumsum(dim=-1)
        random = sums.new_tensor([requests[row].random.random() for row in drawn])
        found = torch.searchsorted(sums, random[:, None] * sums[:, -1:], right=True)[:, 0]
        tokens[drawn] = found.clamp_(max=scores.shape[-1] - 1)
        return tokens, False


def _penalise(state: Any, scores: Tensor, settings: Sampling) -> None:
    """Change the scores of tokens that are biased, or were written already."""
    if settings.logit_bias:
        tokens, biases = zip(*settings.logit_bias, strict=True)
        where = torch.tensor(tokens, device=scores.device)
        scores.index_add_(0, where, scores.new_tensor(biases))
    # Of a request that was put back into the queue, the prompt holds what it had written.
    had = state.initial_tokens[state._true_initial_tokens or len(state.initial_tokens) :]
    for token, times in Counter([*had, *state.generated_tokens]).items():
        scores[token] -= settings.presence_penalty + times * settings.frequency_penalty


def _chosen(logits: Tensor, token: int, alternatives: int) -> Chosen:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = torch.topk(logprobs, alternatives)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Chosen(token, float(logprobs[token]), tuple(pairs))


def _cut(scores: Tensor, settings: Sampling) -> Tensor:
    """Leave out the unlikely tokens that a request leaves out, by transformers' own rules."""
    steps: Any = LogitsProcessorList()
    if settings.top_k is not None:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(max(settings.top_p, 1e-6)))
    return steps(None, scores[None])[0]
