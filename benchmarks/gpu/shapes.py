"""Models of real dimensions with random weights, stores filled in seconds, and drawn routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from melinoe.cache.residency import Residency
from melinoe.experts.formats import named_format
from melinoe.moe.experts import ExpertsLayer, find_experts, is_experts_module
from melinoe.stores.ram_store import PinnedStore, RamStore


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model; *layers* are those that are built of *all_layers*."""

    name: str
    layers: int
    all_layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.width

    def config(self) -> Any:
        """The transformers configuration."""
        common = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.name.startswith("Qwen3"):
            return Qwen3MoeConfig(
                head_dim=self.head_dim,
                moe_intermediate_size=self.width,
                intermediate_size=self.width,
                **common,
            )
        return OlmoeConfig(intermediate_size=self.width, **common)


def shape_of(name: str, layers: int | None, dry_run: bool) -> Shape:
    """The dimensions of a model, or some that fit a test; *layers* of it, None: all."""
    if dry_run:
        heads = 2 if name.startswith("Qwen3") else 4
        return Shape(name, 2, 16, 16, 2, 64, 32, 4, heads, 16, 64)
    if name.startswith("Qwen3"):
        return Shape(name, layers or 48, 48, 128, 8, 2048, 768, 32, 4, 128, 151936)
    return Shape(name, layers or 16, 16, 64, 8, 2048, 1024, 16, 16, 128, 50304)


def on_meta(shape: Shape) -> Any:
    """The model without any memory."""
    kind = Qwen3MoeForCausalLM if shape.name.startswith("Qwen3") else OlmoeForCausalLM
    with torch.device("meta"):
        return kind(shape.config()).to(torch.bfloat16).eval()


def build(shape: Shape, device: torch.device, with_experts: bool) -> Any:
    """A bfloat16 model with random weights on *device*; its experts there too, or on meta."""
    model = on_meta(shape)
    experts = {
        id(p) for layer in find_experts(model) for p in layer.module.parameters(recurse=False)
    }
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in experts and not with_experts:
                continue
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() == 1:
                value.fill_(1.0)
            else:
                value.normal_(0.0, 0.02, generator=generator)
            module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, None, persistent=False)
    _fill_rotary(model, shape, device)
    model.set_experts_implementation("grouped_mm")
    model.generation_config.disable_compile = True
    return model


def _fill_rotary(model: Any, shape: Shape, device: torch.device) -> None:
    """The frequencies are computed when a model is made, which the meta device cannot."""
    rotary = type(model.model.rotary_emb)(config=model.config).to(device)
    model.model.rotary_emb = rotary


def fill_store(layers: list[ExpertsLayer], compression: str | None, pinned: bool) -> Any:
    """A store in which every expert is the same random block: speed does not see values."""
    layers = [layer.stored_as(named_format(compression or "plain")) for layer in layers]
    store = (PinnedStore if pinned else RamStore)(layers)
    for layer in layers:
        one = {t.name: torch.randn(t.shape).mul_(0.02).to(t.dtype) for t in layer.tensors}
        block = layer.format.encode(layer.tensors, one)
        for expert in range(layer.num_experts):
            store.write(layer.index, expert, block)
    return store


def draw(
    shape: Shape, slots: int, miss_rate: float, steps: int, batch: int, seed: int = 0
) -> tuple[torch.Tensor, list[list[int]], int]:
    """
    Routing of *steps* decode steps with a miss rate that is forced, under LRU.

    Every step and layer picks as many experts that are not resident as the rate asks (rounded at
    random, so that the mean is met), uniformly, and the rest uniformly among the residents; the
    tokens of a batch share the experts picked, as their choices overlap in no stated way.

    Returns:
        int64 ``(steps, layers, batch, top_k)``; per layer the experts to prefetch before; and how
        many loads these steps take in all.
    """
    rng = np.random.default_rng(seed)
    start = list(range(slots))
    table = np.empty((steps, shape.layers, batch, shape.top_k), dtype=np.int64)
    loads = 0
    for layer in range(shape.layers):
        residency = Residency(shape.experts, slots, "lru")
        residency.prefetch(start)
        for step in range(steps):
            distinct = min(shape.top_k * batch, slots)
            wanted = miss_rate * distinct
            missing = min(int(wanted + rng.random()), shape.experts - slots)
            resident = residency.expert_of[rng.permutation(slots)[: distinct - missing]]
            absent = np.flatnonzero(residency.slot_of < 0)
            fresh = rng.permutation(absent)[:missing]
            picked = rng.permutation(np.concatenate([resident, fresh]))
            chosen = [picked[(token * shape.top_k + np.arange(shape.top_k)) % distinct]
                      for token in range(batch)]  # fmt: skip
            table[step, layer] = chosen
            loads += len(residency.request(sorted(picked.tolist())).loads)
    return torch.from_numpy(table), [start] * shape.layers, loads


class ForcedRouting:
    """
    Lets every experts module compute the choices of a table instead of its router's.

    The row is a counter on the device, so that captured steps advance it too. The router runs as
    before and its weights are used; only the ids are replaced.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.modules = [module for module in model.modules() if is_experts_module(module)]
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.table: torch.Tensor | None = None
        for number, module in enumerate(self.modules):
            module.forward = self._wrapped(module.forward, number)

    def _wrapped(self, forward: Any, number: int) -> Any:
        def forced(hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            table = self.table
            if table is not None and hidden.shape[0] == table.shape[2]:
                top_k_index = table[:, number].index_select(0, self.step)[0]
            return forward(hidden, top_k_index, top_k_weights)

        return forced

    def use(self, table: torch.Tensor | None, device: torch.device) -> None:
        """
        From now on this table, from its first row; None: what the routers choose.

        A table of the shape of the last one takes its memory, which a captured step reads.
        """
        if table is not None and self.table is not None and table.shape == self.table.shape:
            self.table.copy_(table)
        else:
            self.table = None if table is None else table.to(device)
        self.step.zero_()
