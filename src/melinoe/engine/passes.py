"""Follow a model's forward passes: where one begins, which phase it is, what each row is.

The experts of a layer see tokens, not requests of a user. Whoever stands before the model's own
``forward`` sees the rest: the batch, its padding, and whether anything came before;
`melinoe.engine.generating` tells when ``generate`` is under way.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from melinoe.cache.ahead import Route
from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.prefetch import MOST_ROWS
from melinoe.engine.ahead import Ahead
from melinoe.engine.calls import Batch, Generating, describe_call
from melinoe.errors import AttachError, TraceError
from melinoe.moe.dispatch import NOT_COMPILED
from melinoe.moe.next_router import NextRouters

_log = logging.getLogger("melinoe")

if TYPE_CHECKING:
    from melinoe.engine.prompt_uses import PromptUses
    from melinoe.engine.record import Recorder
    from melinoe.engine.usage import UseMeter


class ForwardPasses:
    """
    Begins and ends the forward passes that counters and traces are made of.

    A pass begins when the first experts of a call run, so that its tokens are those that experts
    compute. Experts that run a second time before the call has ended begin another pass. Without a
    call (a submodule was called directly) a pass of one token counts as completion, any other as
    prompt.

    Passes that verify guesses (assisted decoding, prompt lookup) are completion like any other:
    their tokens, wrong guesses included, come behind the prompt.

    One call at a time: another thread waits until the call that runs has returned, or the
    ``generate`` that it belongs to.

    Attributes:
        lock: held by the thread whose call or ``generate`` runs; by others while they change what
            a call relies on.
        forward: what computes a call of the model; its own, unless a compiled one stands in.
        check: called before each call of the model; raises if it cannot be served.
        recorder: told of every pass, if there is one.
        before_completion: called once, when the next pass of the completion begins and before it
            asks for any expert; then forgotten.
        prompt_uses: counts which experts a prompt's tokens choose, if somebody wants to know.
        next_routers: asked early in passes of the completion with few rows, if somebody wants to
            know.
        guess: what the next layer's router said in the layer entered last; None if it was not
            asked.
        route: which layer comes next; whoever serves a request tells it.
        ahead: which prefetches belong to the text to come.
        phase: of the open pass, or of the last one.
        fallbacks: decode steps that the host planned where the device should; see
            `melinoe.engine.device.passes`.
    """

    def __init__(self, model: nn.Module, counters: Counters) -> None:
        self.counters = counters
        self.lock = threading.RLock()
        self.forward: Callable[..., Any] = model.forward
        self.check: Callable[[], object] = lambda: None
        self.recorder: Recorder | UseMeter | None = None
        self.before_completion: Callable[[], None] | None = None
        self.prompt_uses: PromptUses | None = None
        self.next_routers: NextRouters | None = None
        self.guess: Tensor | None = None
        self.route = Route(counters.num_layers)
        self.ahead = Ahead(counters.num_layers)
        self.phase = PROMPT
        self.tokens = 0
        self._batch = 0  # sequences of the text that began last
        self._call: Batch | None = None
        self._generating: Generating | None = None
        self._inside = False  # a call of the model has begun and not returned
        self._seen = 0  # bit i: layer i has run in the open pass
        self._warned_of_compiling = False
        self.fallbacks = 0
        self._model = model

    def enter(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> None:
        """Experts of *layer* are about to run on ``top_k_index`` ``(tokens, top_k)``."""
        bit = 1 << layer
        if not self._seen or self._seen & bit:
            if not self._inside:  # a submodule was called directly
                self.check()
            self._begin(top_k_index.shape[0])
        self._seen |= bit
        if self.recorder is not None:
            self.recorder.add(layer, top_k_index, top_k_weights)
        if self.prompt_uses is not None and self.phase == PROMPT:
            self.prompt_uses.add(layer, top_k_index)
        if self.next_routers is not None:
            self._ask_early(self.next_routers, layer, *top_k_index.shape)

    def prefetched(self, layer: int, experts: Sequence[int]) -> None:
        """*experts* of *layer* have been loaded ahead."""
        self.ahead.loaded(layer, experts, waits=not self._seen)

    def end(self) -> None:
        """End the open pass, if one is open."""
        if self._seen:
            self._seen = 0
            self.route.end_pass()
            self.counters.end_forward()
            if self.recorder is not None:
                self.recorder.end()

    def settle(self) -> None:
        """Between calls of the model: end a pass that is open, as one of a submodule may be."""
        if not self._inside:
            self.end()

    def drop(self) -> None:
        """
        Drop the open pass, which an exception has ended.

        Its requests stay counted, the pass does not, and no trace holds it.
        """
        if self._seen:
            self._seen = 0
            self.route.drop_pass()
            if self.recorder is not None:
                self.recorder.drop()

    @contextmanager
    def generate(self, generating: Generating | None) -> Iterator[None]:
        """The body of the ``with`` statement is a ``generate``; *generating* is what is known."""
        with self.lock:
            outer = self._generating
            guesses = outer is not None and outer.guesses
            if guesses:  # the model makes them for itself
                assert outer is not None
                outer.drafts += 1
            else:
                self._generating = generating
                self.check()  # a captured step is replayed without a call of the model
            try:
                yield
            finally:
                if guesses:
                    assert outer is not None
                    outer.drafts -= 1
                else:
                    self._generating = outer

    def phase_of_next(self, tokens: int) -> int:
        """Phase of a pass that would now run experts on so many tokens."""
        if self._call is not None:
            return self._call.phase
        return COMPLETION if tokens == 1 else PROMPT

    @property
    def inside(self) -> bool:
        """Whether a call of the model runs."""
        return self._inside

    @property
    def decodes_few(self) -> bool:
        """Whether the open pass is one in which prefetchers are asked between layers."""
        return self.phase == COMPLETION and self.tokens <= MOST_ROWS

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
        call, batch = self._call, 1 if self._call is None else self._call.batch
        # As a recording tells sequences apart.
        if phase == PROMPT and not (call is not None and call.continues and batch == self._batch):
            self._batch = batch
            self.ahead.text_begins()
        self.ahead.pass_begins()
        if self.recorder is not None:
            self.recorder.begin(phase, tokens, self._call)
        if self.prompt_uses is not None and phase == PROMPT:
            self.prompt_uses.begin(phase, tokens, self._call)

    def _ask_early(self, routers: NextRouters, layer: int, rows: int, top_k: int) -> None:
        target = self.route.after(layer) if self.decodes_few else None
        if target is None:
            self.guess = None
            routers.forget(layer)
            return
        self.guess = routers.guess(layer, target, rows, top_k)
        tell = getattr(self.recorder, "add_guess", None)
        if tell is not None:
            tell(target, self.guess)

    def follow(self) -> Callable[[], None]:
        """Stand before the model's own ``forward`` from now on; returns what ends that."""
        model = self._model
        before = vars(model).get("forward")
        own = self.forward
        attached = True

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
            return call(torch.compiler.is_dynamo_compiling(), *args, **kwargs)

        def undo() -> None:
            nonlocal attached
            self.settle()
            attached = False  # somebody may have put another before ours, which then stays
            if vars(model).get("forward") is forward:
                del vars(model)["forward"]
                if before is not None:
                    vars(model)["forward"] = before

        vars(model)["forward"] = forward  # not setattr: nothing of it may be registered
        return undo

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One call of the model."""
        if self._inside:
            raise AttachError(
                "the model was called while it computes another call, as by a hook on one of its "
                "layers; call it when that call has returned"
            )
        self.check()
        self.settle()
        self._inside = True
        try:
            self._before(args, kwargs)
            output = self.forward(*args, **kwargs)
            self.end()
        except BaseException:
            self.drop()
            raise
        finally:
            self._inside, self._call = False, None
        return output

    def _before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call with these arguments is about to run."""
        self._call = describe_call(args, kwargs, self._generating)
        if self._generating is not None:
            self._check(self._generating)
        if self._call is not None and self._call.phase == COMPLETION:
            self._completion_begins()

    def _check(self, generating: Generating) -> None:
        """Say, or refuse to record, that the prompt is computed again and again."""
        if generating.drafts:
            return
        generating.began = True
        if self._call is None or not self._call.repeats:
            return
        if self.recorder is not None:
            raise TraceError(
                "this generation runs without a key-value cache, so each pass computes the whole "
                "text again, which a trace cannot hold; generate with use_cache=True"
            )
        if not generating.warned:
            generating.warned = True
            _log.warning(
                "generation without a key-value cache computes the prompt again for each token, "
                "so all its passes count as the prompt's; use_cache=True avoids both"
            )

    def _completion_begins(self) -> None:
        act, self.before_completion = self.before_completion, None
        if act is not None:
            act()
