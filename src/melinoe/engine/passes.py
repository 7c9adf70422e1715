"""
Follow a model's forward passes: where one begins, sequence and kind of each row.

`ForwardPasses` stands before the model's own ``forward`` and ``generate``, because experts see the
tokens of a layer and nothing else.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.trace import COMPLETION_ROW, PADDING_ROW, PROMPT_ROW
from melinoe.errors import AttachError, TraceError, UnsupportedModelError
from melinoe.moe.dispatch import NOT_COMPILED, refuse_one_graph
from melinoe.moe.next_router import NextRouters
from melinoe.moe.routing import find_routers

_log = logging.getLogger("melinoe")


@dataclass
class Generating:
    """A ``generate`` that is under way."""

    prompt: int  # tokens per row that it was given; all that come behind them are its own
    began: bool = False  # whether it has called the model yet
    warned: bool = False  # whether it was said that it computes the prompt again and again
    guesses: bool = False  # whether the model makes them itself, by a ``generate`` inside this one
    drafts: int = 0  # how many of those run
    chunked: bool = False  # whether the prompt comes in several calls, and may not be over yet


@dataclass(frozen=True)
class Batch:
    """One call of the model: *batch* rows of *length* tokens."""

    batch: int
    length: int
    start: int  # tokens per row that came before; their keys and values are in the cache
    prompt: int  # how many of the *length* tokens are the prompt's, the others are completion
    mask: Tensor | None  # (batch, length or more), or (batch, 1 or more, length, length or more)
    repeats: bool = False  # whether ``generate`` computes the prompt once more, having no cache

    @property
    def phase(self) -> int:
        """`PROMPT` if some token is the prompt's, else `COMPLETION`."""
        return PROMPT if self.prompt else COMPLETION

    def begins_text(self, batch: int) -> bool:
        """Whether a prompt's pass begins a text, *batch* being the rows of the text before."""
        return not (self.start > 0 or self.repeats) or self.batch != batch

    def padding(self) -> Tensor | None:
        """Bool ``(batch, length)``, true where a token is padding; None if no mask tells."""
        if self.mask is None:
            return None
        if self.mask.dim() == 2:
            return ~self.mask[:, -self.length :].bool()
        return _padding_of(self.mask[:, 0], self.start)


class ForwardPasses:
    """
    Begins and ends the forward passes that counters and traces are made of.

    A pass begins when the first experts of a call run; experts that run a second time begin
    another. Without a call (a submodule was called directly) a pass of one token counts as
    completion, any other as prompt; passes that verify guesses are completion. *lock* is held by
    the thread whose call runs; *recorder* and *prompt_uses* are told of every pass;
    *before_completion* is called once; *early*: what the next layer's router said in the layer
    entered last.
    """

    def __init__(self, model: nn.Module, counters: Counters) -> None:
        self.counters = counters
        self.lock = threading.RLock()
        self.forward: Callable[..., Any] = model.forward
        self.check: Callable[[], object] = lambda: None
        self.recorder: Any = None
        self.prompt_uses: Any = None
        self.before_completion: Callable[[], None] | None = None
        self.early: Tensor | None = None
        self.fallbacks = 0
        self.inside = False
        self._model = model
        self._call: Batch | None = None
        self._generating: Generating | None = None
        self._seen = 0  # bit i: layer i has run in the open pass
        self._warned_of_compiling = False
        self._routers: NextRouters | None = None

    def enter(self, layer: int, top_k_index: Tensor) -> None:
        """Experts of *layer* are about to run on ``top_k_index`` ``(tokens, top_k)``."""
        bit = 1 << layer
        if not self._seen or self._seen & bit:
            if not self.inside:  # a submodule was called directly
                self.check()
            self._begin(top_k_index.shape[0])
        self._seen |= bit
        for listener in self._listeners():
            listener.add(layer, top_k_index)
        if self._routers is not None:
            self._ask_early(self._routers, layer, *top_k_index.shape)

    def end(self) -> None:
        """End the open pass, if one is open."""
        if self._seen:
            self.counters.end_forward()
            self._end_uncounted()

    def settle(self) -> None:
        """Between calls of the model: end a pass that is open, as one of a submodule may be."""
        if not self.inside:
            self.end()

    def drop(self) -> None:
        """Drop the open pass, which an exception has ended: its requests stay counted."""
        if self._seen:
            self._seen = 0
            for listener in self._listeners():
                listener.drop()

    @contextmanager
    def generate(self, generating: Generating | None) -> Iterator[None]:
        """The body of the ``with`` statement is a ``generate``; *generating* is what is known."""
        with self.lock:
            outer = self._generating
            if outer is not None and outer.guesses:  # the model makes them for itself
                outer.drafts += 1
                try:
                    yield
                finally:
                    outer.drafts -= 1
                return
            self._generating = generating
            self.check()  # a captured step is replayed without a call of the model
            try:
                yield
            finally:
                self._generating = outer

    def phase_of_next(self, tokens: int) -> int:
        """Phase of a pass that would now run experts on so many tokens."""
        if self._call is not None:
            return self._call.phase
        return COMPLETION if tokens == 1 else PROMPT

    def follow(self) -> Callable[[], None]:
        """Stand before the model's own ``forward`` from now on; returns what ends that."""
        own, attached = self.forward, True

        # A compiler that looked inside would keep for good what is asked and counted once.
        @torch.compiler.disable(reason=NOT_COMPILED)
        def call(compiling: bool, *args: Any, **kwargs: Any) -> Any:
            if compiling and attached and not self._warned_of_compiling:
                self._warned_of_compiling = True
                _log.warning(
                    "torch.compile leaves the forward pass of an offloaded model as it is, because "
                    "its experts ask the host which of them are resident"
                )
            with self.lock:
                if attached:
                    return self._run(args, kwargs)
            return own(*args, **kwargs)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            compiling = torch.compiler.is_dynamo_compiling()
            if compiling and attached:
                refuse_one_graph()
            return call(compiling, *args, **kwargs)

        put_back = _stand_before(self._model, "forward", forward)

        def undo() -> None:
            nonlocal attached
            self.settle()
            attached = False  # somebody may have put another before ours, which then stays
            put_back()

        return undo

    # --- inner ----------------------------------------------------------------------------------

    def _listeners(self) -> list[Any]:
        return [one for one in (self.recorder, self.prompt_uses) if one is not None]

    def _begin(self, tokens: int) -> None:
        self.end()
        phase = self.phase_of_next(tokens)
        if phase == COMPLETION:
            self._completion_begins()  # of a submodule; a call of the model said so earlier
        self.counters.begin_forward(phase, tokens)
        self._tell(phase, tokens)

    def _tell(self, phase: int, tokens: int) -> None:
        """Tell whoever follows that a pass has begun."""
        for listener in self._listeners():
            listener.begin(phase, tokens, self._call)

    def _end_uncounted(self) -> None:
        self._seen = 0
        for listener in self._listeners():
            listener.end()

    def ask_next_routers(self) -> Callable[[], None]:
        """Have each next router asked early, for speed alone, if it can be; returns the undo."""
        with suppress(UnsupportedModelError):
            self._routers = NextRouters(find_routers(self._model))
        return self._ask_no_more

    def _ask_no_more(self) -> None:
        if self._routers is not None:
            self._routers.close()
        self._routers = self.early = None

    def _ask_early(self, routers: NextRouters, layer: int, rows: int, top_k: int) -> None:
        self.early = None
        try:
            if layer + 1 < self.counters.num_layers:
                self.early = routers.guess(layer, layer + 1, rows, top_k)
        except UnsupportedModelError:
            self._ask_no_more()

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One call of the model."""
        if self.inside:
            raise AttachError(
                "the model was called while it computes another call, as by a hook on one of its "
                "layers; call it when that call has returned"
            )
        self.check()
        self.settle()
        self.inside = True
        try:
            self._before(args, kwargs)
            output = self.forward(*args, **kwargs)
            self.end()
        except BaseException:
            self.drop()
            raise
        finally:
            self.inside, self._call = False, None
        return output

    def _before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call with these arguments is about to run."""
        call = self._call = describe_call(args, kwargs, self._generating)
        generating = self._generating
        if generating is not None and not generating.drafts:
            generating.began = True
            if call is not None and call.repeats and self.recorder is not None:
                raise TraceError(
                    "this generation runs without a key-value cache, so each pass computes the "
                    "whole text again, which a trace cannot hold; generate with use_cache=True"
                )
            if call is not None and call.repeats and not generating.warned:
                generating.warned = True
                _log.warning(
                    "generation without a key-value cache computes the prompt again for each "
                    "token, so all its passes count as the prompt's; use_cache=True avoids both"
                )
        if call is not None and call.phase == COMPLETION:
            self._completion_begins()

    def _completion_begins(self) -> None:
        act, self.before_completion = self.before_completion, None
        if act is not None:
            act()


def _stand_before(model: nn.Module, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Make *function* the method *name* of this *model*; returns what puts the old one back."""
    own = vars(model)  # not setattr: nothing of it may be registered
    before = own.get(name)
    own[name] = function

    def undo() -> None:
        if own.get(name) is function:
            del own[name]
            if before is not None:
                own[name] = before

    return undo


# --- calls of the model -------------------------------------------------------------------------


def rows_of(call: Batch | None, phase: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the batch's row of each row of a pass, int32, and its kind as in a trace, uint8."""
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
    Describe what a call of the model computes; None if it has no token input. Outside ``generate``
    a call of one token that continues an earlier one is completion, any other prompt.
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
    Padding by a mask ``(batch, query, key)``: boolean, true where a query sees a key; or added. A
    token that does not see itself is padding. But queries of padding that would see no key are let
    see all: of those the next query that does not see all says whether it sees that token.
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


def request_of(top_k_index: Tensor, num_experts: int) -> tuple[list[int], list[int], bool]:
    """List the distinct ids, ascending, and their uses; and whether every choice is an expert."""
    if top_k_index.shape[0] == 1:
        chosen = sorted(top_k_index.tolist()[0])
        distinct = len(set(chosen)) == len(chosen)
        if distinct and chosen[0] >= 0 and chosen[-1] < num_experts:
            return chosen, [1] * len(chosen), True
    ids = top_k_index.reshape(-1).cpu().numpy()
    known = ids[(ids >= 0) & (ids < num_experts)]
    counts = np.bincount(known, minlength=num_experts)
    experts = counts.nonzero()[0]
    return experts.tolist(), counts[experts].tolist(), known.size == ids.size


# --- generate -----------------------------------------------------------------------------------


def watch_generate(
    model: nn.Module, passes: ForwardPasses, *, may_compile: bool = False
) -> Callable[[], None]:
    """
    Put a ``generate`` before the model's own that tells *passes* when it begins and ends. Unless
    *may_compile*, it also forbids compilation, which transformers begins by itself with a static
    cache on a GPU; the caller's generation config is not touched. Returns the undo.
    """
    original = getattr(model, "generate", None)
    if not callable(original):
        return lambda: None
    own: Any = getattr(model, "generation_config", None)
    compiling = getattr(own, "disable_compile", None)
    forbids = own is not None and not may_compile
    if forbids:
        own.disable_compile = True
    parameters = inspect.signature(original).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        given = kwargs.get("generation_config")
        if not may_compile and kwargs.get("disable_compile") is False:
            _log.warning("disable_compile=False is overruled: offloaded experts cannot be compiled")
            kwargs["disable_compile"] = True
        if not may_compile and given is not None:
            given = kwargs["generation_config"] = copy.deepcopy(given)
            given.disable_compile = True
        # Before anything runs: transformers shortens the model for its guesses, and an exception
        # in the middle of that would leave it short.
        name = "assistant_early_exit"
        early = kwargs[name] if name in kwargs else getattr(given or own, name, None)
        if passes.recorder is not None and early is not None:
            raise TraceError(
                "a trace cannot hold guesses that the model makes with its own first layers; "
                "generate without assistant_early_exit, or do not record"
            )
        known = None
        # The mask covers what a cache holds already where only the new tokens are given.
        inputs = map(kwargs.get, ("inputs", "input_ids", "inputs_embeds", "attention_mask"))
        lengths = [one.shape[1] for one in inputs if isinstance(one, Tensor) and one.dim() >= 2]
        if lengths and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            sizes = [getattr(one, "prefill_chunk_size", None) for one in (given, own)]
            known = Generating(
                max(lengths),
                guesses=early is not None or kwargs.get("assistant_model") is model,
                chunked=any([kwargs.get("prefill_chunk_size"), *sizes]),
            )
        with passes.generate(known):
            return original(*args[len(names) :], **kwargs)

    put_back = _stand_before(model, "generate", generate)

    def restore() -> None:
        put_back()
        if forbids:
            own.disable_compile = compiling

    return restore
