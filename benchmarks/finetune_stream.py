"""
What does fine-tuning with the experts on disk cost, and does it keep its memory?

A checkpoint of OLMoE-1B-7B's dimensions with random weights (see `load_memory.py`) is fine-tuned on
the CPU: rank 8, one text of 1,024 tokens a step, layers recomputed in the backward pass. Each part
runs in a process of its own, and is written to the result as soon as it is there.

* ``limited``: all 16 layers, 12 GiB of experts on disk, in a process that may hold 4 GiB of data,
  which the kernel enforces (RLIMIT_DATA, less what is reserved and untouched at its start).
* ``streamed``, ``resident``, ``accelerate``: the same step with few layers, so that all experts fit
  in memory; from disk by Melinoe, with all experts in memory, and from disk by accelerate's
  ``dispatch_model``, which loads and drops the stack of a whole layer. The arithmetic is the same.
  The first may hold so little data that it reads past the page cache; from the files of the last
  the page cache is emptied all the time, as it would be where a model is larger than the memory.
* ``learning``: the shipped model, trained within a budget that holds less than a fifth of its
  experts, and resident: equal checkpoints, and the experts read by the first steps and by the last.

The floor of a step is the longer of two: the bytes it reads at the rate of four direct reads in
flight, measured beside it, and the resident step. Each process takes a step more than is counted.

Bad news: more than 4 GiB; a step above 1.25 times the floor; above 1.2 times the resident one,
where computing is the bound; not half of accelerate's; another checkpoint than the resident run's.

Not measured: DeepSpeed, whose offload to NVMe needs a build of its own; CUDA.

    python benchmarks/finetune_stream.py --out benchmarks/results/finetune_stream.json
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

from finetune_memory import write_tokenizer
from load_memory import status, write_checkpoint

TOKENS, RANK, VOCABULARY = 1024, 8, 50304
LIMIT, FEW_LIMIT = 4 << 30, 9 << 28  # of data: 4 GiB; 2.25 GiB for few layers
PROMISED = {"floor": 1.25, "resident": 1.2, "accelerate": 0.5}
PARTS = ("limited", "streamed", "resident", "accelerate", "learning")


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


def text(tokens: int) -> str:
    return " ".join(f"w{3 + i * 97 % 1000}" for i in range(tokens))


def run(path: str, out: str, steps: int, ram: int | None, tokens: int) -> dict:
    """Fine-tune in this process, resident or within *ram*; a step's seconds, reads and peak."""
    from transformers import TrainerCallback

    import melinoe.finetune
    from melinoe.config import FinetuneSettings
    from melinoe.data import Example

    settings = FinetuneSettings(
        steps=steps + 1, batch_size=1, max_length=tokens, lambda_replay=0.0, lora_rank=RANK,
        save="adapter", gradient_checkpointing=True, log_every=1,
    )  # fmt: skip
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] += time.perf_counter()
            print(f"step of {times[-1]:.1f} s", file=sys.stderr, flush=True)

    if ram is not None:  # beside what the libraries have reserved and never touched
        limit = status("VmData") - status("RssAnon") + ram
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    example = Example("", text(tokens), "the benchmark")
    done = melinoe.finetune.finetune(path, [example], out, settings, callbacks=[Clock()], ram=ram)
    streamed = done.metadata.get("streamed") or {"reads": {"bytes": 0, "waited_s": 0.0}}
    return {
        "step_s": times[1:],
        "peak_bytes": status("VmHWM"),
        "read_bytes_a_step": streamed["reads"]["bytes"] // (steps + 1),
        "waited_s_a_step": streamed["reads"]["waited_s"] / (steps + 1),
        "forecast_bytes": sum(streamed.get("memory", {}).values()),
        "losses": [row["nll"] for row in done.log if "nll" in row],
    }


def run_accelerate(path: str, out: str, steps: int, tokens: int) -> dict:
    """Take the same steps with accelerate's own offloading of the experts to disk."""
    import torch
    from accelerate import dispatch_model

    from melinoe.checkpoint import load_model, load_tokenizer, open_checkpoint
    from melinoe.config import FinetuneSettings
    from melinoe.data import Example, encode
    from melinoe.finetune.parts import make_trainable
    from melinoe.finetune.preparing import widened
    from melinoe.losses import next_token_loss
    from melinoe.moe.experts import find_experts
    from melinoe.moe.routing import find_routers

    settings = FinetuneSettings(lora_rank=RANK)
    with open_checkpoint(path) as checkpoint:
        model = load_model(checkpoint)
        tokenizer = load_tokenizer(path, checkpoint.config)
    layers, routers = find_experts(model), find_routers(model)
    widened(model, layers)
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
    example = Example("", text(tokens), "the benchmark")
    ids = torch.tensor([encode([example], tokenizer, tokens)[0].input_ids])
    threading.Thread(target=forget_pages, args=(Path(out),), daemon=True).start()
    times, losses = [], []
    for _ in range(steps + 1):
        times.append(-time.perf_counter())
        loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times[-1] += time.perf_counter()
        losses.append(float(loss))
        print(f"step of {times[-1]:.1f} s", file=sys.stderr, flush=True)
    return {"step_s": times[1:], "peak_bytes": status("VmHWM"), "losses": losses}


def forget_pages(directory: Path) -> None:
    """Have the page cache give up the files of *directory*, for ever; mapped pages stay."""
    while True:
        for path in directory.glob("*.dat"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        time.sleep(0.5)


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
    for name, ram in (("resident", None), ("streamed", "1GiB")):
        done = finetune(TINY_OLMOE, data, f"{out}/{name}", settings, ram=ram)
        weights = Path(out, name, "model.safetensors").read_bytes()
        sums.append(hashlib.sha256(weights).hexdigest())
        if ram is not None:
            reads = [row["expert_reads"] for row in done.log if "expert_reads" in row]
            few = max(1, len(reads) // 10)
            streamed = done.metadata["streamed"]
            found = {
                "experts": streamed["experts"],
                "experts_held": streamed["experts_held"],
                "steps": steps,
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


def measure(kind: str, path: str, out: str, steps: int, limit: int, tokens: int) -> dict:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if kind == "accelerate":
        return run_accelerate(path, out, steps, tokens)
    if kind == "learning":
        return learn(out, steps)
    return run(path, out, steps, None if kind == "resident" else limit, tokens)


def checkpoint(directory: Path, layers: int) -> Path:
    """Give the checkpoint of so many layers in *directory*; one that is there is used again."""
    path = directory / f"olmoe-{layers}-layers"
    if not (path / "tokenizer.json").is_file():
        write_checkpoint(path, layers)
        write_tokenizer(path, VOCABULARY)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of the limited run")
    parser.add_argument("--few", type=int, default=2, help="layers of the compared runs")
    parser.add_argument("--steps", type=int, default=2, help="of each run, after a first")
    parser.add_argument("--learning", type=int, default=200, help="steps of the shipped model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="the other parts that are in it already stay")
    parser.add_argument("--checkpoints", type=Path, help="keep them here, for another run")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="fewer for a trial")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, path, out, *numbers = arguments.measure
        print(json.dumps(measure(kind, path, out, *map(int, numbers))))
        return
    record = {}
    if arguments.out and arguments.out.is_file():
        known = json.loads(arguments.out.read_text())
        record = {key: known[key] for key in (*PARTS, "direct_bytes_per_s") if key in known}
    with tempfile.TemporaryDirectory(prefix="finetune-stream-", dir="/tmp") as place:
        kept = arguments.checkpoints or Path(place)
        for part in arguments.parts:
            scratch = Path(place, part)
            scratch.mkdir()
            if part == "learning":
                steps, base, limit = arguments.learning, Path("-"), 0
            else:
                layers = arguments.layers if part == "limited" else arguments.few
                base, limit = checkpoint(kept, layers), LIMIT if part == "limited" else FEW_LIMIT
                steps = 1 if part == "limited" else arguments.steps
            if part in ("limited", "streamed"):
                record["direct_bytes_per_s"] = direct_rate(base)
            out = scratch if part in ("learning", "accelerate") else scratch / "out"
            record[part] = in_a_process(part, base, out, steps, limit, arguments.tokens)
            shutil.rmtree(scratch)
            result = summarise(record, arguments.layers, arguments.few)
            if arguments.out:
                from melinoe.measure import write_json

                write_json(arguments.out, result)
    print(json.dumps(result))
    if result["missed"]:
        sys.exit("missed: " + "; ".join(result["missed"]))


def summarise(record: dict, layers: int, few: int) -> dict:
    """Set the parts that are there beside each other and beside what is promised."""
    from melinoe.measure import machine

    rows, missed, of_few = [], [], f"{few} of 16 layers"
    at = {k: statistics.median(record[k]["step_s"]) for k in PARTS if "step_s" in record.get(k, {})}
    for part, what in (
        ("limited", f"{layers} layers from disk, within {LIMIT >> 30} GiB of data"),
        ("streamed", f"{of_few} from disk"),
        ("resident", f"{of_few} in memory"),
        ("accelerate", f"{of_few} from disk, by accelerate"),
    ):
        if part not in at:
            continue
        one, compared = record[part], part in ("resident", "accelerate") and "streamed" in at
        rows.append(
            {
                "what": what,
                "s a step": at[part],
                "range": f"{min(one['step_s']):.1f} to {max(one['step_s']):.1f}",
                "streamed over it": at["streamed"] / at[part] if compared else None,
                "peak (GiB)": one["peak_bytes"] / 2**30,
                "read a step (GB)": one.get("read_bytes_a_step", 0) / 1e9,
                "waited a step (s)": one.get("waited_s_a_step"),
            }
        )
    if "limited" in record and record["limited"]["peak_bytes"] > LIMIT:
        missed.append(f"{record['limited']['peak_bytes'] / 2**30:.2f} GiB")
    floors = {}
    if "streamed" in at and "resident" in at:
        reading = record["streamed"]["read_bytes_a_step"] / record["direct_bytes_per_s"]
        floors = {"floor": max(reading, at["resident"])}
        if reading <= at["resident"]:
            floors["resident"] = at["resident"]
    if "streamed" in at and "accelerate" in at:
        floors["accelerate"] = at["accelerate"]
    for name, seconds in floors.items():
        if at["streamed"] > PROMISED[name] * seconds:
            missed.append(f"{at['streamed'] / seconds:.2f} times {name}")
    notes = []
    if (learned := record.get("learning")) is not None:
        notes = [
            f"Of the shipped model's {learned['experts']} experts {learned['experts_held']} are "
            f"held at once; a step of one text reads {learned['reads_first_steps']:.0f} over the "
            f"first tenth of {learned['steps']} steps and {learned['reads_last_steps']:.0f} over "
            "the last; the checkpoint is "
            f"{'' if learned['equal'] else 'not '}the resident run's to the bit."
        ]
        if not learned["equal"]:
            missed.append("another checkpoint than the resident run's")
    return {
        "benchmark": "finetune_stream",
        "title": f"Fine-tuning with the experts on disk: {TOKENS} tokens a step, rank {RANK}",
        "result": rows,
        "notes": notes,
        "missed": missed,
        **record,
        "floors_s": floors,
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
