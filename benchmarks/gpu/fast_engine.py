"""
How near is the fast engine to what the link and the memory allow, and how far ahead of the others?

Bad news would be: below 80 % of the roof max(link, memory) at miss rates of .1 and above; below 300
tok/s for OLMoE's shape with everything resident; below 200 tok/s at 60 experts a token in 4 bits;
less than 3 times accelerate's offload or 2 times the reference engine anywhere; more than 5 us a
layer to decide. Each is reported as met or not.

Roofs come first, measured: the link by the copy engine and by kernel reads, device memory. Models
have the dimensions of OLMoE-1B-7B and Qwen3-30B-A3B (as many layers as asked for) and random
weights; speed does not see values. Random weights do not route like a model, so which experts a
step picks is drawn: with a forced miss rate under LRU, the rest uniformly among the residents; the
loads counted must equal the loads drawn. Every engine computes the same table. Prompts are routed
by the random routers, nearly evenly. Half of the experts have slots, unless it says all resident.
Not measured: a trained model's routing, quality, sampling.

    python benchmarks/gpu/fast_engine.py --out FILE [--minutes 8] [--qwen-layers 16]
    TRITON_INTERPRET=1 python benchmarks/gpu/fast_engine.py --dry-run    # tiny, on the CPU
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goals
import roofs
import shapes
import steps
import torch

from melinoe.fast.attach import attach as attach_fast
from melinoe.measure import machine, write_json
from melinoe.moe.experts import find_experts
from melinoe.runtime.attach import attach as attach_reference

RATES = (0.0, 0.05, 0.1, 0.24, 0.5, 1.0)


class Bench:
    """What all sections share: the device, how long, how much time is left, and the rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dry = arguments.dry_run
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.end = time.monotonic() + 60 * arguments.minutes
        self.steps = 2 if self.dry else 32
        self.repeats = 1 if self.dry else 3
        self.prompts = (4,) if self.dry else (512, 4096)
        self.rates = (0.0, 0.5) if self.dry else RATES
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []

    def left_s(self) -> float:
        """Seconds until the script should end."""
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        """One measured row; printed as it comes, for whoever waits."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def section(self, name: str, needs_s: float, run: Callable[[], None]) -> None:
        """Run a section; one that fails or has no time left is reported, and the next one runs."""
        if self.left_s() < needs_s and not self.dry:
            self.failed.append({"section": name, "reason": "no time left"})
            return
        begin = time.monotonic()
        try:
            run()
        except Exception as error:
            if self.dry:
                raise
            reason = f"{type(error).__name__}: {error}"[:300]
            self.failed.append({"section": name, "reason": reason})
        print(f"# {name}: {time.monotonic() - begin:.0f} s", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Setup:
    """A model with an engine, forced routing, and a decoder."""

    def __init__(self, bench: Bench, shape: Any, slots: int, engine: str, store: Any) -> None:
        self.bench, self.shape, self.slots = bench, shape, slots
        device = bench.device
        plain = engine == "plain"
        self.model = shapes.build(shape, device, with_experts=plain)
        self.handle: Any = None
        self.passes: Any = None
        if engine == "fast":
            self.handle = attach_fast(
                self.model, slots=slots, store=store, device=device, graphs=False
            )
            self.passes = self.handle._passes
        elif engine == "reference":
            self.handle = attach_reference(self.model, slots=slots, store=store, device=device)
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
        """What puts engine and routing into the drawn state."""
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
) -> dict[str, float]:
    """Seconds that link and memory need for a step, at the loads that were drawn."""
    loads = setup.loads / bench.steps
    backbone = (
        sum(p.numel() * 2 for n, p in setup.model.named_parameters() if ".experts." not in n)
        - setup.model.model.embed_tokens.weight.numel() * 2
    )
    distinct = min(batch * shape.top_k, setup.slots)
    experts = shape.layers * distinct * shape.expert_weights * 2
    keys = 2 * batch * shape.layers * 32 * shape.kv_heads * shape.head_dim * 2
    link_s = loads * block_bytes / found["copy_engine"]
    memory_s = (backbone + experts + keys) / found["device"]
    return {"loads_per_step": loads, "link_s": link_s, "memory_s": memory_s,
            "roof_s": max(link_s, memory_s)}  # fmt: skip


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
            graph=decoder.graph is not None, **timed, **roof,
            share_of_roof=roof["roof_s"] / timed["step_s"],
        )  # fmt: skip


def fast_sections(bench: Bench, shape: Any, found: dict) -> None:
    """The fast engine by itself, and the reference engine on the same store."""
    # Of a dry run's second model only what differs from the first.
    coded = () if bench.dry and shape.name.startswith("Qwen3") else ("int8", "int4")
    for compression in (None, *coded):
        kind = compression or "bf16"
        layers = find_experts(shapes.on_meta(shape))
        store = None

        def fill(compression: str | None = compression, layers: Any = layers) -> None:
            nonlocal store
            store = shapes.fill_store(layers, compression, bench.device.type == "cuda")

        bench.section(f"{shape.name} {kind} store", 45, fill)
        if store is None:
            continue
        parts = [half_resident]
        if compression is None:
            parts += [all_resident, reference]
        for part in parts:
            bench.section(
                f"{shape.name} {kind} {part.__name__}", 25,
                lambda part=part, store=store, kind=kind: part(bench, shape, found, store, kind),
            )  # fmt: skip


def half_resident(bench: Bench, shape: Any, found: dict, store: Any, kind: str) -> None:
    """Forced miss rates, the parts of a step, a batch of four, prompts."""
    half, nbytes = shape.experts // 2, store.block_bytes(0)
    setup = Setup(bench, shape, half, "fast", store)
    paper = (60 / (shape.layers * shape.top_k),) if kind == "int4" else ()
    rates = (*bench.rates, *(rate for rate in paper if rate <= 1))
    decode(bench, found, setup, "fast", kind, 1, rates, True, nbytes)
    parts = steps.split(
        lambda: setup.decoder(1, True), setup.handle, setup.begin(0.1, 1), bench.steps,
        bench.repeats,
    )  # fmt: skip
    bench.add(section="split", model=shape.name, layers=shape.layers, experts=kind,
              miss_rate=0.1, **parts)  # fmt: skip
    if kind == "bf16":
        if 4 * shape.top_k <= half:
            decode(bench, found, setup, "fast", kind, 4, (0.1, 0.5), True, nbytes)
        prefill(bench, setup, "fast, half resident")


def all_resident(bench: Bench, shape: Any, found: dict, store: Any, kind: str) -> None:
    """As many slots as experts: nothing is copied, batches of any size fit."""
    setup = Setup(bench, shape, shape.experts, "fast", store)
    for batch in (1, 4, 16):
        decode(bench, found, setup, "fast, all resident", kind, batch, (0.0,), True,
               store.block_bytes(0))  # fmt: skip
    prefill(bench, setup, "fast, all resident")


def reference(bench: Bench, shape: Any, found: dict, store: Any, kind: str) -> None:
    """The reference engine; at a miss rate of 1 it is loading on demand without a cache."""
    setup = Setup(bench, shape, shape.experts // 2, "reference", store)
    decode(bench, found, setup, "reference", kind, 1, bench.rates, False, store.block_bytes(0))
    prefill(bench, setup, "reference, half resident")


def prefill(bench: Bench, setup: Setup, engine: str) -> None:
    """Time to the first token of prompts, from a cache that another prompt has filled."""
    setup.forced.use(None, bench.device)
    for length in bench.prompts:
        decoder = setup.decoder(1, False, prompt=length)
        times = [decoder.prefill() for _ in range(bench.repeats + 1)][1:]
        bench.add(section="prefill", model=setup.shape.name, layers=setup.shape.layers,
                  engine=engine, tokens=length, ttft_s=sorted(times)[len(times) // 2],
                  tokens_per_s=length / min(times))  # fmt: skip


def rivals(bench: Bench, shape: Any, found: dict) -> None:
    """Others on the same table: transformers, all experts resident, and accelerate's offload."""
    name, nbytes = shape.name, shape.expert_weights * 2
    plain: Any = None

    def resident() -> None:
        nonlocal plain
        plain = Setup(bench, shape, shape.experts, "plain", None)
        for batch in (1, 4, 16):
            decode(bench, found, plain, "transformers, eager", "bf16", batch, (0.0,), False, nbytes)
        decode(bench, found, plain, "transformers, in our graph", "bf16", 1, (0.0,), True, nbytes)
        prefill(bench, plain, "transformers, all resident")

    bench.section(f"{name} transformers, all resident", 40, resident)
    if plain is not None:
        bench.section(f"{name} accelerate offload", 40, lambda: accelerate_offload(bench, plain))
        plain = None
    bench.section(f"{name} transformers, compiled", 150, lambda: compiled(bench, shape))
    if importlib.util.find_spec("moe_policylang") is None or bench.dry:
        reason = "a GPU is needed" if bench.dry else "it is not installed"
        bench.failed.append({"section": f"{name} moe-policylang", "reason": reason})
    else:
        bench.section(f"{name} moe-policylang", 60, lambda: policylang(bench, shape, found))


def policylang(bench: Bench, shape: Any, found: dict) -> None:
    """moe-policylang's LRU cache at the same slots, misses and tokens; it takes the experts out."""
    import moe_policylang

    setup = Setup(bench, shape, shape.experts, "plain", None)
    setup.slots = shape.experts // 2
    policy = f"policy lru {{ cache {{ capacity = {setup.slots} eviction = lru }} }}"
    moe_policylang.attach(setup.model, policy)
    decoder = setup.decoder(1, False)
    setup.forced.use(None, bench.device)
    decoder.prefill()
    few = min(8, bench.steps)
    for rate in (0.1, 0.5):
        begin = setup.begin(rate, 1)
        timed = steps.measure(decoder, begin, few, 2)
        roof = floor(bench, shape, found, setup, 1, shape.expert_weights * 2)
        bench.add(section="decode", model=shape.name, layers=shape.layers, experts="bf16", batch=1,
                  engine="moe-policylang", slots=setup.slots, miss_rate=rate, **timed, **roof,
                  share_of_roof=roof["roof_s"] / timed["step_s"],
                  note="its cache is not put into the drawn state, so misses may differ at first",
                  )  # fmt: skip


def compiled(bench: Bench, shape: Any) -> None:
    """transformers' own static cache and compilation, by its own generate; routed by the model."""
    setup = Setup(bench, shape, shape.experts, "plain", None)
    for module in setup.forced.modules:
        del module.forward  # the wrapper is not the model's
    config = setup.model.generation_config
    config.disable_compile = False
    ids = torch.full((1, 16), 7, device=bench.device)
    tokens = 2 if bench.dry else 64
    spent = []
    for count in (tokens, 1, tokens):  # the first compiles
        begin = time.perf_counter()
        with torch.no_grad():
            setup.model.generate(
                ids, max_new_tokens=count, do_sample=False, cache_implementation="static"
            )
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begin)
    config.disable_compile = True
    step_s = max(spent[2] - spent[1], 1e-9) / max(tokens - 1, 1)
    bench.add(section="decode", model=setup.shape.name, layers=setup.shape.layers, batch=1,
              engine="transformers, static cache and compile", experts="bf16", miss_rate=0.0,
              slots=setup.shape.experts, step_s=step_s, tokens_per_s=1 / step_s,
              compile_s=spent[0])  # fmt: skip


def accelerate_offload(bench: Bench, setup: Setup) -> None:
    """accelerate moves the whole stack of a layer's experts for every pass."""
    from accelerate import dispatch_model

    gpu = 0 if bench.device.type == "cuda" else "cpu"
    places: dict[str, Any] = {"": gpu}
    if bench.device.type == "cuda":
        names = {layer.name for layer in find_experts(setup.model)}
        places = {n: gpu for n, m in setup.model.named_modules() if n and not list(m.children())}
        places |= {name: "cpu" for name in names}
        places = {n: p for n, p in places.items() if n in names or not n.startswith(tuple(names))}
        dispatch_model(setup.model, places, main_device=gpu)
    decoder = setup.decoder(1, False)
    setup.forced.use(None, bench.device)
    decoder.prefill()
    begin = setup.begin(0.0, 1)
    few = min(4, bench.steps)
    timed = []
    for _ in range(2):
        decoder.rewind()
        begin()
        timed.append(decoder.run(few))
    bench.add(section="decode", model=setup.shape.name, layers=setup.shape.layers, batch=1,
              engine="accelerate, experts on the CPU", experts="bf16", miss_rate=None, slots=0,
              step_s=min(timed), tokens_per_s=1 / min(timed))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--qwen-layers", type=int, default=16)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    models = shapes.shapes(bench.dry, arguments.qwen_layers)
    found: dict[str, Any] = {}
    blocks = (4096, 4) if bench.dry else (models[0].expert_weights * 2, 32)
    bench.section("roofs", 0, lambda: found.update(roofs.measure(bench.device, *blocks)))
    if not found:
        found |= {"copy_engine": 1.0, "device": 1.0, "kernel_reads": 1.0}
    for number, shape in enumerate(models):
        fast_sections(bench, shape, found)
        if number == 0:
            rivals(bench, shape, found)
    record = {
        "benchmark": "gpu_fast_engine",
        "title": "The fast engine against the roofs and the others",
        "question": __doc__.strip().splitlines()[0],
        "routing": "drawn: miss rate forced under LRU, else uniform; prompts by random routers",
        "dry_run": bench.dry,
        "bandwidth_bytes_per_s": found,
        "result": bench.rows,
        "goals": goals.judge(bench.rows),
        "not_measured": bench.failed,
        "machine": machine(),
        "gpu": None if bench.dry else torch.cuda.get_device_name(),
    }
    if arguments.out:
        write_json(arguments.out, record)
    print(goals.table(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
