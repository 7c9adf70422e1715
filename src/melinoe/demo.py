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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from melinoe.cache import DEFAULT_POLICY
from melinoe.cache.prefetch import Predicted
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


def run(
    out: Path,
    settings: DemoSettings,
    *,
    say: Callable[[str], None],
    base: Path = TINY_OLMOE,
) -> str:
    """
    Run everything; leave checkpoints, records and the report in *out*, new or empty.

    *say* is told of progress. Gives the table.
    """
    check_output(out).mkdir(parents=True, exist_ok=True)
    records, seconds = out / "records.jsonl", dict[str, float]()
    paths = {BASE: base, CONTROL: out / "control", TUNED: out / "fine-tuned"}
    experts = describe(str(base)).num_experts
    slots = experts_in_share(settings.slots, experts)
    prompts = [example.prompt for example in held_out(settings, settings.prompts)]

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        say(f"== {name}")
        started = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - started, 1)
        say(f"   {seconds[name]:.0f} s")

    def write(record: dict[str, Any]) -> None:
        append_jsonl(records, record)

    def opened(name: str, slots: int = experts, **more: Any) -> tuple[Any, Any, Any]:
        path = str(paths[name])
        model, handle = load(path, "cpu", slots=slots, dtype=torch.float32, **more)
        return model, handle, load_tokenizer(path, model.config)

    with stage("fine-tune"):
        names = ("steps", "batch_size", "max_length", "own_texts", "seed")
        ours = FinetuneSettings(**{name: getattr(settings, name) for name in names})
        examples = load_examples(GSM8K_TRAIN, limit=settings.train_examples)
        for name, how in ((CONTROL, ours.control()), (TUNED, ours)):

            def progress(row: dict[str, Any], name: str = name) -> None:
                terms = "  ".join(f"{term} {row[term]:.3f}" for term in ("nll", "cache"))
                say(f"   {name}: step {row['step']} of {row['steps']}  {terms}")

            result = finetune(base, examples, paths[name], how, progress=progress)
            log = [row for row in result.log if "step" in row]  # the last has no step of its own
            write({"kind": "training", "model": name, "log": log, "settings": asdict(how)})
    with stage("perplexity"):
        texts = {IN_DOMAIN: held_out(settings, settings.eval_examples)} | {
            path.stem: load_examples(path, limit=settings.other_documents)
            for path in sorted(HELD_OUT.glob("*.jsonl"))
        }
        tokenizer = load_tokenizer(str(base), read_config(str(base)))  # fine-tuning keeps it
        encoded = {name: encode(of, tokenizer, settings.eval_length) for name, of in texts.items()}
        found = []
        for name in paths:
            model, handle, _ = opened(name)
            found += [(perplexity(model, text), name, of) for of, text in encoded.items()]
            read = reading_trace(model, handle, encoded[IN_DOMAIN])
            write(reading_record(read, name, slots, settings.policy))
        for measured, name, domain in found:
            write(quality_record(measured, name, domain, domain == IN_DOMAIN))
    with stage("trace"):
        for name in paths:
            trace = trace_prompts(*opened(name), prompts, settings.max_new_tokens)
            trace.save(out / f"trace-{name}.safetensors")
            write(locality_record(trace, name))
            sizes = sorted({*range(trace.top_k, experts + 1, max(1, experts // 16)), slots})
            for policy in ("lru", "lfu", "belady") if name != CONTROL else ():
                write(curve_record(trace, name, policy, sizes))
    with stage("predictor"):
        predictor = _predictor(settings, opened(TUNED), slots, say)
        predictor.save(out / "predictor")
        assert predictor.comparison is not None
        write(predictor.comparison)
    with stage("serve"):
        for emulated in (False, True):
            # Four strategies in turn, prompt by prompt: the machine's moods fall on all.
            runs = []
            for strategy in (BASE, CONTROL, TUNED, PREFETCH):
                ahead = Predicted(predictor) if strategy == PREFETCH else None
                name = strategy if ahead is None else TUNED
                wire = EmulatedLink(settings.link_bytes_per_s, settings.link_latency_s)
                link = wire if emulated else None
                served = opened(name, slots, store="disk", link=link, policy=settings.policy)
                asked = (*served, prompts, settings.max_new_tokens)
                runs.append(serving(*asked, prefetch=ahead, label=name, strategy=strategy))
            for record in side_by_side(runs):
                write(record)
                say(
                    f"   {record['strategy']}{', emulated link' if emulated else ''}: "
                    f"{record['transfers_per_token']['mean']:.2f} transfers a token, "
                    f"{record['tokens_per_s']['mean']:.0f} tokens/s"
                )
    about = {"settings": asdict(settings), "seconds": seconds, "machine": machine()}
    write({"kind": "demo"} | about)
    write_report([records], out / "report.html")
    say(f"report: {out / 'report.html'}  (and report.md, records.jsonl beside it)")
    return render_table([records], "text")


def held_out(settings: DemoSettings, count: int) -> list[Example]:
    """Read *count* test examples that chose no setting."""
    first = settings.first_test_example
    return load_examples(GSM8K_TEST, limit=first + count)[first:]


def _predictor(
    settings: DemoSettings, opened: tuple[Any, Any, Any], slots: int, say: Callable[[str], None]
) -> Predictor:
    """Fit it on completions of prompts after those trained on, judged across folds of them."""
    first, count = settings.train_examples, settings.predictor_prompts
    prompts = [one.prompt for one in load_examples(GSM8K_TRAIN, limit=first + count)[first:]]
    model, _, tokenizer = opened
    trace = trace_prompts(
        *opened, prompts, settings.predictor_tokens, progress=lambda text: say(f"   {text}")
    )
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    given = (trace, ids, model.get_input_embeddings().weight, slots)
    predictor = fit(*given, seed=settings.seed)
    predictor.comparison = compare(*given, seed=settings.seed).to_record(TUNED)
    return predictor
