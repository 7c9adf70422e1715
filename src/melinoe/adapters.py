"""Let a model with few resident experts write by adapters: several by name, one in each pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.engine.handle import Handle
from melinoe.engine.reference import ExpertCache, ReferenceEngine
from melinoe.errors import AttachError, MelinoeError
from melinoe.experts.format import PackedFormat
from melinoe.finetune.adapter import read_adapter
from melinoe.finetune.parts import LowRank, add_update
from melinoe.moe.grouped import expert_rows, sort_choices, weighted_sum
from melinoe.moe.routing import find_routers


class Adapters:
    """
    Adapters of one model, `melinoe finetune`'s or PEFT's, over its slots.

    The experts stay as they are, in store and slots; low-rank terms are added to their products,
    as in training. Routers are exchanged whole. All adapters' tensors stay in fast memory.
    Detaching the handle takes them off the model again. AttachError: the device decides, whose
    captured steps cannot change; or the CPU computes what is missing, which adds no terms.
    """

    def __init__(self, model: nn.Module, handle: Handle) -> None:
        if not isinstance(handle.engine, ReferenceEngine):
            raise AttachError("adapters need the reference engine; choose engine='reference'")
        self._caches = handle.engine.experts
        if any(cache.rule is not None for cache in self._caches):
            raise AttachError("adapters need every missing expert loaded; choose miss='wait'")
        self._model, self._handle = model, handle
        self._device = next(model.parameters()).device
        self._experts: dict[str, dict[str, LowRank]] = {}
        self._linears: dict[str, dict[str, LowRank]] = {}
        self._routers: dict[str, dict[str, dict[str, Tensor]]] = {}
        self._base = {
            one.name: {key: value.clone() for key, value in one.module.state_dict().items()}
            for one in find_routers(model)
        }
        self._hooks: dict[str, Any] = {}
        self._now: str | None = None
        handle.when_detached(self._remove)

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._routers)

    @torch.no_grad()
    def add(self, name: str, directory: str | Path) -> None:
        """Read an adapter, to be used as *name*; MelinoeError: taken, torn, or not this model's."""
        if name in self._routers:
            raise MelinoeError(f"two adapters are named {name!r}; give each its own name")
        adapter = read_adapter(directory, self._model, self._handle.layers)
        layers = {layer.name: layer for layer in self._handle.layers}
        routers = {key: dict(state) for key, state in adapter.routers.items()}
        experts: dict[str, LowRank] = {}
        linears: dict[str, LowRank] = {}
        for place, factors in adapter.factors.items():
            if place in self._base:  # a low-rank update of a router
                state = routers.setdefault(place, dict(self._base[place]))
                for key, (down, up) in factors.items():
                    state[key] = state[key].clone()
                    add_update(
                        state[key], down.to(self._device), up.to(self._device), adapter.scaling
                    )
                continue
            made = LowRank(factors, adapter.scaling).requires_grad_(False)
            (experts if place in layers else linears)[place] = made.to(self._device)
        with self._handle.lock:
            for place in linears.keys() - self._hooks.keys():
                module = self._model.get_submodule(place)
                self._hooks[place] = module.register_forward_hook(self._adding_to(place))
            self._experts[name], self._linears[name] = experts, linears
            self._routers[name] = routers

    @torch.no_grad()
    def use(self, name: str | None) -> None:
        """Let *name* write from the next pass on; None: the model as it is; KeyError: unknown."""
        chosen = {} if name is None else self._routers[name]
        updates = {} if name is None else self._experts[name]
        with self._handle.lock:  # not in the midst of another thread's pass
            if name == self._now:
                return
            for place, base in self._base.items():
                own = self._model.get_submodule(place).state_dict()
                for key, value in {**base, **chosen.get(place, {})}.items():
                    own[key].copy_(value)
            for cache in self._caches:
                update = updates.get(cache.layer.name)
                cache.compute_by(None if update is None else _UpdatedExperts(cache, update))
            self._now = name

    def _remove(self) -> None:
        """Leave the model as it was: its own routers, and no hook."""
        self.use(None)
        for hook in self._hooks.values():
            hook.remove()

    def _adding_to(self, place: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            update = None if self._now is None else self._linears[self._now].get(place)
            return None if update is None else output + update("weight", inputs[0]).to(output.dtype)

        return add


class _UpdatedExperts:
    """Compute experts from a cache's slots, with low-rank terms; as transformers' functions do."""

    def __init__(self, cache: ExpertCache, update: LowRank) -> None:
        self._cache, self._update = cache, update

    def __call__(
        self, stand_in: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        cache, update = self._cache, self._update
        choice = sort_choices(top_k_index, top_k_weights, stand_in.num_experts)
        counts = choice.offsets.diff(prepend=choice.offsets.new_zeros(1))
        used = counts.nonzero()[:, 0]
        own_offsets = choice.offsets[used]
        experts = cache.expert_of()[used]

        def term(name: str, rows: Tensor, _: Tensor) -> Tensor:
            if name not in update.names:
                return rows.new_zeros(())
            down, up = update.lora_A[name][experts], update.lora_B[name][experts]
            return update.term(down, up, rows, own_offsets)

        rows = hidden_states[choice.tokens].to(cache.layer.pair_dtype)
        layer, stacks, offsets, numbers = cache.layer, cache.slots, choice.offsets, choice.experts
        if isinstance(layer.format, PackedFormat):  # the experts of this pass alone are unpacked
            decoded = [
                layer.format.decode(
                    layer.tensors, {name: part[slot] for name, part in cache.slots.items()}
                )
                for slot in used.tolist()
            ]
            stacks = {
                name: torch.stack([one[name] for one in decoded]).to(layer.pair_dtype)
                for name in decoded[0]
            }
            offsets = own_offsets
            there = torch.arange(len(used), device=used.device)
            numbers = torch.repeat_interleave(there, counts[used].long())
        outputs = expert_rows(layer.module, stacks, rows, numbers, offsets, term)
        return weighted_sum(outputs * choice.weights.unsqueeze(-1), choice, hidden_states)
