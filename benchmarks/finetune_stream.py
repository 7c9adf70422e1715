"""
What does fine-tuning with the experts on disk cost, and does it keep its memory?

A checkpoint of OLMoE-1B-7B's dimensions with random weights (see `load_memory.py`) is fine-tuned on
the CPU: rank 8, one text of 1,024 tokens a step, layers recomputed in the backward pass.

* ``limited``: all 16 layers, 12.9 GiB of experts on disk, in a process that may hold 4 GiB of data
  (RLIMIT_DATA), which the kernel enforces.
* ``streamed``, ``resident``, ``accelerate``: the same step with few layers, so that all experts fit
  in memory; from disk by Melinoe, with all experts in memory, and from disk by accelerate's
  ``dispatch_model``, which loads and drops the stack of a whole layer. The arithmetic is the same.
* ``learning``: the shipped model, trained within a budget and resident: equal checkpoints, and the
  experts read by the first steps and by the last.

The floor of a step is the longer of two: the bytes it reads at the rate of four direct reads in
flight, measured beside it, and the resident step. Each process takes a step more than is counted.

Bad news: more than 4 GiB; a step above 1.25 times the floor; above 1.2 times the resident one; not
half of accelerate's; another checkpoint than the resident run's.

Not measured: DeepSpeed, whose offload to NVMe needs a build of its own; CUDA.

    python benchmarks/finetune_stream.py --out benchmarks/results/finetune_stream.json
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

from finetune_memory import write_tokenizer
from load_memory import status, write_checkpoint

TOKENS, RANK, LIMIT = 1024, 8, 4 << 30
PROMISED = {"floor": 1.25, "resident": 1.2, "accelerate": 0.5}


def direct_rate(path: Path, seconds: float = 4.0) -> float:
    """Bytes a second of four direct reads in flight, each of 4 MiB, over the shards of *path*."""
    shards = sorted(path.glob("*.safetensors"))
    size, began = 4 << 20, time.monotonic()

    def read(number: int) -> int:
        handle, done = os.open(shards[number % len(shards)], os.O_RDONLY | os.O_DIRECT), 0
        whole, buffer = os.fstat(handle).st_size, mmap(-1, size)
        place = number * 97 * size
        while time.monotonic() - began < seconds:
            done += os.preadv(handle, [buffer], place % (whole - size) // size * size)
            place += 7 * size
        os.close(handle)
        return done

    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(read, range(4)))
    return total / (time.monotonic() - began)


def text() -> str:
    return " ".join(f"w{3 + i * 97 % 1000}" for i in range(TOKENS))


def run(path: str, out: str, steps: int, ram: int | None) -> dict:
    """Fine-tune in this process, resident or within *ram*; a step's seconds, reads and peak."""
    from transformers import TrainerCallback

    import melinoe.finetune
    from melinoe.config import FinetuneSettings
    from melinoe.data import Example

    settings = FinetuneSettings(
        steps=steps + 1, batch_size=1, max_length=TOKENS, lambda_replay=0.0, lora_rank=RANK,
        save="adapter", gradient_checkpointing=True, log_every=1,
    )  # fmt: skip
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] += time.perf_counter()

    if ram is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (ram, ram))
    done = melinoe.finetune.finetune(
        path, [Example("", text(), "the benchmark")], out, settings, callbacks=[Clock()], ram=ram
    )
    streamed = done.metadata.get("streamed") or {"reads": {"bytes": 0, "waited_s": 0.0}}
    return {
        "step_s": times[1:],
        "peak_bytes": status("VmHWM"),
        "read_bytes_a_step": streamed["reads"]["bytes"] // (steps + 1),
        "waited_s_a_step": streamed["reads"]["waited_s"] / (steps + 1),
        "forecast_bytes": sum(streamed.get("memory", {}).values()),
        "losses": [row["nll"] for row in done.log if "nll" in row],
    }


def run_accelerate(path: str, out: str, steps: int) -> dict:
    """Take the same steps with accelerate's own offloading of the experts to disk."""
    import torch
    from accelerate import dispatch_model

    from melinoe.checkpoint import load_model, load_tokenizer, open_checkpoint
    from melinoe.config import FinetuneSettings
    from melinoe.data import Example, encode
    from melinoe.finetune.parts import make_trainable
    from melinoe.finetune.preparing import Widened
    from melinoe.losses import next_token_loss
    from melinoe.moe.experts import find_experts
    from melinoe.moe.routing import find_routers

    settings = FinetuneSettings(lora_rank=RANK)
    with open_checkpoint(path) as checkpoint:
        model = load_model(checkpoint)
        tokenizer = load_tokenizer(path, checkpoint.config)
    layers, routers = find_experts(model), find_routers(model)
    Widened(model, layers).make_way()
    places = {name: "cpu" for name, one in model.named_modules() if not list(one.children())}
    places |= {layer.name: "disk" for layer in layers}
    places = {
        name: place
        for name, place in places.items()
        if place == "disk" or not any(name.startswith(f"{x.name}.") for x in layers)
    }
    dispatch_model(model, places, main_device="cpu", offload_dir=out)
    parts = make_trainable(model, routers, layers, settings, RANK, device=torch.device("cpu"))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parts.all(), lr=1e-4)
    ids = torch.tensor([encode([Example("", text(), "x")], tokenizer, TOKENS)[0].input_ids])
    times, losses = [], []
    for _ in range(steps + 1):
        times.append(-time.perf_counter())
        loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times[-1] += time.perf_counter()
        losses.append(float(loss))
    return {"step_s": times[1:], "peak_bytes": status("VmHWM"), "losses": losses}


def learn(out: str, steps: int) -> dict:
    """Train the shipped model within a budget and resident; compare, and count reads by step."""
    from melinoe.config import FinetuneSettings
    from melinoe.data import load_examples
    from melinoe.finetune import finetune
    from melinoe.shipped import GSM8K_TRAIN, TINY_OLMOE

    data = load_examples(GSM8K_TRAIN)
    settings = FinetuneSettings(
        steps=steps, batch_size=1, max_length=128, lambda_replay=0.0, log_every=1
    )
    sums, found = [], {}
    for name, ram in (("resident", None), ("streamed", "2GiB")):
        done = finetune(TINY_OLMOE, data, f"{out}/{name}", settings, ram=ram)
        weights = Path(out, name, "model.safetensors").read_bytes()
        sums.append(hashlib.sha256(weights).hexdigest())
        if ram is not None:
            reads = [row["expert_reads"] for row in done.log if "expert_reads" in row]
            few = max(1, len(reads) // 10)
            found = {
                "reads_first_steps": statistics.mean(reads[:few]),
                "reads_last_steps": statistics.mean(reads[-few:]),
            }
    return {"equal": sums[0] == sums[1], **found}


def in_a_process(*arguments: object) -> dict:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{arguments[0]} failed with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, path: str, out: str, steps: int, limit: int) -> dict:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if kind == "accelerate":
        return run_accelerate(path, out, steps)
    if kind == "learning":
        return learn(out, steps)
    return run(path, out, steps, None if kind == "resident" else limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of the limited run; 0: none")
    parser.add_argument("--few", type=int, default=3, help="layers of the compared runs; 0: none")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--learning", type=int, default=200, help="steps of the shipped model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--directory", help="where to write checkpoints; default: /tmp")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, path, out, steps, limit = arguments.measure
        print(json.dumps(measure(kind, path, out, int(steps), int(limit))))
        return
    rows, record, bad = [], {}, []
    steps = arguments.steps
    with tempfile.TemporaryDirectory(prefix="finetune-stream-", dir=arguments.directory) as place:
        if arguments.layers:
            base = Path(place) / "whole"
            record["checkpoint_bytes"] = write_checkpoint(base, arguments.layers)[
                "checkpoint_bytes"
            ]
            write_tokenizer(base, 50304)
            record["limited"] = one = in_a_process("limited", base, f"{place}/l", steps, LIMIT)
            rows.append(row(f"{arguments.layers} layers, within 4 GiB of data", one))
            subprocess.run(["rm", "-r", str(base)], check=True)
        if arguments.few:
            base = Path(place) / "few"
            write_checkpoint(base, arguments.few)
            write_tokenizer(base, 50304)
            rate = record["direct_bytes_per_s"] = direct_rate(base)
            found = {
                kind: in_a_process(kind, base, f"{place}/{kind}", steps, LIMIT)
                for kind in ("streamed", "resident", "accelerate")
            }
            record |= found
            at = {kind: statistics.median(one["step_s"]) for kind, one in found.items()}
            floor = max(found["streamed"]["read_bytes_a_step"] / rate, at["resident"])
            record |= {"floor_s": floor, "median_s": at}
            for kind, one in found.items():
                rows.append(row(f"{arguments.few} layers, {kind}", one, at["streamed"]))
            against = {"floor": floor, "resident": at["resident"], "accelerate": at["accelerate"]}
            for name, seconds in against.items():
                if at["streamed"] > PROMISED[name] * seconds:
                    bad.append(f"{at['streamed'] / seconds:.2f} times {name}")
        if arguments.learning:
            record["learning"] = in_a_process("learning", "-", place, arguments.learning, 0)
            if not record["learning"]["equal"]:
                bad.append("another checkpoint than the resident run's")
    from melinoe.measure import machine, write_json

    result = {
        "benchmark": "finetune_stream",
        "title": f"Fine-tuning with the experts on disk: {TOKENS} tokens a step, rank {RANK}",
        "result": rows,
        "missed": bad,
        **record,
        "machine": machine(),
    }
    if arguments.out:
        write_json(arguments.out, result)
    print(json.dumps(result))
    if bad:
        sys.exit("missed: " + "; ".join(bad))


def row(what: str, one: dict, streamed: float | None = None) -> dict:
    median = statistics.median(one["step_s"])
    return {
        "what": what,
        "s a step": median,
        "range": f"{min(one['step_s']):.1f} to {max(one['step_s']):.1f}",
        "streamed over it": None if streamed is None else streamed / median,
        "peak (GiB)": one["peak_bytes"] / 2**30,
        "read a step (GB)": one.get("read_bytes_a_step", 0) / 1e9,
    }


if __name__ == "__main__":
    main()
