"""
Record which experts a model chooses while it reads given text, as if it had written that text.

Traces of a model's own completions mix two things: how it routes, and what it writes; one that
repeats itself needs few experts. Reading the same text, two models differ in routing alone.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace, known_ids
from melinoe.data import Encoded
from melinoe.engine.handle import Handle
from melinoe.errors import DataError
from melinoe.measure.traces import completion_counts
from melinoe.moe.next_router import NextRouters
from melinoe.moe.routing import Router, find_routers
from melinoe.stats import bootstrap


def reading_trace(
    model: Any,
    handle: Handle,
    encoded: Sequence[Encoded],
    *,
    scores: bool = False,
    guesses: bool = False,
) -> Trace:
    """
    Record which experts every token of *encoded* chose, laid out as generation would have it.

    A token's routing depends on what stands before it alone, so one forward pass per example
    gives what decoding that text would give, up to rounding: the prompt in one pass, then each
    completion token in its own.

    Args:
        model: A causal language model that *handle* is attached to; any number of slots.
        handle: From `attach` or `load`.
        encoded: At least one example, with at least one completion token.
        scores: Also record the weight that each choice was given, as the policy ``score`` needs it.
        guesses: Also ask each layer's router one layer early about each completion token, as the
            prefetch ``next-router`` does, and record what it said.

    Returns:
        One sequence per example, in order.

    Raises:
        DataError: nothing to read.
        UnsupportedModelError: guesses are wanted of a model whose routers cannot be asked early.
    """
    if not encoded:
        raise DataError("there is no text to read; give at least one example")
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            asked = _Early(model, stack) if guesses else None
            recorder = stack.enter_context(handle.record(scores=scores))
            stack.enter_context(torch.inference_mode())
            for one in encoded:
                ids = torch.tensor([one.input_ids], device=device)
                if asked is not None:
                    asked.rows = len(one)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        trace = recorder.trace("read, not written")
    finally:
        model.train(was_training)
    is_completion = np.concatenate([np.asarray(one.completion_mask) for one in encoded])
    starts = np.zeros(len(is_completion), dtype=bool)
    starts[np.cumsum([0, *(len(one) for one in encoded[:-1])])] = True
    # A pass begins with each example, each completion token, and the prompt's turn after one.
    follows = np.concatenate([[False], is_completion[:-1]])
    forward = np.cumsum(starts | is_completion | follows) - 1
    if asked is not None:
        trace = replace(trace, guesses=asked.guesses(trace, is_completion))
    return replace(
        trace,
        forward=forward.astype(np.int32),
        sequence=(np.cumsum(starts) - 1).astype(np.int32),
        kind=np.where(is_completion, COMPLETION_ROW, PROMPT_ROW).astype(np.uint8),
    )


class _Early:
    """
    Ask each router about the inputs of the one before it, for all tokens of a text at once.

    A recording asks only where few tokens are decoded, as a prefetch would; here a whole text is
    read in one pass in place of decoding it, so all its tokens are asked about.
    """

    def __init__(self, model: Any, stack: ExitStack) -> None:
        routers = find_routers(model)
        self.rows = 0  # tokens of the text that is being read
        self._next = NextRouters(routers)
        stack.callback(self._next.close)
        self._said: list[list[np.ndarray]] = [[] for _ in routers]
        self._before: Router | None = None  # whose inputs the router that runs now is asked about
        for router in routers:
            hook = router.module.register_forward_hook(self._ask(router))
            stack.callback(hook.remove)

    def _ask(self, router: Router) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            before, self._before = self._before, router
            if before is None or before.index >= router.index:  # a text begins
                return
            top_k = router.top_k or router.num_experts
            said = self._next.guess(before.index, router.index, self.rows, top_k)
            known = known_ids(said.cpu().numpy(), router.num_experts)
            self._said[router.index].append(known)

        return hook

    def guesses(self, trace: Trace, is_completion: np.ndarray) -> np.ndarray:
        """Return the guesses as a `Trace` keeps them: -1 in prompts, and in the first layer."""
        out = np.full_like(trace.experts, -1)
        for layer, said in enumerate(self._said):
            if said:
                found = np.concatenate(said)[:, : trace.top_k]
                out[:, layer, : found.shape[1]] = found
        out[~is_completion] = -1
        return out


def reading_record(trace: Trace, model: str, slots: int, policy: str) -> dict[str, Any]:
    """
    Return the record of kind ``reading``: transfers per token of texts that were read, simulated.

    Every text starts from an empty cache; what its prompt loads is not counted.

    Args:
        trace: From `reading_trace`.
        model: Label of the model.
        slots: Slots of each layer.
        policy: ``lru``, ``lfu``, ...
    """
    counts = completion_counts(trace, slots, policy)
    prompts = [
        int(((trace.sequence == one) & (trace.kind == PROMPT_ROW)).sum())
        for one in np.unique(trace.sequence)
    ]
    return {
        "kind": "reading",
        "model": model,
        "slots": slots,
        "policy": policy,
        "num_experts": trace.num_experts,
        "transfers_per_token": bootstrap(counts["loads"], counts["tokens"]).to_dict(),
        "per_prompt": {
            "prompt_tokens": prompts,
            "loads": counts["loads"],
            "tokens": counts["tokens"],
        },
    }
