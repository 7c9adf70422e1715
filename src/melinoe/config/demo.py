"""Settings of the demo."""

from dataclasses import dataclass

from melinoe.config.finetuning import FinetuneSettings
from melinoe.config.names import policies
from melinoe.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of ``melinoe demo``, sized for ten minutes on two CPU cores, set-up included."""

    train_examples: int = setting(1600, "question and answer pairs to fine-tune on")
    steps: int = setting(200, "optimiser steps of each of the two fine-tunings")
    batch_size: int = setting(8, "sequences per step")
    max_length: int = setting(200, "longest training sequence", unit="tokens")
    own_texts: int = setting(256, "texts that the base model writes to keep what it knew")
    eval_examples: int = setting(96, "held-out examples behind each perplexity")
    prompts: int = setting(24, "held-out prompts that are generated from")
    max_new_tokens: int = setting(64, "generated per prompt", unit="tokens")
    slots: float = setting(0.25, "resident experts", unit="share of a layer's experts")
    # The stronger policy for every model of the demo, the base included: see docs/log.md.
    policy: str = setting("lfu", "which resident expert leaves first", choices=policies)
    eval_length: int = setting(512, "longest text behind a perplexity", unit="tokens")
    other_documents: int = setting(16, "documents of each other corpus behind its perplexity")
    predictor_prompts: int = setting(160, "training prompts that the predictor learns from")
    predictor_tokens: int = setting(48, "generated for each of those", unit="tokens")
    # Earlier settings of the fine-tuning were tried on the first 64 test examples.
    first_test_example: int = setting(128, "held-out examples start at this row of the test part")
    # One expert of the shipped model in float32 is 85 times smaller than OLMoE-1B-7B's in bfloat16.
    # At this bandwidth its transfer takes as long as that one's over 25 GB/s (PCIe 4): 0.5 ms.
    link_bytes_per_s: float = setting(293e6, "bandwidth of the emulated link", unit="bytes/s")
    link_latency_s: float = setting(10e-6, "latency of the emulated link per transfer", unit="s")
    seed: int = setting(0, "decides everything that is random")

    def finetune(self) -> FinetuneSettings:
        """Take the defaults, but for the sizes of data and steps."""
        return FinetuneSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            own_texts=self.own_texts,
            seed=self.seed,
        )
