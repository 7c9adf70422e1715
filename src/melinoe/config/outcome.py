"""Settings of what is measured after fine-tuning."""

from dataclasses import dataclass

from melinoe.config.setting import setting


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
