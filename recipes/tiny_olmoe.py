"""
Train the small OLMoE that ships with Melinoe, from nothing but text.

Question answered: does a small mixture of experts, trained in the ordinary way (next token plus
the ordinary load-balancing loss), route like a big one (`routing.py` sets it beside real ones)? The
model is the demo's base model, so it must be a really trained one; nothing in this recipe knows
about caches. It is a true OLMoE, which other engines read: weights of the chosen experts are not
normalised, the head is a tensor of its own. Its text is cut like SmolLM's and StarCoder's (digits
alone, then GPT-2's rule): llama.cpp knows that as `smollm`, though not for this vocabulary
(docs/export.md).

Input: any directory of JSONL files with a "text" field (one file is one corpus), or hub data sets
named with --hub. The last 5 % of each corpus's rows are held out and never trained on.
Output, in the hub's own layout: config.json, generation_config.json, model.safetensors (bf16, one
tensor per expert and projection), tokenizer files, training.json (settings, loss curve, validation
perplexity per corpus). `recipes/model_card.py` turns training.json into the card.

    python recipes/tiny_olmoe.py --data CORPUS_DIR --out OUT_DIR

One CPU core reads about 3,000 tokens a second: three hours for the default 32 M. An interrupted run
resumes from its last checkpoint when started again with the same --out.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset, Subset
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
from transformers.trainer_callback import ExportableState

from melinoe.malloc import keep_freed_memory

HELD_OUT = 0.05
EOS, PAD = "<|endoftext|>", "<|padding|>"
# The words of the demo's questions and answers, on which this model is fine-tuned.
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == "user" -%}
Question: {{ message.content }}
{% elif message.role == "assistant" -%}
Answer: {{ message.content }}{{ eos_token }}
{%- else -%}
{{ message.content }}

{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}Answer:{%- endif -%}"""


def read_corpora(directory: Path | None, hub: list[str]) -> dict[str, list[str]]:
    """Corpus name -> documents, in file order; the caller holds out the tail."""
    corpora: dict[str, list[str]] = {}
    for path in sorted(directory.glob("*.jsonl")) if directory else []:
        with path.open(encoding="utf-8") as lines:
            corpora[path.stem] = [json.loads(line)["text"] for line in lines if line.strip()]
    for name in hub:
        from datasets import load_dataset

        corpora[name.split("/")[-1]] = list(load_dataset(name, split="train")["text"])
    if not corpora:
        raise SystemExit(
            "no text found; point --data at a directory of .jsonl files or name a --hub data set"
        )
    return corpora


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """The first 95 % for training, the last 5 % (at least one document) for validation."""
    held_out = max(1, math.ceil(len(documents) * HELD_OUT))
    return documents[:-held_out], documents[-held_out:]


def train_tokenizer(documents: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (every byte string has an encoding); digits stand alone, for arithmetic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        bos_token=EOS,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
    )


class Blocks(Dataset):
    """Documents joined by end-of-text, cut into blocks of *context* tokens; the rest is dropped."""

    def __init__(self, documents: list[str], tokenizer: PreTrainedTokenizerFast, context: int):
        ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        stream = np.concatenate(
            [np.asarray([*one, tokenizer.eos_token_id], np.int64) for one in ids]
        )
        self.num_characters = sum(map(len, documents))
        self.num_tokens = len(stream)
        self.blocks = stream[: len(stream) // context * context].reshape(-1, context)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index])
        return {"input_ids": block, "labels": block}


def balance_loss(router_logits: tuple[torch.Tensor, ...], config: OlmoeConfig, over: str):
    """
    Ask for even use of the experts, of each layer or of the whole model; top-k where all are even.

    transformers' own term (``model``) adds the counts of all layers up before it compares experts,
    so that each layer may keep to few as long as layers do not keep to the same. ``layer`` asks it
    of one layer at a time and averages, as OLMoE's training does (arXiv:2409.02060).
    """
    parts = [(one,) for one in router_logits] if over == "layer" else [router_logits]
    k = config.num_experts_per_tok
    return sum(load_balancing_loss_func(one, config.num_experts, k) for one in parts) / len(parts)


class PretrainTrainer(Trainer):
    """Balances experts while it trains; validation loss is next tokens alone."""

    balance, over = 0.0, "layer"

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.balance * balance_loss(outputs.router_logits, model.config, self.over)
        return (loss, outputs) if return_outputs else loss


class Clock(TrainerCallback, ExportableState):
    """
    Counts the seconds of training, those of the runs that this one resumes included.

    What a run did after its last checkpoint is done again, and is not counted twice. The Trainer
    keeps what `state` says in the checkpoint's trainer_state.json.
    """

    def __init__(self):
        self.earlier = 0.0
        self.began = None

    @property
    def seconds(self) -> float:
        return self.earlier + (0 if self.began is None else time.perf_counter() - self.began)

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        kept = state.stateful_callbacks.get("Clock", {})
        self.earlier = kept.get("attributes", {}).get("seconds", 0.0)
        self.began = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.earlier, self.began = self.seconds, None


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=False,
        max_position_embeddings=args.context,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,  # the trainer has a term of its own
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="directory of JSONL files, one corpus each")
    add(
        "--hub",
        action="append",
        default=[],
        help="hub data set with a text column; may be repeated",
    )
    add("--out", type=Path, required=True)
    add("--tokens", type=float, default=32e6, help="training tokens")
    add("--vocab-size", type=int, default=4096)
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=32)
    add("--top-k", type=int, default=4)
    add("--hidden-size", type=int, default=128)
    add("--intermediate-size", type=int, default=96)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=512, help="tokens per sequence")
    add("--batch", type=int, default=8, help="sequences per step")
    add("--lr", type=float, default=3e-3)
    add("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    add("--balance-over", choices=["layer", "model"], default="layer", help="what is balanced")
    add("--bf16", action="store_true", help="compute in bfloat16, for larger models on a GPU")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    keep_freed_memory()
    corpora = {
        name: split(documents) for name, documents in read_corpora(args.data, args.hub).items()
    }
    training_text = [document for train, _ in corpora.values() for document in train]
    tokenizer = train_tokenizer(training_text, args.vocab_size, args.context)
    train = Blocks(training_text, tokenizer, args.context)
    validation = {
        name: Blocks(held_out, tokenizer, args.context) for name, (_, held_out) in corpora.items()
    }
    model = build_model(args, tokenizer)

    steps = math.ceil(args.tokens / (args.batch * args.context))
    work = args.out.with_name(args.out.name + ".checkpoints")
    trainer = PretrainTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            max_steps=steps,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=steps // 20,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            logging_steps=25,
            eval_strategy="steps",
            eval_steps=max(1, steps // 12),
            save_steps=max(1, min(200, steps // 24)),
            save_total_limit=1,
            seed=args.seed,
            bf16=args.bf16,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=train,
        # A sample for the curve; the whole of each corpus's held-out part is measured at the end.
        eval_dataset={
            name: Subset(blocks, range(min(32, len(blocks)))) for name, blocks in validation.items()
        },
    )
    trainer.balance, trainer.over = args.balance, args.balance_over
    clock = Clock()
    trainer.add_callback(clock)
    has_checkpoint = work.is_dir() and any(work.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=has_checkpoint)

    model.config.router_aux_loss_coef = args.balance
    model.config.use_cache = True  # the Trainer switches it off
    model = model.to(torch.bfloat16).eval()
    final = {}
    for name, blocks in validation.items():
        loss = trainer.evaluate(blocks)["eval_loss"]
        bits = loss * blocks.num_tokens / math.log(2) / blocks.num_characters
        final[name] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_character": bits,
            "tokens": len(blocks) * (args.context - 1),  # the first of a block is not predicted
        }
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # The class by a name that transformers 4, and so llama.cpp's converter, knows too.
    config_file = args.out / "tokenizer_config.json"
    named = json.loads(config_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(named, indent=2))
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    for key in ("data", "out"):
        settings.pop(key)
    record = {
        "settings": settings,
        "steps": steps,
        "tokens_seen": steps * args.batch * args.context,
        "tokens_in_corpora": train.num_tokens,
        "seconds": round(clock.seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": final,
        "log": trainer.state.log_history,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    temporary = args.out / "training.json.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, args.out / "training.json")
    for name, row in final.items():
        print(
            f"{name:14} validation perplexity {row['perplexity']:8.2f}"
            f"   bits/char {row['bits_per_character']:.3f}"
        )


if __name__ == "__main__":
    main()
