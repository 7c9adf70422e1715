"""What follows a handle's forward passes for a while: recordings, meters, prefetchers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from melinoe.cache.counters import Counters
from melinoe.cache.prefetch import Prefetcher
from melinoe.engine.choosing import Choosing
from melinoe.engine.expert_cache import ExpertCache
from melinoe.engine.passes import ForwardPasses
from melinoe.engine.prefetching import Prefetching
from melinoe.engine.record import Recorder
from melinoe.engine.usage import UseMeter
from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.moe.experts import ExpertsLayer
from melinoe.moe.next_router import NextRouters
from melinoe.moe.routing import find_routers, fingerprint


class Following:
    """The part of `melinoe.engine.handle.Handle` that looks on, or ahead, while the model runs."""

    layers: tuple[ExpertsLayer, ...]
    slots: int
    slots_by_layer: tuple[int, ...]
    policy: str
    _model: nn.Module
    _passes: ForwardPasses
    _caches: list[Any]
    _counters: Counters
    _choosing: Choosing | None
    _prefetching: Prefetching | None
    _askers: int

    @property
    def lock(self) -> threading.RLock:
        """Held by the thread whose call of the model runs."""
        raise NotImplementedError

    def _check_attached(self) -> None:
        raise NotImplementedError

    @property
    def counters(self) -> Counters:
        """What was counted since the start or `reset_counters`; a copy."""
        return self._counters.copy()

    @property
    def counters_before_text(self) -> Counters:
        """
        As `counters`, without the prefetches that wait for the text to come.

        Those are part of its cost, so this is what to subtract from the counters after it.
        """
        counters = self.counters
        for layer, count in enumerate(self._passes.ahead.waiting):
            counters.add_prefetch(layer, -count)
        return counters

    @contextmanager
    def prefetching(
        self, prefetcher: Prefetcher, ids: Sequence[int] | None = None
    ) -> Iterator[None]:
        """
        Load ahead what *prefetcher* names, for the one sequence that the body generates.

        It is asked at once for what to load before the prompt; when the first pass of the
        completion begins; and in each pass of the completion with few rows
        (`melinoe.cache.prefetch.MOST_ROWS`) between layers. One that only speaks between layers
        serves any number of sequences, batches too. What the model says stays the same.

        Args:
            prefetcher: Bound to the model, if it reads prompts (`Prefetcher.bind`).
            ids: Token ids of the prompt, for one that reads them.

        Raises:
            AttachError: detached; another prefetcher is at work, or `Handle.prefetch` waits for a
                completion that this one would speak for; or this engine cannot ask between layers.
                From the body: several prompts came together.
            UnsupportedModelError: it asks the next router, and this model's cannot be asked.
            ValueError: it reads prompts and there is none; an answer that does not name every
                layer, or an id that is out of range or given twice.
        """
        with ExitStack() as stack:
            with self.lock:
                self._begin_prefetching(stack, prefetcher, ids)
            yield

    def _begin_prefetching(
        self, stack: ExitStack, prefetcher: Prefetcher, ids: Sequence[int] | None
    ) -> None:
        """Ask *prefetcher* from now on, until *stack* is closed."""
        self._check_attached()
        if self._prefetching is not None:
            raise AttachError("a prefetcher is at work already; end it before you begin another")
        if prefetcher.for_prompt and self._passes.before_completion is not None:
            raise AttachError(
                "a prefetch waits for the next completion already, and a prefetcher would take its "
                "place; call drop_prefetch() first"
            )
        if prefetcher.uses_ids and ids is None:
            raise ValueError(f"prefetch {prefetcher.name!r} reads prompts; give its token ids")
        if prefetcher.between_layers and not all(type(one) is ExpertCache for one in self._caches):
            raise AttachError(
                f"this engine cannot ask prefetch {prefetcher.name!r} between layers, because its "
                'steps never return to the host; load the model with engine="reference"'
            )
        experts = [layer.num_experts for layer in self.layers]
        work = Prefetching(
            prefetcher,
            self._caches,
            self._passes,
            self._counters,
            self.slots_by_layer,
            experts,
            ids,
        )
        if prefetcher.uses_guesses:
            stack.enter_context(self._asking_next_routers())
        self._prefetching = work
        stack.callback(setattr, self, "_prefetching", None)
        stack.callback(work.close)
        work.begin()

    @contextmanager
    def _asking_next_routers(self) -> Iterator[None]:
        """Have the next router asked early; recording and prefetching may both want it."""
        if self._passes.next_routers is None:
            self._passes.next_routers = NextRouters(find_routers(self._model))
        self._askers += 1
        try:
            yield
        finally:
            self._askers -= 1
            if not self._askers:
                self._passes.next_routers.close()
                self._passes.next_routers = self._passes.guess = None

    @contextmanager
    def record(
        self, model_name: str = "", scores: bool = False, guesses: bool = False
    ) -> Iterator[Recorder]:
        """
        Record what the routers choose in the body of the ``with`` statement.

        Args:
            model_name: for the trace's header; absent means the configuration's name.
            scores: also the weight that each choice was given, as the policy ``score`` needs it.
            guesses: also what each layer's router says one layer early while decoding, as the
                prefetch ``next-router`` needs it.

        Raises:
            AttachError: something is being recorded already, or the runtime is detached.
            UnsupportedModelError: no router is found, by which a trace is told from another
                model's; or guesses are wanted of one that cannot be asked.
        """
        self._check_attached()
        config = getattr(self._model, "config", None)
        name = model_name or getattr(config, "_name_or_path", "") or type(self._model).__name__
        try:
            which = fingerprint(self._model)
        except UnsupportedModelError:
            raise UnsupportedModelError(
                f"{name} cannot be recorded: beside some of its experts no router is found, so its "
                "trace could not be told from another model's; read handle.counters instead"
            ) from None
        experts = [layer.num_experts for layer in self.layers]
        note = "" if self._choosing is None else self._choosing.note(self.policy, self.slots)
        recorder = Recorder(experts, name, which, scores=scores, guesses=guesses, note=note)
        with ExitStack() as stack:
            if guesses:
                stack.enter_context(self._asking_next_routers())
            stack.enter_context(self._telling(recorder))
            yield recorder

    @contextmanager
    def measure_uses(self) -> Iterator[UseMeter]:
        """
        Count which experts completions choose in the body of the ``with`` statement.

        Cheaper than `record`, and for models too that cannot be recorded; nothing is kept of who
        chose what when.

        Raises:
            AttachError: something is being recorded already, or the runtime is detached.
        """
        self._check_attached()
        meter = UseMeter([layer.num_experts for layer in self.layers])
        with self._telling(meter):
            yield meter

    @contextmanager
    def _telling(self, listener: Recorder | UseMeter) -> Iterator[None]:
        """Tell *listener* of each pass that begins in the body of the ``with`` statement."""
        with self.lock:
            if self._passes.recorder is not None:
                raise AttachError("a recording is running already; end it before you begin another")
            self._passes.recorder = listener
        try:
            yield
        finally:
            with self.lock:  # not in the midst of another thread's pass
                self._passes.settle()
                self._passes.recorder = None
