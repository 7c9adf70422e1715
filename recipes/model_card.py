"""
Write the model card of the small OLMoE from what its training left behind.

Question answered: does the trained model route by content? Its locality stands beside that of the
same architecture untrained, measured alike; if the two agreed, training would have taught the
routers nothing and the model would be no base for a study of caches.

    python recipes/model_card.py --model OUT_DIR --held-out src/melinoe/shipped/held_out
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import melinoe
from melinoe.data import Encoded, load_examples
from melinoe.measure import curve_record, locality_record, reading_trace

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPT_TOKENS, NEW_TOKENS, PER_CORPUS = 64, 64, 6

DATA = """
| corpus | what | terms |
|---|---|---|
| novels | Jane Austen's novels, Moby Dick | public domain |
| drama | Shakespeare, Milton | public domain |
| speeches | State of the Union addresses | CC0 |
| definitions | WordNet 3.0 glosses | WordNet 3.0 licence |
| mathematics | comments of Metamath's set.mm | CC0 |
| code | Python 3.11 standard library | PSF licence |
"""


def locality(model: torch.nn.Module, texts: list[list[int]]) -> dict[str, str]:
    """Locality while reading real text token by token, as a table row."""
    experts = model.config.num_experts
    handle = melinoe.attach(model, slots=experts)
    encoded = [Encoded(ids, [at >= PROMPT_TOKENS for at in range(len(ids))]) for ids in texts]
    trace = reading_trace(model, handle, encoded)
    handle.detach()
    found = locality_record(trace, "")
    curve = curve_record(trace, "", "lru", [experts // 4])
    row = {
        "experts per sequence": found["experts_per_sequence_mean"],
        "reuse": found["reuse"],
        f"hit rate, LRU, {experts // 4} slots": curve["hit_rate"][0],
    }
    shown = {n: f"{e['mean']:.3f} ({e['low']:.3f} to {e['high']:.3f})" for n, e in row.items()}
    shown["distinct experts over all prompts, mean layer"] = f"{found['distinct_experts']:.1f}"
    return shown


def loss_curve(log: list[dict], path: Path) -> None:
    """Training loss (load-balancing term included) and validation loss of each corpus."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    train = [(row["step"], row["loss"]) for row in log if "loss" in row]
    axes.plot(*zip(*train, strict=True), color="#999999", lw=1)
    ends = [(train[-1][1], "training", "#777777")]
    # Corpora alone: "eval_loss" is the measurement at the end, "train_loss" the run's mean.
    names = {key for row in log for key in row if re.fullmatch(r"eval_.+_loss", key)}
    for name in sorted(names):
        points = [(row["step"], row[name]) for row in log if name in row]
        (line,) = axes.plot(*zip(*points, strict=True), lw=1.5)
        label = name.removeprefix("eval_").removesuffix("_loss")
        ends.append((points[-1][1], label, line.get_color()))
    lowest = 0.0
    for loss, label, color in sorted(ends):  # from below, each clear of the one before
        lowest = max(loss, lowest + 0.2)
        axes.text(train[-1][0] * 1.02, lowest, label, color=color, fontsize=8, va="center")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(2, 7))
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    training = json.loads((args.model / "training.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [
        tokenizer(example.completion)["input_ids"][: PROMPT_TOKENS + NEW_TOKENS]
        for path in sorted(args.held_out.glob("*.jsonl"))
        for example in load_examples(path, limit=PER_CORPUS)
    ]
    config = AutoConfig.from_pretrained(args.model)
    trained = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    untrained = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rows = {
        "trained": locality(trained, texts),
        "untrained": locality(untrained, texts),
    }
    loss_curve(training["log"], args.model / "loss.png")
    settings = training["settings"]
    names = list(rows["trained"])
    validation = training["validation"]
    perplexities = [row["perplexity"] for row in validation.values()]
    text = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, olmoe]
---

# Tiny OLMoE

A mixture-of-experts language model of {training["parameters"] / 1e6:.2f} M parameters
(OLMoE architecture: {settings["layers"]} layers, {settings["experts"]} experts, top-{
        settings["top_k"]
    }, hidden size {settings["hidden_size"]}, expert width {settings["intermediate_size"]},
vocabulary {settings["vocab_size"]}, context {settings["context"]}), trained from scratch in the
ordinary way: next token, and the ordinary load-balancing loss (weight {settings["balance"]}). It
is the base model of Melinoe's demo and tests. It is too small to be of use for anything else: it
writes grammatical nonsense.

## Data

{training["tokens_in_corpora"] / 1e6:.1f} M tokens of six corpora, {
        training["tokens_seen"] / 1e6:.1f} M tokens seen ({
        training["tokens_seen"] / training["tokens_in_corpora"]:.1f} passes). The last 5 % of each
corpus's rows were held out. Byte-level BPE trained on the training part; digits stand alone.
{DATA}
No GSM8K text was seen: the demo fine-tunes on it.

## Validation

| corpus | perplexity | bits per character | tokens |
|---|---|---|---|
"""
    for name, row in validation.items():
        text += (
            f"| {name} | {row['perplexity']:.2f} | {row['bits_per_character']:.3f} "
            f"| {row['tokens']:,} |\n"
        )
    text += f"| geometric mean | {np.exp(np.mean(np.log(perplexities))):.2f} | | |\n"
    text += f"""
![Training loss and validation loss of each corpus over steps](loss.png)

## Routing

Locality while reading {NEW_TOKENS} tokens of held-out text, one at a time, after {
        PROMPT_TOKENS
    } at once: {len(texts)} passages,
the same for both, mean (95 % interval over passages), cold cache. Chance is {
        settings["top_k"]
    } of {settings["experts"]} ({
        settings["top_k"] / settings["experts"]:.3f}) for reuse and a quarter for the hit rate.

| | {" | ".join(names)} |
|---|{"---|" * len(names)}
"""
    for model, row in rows.items():
        text += f"| {model} | " + " | ".join(row[name] for name in names) + " |\n"
    versions = training["versions"]
    hours = training["seconds"] / 3600
    text += f"""
## Made with

    python recipes/tiny_olmoe.py --data CORPUS_DIR --out OUT_DIR
    python recipes/model_card.py --model OUT_DIR --held-out src/melinoe/shipped/held_out

{training["steps"]:,} steps of {settings["batch"]} x {settings["context"]} tokens, AdamW, peak
learning rate {settings["lr"]}, cosine to 5 % of it, seed {settings["seed"]}; {hours:.1f} hours on {
        training["threads"]
    } CPU cores in float32 (other work ran beside it); torch {versions["torch"]}, transformers {
        versions["transformers"]
    }. All settings and the log are in `training.json`.
"""
    (args.model / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
