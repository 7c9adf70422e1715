"""The demo, run for real but small, on half the layers of the model that ships."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.checkpoint.metadata import read_metadata
from melinoe.demo import DemoSettings, run
from melinoe.outcome import check_control
from melinoe.shipped import TINY_OLMOE


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Its directory, its records by kind, and what it said."""
    root = tmp_path_factory.mktemp("demo")
    base, out, said = root / "base", root / "runs" / "demo", []
    model = AutoModelForCausalLM.from_pretrained(TINY_OLMOE, num_hidden_layers=2)
    shutil.copytree(TINY_OLMOE, base, ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
    model.save_pretrained(base)
    settings = DemoSettings(
        train_examples=64, steps=2, batch_size=4, own_texts=4, eval_examples=4, eval_length=256,
        other_documents=1, prompts=2, max_new_tokens=4, predictor_prompts=16, predictor_tokens=4,
    )  # fmt: skip
    run(out, settings, say=said.append, base=base)
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    kinds = {}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    return out, kinds, said


def test_every_strategy_is_served_on_both_links(demo):
    """Four strategies, as the link is and emulated, a quarter of the experts resident."""
    _, kinds, _ = demo
    served = {(r["strategy"], r["link"] is not None) for r in kinds["serve"]}
    names = ("base", "control", "fine-tuned", "fine-tuned + prefetch")
    assert served == {(name, emulated) for name in names for emulated in (False, True)}
    assert all(r["slots"] * 4 == r["num_experts"] and r["store"] == "disk" for r in kinds["serve"])


@pytest.mark.parametrize("model", ["base", "control", "fine-tuned"])
def test_what_was_served_is_what_the_trace_simulates_to(demo, model):
    """The runtime's loads, prompt by prompt, equal a simulation of the separately traced run."""
    out, kinds, _ = demo
    trace = Trace.load(out / f"trace-{model}.safetensors")
    for record in kinds["serve"]:
        if record["strategy"] != model:
            continue
        simulated = simulate(trace, record["slots"], record["policy"], reset_between_sequences=True)
        loads = [int(c.loads[1].sum()) for c in simulated.per_sequence]
        assert record["per_prompt"]["loads"] == loads


def test_all_models_read_the_same_answers(demo):
    """One record each, of the slots and the policy that serve; as many tokens of each answer."""
    _, kinds, _ = demo
    read = {record["model"]: record for record in kinds["reading"]}
    assert set(read) == {"base", "control", "fine-tuned"}
    assert len({str(record["per_prompt"]["tokens"]) for record in read.values()}) == 1
    served = kinds["serve"][0]
    assert all(
        (r["slots"], r["policy"]) == (served["slots"], served["policy"]) for r in read.values()
    )


def test_the_control_is_the_same_run_without_the_locality_terms(demo):
    """Data and replayed text agree by hash, and `check_control` finds nothing else that differs."""
    out, kinds, _ = demo
    control, tuned = (
        next(r for r in kinds["training"] if r["model"] == name)["settings"]
        for name in ("control", "fine-tuned")
    )
    theirs, ours = (read_metadata(out / name) for name in ("control", "fine-tuned"))
    assert theirs["data"]["tokens_sha256"] == ours["data"]["tokens_sha256"]
    assert theirs["anchor"] == ours["anchor"]
    assert control["lambda_cache"] == 0 < tuned["lambda_cache"]
    assert check_control(out / "control", ours) == theirs


def test_quality_is_measured_in_and_out_of_domain(demo):
    """GSM8K and six other corpora for each of the three models."""
    _, kinds, _ = demo
    domains = {(r["model"], r["domain"]) for r in kinds["quality"]}
    assert len(domains) == 3 * 7
    assert {r["domain"] for r in kinds["quality"] if r["in_domain"]} == {"gsm8k"}


def test_the_report_stands_alone(demo):
    """A page without addresses, and its Markdown twin."""
    out, _, _ = demo
    page = (out / "report.html").read_text()
    assert "data:image/svg+xml" in page and "http" not in page
    assert "fine-tuned + prefetch" in (out / "report.md").read_text()


def test_the_checkpoints_are_plain_and_say_where_they_come_from(demo):
    """Hub layout plus melinoe.json."""
    out, _, _ = demo
    for name in ("control", "fine-tuned"):
        assert (out / name / "model.safetensors").exists()
        about = json.loads((out / name / "melinoe.json").read_text())
        assert about["base_fingerprint"] != about["fingerprint"]
