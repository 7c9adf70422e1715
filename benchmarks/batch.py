"""
How many times faster does a file of requests go than one request after another, from disk?

A checkpoint of OLMoE-1B-7B's dimensions with random weights (see `load_memory.py`) is served on the
CPU under a control group's memory limit (see `disk.py`), with a cold page cache. A process answers
some prompts one after the other by `melinoe.generate`, with as many slots as the limit leaves room
for; another answers all of them by what `melinoe batch` runs, with few slots, because a step of
many texts asks for nearly every expert anyway. All texts are greedy and of one length.

The floor of the batch: each step reads the experts that its tokens choose, less those that have
slots, at the disk's best rate. Bad news: less than 10 times the tokens a second of one by one.

Not measured: other engines; texts of a trained model, whose tokens agree more on experts.

    python benchmarks/batch.py --out benchmarks/results/batch.json [--layers 16 --limit 5]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import publish
from disk import disk_rate, forget, limited
from finetune_memory import write_tokenizer
from load_memory import write_checkpoint

PROMISE = 10


def prompts(options: argparse.Namespace) -> list[list[int]]:
    """Random token ids: *requests* prompts of *prompt* tokens."""
    import torch

    made = torch.Generator().manual_seed(0)
    shape = (options.requests, options.prompt)
    return torch.randint(3, 50000, shape, generator=made).tolist()


def one_by_one(path: str, options: argparse.Namespace) -> dict:
    """Answer the first prompts in turn."""
    import melinoe
    from melinoe.checkpoint import load_tokenizer
    from melinoe.generate import generate

    model, handle = melinoe.load(path, "cpu", slots=options.slots, store="disk")
    model.generation_config.eos_token_id = None
    tokenizer = load_tokenizer(path, model.config)
    began, texts = time.perf_counter(), []
    for prompt in prompts(options)[: options.alone]:
        done = generate(model, handle, tokenizer, prompt, options.tokens)
        texts.append(done.ids)
    seconds = time.perf_counter() - began
    written = sum(map(len, texts))
    return {
        "requests": options.alone,
        "slots": options.slots,
        "seconds": seconds,
        "tokens": written,
        "loads": int(handle.counters.loads.sum()),
        "texts": [tokenizer.decode(ids) for ids in texts],
    }


def batch(path: str, options: argparse.Namespace) -> dict:
    """Answer all prompts as `melinoe batch` does."""
    import melinoe
    from melinoe.checkpoint import load_tokenizer
    from melinoe.serve.batching import Limits
    from melinoe.serve.offline import COMPLETION, Row, answer_file

    model, handle = melinoe.load(path, "cpu", slots=options.batch_slots, store="disk")
    model.generation_config.eos_token_id = None
    tokenizer = load_tokenizer(path, model.config)
    rows = [
        Row(f"r{at}", COMPLETION, {"prompt": ids, "max_tokens": options.tokens, "temperature": 0})
        for at, ids in enumerate(prompts(options))
    ]
    room = options.requests * (options.prompt + options.tokens + 32)
    limits = Limits(
        running=options.requests, waiting=options.requests, max_tokens=options.tokens,
        context=options.prompt + options.tokens, cache_tokens=room, chunk=options.chunk,
        seconds=float("inf"),
    )  # fmt: skip
    rate = disk_rate(handle.store)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.jsonl"
        made = answer_file(model, handle, tokenizer, rows, out, limits=limits)
        answers = [json.loads(line)["response"]["body"] for line in out.read_text().splitlines()]
    rate = max(rate, disk_rate(handle.store))
    return {
        "requests": made.rows,
        "slots": options.batch_slots,
        "seconds": made.seconds,
        "tokens": made.completion_tokens,
        "loads": made.experts_loaded,
        "floor_s": handle.transferred_bytes / rate,
        "rate": rate,
        "texts": [one["choices"][0]["text"] for one in answers],
    }


WAYS = {"one by one": one_by_one, "batch": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    sizes = {"layers": 4, "requests": 64, "alone": 2, "prompt": 128, "tokens": 64, "slots": 16}
    sizes |= {"batch_slots": 4, "chunk": 2048, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--limit", type=float, default=2.5, help="GiB of memory")
    parser.add_argument("--checkpoint", help="kept, and written if it is not there")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        import torch

        path, way, join = options.measure
        Path(join).write_text(str(os.getpid()))
        torch.set_num_threads(options.threads)
        print(json.dumps(WAYS[way](path, options)))
        return
    words = [w for n in sizes for w in (f"--{n.replace('_', '-')}", str(getattr(options, n)))]
    found = {}
    with tempfile.TemporaryDirectory(prefix="melinoe-batch-", dir="/tmp") as scratch:
        path = options.checkpoint or f"{scratch}/model"
        if not (Path(path) / "config.json").exists():
            write_checkpoint(Path(path), options.layers)
        if not (Path(path) / "tokenizer.json").exists():
            write_tokenizer(Path(path), 50304)
        for way in WAYS:
            forget(path)
            with limited(options.limit) as join:
                code = [sys.executable, __file__, "--measure", path, way, str(join), *words]
                done = subprocess.run(code, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{way} ended with {done.returncode}")
            found[way] = json.loads(done.stdout.splitlines()[-1])
    alone, together = found["one by one"], found["batch"]
    texts = [one.pop("texts") for one in found.values()]
    equal = sum(a == b for a, b in zip(*texts, strict=False))
    rows = [
        {
            "what": way,
            "requests": one["requests"],
            "slots of 64": one["slots"],
            "tokens / s": one["tokens"] / one["seconds"],
            "experts loaded a token": one["loads"] / one["tokens"],
        }
        for way, one in found.items()
    ]
    times = rows[1]["tokens / s"] / rows[0]["tokens / s"]
    publish(
        {
            "benchmark": "batch",
            "title": "A file of requests on a model larger than memory",
            "result": rows,
            "notes": [
                f"{options.layers} layers of OLMoE-1B-7B's dimensions, {options.prompt} + "
                f"{options.tokens} tokens a request, {options.limit:g} GiB; all at once: "
                f"{times:.1f} times the tokens of one by one, {equal} of {alone['requests']} texts "
                f"equal, {together['seconds'] / together['floor_s']:.2f} times what its reads take "
                "at the disk's best rate.",
            ],
            "times": times,
            "runs": found,
            "settings": {name: getattr(options, name) for name in (*sizes, "limit")},
        },
        options.out,
    )
    if times < PROMISE:
        sys.exit(f"{times:.1f} times, and {PROMISE} were promised")


if __name__ == "__main__":
    main()
