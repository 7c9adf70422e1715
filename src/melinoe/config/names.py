"""Words, shares and small settings that stages and commands have in common."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from melinoe.config.setting import setting

STORES = ("auto", "ram", "pinned", "disk")
# Share of a layer's experts that is resident where experiments do not say how many are.
QUARTER = 0.25


@dataclass(frozen=True, kw_only=True)
class OutcomeSettings:
    """Sizes of the measurements of a fine-tuned model and its base, for ``melinoe.json``."""

    examples: int = setting(128, "held-out examples behind each perplexity")
    prompts: int = setting(32, "held-out prompts that are answered and traced")
    max_new_tokens: int = setting(64, "generated per prompt at most", unit="tokens")
    max_length: int = setting(512, "longest text behind a perplexity", unit="tokens")
    batch_size: int = setting(8, "sequences per forward pass of a perplexity")
    held_out: float = setting(
        0.05, "kept out of the training data where no held-out data is given", unit="share"
    )


def experts_in_share(share: float, num_experts: int) -> int:
    """Count the experts in a share of a layer's: to the nearest, halves up, at least one."""
    return max(1, min(num_experts, int(share * num_experts + 0.5)))


def policies() -> tuple[str, ...]:
    """Name the cache policies that can run a model: ours, and those of installed packages."""
    from melinoe.cache.policy import servable_names

    return servable_names()


def version_of(package: str) -> str:
    """Give the installed version of *package*, or say that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
