"""The runtime at work on a model: what it counted, what it can be told, and how it leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from melinoe.cache.counters import Counters
from melinoe.cache.policy import Policy
from melinoe.engine.audit import audit
from melinoe.engine.budget import slots_by_layer
from melinoe.engine.choosing import Choosing
from melinoe.engine.expert_cache import ExpertCache
from melinoe.engine.following import Following
from melinoe.engine.generating import watch_generate
from melinoe.engine.host_experts import HostExperts
from melinoe.engine.misses import Misses
from melinoe.engine.passes import ForwardPasses
from melinoe.engine.prefetching import Prefetching
from melinoe.engine.store import Store
from melinoe.engine.stream_order import StreamOrder
from melinoe.engine.transfer import EmulatedLink, transfer_for
from melinoe.engine.weights import free_weights, give_weights_back, refuse_copies
from melinoe.errors import AttachError
from melinoe.moe.choice import ChoiceSettings
from melinoe.moe.dispatch import bind, still_used, unbind, use_melinoe
from melinoe.moe.experts import ExpertsLayer, watch_for_adapters


class Handle(Following):
    """
    A runtime at work on a model. Made by `attach`, `attach_stores` or `load`.

    Also a context manager: leaving it detaches. Several threads may call the model, and the
    methods here: calls run one after another, a `generate` as a whole. Reading waits for nobody.
    A recording holds whatever ran meanwhile, whichever thread asked for it.

    Attributes:
        slots: slots per layer, as given or as the memory allowed; the most, where layers differ.
        slots_by_layer: of each layer.
        policy: name of the cache policy.
        store: where the experts are that are not resident.
        link: the emulated link, or None where experts come over the real one.
        misses: what is done about a miss, and the figures that decide it.
        layers: the MoE layers, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertsLayer],
        store: Store,
        slots: int | Sequence[int],
        policy: Callable[[], Policy] | Sequence[Callable[[], Policy]],
        link: EmulatedLink | None,
        device: torch.device,
        at_detach: Callable[[], None] | None = None,
        misses: Misses | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.store = store
        self.link = link
        self.misses = misses or Misses()
        self._at_detach = at_detach
        self.slots_by_layer = slots_by_layer(slots, layers)
        self.slots = slots if isinstance(slots, int) else max(slots)
        self._model = model
        self._counters = Counters(len(layers))
        self._transfer = transfer_for(store, device, link)
        self._undo = ExitStack()
        self._choosing: Choosing | None = None
        self._prefetching: Prefetching | None = None
        self._askers = 0
        self._on = device
        self._origins = [_origin(layer, device) for layer in layers]
        with ExitStack() as undo:  # undone in reverse order, also if we fail half-way
            self._passes = self._follow(model)
            self._passes.ahead.forget = self._forget_prefetches
            undo.callback(self._passes.close)
            self._caches = self._make_caches(policy, device)
            self.policy = self._caches[0].residency.policy.name
            for layer, cache in zip(layers, self._caches, strict=True):
                free_weights(layer, device)
                undo.callback(refuse_copies(layer))
                cache.watch()
                bind(layer.module, cache)
                undo.callback(unbind, layer.module)
            undo.callback(use_melinoe(model))
            order = StreamOrder(torch.device(device))
            checks = order.follow, still_used(model), watch_for_adapters(model, layers)
            self._passes.check = lambda: [check() for check in checks]
            undo.callback(self._plug_in(model))
            self._undo = undo.pop_all()
        self._attached = True

    # --- what another engine does otherwise -----------------------------------------------------

    def _follow(self, model: nn.Module) -> ForwardPasses:
        """Follow the model's forward passes."""
        return ForwardPasses(model, self._counters)

    def _make_caches(
        self, policy: Callable[[], Policy] | Sequence[Callable[[], Policy]], device: torch.device
    ) -> list[Any]:
        """What computes each layer's experts; the weights are still in the modules."""
        makers = [policy] * len(self.layers) if callable(policy) else list(policy)
        rule, threads = self.misses.rule, self.misses.threads
        return [
            ExpertCache(
                layer, count, make(), self._transfer, self._passes, device, rule,
                HostExperts(layer, self.store, threads, device, self._transfer) if rule else None,
            )
            for layer, count, make in zip(self.layers, self.slots_by_layer, makers, strict=True)
        ]  # fmt: skip

    def _plug_in(self, model: nn.Module) -> Callable[[], None]:
        """Fit `generate` to this engine; returns what undoes it."""
        return watch_generate(model, self._passes)

    @property
    def lock(self) -> threading.RLock:
        """
        Held by the thread whose call of the model runs; for whoever makes several as one.

        A thread that holds it must not wait for another that calls the model.
        """
        return self._passes.lock

    # --- reading --------------------------------------------------------------------------------

    @property
    def stall_s(self) -> float:
        """Seconds for which forward passes waited for experts."""
        return self._transfer.stall_s

    @property
    def host_s(self) -> float:
        """Seconds for which the host computed missing experts, activations' ways included."""
        return self._transfer.host_s

    @property
    def transferred_bytes(self) -> int:
        """Bytes copied into slots, on demand and by prefetches."""
        return self._transfer.transferred_bytes

    @property
    def expert_memory_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(cache.nbytes for cache in self._caches)

    def resident(self) -> list[list[int]]:
        """Ids of the resident experts, by layer, ascending."""
        return [np.flatnonzero(c.residency.slot_of >= 0).tolist() for c in self._caches]

    # --- acting ---------------------------------------------------------------------------------

    def reset_counters(self) -> None:
        """
        Set counters, stall time and transferred bytes to zero.

        What was prefetched before then, and is used later, counts as a prefetch no more.
        """
        with self.lock:
            self._counters.reset()
            self._transfer.reset()
            self._passes.ahead.reset()

    def _forget_prefetches(self, but: Sequence[Collection[int]]) -> None:
        for cache, spared in zip(self._caches, but, strict=True):
            cache.residency.forget_prefetches(but=spared)

    def reset_cache(self) -> None:
        """Empty all slots, and let a choice forget earlier texts; the counters stay."""
        with self.lock:
            self._check_attached()
            for cache in self._caches:
                cache.reset()
            if self._choosing is not None:
                self._choosing.reset()

    def audit(self) -> int:
        """
        Check that the books agree and that each slot holds, bit for bit, what they say.

        Nothing has to be wrong for it: call it when something else went wrong. It reads every
        resident expert once from the store, and waits for the call that runs.

        Returns:
            How many experts were compared with the store.

        Raises:
            AttachError: something differs, and what; or detached.
        """
        with self.lock:
            self._check_attached()
            self._transfer.finish()
            return audit(self.layers, self._caches, self.store)

    def prefetch(
        self, experts_by_layer: Sequence[Sequence[int]], at: Literal["now", "completion"] = "now"
    ) -> None:
        """
        Load experts ahead of need.

        Args:
            experts_by_layer: ids for every layer, the most wanted first; those beyond the slots
                are dropped, those resident are not loaded again.
            at: ``now``, or ``completion``: when the next forward pass of that phase begins, that
                is after a prompt has evicted what it must. Only the last such wish is kept, until
                then or until `drop_prefetch`.

        Raises:
            ValueError: not one entry per layer, or an id that is out of range or given twice; an
                unknown *at*.
            AttachError: detached; or *at* is ``completion`` and a prefetcher is at work.
        """
        self._check_attached()
        if len(experts_by_layer) != len(self._caches):
            raise ValueError(
                f"a prefetch names {len(experts_by_layer)} layers of {len(self._caches)}"
            )
        if at == "completion" and self._prefetching is not None:
            raise AttachError(
                "a prefetcher decides what is loaded for this completion already; end its `with` "
                "statement first"
            )
        if at not in ("now", "completion"):
            raise ValueError(f"a prefetch is at now or completion, not at {at!r}")
        wanted = [list(map(int, experts)) for experts in experts_by_layer]
        with self.lock:
            for cache, experts in zip(self._caches, wanted, strict=True):
                cache.residency.check(experts)
            if at == "completion":
                self._passes.before_completion = lambda: self._prefetch(wanted)
            else:
                self._prefetch(wanted)

    def drop_prefetch(self) -> None:
        """Forget a prefetch that still waits for a completion; without effect if none does."""
        self._passes.before_completion = None

    def _prefetch(self, wanted: list[list[int]]) -> None:
        for index, (cache, experts) in enumerate(zip(self._caches, wanted, strict=True)):
            self._counters.add_prefetch(index, cache.prefetch(experts))

    @property
    def choice(self) -> ChoiceSettings:
        """How experts are chosen; ``exact`` unless `choose` said else."""
        return self._choosing.settings if self._choosing is not None else ChoiceSettings()

    @property
    def changed_choices(self) -> int:
        """Choices that a cache-aware choice has replaced since it was set."""
        return self._choosing.changed if self._choosing is not None else 0

    def choose(self, settings: ChoiceSettings) -> None:
        """
        Let decoding tokens prefer resident experts; ``ChoiceSettings()`` ends that.

        Changes what the model says, and logs so. Measure its cost:
        `melinoe.evaluate.decoded_perplexity`.

        Raises:
            UnsupportedModelError: a router whose logits cannot be seen. One whose weights follow
                no known rule is refused by the first forward pass.
            AttachError: detached, or an engine that cannot do this.
        """
        with self.lock:
            self._check_attached()
            if self._choosing is not None:
                self._choosing.close()
                self._choosing = None
            if settings.kind == "exact":
                return
            if not all(type(cache) is ExpertCache for cache in self._caches):
                raise AttachError(
                    'this engine cannot change choices; load the model with engine="reference"'
                )
            self._choosing = Choosing(self._model, self._caches, self._passes, settings)

    def detach(self) -> None:
        """
        Put the experts' weights back, bit for bit, and the experts implementation of before.

        Needs memory for all experts beside the store. The files of a checkpoint that `load` left
        open for the store are closed, so that the store cannot be used again. Without effect the
        second time. If it fails, for want of that memory say, the runtime is still attached and
        can be detached again. Waits for a call, or a `generate`, of another thread.

        Raises:
            AttachError: a call of the model runs in this thread.
        """
        with self.lock:
            if not self._attached:
                return
            if self._passes.inside:
                raise AttachError("the model computes a call now; detach() when it has returned")
            self._transfer.finish()
            self._give_weights_back()
            self.choose(ChoiceSettings())
            self._attached = False
            self.drop_prefetch()
            self._undo.close()
            if self._at_detach is not None:
                self._at_detach()

    def _give_weights_back(self) -> None:
        """All of them, or none."""
        given = []
        try:
            for layer, origin in zip(self.layers, self._origins, strict=True):
                given.append(layer)
                give_weights_back(layer, self.store, origin)
        except BaseException:
            for layer in given:
                free_weights(layer, self._on)
            raise

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _check_attached(self) -> None:
        if not self._attached:
            raise AttachError("this runtime is detached from its model; attach a new one")


def _origin(layer: ExpertsLayer, device: torch.device) -> torch.device:
    """Where a layer's weights belong when the runtime leaves: where they are, if anywhere."""
    parameter = layer.module.get_parameter("down_proj")
    return device if parameter.is_meta else parameter.device
