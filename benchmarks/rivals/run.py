"""
How fast is Melinoe beside what else runs a Mixture-of-Experts model on a plain machine?

OLMoE's shape with random weights, fewer layers unless told otherwise, on the CPU; the same greedy
decoding after the same prompt, in processes of their own, with as many threads, as many bits and as
much memory (a control group's limit) for each program, and a cold page cache where memory is
limited. "4 bits" are experts in 4.5 bits and all else in 8.5: llama.cpp's Q4_0 and Q8_0, and the
very same codes of the experts in Melinoe with `--backbone int8`. Programs that cannot run are named
with their reason. The first token (the prompt) and the next few are not timed.

Bad news would be less than .7 of llama.cpp's speed with everything resident at 4 bits, less than 4
times our own bf16 there, and less than 8 times llama.cpp's where the model is larger than memory.
Not measured: prompts, batches, GPUs, trained routers.

Each program gets an environment of its own below --work, from the package registries: llama.cpp as
node-llama-cpp's prebuilt library (npm), its file writer `gguf`, DeepSpeed (pip).

    python benchmarks/rivals/run.py [--layers 4] [--threads 1] [--work DIR] [--out RESULT.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common import publish  # noqa: E402
from disk import forget, limited  # noqa: E402
from load_memory import write_checkpoint  # noqa: E402

NPM = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
PIP = {
    "gguf": ("gguf==0.19.0",),
    "deepspeed": ("deepspeed", "hjson", "ninja", "py-cpuinfo", "msgpack", "einops"),
}
PROMPT = list(range(100, 116))
UNTIMED = 4
# Program, bits, and whether memory is limited.
RUNS = (
    ("melinoe", "bf16", False),
    ("transformers", "bf16", False),
    ("llama.cpp", "bf16", False),
    ("melinoe", "4 bits", False),
    ("llama.cpp", "4 bits", False),
    ("melinoe", "bf16", True),
    ("llama.cpp", "bf16", True),
    ("accelerate", "bf16", True),
    ("deepspeed", "bf16", True),
    ("melinoe", "4 bits", True),
    ("llama.cpp", "4 bits", True),
)  # fmt: skip


def set_up(work: Path) -> None:
    """Install what is not there yet; what cannot be installed fails later, with its reason."""
    node = work / "node"
    if not (node / "node_modules").exists():
        node.mkdir(parents=True, exist_ok=True)
        (node / "package.json").write_text("{}")
        quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--omit=optional")
        with suppress(OSError):  # no npm
            subprocess.run(["npm", "install", *quiet, *NPM], cwd=node)
    for name, packages in PIP.items():
        if not (work / name).exists():
            target = ("--target", str(work / name), "--no-deps")
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", *target, *packages])


def make_files(work: Path, layers: int) -> dict[str, dict[str, Path]]:
    """Write the model in both precisions for both kinds of program, unless it is there."""
    plain, packed = work / f"model-{layers}", work / f"packed-{layers}"
    files = {name: work / f"{name}-{layers}" / "model.gguf" for name in ("bf16", "q4")}
    if not (plain / "config.json").exists():
        write_checkpoint(plain, layers)
    environment = os.environ | {"PYTHONPATH": str(work / "gguf")}
    for name, file in files.items():
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            more = [str(packed)] if name == "q4" else []
            half = file.with_suffix(".part")
            code = [sys.executable, str(HERE / "gguf_file.py"), str(plain), name, str(half), *more]
            subprocess.run(code, env=environment, check=True)
            half.rename(file)
    return {
        "torch": {"bf16": plain, "4 bits": packed},
        "llama.cpp": {"bf16": files["bf16"], "4 bits": files["q4"]},
    }


def run(program: str, path: Path, limit: float | None, options: Any) -> dict[str, Any]:
    """Token ids and seconds of one program, or the reason why there are none."""
    tokens, threads = str(options.tokens), str(options.threads)
    if program == "llama.cpp":
        modules = str(options.work / "node/node_modules")
        code = ["node", str(HERE / "llama.mjs"), modules, str(path), threads]
        code += [json.dumps(PROMPT), tokens]
    else:
        code = [sys.executable, str(HERE / "torch_run.py"), program, str(path), threads]
        code += [json.dumps(PROMPT), tokens, str(limit or "none"), str(options.work)]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    if program == "deepspeed":
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(options.work / "deepspeed"), environment.get("PYTHONPATH", "")]
        )

    def started(join: Path | None) -> dict[str, Any]:
        def enter() -> None:
            if join is not None:
                join.write_text(str(os.getpid()))

        try:
            done = subprocess.run(
                code, env=environment, preexec_fn=enter, capture_output=True, text=True,
                timeout=options.timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"reason": f"did not decode {tokens} tokens in {options.timeout} s"}
        except OSError as error:
            return {"reason": str(error)}
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            killed = "killed at the memory limit" if done.returncode == -9 else "failed"
            return {"reason": said[-1][:200] if said and done.returncode != -9 else killed}
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    if limit is None:
        return started(None)
    forget(str(path if path.is_dir() else path.parent))  # a cold page cache
    with limited(limit) as join:
        return started(join)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--share", type=float, default=0.4, help="of a model's bytes, the limit")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one program")
    parser.add_argument("--only", nargs="+", help="programs")
    parser.add_argument("--bits", choices=("bf16", "4 bits"), help="of the weights; absent: both")
    parser.add_argument("--resident", action="store_true", help="leave the memory limit out")
    parser.add_argument("--work", type=Path, help="kept: environments and models")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="melinoe-rivals-") as scratch:
        options.work = (options.work or Path(scratch)).resolve()
        set_up(options.work)
        files = make_files(options.work, options.layers)
        rows, first = [], {}
        for program, bits, is_limited in RUNS:
            if (
                (options.only and program not in options.only)
                or (options.bits and bits != options.bits)
                or (options.resident and is_limited)
            ):
                continue
            path = files["llama.cpp" if program == "llama.cpp" else "torch"][bits]
            model_bytes = files["llama.cpp"][bits].stat().st_size
            limit = round(options.share * model_bytes / 2**30 + 0.75, 2) if is_limited else None
            found = run(program, path, limit, options)
            row: dict[str, Any] = {"program": program, "bits": bits, "memory_gib": limit}
            if "reason" in found:
                row["why_not"] = found["reason"]
            else:
                ids = first.setdefault(bits, found["ids"])
                same = [a == b for a, b in zip(ids, found["ids"], strict=True)]
                timed = found["seconds"][UNTIMED:]
                row |= {
                    "tokens_per_s": 1 / median(timed),
                    "best_tokens_per_s": 1 / min(timed),
                    "equal_tokens": same.index(False) if False in same else len(same),
                }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    notes = [
        f"Limits are {options.share} of the model's bytes and .75 GiB for the program itself.",
        "Equal tokens: of the greedy text, before the first that differs from the first program's "
        "with as many bits.",
    ]
    publish(
        {
            "benchmark": "rivals",
            "title": "Beside other programs, on a plain machine",
            "question": (__doc__ or "").strip().splitlines()[0],
            "result": rows,
            "notes": notes,
            "settings": {n: getattr(options, n) for n in ("layers", "threads", "tokens", "share")},
        },
        options.out,
    )


if __name__ == "__main__":
    main()
