"""Decode steps, captured in a CUDA graph or launched one by one, and their parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StaticCache

from melinoe.engine.device.capture import uncollected
from melinoe.engine.passes import Batch


class Decoder:
    """
    Greedy decoding with a static cache, everything that changes from step to step on the device.

    Args:
        model: with or without an engine attached.
        batch: sequences.
        prompt: tokens of each that come first.
        room: tokens that may follow.
        captured: replay the step from a CUDA graph.
        passes: the engine's, told what a call is so that it need not ask the device; or None.
    """

    def __init__(
        self, model: Any, batch: int, prompt: int, room: int, captured: bool, passes: Any = None
    ) -> None:
        self.model, self.batch, self.prompt = model, batch, prompt
        self.device = model.lm_head.weight.device
        self.captured = captured and self.device.type == "cuda"
        self.passes = passes
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + room)
        self.ids = torch.full((batch, 1), 7, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.keys = torch.arange(prompt + room, device=self.device)
        self.after: list[Callable[[], Any]] = []
        self.graph: Any = None

    def prefill(self) -> float:
        """Compute the prompt anew; seconds until its last token's choice is on the host."""
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(1, vocabulary, (self.batch, self.prompt), generator=generator)
        ids = ids.to(self.device)
        if self.cache.is_initialized:
            self.cache.reset()
        self._wait()
        begin = time.perf_counter()
        with torch.no_grad():
            out = self.model(ids, past_key_values=self.cache, logits_to_keep=1)
            self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
            self.ids.cpu()
        self.position.fill_(self.prompt)
        return time.perf_counter() - begin

    def step(self) -> None:
        """One token for each sequence."""
        mask = (self.keys <= self.position)[None, None, None, :].expand(self.batch, 1, 1, -1)
        if self.passes is not None:
            self.passes.given = Batch(self.batch, 1, 1, 0, None)
        try:
            out = self.model(
                input_ids=self.ids,
                past_key_values=self.cache,
                position_ids=self.position[None].expand(self.batch, 1),
                attention_mask=mask,
            )
        finally:
            if self.passes is not None:
                self.passes.given = None
        self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        for act in self.after:
            act()

    def prepare(self) -> None:
        """Warm up with two steps, then capture; the engine counts them."""
        with torch.no_grad():
            self.step()
            self.step()
            if self.captured:
                self._wait()
                self.graph = torch.cuda.CUDAGraph()
                capture = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
                with uncollected(), capture:
                    self.step()

    def run(self, steps: int) -> float:
        """Seconds per step."""
        self._wait()
        begin = time.perf_counter()
        with torch.no_grad():
            for _ in range(steps):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.step()
        self._wait()
        return (time.perf_counter() - begin) / steps

    def rewind(self) -> None:
        """Back to the end of the prompt; keys and values behind it are overwritten."""
        self.position.fill_(self.prompt)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def by_generate(
    generate: Callable[[int], None], tokens: int, device: torch.device
) -> dict[str, float]:
    """
    Seconds per step of *generate*, which is told how many tokens: what more tokens take longer.

    The first two calls compile or capture; the first one's seconds are given too.
    """
    spent: dict[int, list[float]] = {1: [], tokens: []}
    for count in (tokens, tokens, 1, tokens, 1, tokens, 1, tokens):
        begin = time.perf_counter()
        with torch.no_grad():
            generate(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent[count].append(time.perf_counter() - begin)
    longer = statistics.median(spent[tokens][2:]) - statistics.median(spent[1])
    step_s = max(longer, 1e-9) / (tokens - 1)
    return {"step_s": step_s, "tokens_per_s": 1 / step_s, "first_call_s": spent[tokens][0]}


def measure(decoder: Decoder, begin: Callable[[], None], steps: int, repeats: int) -> dict:
    """Median seconds per step over repeats, each from the same state; its range."""
    times = []
    for _ in range(repeats):
        decoder.rewind()
        begin()
        times.append(decoder.run(steps))
    return {
        "step_s": statistics.median(times),
        "step_s_range": [min(times), max(times)],
        "tokens_per_s": decoder.batch / statistics.median(times),
    }


@contextmanager
def without(handle: Any, part: str) -> Iterator[None]:
    """
    In the body the engine leaves out *part* of a step, to see what it takes.

    ``copy``: nothing is copied; ``decide``: nor decided, slots are the ids modulo the slots;
    ``compute``: nor computed, the layer's experts give zeros.
    """
    experts = handle._caches
    saved = [(one.loaders[0].load_listed, one._on_device) for one in experts]
    for one in experts:
        if part == "copy":
            one.loaders[0].load_listed = lambda *_: None
        elif part == "decide":
            one._on_device = _renumbered(one)
        elif part == "compute":
            one._on_device = lambda hidden, *_: torch.zeros_like(hidden)
    try:
        yield
    finally:
        for one, (load, on_device) in zip(experts, saved, strict=True):
            one.loaders[0].load_listed, one._on_device = load, on_device


def _renumbered(one: Any) -> Callable[..., Any]:
    def on_device(hidden: Any, index: Any, weights: Any) -> Any:
        return one._forward(one._stand_in, hidden, index % one._num_slots, weights)

    return on_device


def split(
    make: Callable[[], Decoder], handle: Any, begin: Callable[[], None], steps: int, repeats: int
) -> dict[str, float]:
    """Seconds per step of decide, copy, compute and all else: four captures, one part less each."""
    found = {}
    for part in ("nothing", "copy", "decide", "compute"):
        with without(handle, part):
            decoder = make()
            decoder.prefill()
            begin()
            decoder.prepare()
            found[part] = measure(decoder, begin, steps, repeats)["step_s"]
            del decoder
    return {
        "copy_s": found["nothing"] - found["copy"],
        "decide_s": found["copy"] - found["decide"],
        "compute_s": found["decide"] - found["compute"],
        "rest_s": found["compute"],
    }
