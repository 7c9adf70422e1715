"""Follow a model's forward passes: where one begins, which phase it is, what each row is.

The experts of a layer see tokens, not requests of a user. Hooks on the whole model see the rest:
the batch, its padding, and whether anything came before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from melinoe.cache.counters import COMPLETION, PROMPT, Counters

if TYPE_CHECKING:
    from melinoe.runtime.record import Recorder


class Batch:
    """
    One call of the model: *batch* rows of *length* tokens.

    Attributes:
        phase: `PROMPT` if the call has several tokens per row or nothing came before it, else
            `COMPLETION`.
        continues: whether something came before it.
        mask: the attention mask, ``(batch, length or more)``, or None.
    """

    def __init__(self, batch: int, length: int, past: bool, mask: Tensor | None) -> None:
        self.batch = batch
        self.length = length
        self.continues = past
        self.mask = mask
        self.phase = PROMPT if length > 1 or not past else COMPLETION


class ForwardPasses:
    """
    Begins and ends the forward passes that counters and traces are made of.

    A pass begins when the first experts of a call run, so that its tokens are those that experts
    compute. Experts that run a second time before the call has ended begin another pass. Without a
    call (a submodule was called directly) a pass of one token counts as completion, any other as
    prompt.

    Attributes:
        recorder: told of every pass, if there is one.
        before_completion: called once, when the next pass of the completion begins and before it
            asks for any expert; then forgotten.
    """

    def __init__(self, model: nn.Module, counters: Counters) -> None:
        self.counters = counters
        self.recorder: Recorder | None = None
        self.before_completion: Callable[[], None] | None = None
        self._call: Batch | None = None
        self._inside = False  # a call of the model has begun and not returned
        self._seen = 0  # bit i: layer i has run in the open pass
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def enter(self, layer: int, top_k_index: Tensor) -> None:
        """Experts of *layer* are about to run on ``top_k_index`` ``(tokens, top_k)``."""
        bit = 1 << layer
        if not self._seen or self._seen & bit:
            self._begin(top_k_index.shape[0])
        self._seen |= bit
        if self.recorder is not None:
            self.recorder.add(layer, top_k_index)

    def end(self) -> None:
        """End the open pass, if one is open."""
        if self._seen:
            self._seen = 0
            self.counters.end_forward()
            if self.recorder is not None:
                self.recorder.end()

    def settle(self) -> None:
        """
        Between calls of the model: end the open pass, or drop it if its call never returned.

        An exception leaves such a pass behind: its requests stay counted, the pass does not, and
        no trace holds it.
        """
        if not self._inside:
            self.end()  # a submodule was called directly
        elif self._seen:
            self._seen = 0
            if self.recorder is not None:
                self.recorder.drop()
        self._inside = False
        self._call = None

    def close(self) -> None:
        """Take the hooks off the model."""
        self.settle()
        for hook in self._hooks:
            hook.remove()

    def _begin(self, tokens: int) -> None:
        self.end()
        call = self._call
        phase = call.phase if call is not None else (COMPLETION if tokens == 1 else PROMPT)
        if phase == COMPLETION:
            self._completion_begins()  # of a submodule; a call of the model said so earlier
        self.counters.begin_forward(phase, tokens)
        if self.recorder is not None:
            self.recorder.begin(phase, tokens, call)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.settle()
        self._inside = True
        self._call = describe_call(args, kwargs)
        if self._call is not None and self._call.phase == COMPLETION:
            self._completion_begins()

    def _after(self, *_: Any) -> None:
        self.end()
        self._inside = False
        self._call = None

    def _completion_begins(self) -> None:
        act, self.before_completion = self.before_completion, None
        if act is not None:
            act()


def describe_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch | None:
    """What a call of the model with these arguments computes, or None if it has no token input."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None and args and isinstance(args[0], Tensor):
        tokens = args[0]
    if tokens is None or tokens.dim() < 2:
        return None
    batch, length = tokens.shape[:2]
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch:
        mask = None
    return Batch(batch, length, _has_past(length, mask, kwargs), mask)


def _has_past(length: int, mask: Tensor | None, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call continues an earlier one."""
    if mask is not None and mask.shape[1] > length:
        return True
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs.get("cache_params")
    if cache is None:
        return False
    position = kwargs.get("cache_position", kwargs.get("position_ids"))
    try:
        return int(cache.get_seq_length()) > 0
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # A cache of recurrent states knows no length.
        return isinstance(position, torch.Tensor) and bool((position > 0).any())
