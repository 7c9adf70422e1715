"""
Find settings of a checkpoint that other engines read otherwise than transformers.

Each rule was read in the engine's own code or seen to happen; `docs/export.md` says which.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from melinoe.checkpoint.files import read_raw_config
from melinoe.checkpoint.hub import locate
from melinoe.checkpoint.packed import OWN_METHOD, find_packing
from melinoe.checkpoint.tokenizer import TOKENIZER_FILES

Config = dict[str, Any]


class Finding(NamedTuple):
    """
    Say what about a checkpoint another engine reads otherwise, or misses.

    Attributes:
        engines: Who does.
        what: The setting or the file.
        why: What happens, and the way out where there is one.
        changes_results: Whether the engine computes something else, if it loads at all.
    """

    engines: str
    what: str
    why: str
    changes_results: bool = True


class _Rule(NamedTuple):
    """Hold a finding and the family whose configs it is about; None for any family."""

    family: str | None
    holds: Callable[[Config], bool]
    finding: Finding


def _is_packed_here(config: Config) -> bool:
    """Whether `melinoe pack` wrote the checkpoint."""
    packing = find_packing(config)
    return packing is not None and packing.method == OWN_METHOD


_FIXED = "vLLM, SGLang, llama.cpp"
_RULES = (
    _Rule("olmoe", lambda c: bool(c.get("norm_topk_prob")), Finding(
        _FIXED, "norm_topk_prob is true",
        "their OLMoE never normalises the weights of the chosen experts, whatever the config says",
    )),
    _Rule("olmoe", lambda c: bool(c.get("tie_word_embeddings")), Finding(
        _FIXED, "tie_word_embeddings is true",
        "their OLMoE has a head of its own, which no stored tensor fills",
    )),
    _Rule("olmoe", lambda c: c.get("clip_qkv") is not None, Finding(
        _FIXED, "clip_qkv is set", "their OLMoE does not clip queries, keys and values",
    )),
    _Rule("olmoe", lambda c: c.get("rms_norm_eps", 1e-5) != 1e-5, Finding(
        "vLLM, SGLang", "rms_norm_eps is not 1e-05", "their OLMoE takes 1e-05 in every norm",
    )),
    _Rule(None, lambda c: "rope_parameters" in c and "rope_theta" not in c, Finding(
        "transformers 4", "rope_parameters, and no rope_theta",
        "it knows only rope_theta and rope_scaling, and takes its family's default (10,000 for "
        "most) without a word; write them beside",
    )),
    _Rule("qwen3_moe", lambda c: "num_local_experts" in c and "num_experts" not in c, Finding(
        "transformers 4", "num_local_experts, and no num_experts",
        "it takes 128 experts and fails to load; write num_experts beside",
    )),
    _Rule(None, lambda c: _is_packed_here(c), Finding(
        "all", "experts are packed by `melinoe pack`",
        "only Melinoe reads them; `melinoe pack --format plain` writes them for other engines",
    )),
)  # fmt: skip


def other_results(config: Config) -> list[Finding]:
    """Find the rules that hold for a raw config, or for any part of it."""
    family = config.get("model_type")
    return [
        rule.finding
        for rule in _RULES
        if rule.family in (None, family) and any(rule.holds(part) for part in _parts(config))
    ]


def find_export_faults(name: str) -> list[Finding]:
    """
    Look for what would keep other engines from computing what transformers computes.

    Of a name on the hub config and tokenizer are fetched.
    """
    path, config = read_raw_config(name)
    found = other_results(config)
    if not config.get("architectures"):
        found.append(Finding(
            "all", "config.json names no architectures", "engines choose their code by that name"
        ))  # fmt: skip
    if not any(locate(name, filename) for filename in TOKENIZER_FILES):
        found.append(Finding(
            "all", "no tokenizer", "put the base's own beside the weights"
        ))  # fmt: skip
    if locate(name, "generation_config.json") is None:
        found.append(Finding(
            "all", "no generation_config.json",
            "where a text ends is then told by config.json alone", changes_results=False,
        ))  # fmt: skip
    if (Path(path).parent / "adapter" / "adapter_config.json").is_file():
        found.append(Finding(
            "vLLM", "an adapter lies beside the weights",
            "vLLM takes no adapter that saves routers; serve this directory, which is merged",
            changes_results=False,
        ))  # fmt: skip
    return found


def _parts(config: Config) -> Iterator[Config]:
    yield config
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:
            yield from _parts(part)
