"""
Follow a model's forward passes: where one begins, sequence and kind of each row.

Experts see the tokens of a layer and nothing else. `ForwardPasses` stands before the model's own
``forward`` and ``generate`` and sees the rest: the batch, its padding, the prompt's length.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.prefetch import MOST_ROWS, Route
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


class Listener(Protocol):
    """Is told of forward passes."""

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """A pass of *tokens* rows begins, within *call* if the model was called as a whole."""

    def add(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> None:
        """The rows of the open pass chose ``top_k_index`` ``(tokens, top_k)`` in *layer*."""

    def end(self) -> None:
        """The open pass is complete."""

    def drop(self) -> None:
        """Forget the open pass, which an exception has ended."""


class Ahead:
    """
    Tell which prefetches belong to the text to come, so that each is judged by its own text.

    A prefetch between passes belongs to the text whose pass comes next. An earlier one was for an
    earlier text, and wasted, even if a later text finds the expert resident; as the simulator says.
    *forget* is then called with what still counts, by layer (`Residency.forget_prefetches`).
    """

    def __init__(self, num_layers: int) -> None:
        self._by_layer: list[list[int]] = [[] for _ in range(num_layers)]  # for the text to come
        self._any = False  # whether anything was loaded ahead since a text began
        self.forget: Callable[[Sequence[Collection[int]]], None] = lambda _: None

    def loaded(self, layer: int, experts: Sequence[int], waits: bool) -> None:
        """*experts* of *layer* were loaded ahead; *waits*: between passes, not within one."""
        self._any |= bool(experts)
        if waits:
            self._by_layer[layer].extend(experts)

    def text_begins(self) -> None:
        """A text's first pass is about to begin."""
        if self._any:
            self.forget(self._by_layer)
            self._any = any(self._by_layer)

    def pass_begins(self) -> None:
        """Nothing waits for the pass that begins any more."""
        if self._any:
            self._by_layer = [[] for _ in self._by_layer]

    def reset(self) -> None:
        """Counters begin anew: nothing that was loaded so far counts."""
        self._by_layer = [[] for _ in self._by_layer]
        self.forget(self._by_layer)
        self._any = False

    @property
    def waiting(self) -> list[int]:
        """How many experts of each layer were loaded ahead for the text to come."""
        return [len(experts) for experts in self._by_layer]


class ForwardPasses:
    """
    Begins and ends the forward passes that counters and traces are made of.

    A pass begins when the first experts of a call run, so that its tokens are those that experts
    compute. Experts that run a second time before the call has ended begin another pass. Without a
    call (a submodule was called directly) a pass of one token counts as completion, any other as
    prompt. Passes that verify guesses (assisted decoding, prompt lookup) are completion: their
    tokens, wrong guesses included, come behind the prompt.

    Attributes:
        lock: Held by the thread whose call or ``generate`` runs; by others while they change what
            a call relies on.
        forward: Computes a call of the model; its own, unless a compiled one stands in.
        check: Called before each call of the model; raises if it cannot be served.
        recorder, prompt_uses: Told of every pass, if there are any.
        before_completion: Called once, when the next pass of the completion begins and before it
            asks for any expert; then forgotten.
        reads_ahead: Whether whoever loads wants the next router asked in every pass, if it can be.
        early: What the next layer's router said in the layer entered last; None if not asked.
        guess: The same in passes of the completion with few rows, as prefetchers and traces see it.
        route: Which layer comes next; whoever serves a request tells it.
        ahead: Which prefetches belong to the text to come.
        phase, tokens: Of the open pass, or of the last one.
        fallbacks: Decode steps that the host planned where the device should.
        inside: Whether a call of the model has begun and not returned.
    """

    def __init__(self, model: nn.Module, counters: Counters) -> None:
        self.counters = counters
        self.lock = threading.RLock()
        self.forward: Callable[..., Any] = model.forward
        self.check: Callable[[], object] = lambda: None
        self.recorder: Listener | None = None
        self.prompt_uses: Listener | None = None
        self.before_completion: Callable[[], None] | None = None
        self.reads_ahead = False
        self.guess: Tensor | None = None
        self.early: Tensor | None = None
        self.route = Route(counters.num_layers)
        self.ahead = Ahead(counters.num_layers)
        self.phase = PROMPT
        self.tokens = 0
        self.fallbacks = 0
        self.inside = False
        self._model = model
        self._batch = 0  # sequences of the text that began last
        self._call: Batch | None = None
        self._generating: Generating | None = None
        self._seen = 0  # bit i: layer i has run in the open pass
        self._warned_of_compiling = False
        self._routers: NextRouters | None = None
        self._askers = 0

    def enter(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> None:
        """Experts of *layer* are about to run on ``top_k_index`` ``(tokens, top_k)``."""
        bit = 1 << layer
        if not self._seen or self._seen & bit:
            if not self.inside:  # a submodule was called directly
                self.check()
            self._begin(top_k_index.shape[0])
        self._seen |= bit
        for listener in self._listeners():
            listener.add(layer, top_k_index, top_k_weights)
        if self._routers is not None:
            self._ask_early(self._routers, layer, *top_k_index.shape)

    def prefetched(self, layer: int, experts: Sequence[int]) -> None:
        """*experts* of *layer* have been loaded ahead."""
        self.ahead.loaded(layer, experts, waits=not self._seen)

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
            self.route.drop_pass()
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

    @property
    def decodes_few(self) -> bool:
        """Whether the open pass is one in which prefetchers are asked between layers."""
        return self.phase == COMPLETION and self.tokens <= MOST_ROWS

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

    def _listeners(self) -> Iterator[Listener]:
        if self.recorder is not None:
            yield self.recorder
        if self.prompt_uses is not None:
            yield self.prompt_uses

    def _begin(self, tokens: int) -> None:
        self.end()
        phase = self.phase_of_next(tokens)
        if phase == COMPLETION:
            self._completion_begins()  # of a submodule; a call of the model said so earlier
        self.counters.begin_forward(phase, tokens)
        self._tell(phase, tokens)

    def _tell(self, phase: int, tokens: int) -> None:
        """Tell whoever follows that a pass has begun."""
        self.phase, self.tokens = phase, tokens
        if phase == PROMPT and (self._call is None or self._call.begins_text(self._batch)):
            self._batch = 1 if self._call is None else self._call.batch
            self.ahead.text_begins()
        self.ahead.pass_begins()
        for listener in self._listeners():
            listener.begin(phase, tokens, self._call)

    def _end_uncounted(self) -> None:
        self._seen = 0
        self.route.end_pass()
        for listener in self._listeners():
            listener.end()

    @contextmanager
    def asking_next_routers(self) -> Iterator[None]:
        """
        Have the next router asked early in the body; several may want it.

        Raises:
            UnsupportedModelError: this model's cannot be asked.
        """
        with self.lock:  # not in the midst of another thread's pass
            if self._routers is None:
                self._routers = NextRouters(find_routers(self._model))
            self._askers += 1
        try:
            yield
        finally:
            with self.lock:
                self._askers -= 1
                if not self._askers:
                    self._ask_no_more()

    def _ask_no_more(self) -> None:
        if self._routers is not None:
            self._routers.close()
        self._routers = self.guess = self.early = None

    def _ask_early(self, routers: NextRouters, layer: int, rows: int, top_k: int) -> None:
        few = self.decodes_few
        target = self.route.after(layer) if few or self.reads_ahead else None
        self.guess = self.early = None
        if target is None:
            routers.forget(layer)
            return
        try:
            self.early = routers.guess(layer, target, rows, top_k)
        except UnsupportedModelError:
            if not self.reads_ahead or self._askers > 1:
                raise
            self._ask_no_more()  # only speed asked for it
            return
        if few:
            self.guess = self.early
            tell = getattr(self.recorder, "add_guess", None)
            if tell is not None:
                tell(target, self.guess)

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
    """
    Sequence and kind of each row of a pass of *tokens* rows within *call*, if there is one.

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
    Describe what a call of the model computes; None if it has no token input.

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


# --- generate -----------------------------------------------------------------------------------


def watch_generate(
    model: nn.Module, passes: ForwardPasses, *, may_compile: bool = False
) -> Callable[[], None]:
    """
    Put a ``generate`` before the model's own that tells *passes* when it begins and ends.

    Unless *may_compile*, it also forbids compilation, which transformers begins by itself with a
    static cache on a GPU: the experts ask the host who is resident. The caller's generation config
    is not touched; the model's own is, until what is returned puts all back.
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
