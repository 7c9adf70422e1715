"""A served model's handle: what it counted, what it can be told, and how it leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from melinoe.cache.counters import Counters
from melinoe.cache.prefetch import Prefetcher, Prompt, load_ahead
from melinoe.cache.residency import StreamedPrefill
from melinoe.engine.budget import GpuBudget
from melinoe.engine.checks import audit, stream_order
from melinoe.engine.choosing import Choosing
from melinoe.engine.misses import Misses
from melinoe.engine.record import PromptUses, Recorder
from melinoe.engine.reference import ReferenceEngine
from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.moe.choice import ChoiceSettings
from melinoe.moe.dispatch import bind, still_used, unbind, use_melinoe
from melinoe.moe.experts import ExpertsLayer, watch_for_adapters
from melinoe.moe.routing import fingerprint
from melinoe.stores.store import Store
from melinoe.stores.weights import free_weights, give_weights_back, refuse_copies

if TYPE_CHECKING:  # Triton may be absent
    from melinoe.engine.device.engine import DeviceEngine


class Handle:
    """
    A model served with few resident experts. Made by `melinoe.load` and `melinoe.attach`.

    Leaving it as a context manager detaches. Several threads may call the model, and the methods
    here: calls run one after another, a `generate` as a whole. Reading waits for nobody.

    Attributes:
        slots, slots_by_layer: Slots per layer, the most where layers differ; and of each layer.
        policy, store, link: The cache policy's name; where other experts are; the emulated link.
        misses, engine: What is done about a miss, with its figures; who decides what is loaded.
        layers, device: The MoE layers; where the slots are.
        budget, placement: Of the GPU's memory, until `detach`; what was chosen, and why.
        lock: Held by the thread whose call of the model runs, for whoever makes several as one.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertsLayer],
        store: Store,
        engine: ReferenceEngine | DeviceEngine,
        device: torch.device,
        *,
        slots: Sequence[int],
        misses: Misses | None = None,
        link: Any = None,
        budget: GpuBudget | None = None,
        lift_cap: Callable[[], None] | None = None,
        at_detach: Callable[[], None] | None = None,
        placement: str = "",
    ) -> None:
        self.layers, self.store, self.engine, self.device = tuple(layers), store, engine, device
        self.slots_by_layer, self.slots = tuple(slots), max(slots)
        self.link, self.misses = link, misses or Misses()
        self.budget, self.placement = budget, placement
        self._lift_cap, self._at_detach = lift_cap, at_detach
        self._model, self._passes = model, engine.passes
        self._caches: Sequence[Any] = engine.experts
        self.lock: threading.RLock = self._passes.lock
        self._choosing: Choosing | None = None
        self._prefetching = False  # whether a prefetcher is at work
        self.policy = self._caches[0].residency.policy.name
        # Where each layer's weights go back to.
        self._origins = [
            device if p.is_meta else p.device
            for p in (layer.module.get_parameter("down_proj") for layer in layers)
        ]
        with ExitStack() as undo:  # undone in reverse order, also if we fail half-way
            undo.callback(self._passes.follow())
            for number, layer in enumerate(layers):
                cache = self._caches[number]
                free_weights(layer, device)
                undo.callback(refuse_copies(layer))
                cache.watch()
                bind(layer.module, cache)
                undo.callback(unbind, layer.module)
            undo.callback(use_melinoe(model))
            checks = stream_order(device), still_used(model), watch_for_adapters(model, layers)
            self._passes.check = lambda: [check() for check in checks]
            undo.callback(engine.plug_in(model))
            self._undo = undo.pop_all()
        self._attached = True

    # --- reading --------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """A copy of what was counted since the start or `reset_counters`; waits for the device."""
        return self.engine.counters()

    @property
    def prefill(self) -> StreamedPrefill | None:
        """The rule by which prompts are streamed, for `simulate`; None: like any request."""
        return self.engine.prefill

    @property
    def graphs(self) -> Any:
        """The captured decode steps; None with an engine that captures none."""
        return self.engine.graphs

    @property
    def fallbacks(self) -> int:
        """Decode steps that the host planned, because they might have needed more slots."""
        return self._passes.fallbacks

    @property
    def stall_s(self) -> float:
        """Seconds for which forward passes waited for experts; 0 where the device does it."""
        return self.engine.stall_s

    @property
    def host_s(self) -> float:
        """Seconds for which the host computed missing experts, activations' ways included."""
        return self.engine.host_s

    @property
    def transferred_bytes(self) -> int:
        """Bytes copied from the store, for prompts, on demand and by prefetches."""
        return self.engine.transferred_bytes

    @property
    def expert_memory_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(cache.nbytes for cache in self._caches)

    def resident(self) -> list[list[int]]:
        """Ids of the resident experts, by layer, ascending."""
        return [cache.resident() for cache in self._caches]

    def resident_count(self, layer: int) -> int:
        """How many experts of MoE layer *layer* are resident."""
        return len(self._caches[layer].resident())

    @property
    def choice(self) -> ChoiceSettings:
        """How experts are chosen; ``exact`` unless `choose` said else."""
        return self._choosing.settings if self._choosing is not None else ChoiceSettings()

    @property
    def changed_choices(self) -> int:
        """Choices that a cache-aware choice has replaced since it was set."""
        return self._choosing.changed if self._choosing is not None else 0

    # --- acting ---------------------------------------------------------------------------------

    def reset_counters(self) -> None:
        """Set counters, stall time and transferred bytes to zero."""
        with self.lock:
            self.engine.reset_counters()

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
        Check that the books agree and that each slot holds, bit for bit, what the store has.
        Returns how many experts were compared; AttachError if something differs, and what.
        """
        with self.lock:
            self._check_attached()
            self.engine.finish()
            return audit(self.layers, self._caches)

    def prefetch(self, experts_by_layer: Sequence[Sequence[int]]) -> None:
        """
        Load experts ahead of need, now: ids for every layer, the most wanted first. Those beyond
        the slots are dropped. ValueError: not one entry per layer, or an id that is out of range or
        given twice.
        """
        if len(experts_by_layer) != len(self._caches):
            raise ValueError(
                f"a prefetch names {len(experts_by_layer)} layers of {len(self._caches)}"
            )
        wanted = [list(map(int, experts)) for experts in experts_by_layer]
        with self.lock:
            self._check_attached()
            for cache, experts in zip(self._caches, wanted, strict=True):
                cache.residency.check(experts)
            for layer, experts in enumerate(wanted):
                self._prefetch(layer, experts)

    def _prefetch(self, layer: int, experts: list[int]) -> int:
        # Counted at once: should a later layer's answer be wrong, these have been copied.
        loads = self._caches[layer].prefetch(experts)
        self._passes.counters.add_prefetch(layer, loads)
        return loads

    @contextmanager
    def prefetching(
        self, prefetcher: Prefetcher, ids: Sequence[int] | None = None
    ) -> Iterator[None]:
        """
        Load ahead what *prefetcher* names, for the one sequence that the body generates from *ids*,
        when its completion begins; what the model says stays the same.

        AttachError: detached, another prefetcher is at work, or several prompts came together.
        ValueError: it reads prompts and there is none; an answer that does not name every layer, or
        an id that is out of range or given twice.
        """
        passes = self._passes
        num_experts = [layer.num_experts for layer in self.layers]
        given = None if ids is None else tuple(map(int, ids))

        def completion_begins() -> None:
            passes.prompt_uses = None
            prompt = Prompt(self.slots_by_layer, max(num_experts), given, seen.counts())
            load_ahead(prefetcher, prompt, self._prefetch)

        with self.lock:
            self._check_attached()
            if self._prefetching:
                raise AttachError(
                    "a prefetcher is at work already; end it before you begin another"
                )
            if prefetcher.uses_ids and ids is None:
                raise ValueError(f"prefetch {prefetcher.name!r} reads prompts; give its token ids")
            passes.prompt_uses = seen = PromptUses(num_experts)
            passes.before_completion = completion_begins
            self._prefetching = True
        try:
            yield
        finally:
            with self.lock:
                passes.prompt_uses = passes.before_completion = None
                self._prefetching = False

    @contextmanager
    def record(self, model_name: str = "") -> Iterator[Recorder]:
        """
        Record what the routers choose in the body. AttachError: something is being recorded
        already, or detached. UnsupportedModelError: no router is found, by which traces are told
        apart.
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
        note = "" if self._choosing is None else self._choosing.note(self.policy, self.slots)
        recorder = Recorder([layer.num_experts for layer in self.layers], name, which, note)
        with self.engine.every_step_seen():
            with self.lock:
                if self._passes.recorder is not None:
                    raise AttachError(
                        "a recording is running already; end it before you begin another"
                    )
                self._passes.recorder = recorder
            try:
                yield recorder
            finally:
                with self.lock:  # not in the midst of another thread's pass
                    self._passes.settle()
                    self._passes.recorder = None

    def choose(self, settings: ChoiceSettings) -> None:
        """
        Let decoding tokens prefer resident experts; ``ChoiceSettings()`` ends that.

        Changes what the model says, and logs so; `melinoe.evaluate.decoded_perplexity` measures its
        cost. UnsupportedModelError: a router whose logits cannot be seen. AttachError: an engine
        that cannot do this.
        """
        with self.lock:
            self._check_attached()
            if self._choosing is not None:
                self._choosing.close()
                self._choosing = None
            if settings.kind == "exact":
                return
            if not self.engine.asks_host:
                raise AttachError(
                    'this engine cannot change choices; load the model with engine="reference"'
                )
            self._choosing = Choosing(self._model, self._caches, self._passes, settings)

    def when_detached(self, undo: Callable[[], object]) -> None:
        """Call *undo* once the model is detached: for what was added to it beside the slots."""
        self._undo.callback(undo)

    def detach(self) -> None:
        """
        Put the experts' weights back, bit for bit unless they were packed, and all else as it was.

        Needs memory for all experts beside the store. Files that `load` left open are closed.
        Without effect the second time; if it fails, the handle is still attached. Waits for another
        thread's call; AttachError if a call of the model runs in this one.
        """
        with self.lock:
            if not self._attached:
                return
            if self._passes.inside:
                raise AttachError("the model computes a call now; detach() when it has returned")
            self.engine.finish()
            self.engine.close()
            if self._lift_cap is not None:
                self._lift_cap()  # experts that come back may need more than the budget
            given = []
            try:  # all of them, or none
                for layer, origin in zip(self.layers, self._origins, strict=True):
                    given.append(layer)
                    give_weights_back(layer, self.store, origin)
            except BaseException:
                for layer in given:
                    free_weights(layer, self.device)
                raise
            self.choose(ChoiceSettings())
            self._attached = False
            self._undo.close()
            for cache in self._caches:
                cache.release()
            if self._at_detach is not None:
                self._at_detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _check_attached(self) -> None:
        if not self._attached:
            raise AttachError("this handle is detached from its model; attach again")
