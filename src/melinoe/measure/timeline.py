"""One generation token by token: how long each took, what it waited, what each layer loaded."""

import time
from itertools import pairwise
from typing import Any

import torch

from melinoe.engine.handle import Handle
from melinoe.errors import DataError
from melinoe.generate import Prompt, generate
from melinoe.measure.link import link_fields


class _Stamps:
    """A streamer that notes the clock, the stall, hits and loads so far at each new token."""

    def __init__(self, handle: Handle, device: torch.device) -> None:
        self.handle, self.device = handle, device
        self.clock_s: list[float] = []
        self.stall_s: list[float] = []
        self.hits: list[list[int]] = []
        self.loads: list[list[int]] = []
        self.at_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.at_prompt:  # transformers hands the prompt over first
            self.at_prompt = True
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.clock_s.append(time.perf_counter())
        self.stall_s.append(self.handle.stall_s)
        hits, loads = _hits_and_loads(self.handle)
        self.hits.append(hits)
        self.loads.append(loads)

    def end(self) -> None:
        pass


def timeline_record(
    model: Any,
    handle: Handle,
    tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int = 64,
    *,
    label: str,
    **options: Any,
) -> dict[str, Any]:
    """
    Generate once, from an empty cache, and return the record of kind ``timeline``.

    Its lists have one entry per token after the first: ``ms`` from the token before to this one,
    ``stall_ms`` of it waiting for experts, ``hits`` and ``loads`` by layer (uses whose expert was
    resident, experts copied on demand), and ``tokens``, the text of each. What the prompt took
    stands apart: ``ttft_s`` and ``prompt_loads``.

    Args:
        model: As in `melinoe.generate.generate`.
        handle: Attached to *model*.
        tokenizer: The model's.
        prompt: Text or token ids.
        max_new_tokens: At most so many.
        label: The model's name in reports.
        options: As in `melinoe.generate.generate`.

    Raises:
        DataError: fewer than two tokens came.
    """
    stamps = _Stamps(handle, model.get_input_embeddings().weight.device)
    handle.reset_cache()
    first_hits, first_loads = _hits_and_loads(handle)
    done = generate(model, handle, tokenizer, prompt, max_new_tokens, streamer=stamps, **options)
    if len(stamps.clock_s) < 2:
        raise DataError("the prompt got fewer than two tokens; take another for a timeline")
    hits = _steps([first_hits, *stamps.hits])
    loads = _steps([first_loads, *stamps.loads])
    return {
        "kind": "timeline",
        "model": label,
        "slots": handle.slots,
        "num_experts": handle.layers[0].num_experts,
        "policy": handle.policy,
        "link": link_fields(handle.link),
        "ttft_s": done.ttft_s,
        "prompt_tokens": len(done.prompt_ids),
        "prompt_loads": loads[0],
        "ms": _steps_ms(stamps.clock_s),
        "stall_ms": _steps_ms(stamps.stall_s),
        "hits": hits[1:],
        "loads": loads[1:],
        "tokens": [tokenizer.decode([token]) for token in done.ids[1:]],
    }


def _hits_and_loads(handle: Handle) -> tuple[list[int], list[int]]:
    """Of each layer, in prompt and completion so far."""
    counters = handle.counters
    return counters.hits.sum(axis=0).tolist(), counters.loads.sum(axis=0).tolist()


def _steps(sums: list[list[int]]) -> list[list[int]]:
    """What each token added to sums by layer."""
    return [
        [now - then for now, then in zip(after, before, strict=True)]
        for before, after in pairwise(sums)
    ]


def _steps_ms(stamps: list[float]) -> list[float]:
    return [1e3 * (now - then) for then, now in pairwise(stamps)]
