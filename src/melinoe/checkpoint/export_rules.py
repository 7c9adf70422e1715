"""
Find settings of a checkpoint that other engines read otherwise than transformers.

Each rule was read in the engine's own code or seen to happen; `docs/export.md` says which.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from melinoe.checkpoint.files import locate, read_raw_config
from melinoe.checkpoint.packed import OWN_METHOD, find_packing
from melinoe.checkpoint.tokenizer import TOKENIZER_FILES

Config = dict[str, Any]


class Finding(NamedTuple):
    """Say what about a checkpoint another engine reads otherwise, or misses."""

    engines: str  # who does
    what: str  # the setting or the file
    why: str  # what happens, and the way out where there is one
    changes_results: bool = True  # whether it computes something else, if it loads at all


_FIXED = "vLLM, SGLang, llama.cpp"
# The family whose configs a rule is about, or None; whether it holds; what it finds.
_RULES: tuple[tuple[str | None, Callable[[Config], bool], Finding], ...] = (
    ("olmoe", lambda c: bool(c.get("norm_topk_prob")), Finding(
        _FIXED, "norm_topk_prob is true",
        "their OLMoE never normalises the weights of the chosen experts, whatever the config says",
    )),
    ("olmoe", lambda c: bool(c.get("tie_word_embeddings")), Finding(
        _FIXED, "tie_word_embeddings is true",
        "their OLMoE has a head of its own, which no stored tensor fills",
    )),
    ("olmoe", lambda c: c.get("clip_qkv") is not None, Finding(
        _FIXED, "clip_qkv is set", "their OLMoE does not clip queries, keys and values",
    )),
    ("olmoe", lambda c: c.get("rms_norm_eps", 1e-5) != 1e-5, Finding(
        "vLLM, SGLang", "rms_norm_eps is not 1e-05", "their OLMoE takes 1e-05 in every norm",
    )),
    (None, lambda c: "rope_parameters" in c and "rope_theta" not in c, Finding(
        "transformers 4", "rope_parameters, and no rope_theta",
        "it knows only rope_theta and rope_scaling, and takes its family's default (10,000 for "
        "most) without a word; write them beside",
    )),
    ("qwen3_moe", lambda c: "num_local_experts" in c and "num_experts" not in c, Finding(
        "transformers 4", "num_local_experts, and no num_experts",
        "it takes 128 experts and fails to load; write num_experts beside",
    )),
    (None, lambda c: (find_packing(c) or ("",))[0] == OWN_METHOD, Finding(
        "all", "experts are packed by `melinoe pack`",
        "only Melinoe reads them; `melinoe pack --format plain` writes them for other engines",
    )),
)  # fmt: skip


def other_results(config: Config) -> list[Finding]:
    """Find the rules that hold for a raw config, or for any part of it."""
    family = config.get("model_type")
    return [
        finding
        for of, holds, finding in _RULES
        if of in (None, family) and any(holds(part) for part in _parts(config))
    ]


def _parts(config: Config) -> Iterator[Config]:
    yield config
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:
            yield from _parts(part)


def find_export_faults(name: str) -> list[Finding]:
    """Look for what would keep other engines from computing what transformers computes."""
    path, config = read_raw_config(name)
    found = other_results(config)
    if not config.get("architectures"):
        why = "engines choose their code by that name"
        found.append(Finding("all", "config.json names no architectures", why))
    if not any(locate(name, filename) for filename in TOKENIZER_FILES):
        found.append(Finding("all", "no tokenizer", "put the base's own beside the weights"))
    if locate(name, "generation_config.json") is None:
        why = "where a text ends is then told by config.json alone"
        found.append(Finding("all", "no generation_config.json", why, changes_results=False))
    if (path.parent / "adapter" / "adapter_config.json").is_file():
        why = "vLLM takes no adapter that saves routers; serve this directory, which is merged"
        found.append(Finding("vLLM", "an adapter lies beside the weights", why, False))
    return found
