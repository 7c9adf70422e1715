"""
Decode greedily with one program that runs on torch; print token ids and the time of each as JSON.

    python torch_run.py PROGRAM CHECKPOINT THREADS PROMPT_IDS(JSON) TOKENS LIMIT_GIB(or "none") WORK
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def opened(program: str, path: str, limit: float | None, work: str) -> Any:
    """The model, as *program* opens it within *limit* GiB."""
    from transformers import AutoModelForCausalLM

    if program == "melinoe":
        import melinoe

        options: dict[str, Any] = {"store": "disk", "policy": "lfu"} if limit else {}
        if "quantization_config" in json.loads(Path(path, "config.json").read_text()):
            options["backbone"] = "int8"
        return melinoe.load(path, "cpu", **options)[0]
    if program == "transformers":
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    if program == "accelerate":
        memory = {"cpu": f"{limit / 2}GiB"} if limit else None
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            device_map="auto",
            max_memory=memory,
            offload_folder=f"{work}/offload",
        )
    import deepspeed

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    return deepspeed.initialize(model=model, config=settings | {"bf16": {"enabled": True}})[
        0
    ].module


def main() -> None:
    program, path, threads, prompt, tokens, limit, work = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = opened(program, path, None if limit == "none" else float(limit), work).eval()
    given, cache = torch.tensor([json.loads(prompt)]), None
    ids: list[int] = []
    seconds: list[float] = []
    with torch.inference_mode():
        while len(ids) < int(tokens):
            begin = time.perf_counter()
            done = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = done.past_key_values, done.logits[:, -1].argmax(-1, keepdim=True)
            ids.append(int(given))
            seconds.append(time.perf_counter() - begin)
    print(json.dumps({"ids": ids, "seconds": seconds}))


if __name__ == "__main__":
    main()
