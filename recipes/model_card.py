"""
Write the model card of the small OLMoE from what its training left behind.

Question answered: does the trained model route like real ones? The five figures of `routing.py`
stand beside those of real models, and of the same architecture untrained, measured alike; if these
two agreed, training would have taught the routers nothing.

    python recipes/model_card.py --model OUT_DIR --held-out src/melinoe/shipped/held_out
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from routing import BEFORE, TEXTS, TOKENS, figures, trace_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REAL = Path(__file__).parents[1] / "benchmarks" / "results" / "routing.json"
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
    config = AutoConfig.from_pretrained(args.model)
    trained = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    untrained = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    corpora = sorted(args.held_out.glob("*.jsonl"))
    rows = {
        name: figures(trace_of(model, tokenizer, corpora))
        for name, model in (("this model", trained), ("untrained", untrained))
    }
    for row in json.loads(REAL.read_text())["result"]:
        if row["real"]:
            rows[row["model"]] = row
    loss_curve(training["log"], args.model / "loss.png")
    settings = training["settings"]
    names = list(rows["this model"])
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

{TOKENS} tokens of held-out text, from an empty cache, after {BEFORE} that are not counted;
{TEXTS} passages of each corpus. Of real models as many tokens of their answers. Columns are
explained in `recipes/routing.py`.

| | {" | ".join(names)} |
|---|{"---|" * len(names)}
"""
    for model, row in rows.items():
        text += f"| {model} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |\n"
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
