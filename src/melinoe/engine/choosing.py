"""Cache-aware choice at work: between the routers of a model and the slots of its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.cache.counters import COMPLETION
from melinoe.engine.passes import ForwardPasses
from melinoe.errors import UnsupportedModelError
from melinoe.moe.choice import CacheAwareChoice, ChoiceSettings
from melinoe.moe.dispatch import NOT_COMPILED, bind, unbind
from melinoe.moe.routing import Router, find_routers, router_logits

_log = logging.getLogger("melinoe")


class Choosing:
    """Changes the choices of decoding tokens, before they are counted and computed."""

    def __init__(
        self,
        model: nn.Module,
        caches: Sequence[Any],
        passes: ForwardPasses,
        settings: ChoiceSettings,
    ) -> None:
        self.settings = settings
        routers = find_routers(model)
        self._choices = [CacheAwareChoice(settings, router.num_experts) for router in routers]
        self._undo = ExitStack()
        for router, cache, choice in zip(routers, caches, self._choices, strict=True):
            self._undo.callback(_insert(router, cache, passes, choice))
        # It changes what the model says, so it is never silent.
        _log.warning(
            "choices of decoding tokens are made with an eye on the cache (%s, strength %g): "
            "results differ from the model's own",
            settings.kind,
            settings.strength,
        )

    @property
    def changed(self) -> int:
        """Choices replaced so far, over all layers."""
        return sum(choice.changed for choice in self._choices)

    def note(self, policy: str, slots: int) -> str:
        """For a trace: its choices hold for this cache alone, so no other can be simulated."""
        return (
            f"choices changed for a cache of {slots} slots, {policy} ({self.settings.kind}, "
            f"strength {self.settings.strength:g}, keep {self.settings.keep}); "
            "another cache would have changed others"
        )

    def reset(self) -> None:
        """Forget earlier texts: what follows is chosen as if it came first."""
        for choice in self._choices:
            choice.reset()

    def close(self) -> None:
        """Let the routers decide alone again."""
        self._undo.close()


def _insert(
    router: Router, cache: Any, passes: ForwardPasses, choice: CacheAwareChoice
) -> Callable[[], None]:
    seen: list[Tensor] = []

    @torch.compiler.disable(reason=NOT_COMPILED)
    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [router_logits(output)]

    def compute(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        logits = seen.pop() if seen else None
        rows = top_k_index.shape[0]
        if not rows:
            return cache(hidden_states, top_k_index, top_k_weights)
        if logits is None or logits.shape[0] != rows:
            raise UnsupportedModelError(
                f"the router of {router.name} and its experts did not see the same tokens, so its "
                'choices cannot be changed; serve it with choice="exact"'
            )
        if passes.phase_of_next(rows) == COMPLETION:
            resident = torch.from_numpy(cache.residency.slot_of >= 0).to(top_k_index.device)
            top_k_index, top_k_weights = choice(logits, top_k_index, top_k_weights, resident)
        else:
            choice.observe(logits, top_k_index, top_k_weights)
        return cache(hidden_states, top_k_index, top_k_weights)

    compute.read = cache.read  # type: ignore[attr-defined]
    part = router.module.get_submodule(router.source)
    hook = part.register_forward_hook(see)
    unbind(router.experts)
    bind(router.experts, compute)

    def undo() -> None:
        hook.remove()
        unbind(router.experts)
        bind(router.experts, cache)

    return undo
