"""What one call of the model computes: which rows are the prompt's, which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.trace import COMPLETION_ROW, PADDING_ROW, PROMPT_ROW


@dataclass
class Generating:
    """
    A ``generate`` that is under way.

    Attributes:
        prompt: tokens per row that it was given; all that come behind them are its own.
        began: whether it has called the model yet.
        warned: whether it was said that it computes the prompt again and again.
        guesses: whether the model makes guesses for itself, by a ``generate`` inside this one.
        drafts: how many of those run.
        chunked: whether the prompt comes in several calls, and may not be over yet.
    """

    prompt: int
    began: bool = False
    warned: bool = False
    guesses: bool = False
    drafts: int = 0
    chunked: bool = False


@dataclass(frozen=True)
class Batch:
    """
    One call of the model: *batch* rows of *length* tokens.

    Attributes:
        start: tokens per row that came before these; their keys and values are in the cache.
        prompt: how many of the *length* tokens are the prompt's; those behind are completion.
        mask: the attention mask, ``(batch, length or more)`` or ``(batch, 1 or more, length,
            length or more)``, or None.
        repeats: whether ``generate`` computes the prompt once more, having no cache.
    """

    batch: int
    length: int
    start: int
    prompt: int
    mask: Tensor | None
    repeats: bool = False

    @property
    def phase(self) -> int:
        """`PROMPT` if some token is the prompt's, else `COMPLETION`."""
        return PROMPT if self.prompt else COMPLETION

    @property
    def continues(self) -> bool:
        """Whether something came before."""
        return self.start > 0 or self.repeats

    def padding(self) -> Tensor | None:
        """Bool ``(batch, length)``, true where a token is padding; None if no mask tells."""
        if self.mask is None:
            return None
        if self.mask.dim() == 2:
            return ~self.mask[:, -self.length :].bool()
        return _padding_of(self.mask[:, 0], self.start)


def rows_of(call: Batch | None, phase: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Whose each row of a pass is, and what it is.

    Args:
        call: The call that the pass belongs to; None if the model was not called as a whole.
        phase: Of the pass.
        tokens: Rows of the pass.

    Returns:
        int32 (tokens,), number of the batch's row that each belongs to; uint8 (tokens,), its kind
        as a trace has it.
    """
    kinds = np.full(tokens, PROMPT_ROW if phase == PROMPT else COMPLETION_ROW, dtype=np.uint8)
    rows = np.zeros(tokens, dtype=np.int32)
    # Some models compute other tokens than they are given (images); then rows stay unassigned.
    if call is not None and tokens == call.batch * call.length:
        rows = np.repeat(np.arange(call.batch, dtype=np.int32), call.length)
        by_row = kinds.reshape(call.batch, call.length)
        by_row[:, call.prompt :] = COMPLETION_ROW
        padding = call.padding()
        # Rows of padding alone would be read as a prompt's, so they stay the completion's.
        if padding is not None and (phase == PROMPT or not padding.all()):
            by_row[padding.cpu().numpy()] = PADDING_ROW
    return rows, kinds


def describe_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], generating: Generating | None = None
) -> Batch | None:
    """
    What a call of the model with these arguments computes, or None if it has no token input.

    Within ``generate`` the prompt's length is known. Else a call of one token that continues an
    earlier call is completion, and any other is prompt.
    """
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None and args and isinstance(args[0], Tensor):
        tokens = args[0]
    if tokens is None or tokens.dim() < 2:
        return None
    batch, length = tokens.shape[:2]
    mask = _mask(kwargs.get("attention_mask"), batch, length)
    start = _start(length, mask, kwargs)
    if generating is None:
        return Batch(batch, length, start, 0 if start and length == 1 else length, mask)
    repeats = generating.began and start == 0 and length > generating.prompt
    prompt = min(max(generating.prompt - start, 0), length)
    return Batch(batch, length, start, prompt, mask, repeats)


def _mask(given: Any, batch: int, length: int) -> Tensor | None:
    """The attention mask in a form that tells padding; the widest of several."""
    if isinstance(given, Mapping):  # one per kind of layer
        given = given.get("full_attention", next(iter(given.values()), None))
    if not isinstance(given, Tensor) or given.shape[:1] != (batch,):
        return None
    if given.dim() == 2 and given.shape[1] >= length:
        return given
    return given if given.dim() == 4 and given.shape[2] == length else None


def _start(length: int, mask: Tensor | None, kwargs: Mapping[str, Any]) -> int:
    """How many tokens per row came before these."""
    if mask is not None and mask.dim() == 2 and mask.shape[1] > length:
        return mask.shape[1] - length
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs.get("cache_params")
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # A cache of recurrent states knows no length; where its next token stands tells.
        position = kwargs.get("cache_position", kwargs.get("position_ids"))
        last = int(position.max()) if isinstance(position, Tensor) else 0
        return max(last + 1 - length, 0)


def _padding_of(mask: Tensor, start: int) -> Tensor:
    """
    Padding by a mask ``(batch, query, key)``: boolean, true where a query sees a key; or added.

    A token that does not see itself is padding. But attention functions want every query to see
    some key, so queries of padding that would see none are let see all. Such a query says nothing
    of itself, and the next one that does not see all says whether it sees that token.
    """
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    batch, length, keys = seen.shape
    if start + length > keys:  # a window's cache: which key is whose is not known
        return torch.zeros(batch, length, dtype=torch.bool, device=mask.device)
    number = torch.arange(length, device=mask.device)
    telling = torch.where(seen.all(-1), length, number)
    telling = telling.flip(1).cummin(1).values.flip(1)  # the next that tells; length if none does
    telling = torch.where(telling == length, number, telling)
    rows = torch.arange(batch, device=mask.device)[:, None]
    return ~seen[rows, telling, start + number]
