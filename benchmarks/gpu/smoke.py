"""Does the engine work here at all? Each step by itself, with its whole traceback if it fails."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, StaticCache

import melinoe
from melinoe.engine.device.support import grouped_mm_waits
from melinoe.engine.passes import Batch
from melinoe.host_memory import free_host_bytes

ROOT = Path(__file__).parents[2]
_CARD = (
    "name,driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,"
    "memory.total,memory.free"
)


def card(dry: bool) -> dict[str, Any]:
    """Name the GPU, its link, its free memory, and the versions of what runs on it."""
    found: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "triton")}
    found["host_free_bytes"] = free_host_bytes()
    if dry:
        return found | {"gpu": None}
    asked = ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    free, total = torch.cuda.mem_get_info()
    capability = torch.cuda.get_device_capability()
    return found | {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(capability),
        "grouped_mm_waits": grouped_mm_waits(capability, torch.bfloat16),
        "free_bytes": free,
        "total_bytes": total,
        "nvidia_smi": dict(zip(_CARD.split(","), said.stdout.strip().split(", "), strict=False)),
    }


def smoke(device: torch.device) -> Iterator[dict[str, Any]]:
    """Try attach, a step that may not wait, capture and replay, and packed experts."""
    steps: dict[str, Callable[[torch.device], str]] = {
        "attach and generate": _generates,
        "a step that may not wait": _never_waits,
        "captured steps give the tokens of plain ones": _replays,
        "packed experts": _packed,
    }
    for name, step in steps.items():
        try:
            yield {"step": name, "passed": True, "said": step(device)}
        except Exception:
            yield {"step": name, "passed": False, "said": traceback.format_exc()}


def run_tests(folder: Path, chosen: list[str]) -> dict[str, Any]:
    """
    Run GPU tests in a process of their own; their results are written to *folder* as they come.

    Args:
        folder: Gets ``tests.jsonl``, a line a test, and ``tests.log``.
        chosen: Further arguments of pytest.
    """
    results, log = folder / "tests.jsonl", folder / "tests.log"
    command = [
        sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-p", "no:cacheprovider", "-W",
        "default", f"--gpu-results={results}", *chosen,
    ]  # fmt: skip
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False)
    return {"code": done.returncode, "last": log.read_text(encoding="utf-8").splitlines()[-3:]}


def _model(device: torch.device) -> Any:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_experts=16, num_experts_per_tok=4, initializer_range=0.1,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    found = OlmoeForCausalLM(config).to(device, torch.bfloat16).eval()
    found.set_experts_implementation("grouped_mm")
    return found


def _text(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 25, device=model.device)[None]
    tokens = 24 if model.device.type == "cuda" else 4
    with torch.no_grad():
        return model.generate(
            ids, max_new_tokens=tokens, do_sample=False, cache_implementation="static"
        )


def _generates(device: torch.device) -> str:
    model = _model(device)
    with melinoe.attach(model, engine="fast", slots=6, graphs=False) as handle:
        programs = handle._caches[0].loaders[0].programs
        return f"{_text(model).shape[1]} tokens, {programs} programs copy"


def _never_waits(device: torch.device) -> str:
    model = _model(device)
    with melinoe.attach(model, engine="fast", slots=6, graphs=False) as handle, torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=64)
        ids = torch.arange(1, 25, device=device)[None]
        model(ids, past_key_values=cache)
        handle._passes.given = Batch(1, 1, 1, 0, None)
        options = {
            "past_key_values": cache,
            "position_ids": torch.tensor([[24]], device=device),
            "attention_mask": torch.ones(1, 1, 1, 64, dtype=torch.bool, device=device),
        }
        model(ids[:, :1], **options)  # compiles the kernels
        with _waiting_is_an_error(device):
            model(ids[:, :1], **options)
        handle._passes.given = None
    return "it did not"


@contextlib.contextmanager
def _waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _replays(device: torch.device) -> str:
    model = _model(device)
    with melinoe.attach(model, engine="fast", slots=6, graphs=False):
        expected = _text(model)
    with melinoe.attach(model, engine="fast", slots=6, graphs=True) as handle:
        for _ in range(2):
            assert torch.equal(_text(model), expected), "other tokens"
        graphs = handle.graphs
        assert graphs.reason is None, graphs.reason
        # On the CPU generate asks for no captured step.
        assert graphs.replayed > 20 or device.type != "cuda", f"{graphs.replayed} replays"
    return f"{graphs.captured} captured, {graphs.replayed} replayed"


def _packed(device: torch.device) -> str:
    model = _model(device)
    formats = ("int8", "int4", "mxfp4", "fp8")
    for format in formats:
        found = []
        for slots in (6, 16):
            with melinoe.attach(model, engine="fast", slots=slots, format=format, graphs=False):
                found.append(_text(model))
        assert torch.equal(*found), f"{format}: other tokens than with every expert in a slot"
    return f"{', '.join(formats)}: the tokens of all-resident experts"
