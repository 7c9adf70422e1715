"""Follow a model's forward passes: where one begins, which phase it is, what each row is.

The experts of a layer see tokens, not requests of a user. Hooks on the whole model see the rest:
the batch, its padding, and whether anything came before; `melinoe.runtime.generating` tells when
``generate`` is under way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.prefetcher import MOST_ROWS
from melinoe.cache.route import Route
from melinoe.errors import TraceError
from melinoe.moe.next_router import NextRouters
from melinoe.runtime.ahead import Ahead
from melinoe.runtime.calls import Batch, Generating, describe_call

_log = logging.getLogger("melinoe")

if TYPE_CHECKING:
    from melinoe.runtime.prompt_uses import PromptUses
    from melinoe.runtime.record import Recorder
    from melinoe.runtime.usage import UseMeter


class ForwardPasses:
    """
    Begins and ends the forward passes that counters and traces are made of.

    A pass begins when the first experts of a call run, so that its tokens are those that experts
    compute. Experts that run a second time before the call has ended begin another pass. Without a
    call (a submodule was called directly) a pass of one token counts as completion, any other as
    prompt.

    Passes that verify guesses (assisted decoding, prompt lookup) are completion like any other:
    their tokens, wrong guesses included, come behind the prompt.

    Attributes:
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
    """

    def __init__(self, model: nn.Module, counters: Counters) -> None:
        self.counters = counters
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
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def enter(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> None:
        """Experts of *layer* are about to run on ``top_k_index`` ``(tokens, top_k)``."""
        bit = 1 << layer
        if not self._seen or self._seen & bit:
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
        """
        Between calls of the model: end the open pass, or drop it if its call never returned.

        An exception leaves such a pass behind: its requests stay counted, the pass does not, and
        no trace holds it.
        """
        if not self._inside:
            self.end()  # a submodule was called directly
        elif self._seen:
            self._seen = 0
            self.route.drop_pass()
            if self.recorder is not None:
                self.recorder.drop()
        self._inside = False
        self._call = None

    @contextmanager
    def generate(self, generating: Generating | None) -> Iterator[None]:
        """The body of the ``with`` statement is a ``generate``; *generating* is what is known."""
        outer = self._generating
        if outer is not None:  # the model makes guesses for itself, with its first layers
            outer.drafts += 1
        else:
            self._generating = generating
        try:
            yield
        finally:
            if outer is not None:
                outer.drafts -= 1
            else:
                self._generating = None

    def close(self) -> None:
        """Take the hooks off the model."""
        self.settle()
        for hook in self._hooks:
            hook.remove()

    def phase_of_next(self, tokens: int) -> int:
        """Phase of a pass that would now run experts on so many tokens."""
        if self._call is not None:
            return self._call.phase
        return COMPLETION if tokens == 1 else PROMPT

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

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.settle()
        self._inside = True
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

    def _after(self, *_: Any) -> None:
        self.end()
        self._inside = False
        self._call = None

    def _completion_begins(self) -> None:
        act, self.before_completion = self.before_completion, None
        if act is not None:
            act()
