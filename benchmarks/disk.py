"""
Does a model larger than memory decode as fast as its disk gives experts?

A checkpoint of OLMoE-1B-7B's dimensions with random weights (see `load_memory.py`; 16 layers are
13.8 GB in bf16) is served on the CPU under a real memory limit, a control group's, with a cold page
cache: 16 of 64 slots a layer, LFU, given tokens one by one after some that warm the slots. Beside
it, in processes of their own under the same limit and for the same tokens: reads one at a time
through the page cache, which is how experts were read before; and a prompt.

The floor of a token: the slower of what its loads take at the disk's best rate, the best of several
runs of four direct reads in flight just before and after, and of computing, timed with every expert
that the token needs resident. Of a prompt: reading every expert once at that rate.

Promise, and so the bad news: below 85 % of the floor's tokens a second; a prompt of 256 tokens
above 1.3 times its floor.

Not measured: other engines; a checkpoint whose routers were trained, whose next layers are easier
to guess than random ones.

    python benchmarks/disk.py --out benchmarks/results/disk.json [--checkpoint DIR] [--threads 2]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common import publish
from load_memory import write_checkpoint

GIB = 1 << 30
PROMISE, PROMPT_PROMISE = 0.85, 1.3
WAYS = ("serve", "one by one", "prompt")


@contextmanager
def limited(gib: float):
    """Yield the file to write a process's number to, so that it has at most *gib* GiB."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = [path for _, names, path in lines if "memory" in names.split(",")]
    top, path, limit = (
        ("/sys/fs/cgroup/memory", old[0], "memory.limit_in_bytes")
        if old
        else ("/sys/fs/cgroup", lines[-1][2], "memory.max")
    )
    group = Path(top + path) / f"melinoe-disk-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(int(gib * GIB)))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def forget(directory: str) -> None:
    """Drop the files of *directory* from the page cache."""
    for path in Path(directory).iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def disk_rate(store, runs: int = 3, experts: int = 24) -> float:
    """Bytes a second of random experts, four reads in flight: the best of some runs."""
    import numpy as np

    from melinoe.stores.store import empty_block

    rng, best = np.random.default_rng(1), 0.0
    blocks = [empty_block(store._layers[0].parts) for _ in range(4)]
    for _ in range(runs):
        begin = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            for _ in range(experts):
                layer = int(rng.integers(store.num_layers))
                expert = int(rng.integers(store.num_experts(layer)))

                def read(layer=layer, expert=expert):
                    block = blocks.pop()
                    store.read(layer, expert, block)
                    blocks.append(block)

                pool.submit(read)
        taken = time.perf_counter() - begin
        best = max(best, experts * store.block_bytes(0) / taken)
    return best


def measure(path: str, way: str, options: argparse.Namespace) -> dict:
    """Serve in this process, which has joined its group; say what it took."""
    import torch

    import melinoe
    import melinoe.engine.load as loading
    from melinoe.engine import reference
    from melinoe.engine.transfer import Transfer

    torch.set_num_threads(options.threads)
    if way == "one by one":
        reference.DiskTransfer = lambda store, layers, staging: Transfer(store)
        loading.free_host_bytes = lambda: None  # through the page cache
    model, handle = melinoe.load(path, "cpu", slots=options.slots, policy="lfu", store="disk")
    if way == "one by one":
        handle._passes._ask_no_more()
    words = torch.randint(3, 50000, (options.warm + options.tokens,), generator=_seed(torch))
    found = {"way": way}
    with torch.inference_mode():
        if way == "prompt":
            prompt = torch.randint(3, 50000, (1, options.prompt), generator=_seed(torch))
            before = disk_rate(handle.store)
            begin = time.perf_counter()
            model(prompt, logits_to_keep=1)
            taken = time.perf_counter() - begin
            nbytes = sum(layer.num_experts * layer.block_bytes for layer in handle.layers)
            rate = max(before, disk_rate(handle.store))
            return found | {
                "seconds": taken,
                "read_bytes": handle.transferred_bytes,
                "rate": rate,
                "floor_s": nbytes / rate,
                "stall_s": handle.stall_s,
            }
        cache = None
        rates = [disk_rate(handle.store)] if way == "serve" else []
        for number, word in enumerate(words):
            if number == options.warm:
                handle.reset_counters()
                begin = time.perf_counter()
            done = model(word.reshape(1, 1), past_key_values=cache, use_cache=True)
            cache = done.past_key_values
        taken = time.perf_counter() - begin
        found |= {
            "seconds": taken,
            "tokens_per_s": options.tokens / taken,
            "loads_per_token": int(handle.counters.loads.sum()) / options.tokens,
            "read_bytes": handle.transferred_bytes,
            "stall_s": handle.stall_s,
            "last": int(done.logits[0, -1].argmax()),
        }
        if way == "serve":
            transfer = handle.engine.transfer
            found |= {"ahead_reads": transfer.ahead_reads, "ahead_used": transfer.ahead_used}
            rates.append(disk_rate(handle.store))
            one, times = words[:1].reshape(1, 1), []
            for _ in range(6):  # always the same experts
                begin = time.perf_counter()
                model(one, use_cache=False)
                times.append(time.perf_counter() - begin)
            found |= {"rate": max(rates), "compute_s": sorted(times[1:])[2]}
    return found


def _seed(torch):
    return torch.Generator().manual_seed(0)


def run(path: str, way: str, options: argparse.Namespace, arguments: list[str]) -> dict:
    """Measure one way in a process of its own, under the limit, with a cold page cache."""
    forget(path)
    with limited(options.limit) as join:
        code = [sys.executable, __file__, "--measure", path, way, "--join", str(join), *arguments]
        done = subprocess.run(code, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{way} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--limit", type=float, default=5.0, help="GiB of memory")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--warm", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", help="kept, and written if it is not there")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--join", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        Path(options.join).write_text(str(os.getpid()))
        print(json.dumps(measure(*options.measure, options)))
        return
    names = ("layers", "slots", "warm", "tokens", "prompt", "threads")
    arguments = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    with tempfile.TemporaryDirectory(prefix="melinoe-disk-", dir="/tmp") as scratch:
        path = options.checkpoint or f"{scratch}/model"
        if not (Path(path) / "config.json").exists():
            write_checkpoint(Path(path), options.layers)
        found = {way: run(path, way, options, arguments) for way in options.ways}
    rows = []
    if "serve" in found:
        serve = found["serve"]
        loads_s = serve["read_bytes"] / options.tokens / serve["rate"]
        floor = 1 / max(loads_s, serve["compute_s"])
        rows.append(_row("decoding", serve, floor))
        if "one by one" in found:
            assert found["one by one"]["last"] == serve["last"], "other tokens"
            rows.append(_row("decoding, one read at a time, cached", found["one by one"], floor))
    result = {
        "benchmark": "disk",
        "title": "A model larger than memory, from disk",
        "result": rows,
        "runs": list(found.values()),
        "settings": {
            **{name: getattr(options, name) for name in names},
            "limit_gib": options.limit,
        },
    }
    kept = True
    if rows:
        result["promise"] = {"share of the floor": PROMISE}
        kept = rows[0]["share of the floor"] >= PROMISE
    if "prompt" in found:
        prompt = found["prompt"]
        times = prompt["seconds"] / prompt["floor_s"]
        result["prompt"] = {
            "tokens": options.prompt,
            "seconds": prompt["seconds"],
            "reading every expert once (s)": prompt["floor_s"],
            "times": times,
            "promise": PROMPT_PROMISE,
        }
        kept = kept and times <= PROMPT_PROMISE
    publish(result, options.out)
    if not kept:
        sys.exit("a promise was not kept")


def _row(what: str, found: dict, floor: float) -> dict:
    return {
        "what": what,
        "tokens / s": found["tokens_per_s"],
        "floor tokens / s": floor,
        "share of the floor": found["tokens_per_s"] / floor,
        "experts loaded per token": found["loads_per_token"],
        "GB / s": found["read_bytes"] / found["seconds"] / 1e9,
    }


if __name__ == "__main__":
    main()
