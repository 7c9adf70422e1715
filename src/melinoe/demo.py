"""
The main job on the shipped model, from text to table: what `make demo` runs.

Nothing here is canned: every figure is measured in this run, by the stages that everybody uses.

    1. fine-tune the shipped model twice on GSM8K, with text of the model's own to keep what it
       knew: without the locality terms (the control), and with them
    2. perplexity of all three on held-out GSM8K and on six other kinds of text, and what a cache
       would move while each reads the same answers
    3. trace their routing on held-out prompts; fit the predictor on prompts of its own, which
       neither the fine-tuning nor the serving sees
    4. serve with few experts resident, the rest on disk: as the link is, and on an emulated one
    5. a table, and a report with figures
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from melinoe.cache import DEFAULT_POLICY
from melinoe.cache.prefetch import Predicted
from melinoe.cache.trace import Trace
from melinoe.checkpoint import check_output, describe, load_tokenizer
from melinoe.checkpoint.files import read_config
from melinoe.config import FinetuneSettings, experts_in_share
from melinoe.data import Example, encode, load_examples
from melinoe.engine.load import load
from melinoe.engine.transfer import EmulatedLink
from melinoe.evaluate import perplexity, quality_record
from melinoe.finetune import finetune
from melinoe.generate import prompt_ids, trace_prompts
from melinoe.measure import (
    append_jsonl,
    curve_record,
    locality_record,
    machine,
    reading_record,
    reading_trace,
    serving,
    side_by_side,
)
from melinoe.predictor import Predictor, compare, fit
from melinoe.report import render_table, write_report
from melinoe.shipped import GSM8K_TEST, GSM8K_TRAIN, HELD_OUT, TINY_OLMOE

BASE, CONTROL, TUNED = "base", "control", "fine-tuned"
PREFETCH = "fine-tuned + prefetch"
IN_DOMAIN = "gsm8k"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo, for ten minutes on two CPU cores, set-up included."""

    train_examples: int = 1600  # question and answer pairs to fine-tune on
    steps: int = 200  # of each of the two fine-tunings
    batch_size: int = 8
    max_length: int = 200  # tokens of a training sequence
    own_texts: int = 256  # that the base model writes to keep what it knew
    eval_examples: int = 96  # held out, behind each perplexity
    eval_length: int = 512  # tokens of a text behind a perplexity
    other_documents: int = 16  # of each other corpus, behind its perplexity
    prompts: int = 24  # held out, that are generated from
    max_new_tokens: int = 64
    slots: float = 0.25  # share of a layer's experts that is resident
    policy: str = DEFAULT_POLICY  # of every model of the demo, the base included
    predictor_prompts: int = 160  # that the predictor learns from
    predictor_tokens: int = 48  # generated for each of those
    # Earlier settings of the fine-tuning were tried on the first 64 test examples.
    first_test_example: int = 128
    # One expert of the shipped model in float32 is 85 times smaller than OLMoE-1B-7B's in bfloat16.
    # At this bandwidth its transfer takes as long as that one's over 25 GB/s (PCIe 4): 0.5 ms.
    link_bytes_per_s: float = 293e6
    link_latency_s: float = 10e-6
    seed: int = 0  # decides everything that is random


def quick_settings() -> DemoSettings:
    """Give settings that take the same path in about a minute; the figures mean nothing."""
    return DemoSettings(
        train_examples=64,
        steps=6,
        own_texts=8,
        eval_examples=8,
        prompts=4,
        predictor_prompts=16,
        predictor_tokens=8,
        other_documents=2,
        max_new_tokens=8,
    )


def run(
    out: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    say: Callable[[str], None],
    base: Path = TINY_OLMOE,
) -> str:
    """
    Run everything; leave checkpoints, records and the report in *out*, new or empty.

    *seed* decides data order, adapters and predictor; *say* is told of progress. Gives the table.
    """
    settings = replace(quick_settings() if quick else DemoSettings(), seed=seed)
    return Demo(check_output(out), settings, base, say).run()


class Demo:
    """One run: its settings, where it writes, and how long each stage took."""

    def __init__(self, out: Path, settings: DemoSettings, base: Path, say: Callable[[str], None]):
        self.out, self.settings, self.say = out, settings, say
        self.records = out / "records.jsonl"
        self.paths = {BASE: base, CONTROL: out / "control", TUNED: out / "fine-tuned"}
        self.seconds: dict[str, float] = {}
        self.experts = describe(str(base)).num_experts
        self.slots = experts_in_share(settings.slots, self.experts)

    def run(self) -> str:
        """Run all stages in turn, and give the table."""
        self.out.mkdir(parents=True, exist_ok=True)
        prompts = [e.prompt for e in self._held_out(self.settings.prompts)]
        with self._stage("fine-tune"):
            self._finetune()
        with self._stage("perplexity"):
            self._perplexity()
        with self._stage("trace"):
            for name in self.paths:
                self._locality(name, self._trace(name, prompts))
        with self._stage("predictor"):
            predictor = self._predictor()
        with self._stage("serve"):
            self._serve(prompts, predictor, emulated=False)
            self._serve(prompts, predictor, emulated=True)
        about = {"settings": asdict(self.settings), "seconds": self.seconds, "machine": machine()}
        self._write({"kind": "demo"} | about)
        write_report([self.records], self.out / "report.html")
        self.say(f"report: {self.out / 'report.html'}  (and report.md, records.jsonl beside it)")
        return render_table([self.records], "text")

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.say(f"== {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.say(f"   {self.seconds[name]:.0f} s")

    def _write(self, record: dict[str, Any]) -> None:
        append_jsonl(self.records, record)

    def _held_out(self, count: int) -> list[Example]:
        """Test examples that chose no setting."""
        first = self.settings.first_test_example
        return load_examples(GSM8K_TEST, limit=first + count)[first:]

    def _open(self, name: str, slots: int, **more: Any) -> tuple[Any, Any, Any]:
        """Load a model with the loader that opens any checkpoint."""
        path = str(self.paths[name])
        model, handle = load(path, "cpu", slots=slots, dtype=torch.float32, **more)
        return model, handle, load_tokenizer(path, model.config)

    def _on_disk(self, name: str, emulated: bool) -> tuple[Any, Any, Any]:
        """Open a model with few slots, its experts on disk, on the link as it is or emulated."""
        one = self.settings
        link = EmulatedLink(one.link_bytes_per_s, one.link_latency_s) if emulated else None
        return self._open(name, self.slots, store="disk", link=link, policy=one.policy)

    def _finetune(self) -> None:
        one = self.settings
        examples = load_examples(GSM8K_TRAIN, limit=one.train_examples)
        names = ("steps", "batch_size", "max_length", "own_texts", "seed")
        ours = FinetuneSettings(**{name: getattr(one, name) for name in names})
        for name, settings in ((CONTROL, ours.control()), (TUNED, ours)):

            def progress(row: dict[str, Any], name: str = name) -> None:
                terms = "  ".join(f"{term} {row[term]:.3f}" for term in ("nll", "cache"))
                self.say(f"   {name}: step {row['step']} of {row['steps']}  {terms}")

            where = (self.paths[BASE], examples, self.paths[name])
            result = finetune(*where, settings, progress=progress)
            log = [row for row in result.log if "step" in row]  # the last has no step of its own
            about = {"kind": "training", "model": name}
            self._write({**about, "log": log, "settings": asdict(settings)})

    def _perplexity(self) -> None:
        texts = {IN_DOMAIN: self._held_out(self.settings.eval_examples)} | {
            path.stem: load_examples(path, limit=self.settings.other_documents)
            for path in sorted(HELD_OUT.glob("*.jsonl"))
        }
        base = str(self.paths[BASE])
        tokenizer = load_tokenizer(base, read_config(base))  # fine-tuning keeps it
        encoded = {
            domain: encode(examples, tokenizer, self.settings.eval_length)
            for domain, examples in texts.items()
        }
        measured: dict[tuple[str, str], Any] = {}
        for name in self.paths:
            model, handle, _ = self._open(name, self.experts)
            for domain, text in encoded.items():
                measured[name, domain] = perplexity(model, text)
            read = reading_trace(model, handle, encoded[IN_DOMAIN])
            self._write(reading_record(read, name, self.slots, self.settings.policy))
        for (name, domain), found in measured.items():
            self._write(quality_record(found, name, domain, domain == IN_DOMAIN))

    def _trace(self, name: str, prompts: list[str]) -> Trace:
        how = (*self._open(name, self.experts), prompts, self.settings.max_new_tokens)
        trace = trace_prompts(*how)
        trace.save(self.out / f"trace-{name}.safetensors")
        return trace

    def _locality(self, name: str, trace: Trace) -> None:
        self._write(locality_record(trace, name))
        steps = range(trace.top_k, self.experts + 1, max(1, self.experts // 16))
        for policy in ("lru", "lfu", "belady") if name != CONTROL else ():
            self._write(curve_record(trace, name, policy, sorted({*steps, self.slots})))

    def _predictor(self) -> Predictor:
        """Fit it on completions of prompts after those trained on, judged across folds of them."""
        first, count = self.settings.train_examples, self.settings.predictor_prompts
        prompts = [e.prompt for e in load_examples(GSM8K_TRAIN, limit=first + count)[first:]]
        model, handle, tokenizer = self._open(TUNED, self.experts)
        tokens = self.settings.predictor_tokens
        trace = trace_prompts(
            model, handle, tokenizer, prompts, tokens, progress=lambda text: self.say(f"   {text}")
        )
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        given = (trace, ids, model.get_input_embeddings().weight, self.slots)
        found = compare(*given, seed=self.settings.seed).to_record(TUNED)
        self._write(found)
        predictor = fit(*given, seed=self.settings.seed)
        predictor.comparison = found
        predictor.save(self.out / "predictor")
        return predictor

    def _serve(self, prompts: list[str], predictor: Predictor, emulated: bool) -> None:
        """Serve by four strategies in turn, prompt by prompt: the machine's moods fall on all."""
        servings = []
        for strategy, name in ((BASE, BASE), (CONTROL, CONTROL), (TUNED, TUNED), (PREFETCH, TUNED)):
            ahead = Predicted(predictor) if strategy == PREFETCH else None
            how = (*self._on_disk(name, emulated), prompts, self.settings.max_new_tokens)
            servings.append(serving(*how, prefetch=ahead, label=name, strategy=strategy))
        for record in side_by_side(servings):
            self._write(record)
            self.say(
                f"   {record['strategy']}{', emulated link' if emulated else ''}: "
                f"{record['transfers_per_token']['mean']:.2f} transfers a token, "
                f"{record['tokens_per_s']['mean']:.0f} tokens/s"
            )
