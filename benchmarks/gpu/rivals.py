"""The others on the same table and tokens: transformers, and accelerate's offload."""

from __future__ import annotations

from typing import Any

import steps
import torch
from sections import Bench, Setup, decode, prefill
from transformers import StaticCache

from melinoe.moe.experts import find_experts


def resident(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """transformers with all experts on the GPU, by both of its grouped ways."""
    nbytes = shape.expert_weights * 2
    plain = Setup(bench, shape, shape.experts, "plain", None)
    for batch in (1, 16):
        decode(bench, found, plain, "transformers, eager", kind, batch, (0.0,), False, nbytes)
    decode(bench, found, plain, "transformers, in our graph", kind, 1, (0.0,), True, nbytes)
    prefill(bench, plain, "transformers, all resident")
    plain.model.set_experts_implementation("batched_mm")
    for captured, name in ((False, "eager"), (True, "in our graph")):
        engine = f"transformers, batched_mm, {name}"
        decode(bench, found, plain, engine, kind, 1, (0.0,), captured, nbytes)


def compiled(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """
    transformers' own static cache and compilation, by its own generate; routed by the model.

    One cache for all calls, so that what was compiled and captured for it serves all of them.
    """
    setup = Setup(bench, shape, shape.experts, "plain", None)
    for module in setup.forced.modules:
        del module.forward  # the wrapper is not the model's
    model, config = setup.model, setup.model.generation_config
    config.disable_compile = False
    ids = torch.full((1, 16), 7, device=bench.device)
    tokens = 3 if bench.dry else 64
    cache = StaticCache(config=model.config, max_cache_len=16 + tokens)

    def generate(count: int) -> None:
        if cache.is_initialized:
            cache.reset()
        model.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False)

    timed = steps.by_generate(generate, tokens, bench.device)
    config.disable_compile = True
    bench.add(section="decode", model=shape.name, layers=shape.layers, batch=1,
              engine="transformers, static cache and compile", experts=kind, miss_rate=0.0,
              slots=shape.experts, **timed)  # fmt: skip


def accelerate_offload(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """accelerate moves the whole stack of a layer's experts for every pass."""
    setup = Setup(bench, shape, shape.experts, "plain", None)
    if bench.device.type == "cuda":
        dispatch(setup.model, bench.device.index)
    decoder = setup.decoder(1, False)
    setup.forced.use(None, bench.device)
    decoder.prefill()
    begin = setup.begin(0.0, 1)
    few = min(2, bench.steps)
    timed = []
    for _ in range(2):
        decoder.rewind()
        begin()
        timed.append(decoder.run(few))
    bench.add(section="decode", model=shape.name, layers=shape.layers, batch=1,
              engine="accelerate, experts on the CPU", experts=kind, miss_rate=None, slots=0,
              step_s=min(timed), tokens_per_s=1 / min(timed))  # fmt: skip
    prefill(bench, setup, "accelerate, experts on the CPU")


def dispatch(model: Any, gpu: int) -> None:
    """
    Leave the experts on the CPU and let accelerate bring them, as its device maps do.

    They are moved there first: accelerate keeps what it offloads where it finds it.
    """
    from accelerate import dispatch_model

    experts = {layer.name: layer.module for layer in find_experts(model)}
    for module in experts.values():
        module.to("cpu")
    leaves = [name for name, one in model.named_modules() if name and not list(one.children())]
    places: dict[str, Any] = {
        name: gpu for name in leaves if not name.startswith(tuple(f"{one}." for one in experts))
    }
    dispatch_model(model, places | dict.fromkeys(experts, "cpu"), main_device=gpu)
