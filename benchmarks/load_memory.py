"""
How much host memory does it take to load a checkpoint, and does it stay within what is promised?

A checkpoint of OLMoE-1B-7B's dimensions (hidden 2048, 64 experts of 3 x 2048 x 1024, top-8) with 5
layers and random weights is written in the hub's per-expert layout, in shards of about 1 GiB: 4.3
GiB in bf16. Fresh processes load it in turn with `melinoe.load` (store in RAM, store on disk) and
with transformers' `from_pretrained`, then run one forward pass over 16 tokens, so that every slot
has been written to. Peak resident memory is the kernel's high-water mark (VmHWM), less what the
process held once everything was imported.

Promises, and so the bad news: more than 1.15 x the experts' bytes + the backbone's with the RAM
store; more than the slots + the backbone + the largest stored tensor with the disk store.

The floor: RAM store, experts + slots + backbone; disk store, slots + backbone; from_pretrained,
the whole model. For the promise of the RAM store the slots come out of the 15 per cent.

Not measured: the page cache, which the system takes and gives back by itself; a cold disk (the
files have just been written, so the seconds are those of memory copies more than of a disk);
CUDA. from_pretrained maps the files: resident pages of mapped files count in VmHWM, and are also
shown apart (peak_anonymous_bytes leaves them out, sampled every 5 ms).

    python benchmarks/load_memory.py --out benchmarks/results/load_memory.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SLOTS = 8
KINDS = ("ram", "disk", "from_pretrained")
SHARD_BYTES = 2**30


def write_checkpoint(out: Path, layers: int) -> dict:
    """Write config, shards and index; never more than one tensor in memory."""
    out.mkdir(parents=True, exist_ok=True)
    import torch
    from transformers import OlmoeConfig

    config = OlmoeConfig(num_hidden_layers=layers, intermediate_size=1024, dtype="bfloat16")
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(out)
    shapes = tensor_shapes(config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    random = torch.Generator().manual_seed(0)
    pool = torch.randn(32 * 2**20, generator=random).mul_(0.02).to(torch.bfloat16)
    weight_map, written = {}, 0
    for number, names in enumerate(shards, start=1):
        filename = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name in names:
            nbytes = 2 * torch.Size(shapes[name]).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
            weight_map[name] = filename
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (out / filename).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                left = torch.Size(shapes[name]).numel()
                written += 2 * left
                while left:  # any window of the pool is as random as another
                    start = int(torch.randint(0, pool.numel() // 2, (1,), generator=random))
                    piece = pool[start : start + min(left, pool.numel() // 2)]
                    if "norm" in name:  # else all logits are nearly alike
                        piece = torch.ones_like(piece)
                    file.write(memoryview(piece.view(torch.uint8).numpy()))
                    left -= piece.numel()
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    experts = sum(
        2 * torch.Size(shape).numel() for name, shape in shapes.items() if ".experts." in name
    )
    largest = max(2 * torch.Size(shape).numel() for shape in shapes.values())
    return {
        "checkpoint_bytes": written,
        "shards": len(shards),
        "expert_bytes": experts,
        "backbone_bytes": written - experts,
        "slots_bytes": experts * SLOTS // config.num_experts,
        "largest_tensor_bytes": largest,
    }


def tensor_shapes(config) -> dict[str, list[int]]:
    """The hub's names of an OLMoE checkpoint, layer by layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"model.embed_tokens.weight": [config.vocab_size, hidden]}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}self_attn.{name}.weight"] = [hidden, hidden]
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm"):
            shapes[f"{at}{name}.weight"] = [hidden]
        shapes[f"{at}post_attention_layernorm.weight"] = [hidden]
        shapes[f"{at}mlp.gate.weight"] = [config.num_experts, hidden]
        for expert in range(config.num_experts):
            shapes[f"{at}mlp.experts.{expert}.gate_proj.weight"] = [inner, hidden]
            shapes[f"{at}mlp.experts.{expert}.up_proj.weight"] = [inner, hidden]
            shapes[f"{at}mlp.experts.{expert}.down_proj.weight"] = [hidden, inner]
    shapes["model.norm.weight"] = [hidden]
    shapes["lm_head.weight"] = [config.vocab_size, hidden]
    return shapes


def status(key: str) -> int:
    """One line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {key}")


def measure(kind: str, path: str) -> dict:
    """Load once, in this process; print what it took."""
    import torch
    from transformers import OlmoeForCausalLM
    from transformers.utils import logging

    import melinoe
    import melinoe.engine.load  # the import is not what is measured

    logging.disable_progress_bar()
    torch.set_num_threads(2)
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before, anonymous = status("VmRSS"), status("RssAnon")
    peak = {"anonymous": anonymous, "running": True}

    def watch() -> None:
        while peak["running"]:
            peak["anonymous"] = max(peak["anonymous"], status("RssAnon"))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if kind == "from_pretrained":
        model, handle = OlmoeForCausalLM.from_pretrained(path), None
    else:
        model, handle = melinoe.load(path, slots=SLOTS, store=kind)
    load_s = time.perf_counter() - start
    loaded = status("VmHWM") - before
    with torch.no_grad():
        logits = model(torch.arange(16).unsqueeze(0) * 977).logits
    peak["running"] = False
    watcher.join()
    loads = (
        None if handle is None else sum(sum(phase) for phase in handle.counters.to_dict()["loads"])
    )
    return {
        "load_s": load_s,
        "load_peak_bytes": loaded,
        "peak_bytes": status("VmHWM") - before,
        "peak_anonymous_bytes": peak["anonymous"] - anonymous,
        "expert_loads": loads,
        "logits_sum": float(logits.double().sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--directory", help="where to write the checkpoint; default: /tmp")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="load-memory-", dir=arguments.directory) as path:
        sizes = write_checkpoint(Path(path), arguments.layers)
        print(f"wrote {sizes['checkpoint_bytes'] / 2**30:.2f} GiB", file=sys.stderr)
        runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for number in range(arguments.runs + 1):
            for kind in KINDS:
                command = [sys.executable, __file__, "--measure", kind, path]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                if number:  # the first round warms the page cache
                    runs[kind].append(found)
                    gib, s = found["peak_bytes"] / 2**30, found["load_s"]
                    print(f"{kind:16} peak {gib:6.2f} GiB, load {s:6.2f} s", file=sys.stderr)
    result = summarise(sizes, runs)
    if arguments.out:
        from melinoe.measure import write_json

        write_json(arguments.out, result)
    print(json.dumps(result))
    if not all(bound["kept"] for bound in result["bounds"].values()):
        sys.exit("a bound was not kept")


def summarise(sizes: dict, runs: dict[str, list[dict]]) -> dict:
    """Medians and ranges, and the two promises beside the worst run."""
    from melinoe.measure import machine  # late: a child's baseline is taken before torch is here

    def spread(kind: str, key: str) -> dict:
        values = [run[key] for run in runs[kind]]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def in_gib(amounts: dict) -> dict:
        return {name: value / 2**30 for name, value in amounts.items()}

    limits = {
        "ram": int(1.15 * sizes["expert_bytes"]) + sizes["backbone_bytes"],
        "disk": sizes["slots_bytes"] + sizes["backbone_bytes"] + sizes["largest_tensor_bytes"],
    }
    keys = ("load_s", "load_peak_bytes", "peak_bytes", "peak_anonymous_bytes")
    bounds = {}
    for kind, limit in limits.items():
        worst = max(run["peak_bytes"] for run in runs[kind])
        bounds[kind] = {"limit_bytes": limit, "worst_bytes": worst, "kept": worst <= limit}
    return {
        "benchmark": "load_memory",
        "title": "Peak host memory of loading, and of one forward pass of 16 tokens after it",
        "result": [
            {
                "loader": "transformers" if kind == "from_pretrained" else f"melinoe, {kind} store",
                "peak (GiB)": in_gib(spread(kind, "peak_bytes")),
                "of it anonymous (GiB)": in_gib(spread(kind, "peak_anonymous_bytes")),
                "bound (GiB)": bounds[kind]["limit_bytes"] / 2**30 if kind in bounds else None,
                "kept": bounds[kind]["kept"] if kind in bounds else None,
            }
            for kind in KINDS
        ],
        "slots": SLOTS,
        **sizes,
        "bounds": bounds,
        "results": {kind: {key: spread(kind, key) for key in keys} for kind in KINDS},
        "expert_loads": {kind: runs[kind][0]["expert_loads"] for kind in KINDS},
        "logits_sum": {kind: runs[kind][0]["logits_sum"] for kind in KINDS},
        "runs": len(runs["ram"]),
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
