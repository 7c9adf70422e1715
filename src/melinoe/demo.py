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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from melinoe.cache.trace import Trace
from melinoe.checkpoint import check_output, describe, load_tokenizer
from melinoe.config import DemoSettings, experts_in_share
from melinoe.data import Example, encode, load_examples
from melinoe.engine.load import load
from melinoe.engine.transfer import EmulatedLink
from melinoe.evaluate import perplexity, perplexity_increase, quality_record
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
    timeline_record,
    training_record,
    usage_record,
)
from melinoe.predictor import Predictor, compare, fit
from melinoe.report import render_table, write_report
from melinoe.shipped import GSM8K_TEST, GSM8K_TRAIN, HELD_OUT, TINY_OLMOE

BASE, CONTROL, TUNED = "base", "control", "fine-tuned"
PREFETCH = "fine-tuned + prefetch"
IN_DOMAIN = "gsm8k"


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
    Run everything; leave checkpoints, records and the report in *out*.

    Args:
        out: Directory to write; must not exist, or be empty.
        seed: Decides data order, adapters and predictor.
        quick: A minute instead of eight, for trying the path; the figures mean nothing.
        say: Told of progress, a line at a time.
        base: Checkpoint to start from.

    Returns:
        The table, for a terminal.

    Raises:
        OutputExistsError: *out* is taken.
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
        self.about = describe(str(base))
        self.slots = experts_in_share(settings.slots, self.about.num_experts)

    def run(self) -> str:
        """Run all stages in turn, and give the table."""
        self.out.mkdir(parents=True, exist_ok=True)
        prompts = [e.prompt for e in self._held_out(self.settings.prompts)]
        with self._stage("fine-tune"):
            self._finetune()
        with self._stage("perplexity"):
            self._perplexity()
        with self._stage("trace"):
            traces = {name: self._trace(name, prompts) for name in self.paths}
            self._locality(traces)
        with self._stage("predictor"):
            predictor = self._predictor()
        with self._stage("serve"):
            self._serve(prompts, predictor)
        self._write(
            {
                "kind": "demo",
                "settings": asdict(self.settings),
                "seconds": self.seconds,
                "machine": machine(),
            }
        )
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

    def _finetune(self) -> None:
        examples = load_examples(GSM8K_TRAIN, limit=self.settings.train_examples)
        ours = self.settings.finetune()
        for name, settings in ((CONTROL, ours.control()), (TUNED, ours)):

            def progress(row: dict[str, Any], name: str = name) -> None:
                terms = "  ".join(f"{term} {row[term]:.3f}" for term in ("nll", "cache"))
                self.say(f"   {name}: step {row['step']} of {row['steps']}  {terms}")

            result = finetune(
                self.paths[BASE],
                examples,
                self.paths[name],
                settings,
                progress=progress,
            )
            self._write(training_record(name, result.log, asdict(settings)))

    def _open(self, name: str, slots: int, **more: Any) -> tuple[Any, Any, Any]:
        """Load a model with the loader that opens any checkpoint."""
        path = str(self.paths[name])
        model, handle = load(path, "cpu", slots=slots, dtype=torch.float32, **more)
        return model, handle, load_tokenizer(path, model.config)

    def _perplexity(self) -> None:
        texts = {IN_DOMAIN: self._held_out(self.settings.eval_examples)} | {
            path.stem: load_examples(path, limit=self.settings.other_documents)
            for path in sorted(HELD_OUT.glob("*.jsonl"))
        }
        encoded: dict[str, Any] = {}  # once for all models: fine-tuning keeps the tokenizer
        measured: dict[tuple[str, str], Any] = {}
        for name in self.paths:
            model, handle, tokenizer = self._open(name, self.about.num_experts)
            for domain, examples in texts.items():
                if domain not in encoded:
                    encoded[domain] = encode(examples, tokenizer, self.settings.eval_length)
                measured[name, domain] = perplexity(model, encoded[domain])
            read = reading_trace(model, handle, encoded[IN_DOMAIN])
            handle.detach()
            self._write(reading_record(read, name, self.slots, self.settings.policy))
        for (name, domain), found in measured.items():
            more = {}
            if name == TUNED:
                over = perplexity_increase(found, measured[CONTROL, domain])
                more["increase_over_control"] = over.to_dict()
            self._write(quality_record(found, name, domain, domain == IN_DOMAIN, **more))

    def _trace(self, name: str, prompts: list[str]) -> Trace:
        model, handle, tokenizer = self._open(name, self.about.num_experts)
        trace = trace_prompts(model, handle, tokenizer, prompts, self.settings.max_new_tokens)
        handle.detach()
        trace.save(self.out / f"trace-{name}.safetensors")
        return trace

    def _locality(self, traces: dict[str, Trace]) -> None:
        experts = self.about.num_experts
        top_k = next(iter(traces.values())).top_k
        sizes = sorted({top_k, *range(top_k, experts + 1, max(1, experts // 16)), self.slots})
        for name, trace in traces.items():
            self._write(locality_record(trace, name))
            self._write(usage_record(trace, name))
            if name == CONTROL:
                continue
            for policy in ("lru", "lfu", "belady"):
                self._write(curve_record(trace, name, policy, sizes))

    def _predictor(self) -> Predictor:
        """Fitted on completions of prompts after those trained on, judged across folds of them."""
        first, count = self.settings.train_examples, self.settings.predictor_prompts
        examples = load_examples(GSM8K_TRAIN, limit=first + count)[first:]
        model, handle, tokenizer = self._open(TUNED, self.about.num_experts)
        prompts = [e.prompt for e in examples]
        trace = trace_prompts(
            model,
            handle,
            tokenizer,
            prompts,
            self.settings.predictor_tokens,
            progress=lambda text: self.say(f"   {text}"),
        )
        handle.detach()
        embeddings = model.get_input_embeddings().weight
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        found = compare(trace, ids, embeddings, self.slots, seed=self.settings.seed)
        self._write(found.to_record(TUNED))
        predictor = fit(trace, ids, embeddings, self.slots, seed=self.settings.seed)
        predictor.comparison = found.to_record(TUNED)
        predictor.save(self.out / "predictor")
        return predictor

    def _timelines(self, prompt: str) -> None:
        """One prompt token by token on the emulated link, before and after fine-tuning."""
        settings = self.settings
        for name in (BASE, TUNED):
            link = EmulatedLink(settings.link_bytes_per_s, settings.link_latency_s)
            model, handle, tokenizer = self._open(
                name, self.slots, store="disk", link=link, policy=settings.policy
            )
            # Twice, because a first generation is slower than all others.
            for _ in range(2):
                record = timeline_record(
                    model, handle, tokenizer, prompt, settings.max_new_tokens, label=name
                )
            handle.detach()
            self._write(record)

    def _serve(self, prompts: list[str], predictor: Predictor) -> None:
        """Four strategies on the link as it is, then on an emulated one; the store is on disk."""
        settings = self.settings
        strategies = ((BASE, BASE), (CONTROL, CONTROL), (TUNED, TUNED), (PREFETCH, TUNED))
        self._timelines(prompts[0])
        for emulated in (False, True):
            servings = []
            for strategy, name in strategies:
                link = (
                    EmulatedLink(settings.link_bytes_per_s, settings.link_latency_s)
                    if emulated
                    else None
                )
                model, handle, tokenizer = self._open(
                    name, self.slots, store="disk", link=link, policy=settings.policy
                )
                servings.append(
                    serving(
                        model,
                        handle,
                        tokenizer,
                        prompts,
                        settings.max_new_tokens,
                        predictor if strategy == PREFETCH else None,
                        # A prompt uses more experts than there are slots: it would evict them all.
                        prefetch_at="completion",
                        label=name,
                        strategy=strategy,
                    )
                )
            # In turn, prompt by prompt, so that the machine's moods fall on all alike.
            for record in side_by_side(servings):
                self._write(record)
                self.say(
                    f"   {record['strategy']}{', emulated link' if emulated else ''}: "
                    f"{record['transfers_per_token']['mean']:.2f} transfers a token, "
                    f"{record['tokens_per_s']['mean']:.0f} tokens/s"
                )
