"""Choose each request's next token by its own settings, inside one batch."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from melinoe.serve.body import Sampling

GREEDY = Sampling(temperature=0.0)


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
        self.supported_kwargs = {"settings": Sampling, "priority": int}
        self.ignored_kwargs = ()
        self._states: list[Any] = []
        self._generators: dict[str, torch.Generator] = {}
        # By request: what was written, for those that asked for log-probabilities.
        self.chosen: dict[str, list[Chosen]] = {}

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Write zeros: settings do not travel in the tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Remember whose row is which."""
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Give *scores* ``(rows, vocabulary)`` with minus infinity but for one token a row."""
        tokens = [self._choose(state, scores[row]) for row, state in enumerate(self._states)]
        only = torch.full_like(scores, -torch.inf)
        only[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.long)] = 0
        return only

    def forget(self, request: str) -> None:
        """Drop what is kept of a request that has ended."""
        self._generators.pop(request, None)
        self.chosen.pop(request, None)

    def _choose(self, state: Any, logits: Tensor) -> int:
        settings: Sampling = state.logit_processor_kwargs.get("settings", GREEDY)
        token = int(self._draw(state, logits, settings))
        if settings.alternatives is not None:
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            best = torch.topk(logprobs, settings.alternatives)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            kept = self.chosen.setdefault(state.request_id, [])
            kept.append(Chosen(token, float(logprobs[token]), tuple(pairs)))
        return token

    def _draw(self, state: Any, logits: Tensor, settings: Sampling) -> Tensor:
        scores = logits
        if settings.logit_bias or settings.presence_penalty or settings.frequency_penalty:
            scores = logits.clone()
            for token, bias in settings.logit_bias:
                scores[token] += bias
            # Of a request that was put back into the queue, the prompt holds what it had written.
            had = state.initial_tokens[state._true_initial_tokens or len(state.initial_tokens) :]
            for token, times in Counter([*had, *state.generated_tokens]).items():
                scores[token] -= settings.presence_penalty + times * settings.frequency_penalty
        if settings.temperature == 0:
            return scores.argmax()
        steps: Any = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
        if settings.top_k is not None:
            steps.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            steps.append(TopPLogitsWarper(max(settings.top_p, 1e-6)))
        shares = torch.softmax(steps(None, scores[None]), dim=-1)
        return torch.multinomial(shares, 1, generator=self._generator(state, settings, logits))

    def _generator(self, state: Any, settings: Sampling, logits: Tensor) -> torch.Generator:
        if state.request_id not in self._generators:
            made = torch.Generator(device=logits.device)
            if settings.seed is None:
                made.seed()
            else:
                made.manual_seed(settings.seed % (1 << 63))
            self._generators[state.request_id] = made
        return self._generators[state.request_id]
