"""Learning from an earlier run: its words, its hidden states, and the run that trains it first."""

import copy
import json

import pytest
import torch
from data_rows import write
from small_runs import examples, settings
from tiny import tiny_model
from typer.testing import CliRunner

from melinoe.cli.app import app
from melinoe.data import Collator, load_examples
from melinoe.errors import CheckpointError, TrainingError
from melinoe.finetune import finetune, train
from melinoe.finetune.adapter import Teacher, adapter_of, read_teacher
from melinoe.finetune.objective import Objective
from melinoe.finetune.parts import make_trainable
from melinoe.losses import match_loss
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers

CPU = torch.device("cpu")


def moved(parts, seed):
    """Trained parts as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.all():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return parts


def student_and_teacher(family, **changes):
    """A model in training, its objective with a teacher, and that teacher as a model of its own."""
    chosen = settings(**changes)
    model, base = tiny_model(family), tiny_model(family)
    base.load_state_dict(model.state_dict())
    taught = copy.deepcopy(base)
    own = moved(make_trainable(taught, find_routers(taught), find_experts(taught), chosen, 2), 5)
    adapter = adapter_of(own)
    own.merge()
    routers, layers = find_routers(model), find_experts(model)
    parts = make_trainable(model, routers, layers, chosen, rank=2)
    teacher = Teacher(adapter, parts, CPU)
    objective = Objective(routers, chosen, parts=parts, teacher=teacher)
    moved(parts, 9)
    return model, objective, taught, base


def batch_of(data):
    """What the collator gives for *data*."""
    return Collator(0)(data)


def states_of(model, inputs):
    """Logits, and what routers and head saw, gathered by hooks of this test's own."""
    seen, places = [], [*(router.module for router in find_routers(model))]
    places.append(model.get_output_embeddings())
    hooks = [
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        for part in places
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits.double(), [one.double() for one in seen]


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_the_term_of_a_teacher_equals_its_formula(family):
    """The term against loops in float64 over the teacher as a model of its own, merged."""
    model, objective, taught, base = student_and_teacher(family, lambda_match=0.7, lambda_cache=0.0)
    batch = batch_of(examples())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    terms = objective.measure(model, batch, training=True)
    (_, h), (theirs, t) = states_of(model, inputs), states_of(taught, inputs)
    counted = [i for i, label in enumerate(batch["labels"].flatten().tolist()) if label != -100]
    total = sum(
        float(((h[p][i] - t[p][i]) ** 2).sum() / (t[p][i] ** 2).sum())
        for p in range(len(h))
        for i in counted
    )
    assert len(h) == len(find_routers(model)) + 1
    expected = total / len(counted) / len(h)
    assert terms["match"].item() == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    weighed = terms["nll"] + 0.7 * terms["match"]
    assert terms.total.item() == pytest.approx(weighed.item())
    assert not torch.allclose(theirs, states_of(base, inputs)[0], atol=1e-3)


def test_a_teachers_pass_leaves_the_run_as_it_was():
    """Gradients reach the parts in training, none the teacher's; the model computes as before."""
    model, objective, _, _ = student_and_teacher("olmoe", lambda_match=1.0)
    names = {name for name, _ in model.named_parameters()}
    batch = batch_of(examples())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before = states_of(model, inputs)[0]
    terms = objective.measure(model, batch, training=True)
    terms["match"].backward()
    got = {name for name, one in model.named_parameters() if one.grad is not None}
    assert any("lora_B" in name for name in got) and any("gate" in name for name in got)
    assert all(
        one.grad is None for low in objective.teacher.updates.values() for one in low.parameters()
    )
    assert {name for name, _ in model.named_parameters()} == names
    assert torch.equal(states_of(model, inputs)[0], before)


def test_without_a_teacher_the_base_model_is_matched():
    """Before the first step the model is the base: 0; after a change it is not."""
    chosen = settings(lambda_match=1.0)
    model = tiny_model("olmoe")
    parts = make_trainable(model, find_routers(model), find_experts(model), chosen, rank=2)
    objective = Objective(find_routers(model), chosen, parts=parts)
    batch = batch_of(examples())
    first = objective.measure(model, batch, training=True)
    assert first["match"].item() == pytest.approx(0.0, abs=1e-9)
    moved(parts, 1)
    later = objective.measure(model, batch, training=True)
    assert later["match"].item() > 1e-3


def test_match_is_relative_and_counts_the_tokens_it_is_told():
    """By hand: one place, |3 - 1|^2 / |1|^2 = 4 and 0; a token that does not count is wild."""
    ours = {0: torch.tensor([[3.0, 0.0], [0.0, 2.0], [99.0, 9.0]], requires_grad=True)}
    theirs = {0: torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])}
    loss = match_loss(ours, theirs, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(2.0)
    assert match_loss(ours, theirs, torch.tensor([0, 1]), denominator=8.0).item() == 0.5
    loss.backward()
    assert ours[0].grad.tolist() == [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="places differ"):
        match_loss(ours, {1: theirs[0]}, torch.tensor([0]))


def test_a_heavy_match_keeps_hidden_states_near_the_teachers():
    """Twelve steps with a strong cache term: nearer to the teacher with the term than without."""
    distances = {}
    for weight in (0.0, 30.0):
        model = tiny_model("olmoe")
        taught = tiny_model("olmoe")
        taught.load_state_dict(model.state_dict())
        chosen = settings(steps=12, lambda_cache=1.0, lambda_match=weight or 1e-9)
        parts = make_trainable(taught, find_routers(taught), find_experts(taught), chosen, 2)
        adapter = adapter_of(moved(parts, 5))
        rows = train(model, examples(), chosen, pad_token_id=0, teacher=adapter).rows
        distances[weight] = rows[-1]["match"]
    assert distances[30.0] < 0.7 * distances[0.0]


def test_the_plain_run_is_trained_first_and_teaches(checkpoint):
    """The files of both runs; the teacher's is what the plain run alone gives, bit for bit."""
    data = load_examples(checkpoint / "data.jsonl")
    chosen = settings(lambda_match=1.0)
    base = checkpoint / "base"
    done = finetune(base, data, checkpoint / "out", chosen, teacher="plain")
    assert (checkpoint / "out.teacher" / "adapter_model.safetensors").is_file()
    alone = settings(save="adapter").plain()
    finetune(base, data, checkpoint / "alone", alone)
    there, here = (
        (checkpoint / name / "adapter_model.safetensors").read_bytes()
        for name in ("alone", "out.teacher")
    )
    assert there == here
    assert done.metadata["teacher"]["source"].endswith("out.teacher")
    assert "match" in done.log[-1]
    again = finetune(base, data, checkpoint / "two", chosen, teacher=checkpoint / "out.teacher")
    assert again.log == done.log


def test_a_taught_run_that_failed_goes_on_after_its_teacher(checkpoint):
    """The teacher is there and the second run is not: --resume does not train the first again."""
    data = load_examples(checkpoint / "data.jsonl")
    chosen = settings(lambda_match=1.0)
    seen = []
    finetune(
        checkpoint / "base", data, checkpoint / "out.teacher", settings(save="adapter").plain()
    )
    finetune(
        checkpoint / "base", data, checkpoint / "out", chosen,
        teacher="plain", resume=True, progress=seen.append,
    )  # fmt: skip
    assert all("match" in row for row in seen if "nll" in row)


def test_a_teacher_that_cannot_teach_is_refused(checkpoint, tmp_path):
    """No term, no adapter, another base, experts where routers alone are trained."""
    data = load_examples(checkpoint / "data.jsonl")
    base, out = checkpoint / "base", checkpoint / "out"
    taught = settings(lambda_match=1.0)
    with pytest.raises(TrainingError, match="nothing to learn from a teacher"):
        finetune(base, data, out, settings(), teacher="plain")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        finetune(base, data, out, taught, teacher=tmp_path)
    finetune(base, data, checkpoint / "t", settings(save="both"))
    with pytest.raises(TrainingError, match="does nothing while"):
        finetune(base, data, out, settings(), teacher=checkpoint / "t")
    routers_only = settings(lambda_match=1.0, train="router")
    with pytest.raises(TrainingError, match="trains routers alone"):
        finetune(base, data, out, routers_only, teacher=checkpoint / "t")
    record = checkpoint / "t" / "adapter" / "melinoe.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base_fingerprint": "0" * 64}))
    with pytest.raises(TrainingError, match="another base model"):
        read_teacher(checkpoint / "t", tiny_model("olmoe", dtype=torch.bfloat16))
    assert not out.exists()


def test_the_command_trains_both_runs(checkpoint):
    """``--teacher plain``: two directories, and the record names the teacher."""
    words = f"finetune {checkpoint}/base --data {checkpoint}/data.jsonl --out {checkpoint}/o"
    options = "--steps 2 --teacher plain --capacity 0.5 --no-measure"
    done = CliRunner().invoke(app, [*words.split(), *options.split(), "--hold-out", "0"])
    assert done.exit_code == 0, done.output
    assert (checkpoint / "o.teacher" / "adapter_config.json").is_file()
    record = json.loads((checkpoint / "o" / "melinoe.json").read_text())
    assert record["teacher"]["source"] == "o.teacher"  # where it lies is nobody else's business
    assert record["settings"]["lambda_match"] == 10.0


def test_a_control_learns_from_whom_its_run_learns(checkpoint):
    """``--control`` leaves out the locality terms alone: the same teacher, at the same weight."""
    words = f"finetune {checkpoint}/base --data {checkpoint}/data.jsonl --out {checkpoint}/o"
    options = "--control --steps 1 --capacity 0.5 --no-measure --save adapter --teacher plain"
    done = CliRunner().invoke(app, f"{words} {options}".split())
    assert done.exit_code == 0, done.output
    record = json.loads((checkpoint / "o" / "melinoe.json").read_text())
    assert record["is_control"] and record["teacher"]["source"] == "o.teacher"
    weights = {key: record["settings"][f"lambda_{key}"] for key in ("match", "cache")}
    assert weights == {"match": 10.0, "cache": 0.0}


def test_run_and_control_have_one_teacher(checkpoint):
    """So that the gap between them is the locality terms' alone."""
    held = checkpoint / "held.jsonl"
    rows = [{"prompt": "what? ", "completion": f"{word} is it."} for word in "abcdefgh"]
    write(held, *rows)
    command = f"finetune {checkpoint}/base --data {checkpoint}/data.jsonl --out {checkpoint}/o"
    options = "--steps 2 --capacity 0.5 --against control --teacher plain"
    # Whether such models write enough to be measured by does not matter here.
    CliRunner().invoke(app, f"{command} {options} --eval-data {held}".split())
    records = [
        json.loads((checkpoint / name / "melinoe.json").read_text()) for name in ("o", "o.control")
    ]
    assert all(one["settings"]["lambda_match"] > 0 for one in records)
    teachers = {one["teacher"]["fingerprint"] for one in records}
    assert len(teachers) == 1
