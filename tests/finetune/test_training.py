"""Fine-tuning tiny random models: what moves, what stays, and what is written."""

import math

import pytest
import torch
from data_rows import write
from small_runs import examples, settings, trained
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import melinoe.finetune.trainer as trainer_module
from melinoe.checkpoint import read_metadata
from melinoe.data import Encoded
from melinoe.errors import DataError, OutputExistsError, TrainingError
from melinoe.finetune import finetune, resume, train
from melinoe.finetune.resume import read_tensors
from melinoe.moe.routing import find_routers, fingerprint

FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "phimoe", "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_combined_loss_falls_and_only_the_named_parts_move(family):
    """Eight steps on one batch: routers and experts move, every other tensor is bit-identical."""
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    routers = {router.name for router in find_routers(model)}
    experts = {name for name, m in model.named_modules() if hasattr(m, "_apply_gate")}
    rows = trained(model, steps=8)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(math.isfinite(row["total"]) for row in rows)
    assert rows[-1]["total"] < rows[0]["total"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(any(name.startswith(r) for name in moved) for r in routers)
    assert all(any(name.startswith(e) for name in moved) for e in experts)
    assert all(name.startswith((*routers, *experts)) for name in moved)


def test_router_only_leaves_the_experts_alone():
    """With train="router" nothing but router weights differs."""
    model = tiny_model("olmoe")
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    trained(model, train="router")
    moved = {n for n, p in model.state_dict().items() if not torch.equal(before[n], p)}
    assert moved == {f"{router.name}.weight" for router in find_routers(model)}


def test_the_cache_term_lowers_the_cache_loss_against_the_control():
    """Same data, order, steps and seed: only the weighted run learns to reuse experts."""
    chosen, base = settings(steps=30, lambda_cache=2.0), tiny_model("olmoe")
    runs = {}
    for name, one in {"tuned": chosen, "control": chosen.control()}.items():
        model = tiny_model("olmoe")
        model.load_state_dict(base.state_dict())
        runs[name] = train(model, examples(), one, pad_token_id=0).rows
    assert runs["tuned"][0]["nll"] == runs["control"][0]["nll"]
    assert runs["tuned"][0]["cache"] == runs["control"][0]["cache"]
    assert runs["tuned"][-1]["cache"] < 0.8 * runs["control"][-1]["cache"]
    assert runs["control"][-1]["total"] == runs["control"][-1]["nll"]


def test_the_same_settings_give_the_same_model():
    """Two runs agree bit for bit; another seed does not."""
    prints = []
    for seed in (0, 0, 1):
        model = tiny_model("olmoe")
        trained(model, examples(12), steps=3, seed=seed)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1] != prints[2]


def test_accumulated_batches_equal_one_large_batch():
    """Two passes of four examples take the step that one pass of eight takes, terms included."""
    curves = []
    for batch, accumulation in ((8, 1), (4, 2)):
        model = tiny_model("olmoe")
        rows = trained(
            model, examples(8), batch_size=batch, gradient_accumulation=accumulation, steps=3
        )
        curves.append([(row["nll"], row["cache"], row["total"]) for row in rows])
    for large, small in zip(*curves, strict=True):
        assert small == pytest.approx(large, rel=1e-4)


def test_the_load_balancing_loss_is_off_and_the_config_comes_back():
    """A model that asks for it trains as one that does not, and keeps asking afterwards."""
    plain, asking = tiny_model("olmoe"), tiny_model("olmoe")
    asking.load_state_dict(plain.state_dict())
    asking.config.output_router_logits, asking.config.router_aux_loss_coef = True, 5.0
    cached = asking.config.use_cache = True
    rows = [trained(model)[-1]["nll"] for model in (plain, asking)]
    assert rows[0] == rows[1]
    assert asking.config.use_cache is cached  # the Trainer switches it off
    assert asking.config.output_router_logits and asking.config.router_aux_loss_coef == 5.0


def test_tensors_keep_the_types_they_came_with():
    """A bfloat16 model trains in float32 and ends in bfloat16."""
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    trained(model)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == types


def test_bfloat16_computing_trains_too():
    """Autocast over bfloat16 weights, with trained parts in float32."""
    model = tiny_model("olmoe", dtype=torch.bfloat16)
    rows = trained(model, compute_dtype="bfloat16", steps=8)
    assert rows[-1]["total"] < rows[0]["total"]
    assert model.lm_head.weight.dtype == torch.bfloat16


def break_losses(monkeypatch, bad_calls):
    """Make the given calls of the objective (counted from 1) return a loss of nan."""
    calls = []
    whole = trainer_module.Objective.weigh

    def broken(self, *args, **kwargs):
        terms = whole(self, *args, **kwargs)
        calls.append(1)
        if len(calls) in bad_calls:
            terms.total = terms.total * float("nan")
        return terms

    monkeypatch.setattr(trainer_module.Objective, "weigh", broken)


def test_a_step_with_a_non_finite_loss_changes_nothing(monkeypatch, caplog):
    """A good step and a bad one end where the good one alone does: momentum moves nothing."""
    good, both = tiny_model("olmoe"), tiny_model("olmoe")
    both.load_state_dict(good.state_dict())
    trained(good, steps=1)
    break_losses(monkeypatch, {2})
    done = train(both, examples(), settings(steps=2), pad_token_id=0)
    assert done.skipped_steps == 1 and "step 2 is skipped" in caplog.text
    other = both.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in good.state_dict().items())


def test_too_many_bad_steps_in_a_row_stop_the_run(monkeypatch):
    """Two allowed in a row, apart from a good one between; at the third in a row it ends."""
    break_losses(monkeypatch, {1, 3, 4, 5})
    monkeypatch.setattr(trainer_module, "_MOST_BAD_STEPS", 3)
    with pytest.raises(TrainingError, match="3 steps in a row, up to step 5"):
        train(tiny_model("olmoe"), examples(), settings(steps=9), pad_token_id=0)


def test_what_was_good_before_too_many_bad_steps_is_kept(monkeypatch, tmp_path):
    """Two good steps, then only bad ones: the checkpoint holds what those two trained."""
    model, other = tiny_model("olmoe"), tiny_model("olmoe")
    break_losses(monkeypatch, {3, 4, 5, 6})
    monkeypatch.setattr(trainer_module, "_MOST_BAD_STEPS", 2)
    chosen = settings(steps=9, train="router")
    with pytest.raises(TrainingError, match=r"trained before is kept in .*run"):
        train(model, examples(), chosen, pad_token_id=0, checkpoints=tmp_path / "run")
    (path,) = (tmp_path / "run").iterdir()
    monkeypatch.undo()
    train(other, examples(), settings(steps=2, train="router"), pad_token_id=0)
    kept = read_tensors(path, "parts")
    assert kept.keys() == {f"{router.name}.weight" for router in find_routers(other)}
    for router in find_routers(other):
        assert torch.equal(kept[f"{router.name}.weight"], router.weight)


def test_checkpoints_of_before_the_loss_broke_outlive_it(monkeypatch, tmp_path):
    """Saved each step, one kept: bad steps save nothing, and the last save gives up no good one.

    Resumed, the run goes on after the bad steps but the last, whose turn comes again, and counts
    each once.
    """
    where = {"checkpoints": tmp_path / "run", "pad_token_id": 0}
    chosen = settings(steps=9, save_every=1, train="router")
    monkeypatch.setattr(trainer_module, "_MOST_BAD_STEPS", 4)
    monkeypatch.setattr(resume, "_KEPT", 1)
    break_losses(monkeypatch, {4, 5, 6, 7})
    with pytest.raises(TrainingError, match="4 steps in a row, up to step 7"):
        train(tiny_model("olmoe"), examples(), chosen, **where)
    kept = sorted((tmp_path / "run").iterdir())
    assert [path.name for path in kept] == ["step-000003", "step-000006"]
    before, after = (read_tensors(path, "parts") for path in kept)
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    done = train(tiny_model("olmoe"), examples(), chosen, resume=True, **where)
    assert done.skipped_steps == 3 and done.step == 9


def test_routers_that_cannot_be_trained_are_refused():
    """Frozen by whoever loaded the model: one sentence, and nothing has changed."""
    model = tiny_model("olmoe")
    for router in find_routers(model):
        router.weight.requires_grad_(False)
    with pytest.raises(TrainingError, match="routers of olmoe are frozen"):
        trained(model)


def test_a_cache_smaller_than_one_token_needs_is_refused():
    """Capacity .1 of 8 experts is 1, top-k is 2: the message names the smallest that works."""
    with pytest.raises(TrainingError, match=r"fewer than the 2 .* raise it to 0\.25 or more"):
        trained(tiny_model("olmoe"), capacity=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": 0},
        {"gamma": 1.5},
        {"cache_loss": "both"},
        {"cache_loss": "soft"},
        {"learning_rate": 0},
        {"steps": 0},
        {"lambda_cache": -1},
    ],
)
def test_a_setting_that_no_run_could_use_is_named(change):
    """One sentence with the setting's name, before anything is loaded."""
    (name,) = change
    with pytest.raises(TrainingError, match=name):
        settings(**change)


# ---- from files to files ----


def test_what_is_written_is_the_trained_model(checkpoint, monkeypatch):
    """Reloaded logits equal the merged model's in memory; experts are stored one by one."""
    kept = {}
    from melinoe.finetune import run, saving

    write = saving.write_model

    def keep(model, *args):
        kept["model"] = model
        write(model, *args)

    monkeypatch.setattr(saving, "write_model", keep)
    seen = []
    result = finetune(
        checkpoint / "base",
        checkpoint / "data.jsonl",
        checkpoint / "out",
        settings(batch_size=3),
        eval_examples=run.load_examples(checkpoint / "data.jsonl"),
        progress=seen.append,
    )
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint / "out", dtype="auto").eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, kept["model"](ids).logits)
    assert fingerprint(reloaded) == result.metadata["fingerprint"]
    assert result.metadata["fingerprint"] != result.metadata["base_fingerprint"]
    assert read_metadata(checkpoint / "out") == result.metadata
    assert result.metadata["settings"]["lambda_cache"] == 1.0
    assert (checkpoint / "out" / "tokenizer.json").is_file()
    from safetensors import safe_open

    with safe_open(checkpoint / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.7.down_proj.weight" in file.keys()  # noqa: SIM118
    assert [row["step"] for row in result.log] == [0, 1, 2, 2]
    assert result.log[0]["eval_nll"] > result.log[-1]["eval_nll"] > 0
    assert len(seen) == 4 and seen[0]["steps"] == 2


def test_an_output_that_is_taken_stops_before_any_training(checkpoint):
    """A directory with something in it is left as it is."""
    (checkpoint / "out").mkdir()
    (checkpoint / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        finetune(checkpoint / "base", checkpoint / "absent.jsonl", checkpoint / "out", settings())
    assert [path.name for path in (checkpoint / "out").iterdir()] == ["mine.txt"]


def test_a_failed_run_leaves_nothing_half_written(checkpoint, monkeypatch):
    """Neither an output nor a temporary directory stays beside it."""
    break_losses(monkeypatch, range(1, 9))
    before = sorted(checkpoint.iterdir())
    with pytest.raises(TrainingError):
        finetune(
            checkpoint / "base",
            checkpoint / "data.jsonl",
            checkpoint / "out",
            settings(steps=5),
        )
    assert sorted(checkpoint.iterdir()) == before


def test_data_with_nothing_to_learn_is_refused(checkpoint):
    """Chats whose completions the limit cuts off, one token short of the first answer's."""
    rows = [{"prompt": "what is it? ", "completion": "it."}] * 3
    write(checkpoint / "data.jsonl", *rows)
    with pytest.raises(DataError, match="no example has a completion token within 12 tokens"):
        finetune(
            checkpoint / "base",
            checkpoint / "data.jsonl",
            checkpoint / "out",
            settings(max_length=12),
        )
    assert not (checkpoint / "out.checkpoints").exists()


def test_encoded_data_with_nothing_to_learn_is_refused():
    """As `train` may be given it, past every check of files."""
    masked = [Encoded(one.input_ids, [False] * len(one)) for one in examples()]
    with pytest.raises(DataError, match="no example has a token to learn"):
        trained(tiny_model("olmoe"), masked)


def test_data_without_room_for_a_completion_is_refused(checkpoint):
    """All prompts are six tokens long: at a limit of six nothing is left to learn."""
    with pytest.raises(DataError, match="max_length"):
        finetune(
            checkpoint / "base",
            checkpoint / "data.jsonl",
            checkpoint / "out",
            settings(max_length=6),
        )
