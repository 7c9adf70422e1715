"""Measure the engines on one drawn routing, which each computes in its own way."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import link
import plan
import shapes
import steps
import torch

import melinoe

RATES = (0.0, 0.1, 0.5)


class Bench:
    """
    Shared by all sections: the device, how much is measured, and where rows go.

    Args:
        dry: Tiny, on the CPU.
        add: Takes one measured row.
        folder: For files beside the results.
    """

    def __init__(self, dry: bool, add: Callable[..., None], folder: Path) -> None:
        self.dry, self._add, self.folder = dry, add, folder
        self.device = torch.device("cpu" if dry else "cuda", None if dry else 0)
        self.steps = 2 if dry else 32
        self.repeats = 1 if dry else 3
        self.prompts = (4, 8) if dry else (512, 4096)
        self.rates = (0.0, 0.5) if dry else RATES
        self._store: tuple[tuple[str, str], Any] | None = None

    def add(self, **row: Any) -> None:
        """One measured row, with the most that PyTorch has allocated on the GPU in its section."""
        if self.device.type == "cuda":
            row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        self._add(**row)

    def store(self, shape: Any, kind: str) -> Any:
        """All experts of a model, ``bf16`` or in codes; the last one made is kept."""
        if self._store is None or self._store[0] != (shape.name, kind):
            self._store = None  # first let go of the other: host memory holds one
            gc.collect()
            begin = time.monotonic()
            layers = shapes.find_experts(shapes.on_meta(shape))
            coded = None if kind == "bf16" else kind
            found = shapes.fill_store(layers, coded, self.device.type == "cuda")
            self._store = (shape.name, kind), found
            self._add(section="store", model=shape.name, experts=kind,
                      host_bytes=found.host_bytes, seconds=time.monotonic() - begin)  # fmt: skip
        return self._store[1]

    def settle(self) -> None:
        """
        Between sections: free what the last one left.

        Raises:
            RuntimeError: CUDA has failed for good in this process.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Setup:
    """A model with an engine, forced routing, and a decoder."""

    def __init__(
        self, bench: Bench, shape: Any, slots: int, engine: str, store: Any,
        implementation: str = "grouped_mm", graphs: bool = False,
    ) -> None:  # fmt: skip
        self.bench, self.shape, self.slots = bench, shape, slots
        device = bench.device
        plain = engine == "plain"
        self.model = shapes.build(shape, device, with_experts=plain)
        self.model.set_experts_implementation(implementation)
        self.handle: Any = None
        self.passes: Any = None
        if engine == "fast":
            self.handle = melinoe.attach(
                self.model,
                engine="fast",
                slots=slots,
                store=store,
                device=device,
                graphs=graphs,
            )
            self.passes = self.handle._passes
        elif engine == "reference":
            self.handle = melinoe.attach(
                self.model, engine="reference", slots=slots, store=store, device=device
            )
        self.programs = self.handle._caches[0].loaders[0].programs if engine == "fast" else None
        self.forced = shapes.ForcedRouting(self.model, device)
        self.loads = 0

    def decoder(self, batch: int, captured: bool, prompt: int = 16) -> steps.Decoder:
        """A decoder whose steps advance the table."""
        found = steps.Decoder(
            self.model, batch, prompt, self.bench.steps + 8, captured, self.passes
        )
        found.after.append(lambda: self.forced.step.add_(1))
        return found

    def begin(self, rate: float, batch: int) -> Callable[[], None]:
        """Make a function that puts engine and routing into the drawn state."""
        drawn = shapes.draw(self.shape, self.slots, rate, self.bench.steps, batch)
        table, ahead, self.loads = drawn

        def begin() -> None:
            if self.handle is not None:
                self.handle.reset_cache()
                self.handle.prefetch(ahead)
                self.handle.reset_counters()
            self.forced.use(table, self.bench.device)

        return begin

    def check(self) -> None:
        """The engine loaded what was drawn, no more and no less."""
        counted = int(self.handle.counters.loads.sum())
        assert counted == self.loads, f"{counted} loads, {self.loads} drawn"


def floor(
    bench: Bench, shape: Any, found: dict, setup: Setup, batch: int, block_bytes: int
) -> dict[str, Any]:
    """Seconds that link and memory need for a step, at the loads drawn; None without roofs."""
    loads = setup.loads / bench.steps
    backbone = (
        sum(p.numel() * 2 for n, p in setup.model.named_parameters() if ".experts." not in n)
        - setup.model.model.embed_tokens.weight.numel() * 2
    )
    distinct = min(batch * shape.top_k, setup.slots)
    experts = shape.layers * distinct * shape.expert_weights * 2
    keys = 2 * batch * shape.layers * 32 * shape.kv_heads * shape.head_dim * 2
    if not found:
        return {"loads_per_step": loads, "link_s": None, "memory_s": None, "roof_s": None}
    link_s = loads * block_bytes / found["copy_engine"]
    memory_s = (backbone + experts + keys) / found["device"]
    return {"loads_per_step": loads, "link_s": link_s, "memory_s": memory_s,
            "roof_s": max(link_s, memory_s)}  # fmt: skip


def share_of(roof: dict[str, Any], step_s: float) -> float | None:
    """Of the roof; None where the roofs could not be measured."""
    return roof["roof_s"] / step_s if roof["roof_s"] is not None else None


def decode(bench: Bench, found: dict, setup: Setup, engine: str, kind: str, batch: int,
           rates: tuple[float, ...], captured: bool, block_bytes: int) -> None:  # fmt: skip
    """One decoder, measured at several miss rates."""
    decoder = setup.decoder(batch, captured)
    setup.forced.use(None, bench.device)  # a prompt may have as many tokens as the table has rows
    decoder.prefill()
    setup.begin(rates[0], batch)()
    decoder.prepare()
    for rate in rates:
        begin = setup.begin(rate, batch)
        timed = steps.measure(decoder, begin, bench.steps, bench.repeats)
        if setup.handle is not None:
            setup.check()
        roof = floor(bench, setup.shape, found, setup, batch, block_bytes)
        bench.add(
            section="decode", model=setup.shape.name, layers=setup.shape.layers, engine=engine,
            experts=kind, batch=batch, slots=setup.slots, miss_rate=rate,
            graph=decoder.graph is not None,
            copy_programs=setup.programs, **timed, **roof,
            share_of_roof=share_of(roof, timed["step_s"]),
        )  # fmt: skip


def measure_link(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """Roofs for all that follows."""
    store = bench.store(shape, kind)
    found |= link.measure(store, shapes.find_experts(shapes.on_meta(shape)), bench.device)
    bench.add(section="link", **found)


def half_resident(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """Decode at forced miss rates, a batch of four too, and compute prompts."""
    store = bench.store(shape, kind)
    setup = Setup(bench, shape, shape.experts // 2, "fast", store)
    paper = (plan.PAPER_RATE,) if (shape.name, kind) == (plan.OLMOE, "int4") else ()
    nbytes = store.block_bytes(0)
    decode(bench, found, setup, "fast", kind, 1, (*bench.rates, *paper), True, nbytes)
    if kind == "bf16":
        decode(bench, found, setup, "fast", kind, 4, (0.1, 0.5), True, nbytes)
        prefill(bench, setup, "fast, half resident")


def split(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """Find what deciding, copying and computing take of a step, by leaving each out."""
    setup = Setup(bench, shape, shape.experts // 2, "fast", bench.store(shape, kind))
    for rate in (0.1, 0.5):
        parts = steps.split(
            lambda: setup.decoder(1, True), setup.handle, setup.begin(rate, 1), bench.steps,
            bench.repeats,
        )  # fmt: skip
        bench.add(section="split", model=shape.name, layers=shape.layers, experts=kind,
                  miss_rate=rate, **parts)  # fmt: skip


def profile(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """Trace one replayed step: its kernels by time, and the whole trace for a viewer."""
    setup = Setup(bench, shape, shape.experts // 2, "fast", bench.store(shape, kind))
    decoder = setup.decoder(1, True)
    setup.forced.use(None, bench.device)
    decoder.prefill()
    begin = setup.begin(0.1, 1)
    begin()
    decoder.prepare()
    decoder.rewind()
    begin()
    decoder.run(1)
    with torch.profiler.profile() as trace:
        decoder.run(1)
    trace.export_chrome_trace(str(bench.folder / "replay.json.gz"))
    on_gpu = bench.device.type == "cuda"
    time_of = "device_time_total" if on_gpu else "cpu_time_total"
    events = [one for one in trace.key_averages() if not on_gpu or one.device_time_total > 0]
    events.sort(key=lambda one: -getattr(one, time_of))
    kernels = [
        {"name": one.key[:120], "count": one.count, "us": getattr(one, time_of)}
        for one in events[:40]
    ]
    bench.add(section="profile", model=shape.name, layers=shape.layers, miss_rate=0.1,
              launches=sum(one.count for one in events), kernels=kernels)  # fmt: skip


def all_resident(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """Measure with as many slots as experts: nothing is copied, batches of any size fit."""
    store = bench.store(shape, kind)
    setup = Setup(bench, shape, shape.experts, "fast", store)
    for batch in (1, 16):
        decode(bench, found, setup, "fast, all resident", kind, batch, (0.0,), True,
               store.block_bytes(0))  # fmt: skip
    prefill(bench, setup, "fast, all resident")
    del setup
    bench.settle()
    by_generate(bench, shape, store, kind)
    bench.settle()
    # What transformers' generate prefers for few tokens: it gathers each choice's weights.
    setup = Setup(bench, shape, shape.experts, "fast", store, "batched_mm")
    decode(bench, found, setup, "fast, all resident, batched_mm", kind, 1, (0.0,), True,
           store.block_bytes(0))  # fmt: skip


def by_generate(bench: Bench, shape: Any, store: Any, kind: str) -> None:
    """Measure `generate` as a user calls it, with its own work between steps and its waits."""
    setup = Setup(bench, shape, shape.experts, "fast", store, graphs=True)
    setup.forced.use(None, bench.device)
    ids = torch.full((1, 16), 7, device=bench.device)
    tokens = 3 if bench.dry else 64
    timed = steps.by_generate(
        lambda count: setup.model.generate(ids, max_new_tokens=count, do_sample=False),
        tokens, bench.device,
    )  # fmt: skip
    graphs = setup.handle.graphs
    bench.add(section="decode", model=shape.name, layers=shape.layers, batch=1,
              engine="fast, all resident, by generate", experts=kind, miss_rate=0.0,
              slots=shape.experts, replayed=graphs.replayed, reason=graphs.reason,
              **timed)  # fmt: skip


def reference(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """The reference engine; and with room for one token's experts, all loaded on demand."""
    store = bench.store(shape, kind)
    setup = Setup(bench, shape, shape.experts // 2, "reference", store)
    decode(bench, found, setup, "reference", kind, 1, bench.rates, False, store.block_bytes(0))
    prefill(bench, setup, "reference, half resident")
    del setup
    bench.settle()
    setup = Setup(bench, shape, shape.top_k, "reference", store)
    decode(bench, found, setup, "on demand, no cache", kind, 1, (1.0,), False, store.block_bytes(0))


def prefill(bench: Bench, setup: Setup, engine: str) -> None:
    """Time to the first token of prompts, from a cache that another prompt has filled."""
    setup.forced.use(None, bench.device)
    for length in bench.prompts:
        decoder = setup.decoder(1, False, prompt=length)
        times = [decoder.prefill() for _ in range(bench.repeats + 1)][1:]
        bench.add(section="prefill", model=setup.shape.name, layers=setup.shape.layers,
                  engine=engine, tokens=length, ttft_s=sorted(times)[len(times) // 2],
                  tokens_per_s=length / min(times))  # fmt: skip
