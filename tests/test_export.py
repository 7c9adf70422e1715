"""What other engines make of a checkpoint: the rules, who says them, and a reference to compare."""

import json

import pytest
import torch
from small_olmoe import tiny_model, words_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from melinoe.checkpoint import load_model, open_checkpoint, write_model
from melinoe.checkpoint.export_rules import find_export_faults, other_results
from melinoe.cli.app import app

OLMOE = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "rope_theta": 1e4}

CASES = {
    "nothing": ({}, None),
    "normalised": ({"norm_topk_prob": True}, "norm_topk_prob is true"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    "clipped": ({"clip_qkv": 8.0}, "clip_qkv is set"),
    "another epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is not 1e-05"),
    "another family": ({"model_type": "qwen3_moe", "norm_topk_prob": True}, None),
    "newer spelling": (
        {"model_type": "qwen3_moe", "num_local_experts": 128},
        "num_local_experts, and no num_experts",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_rule_holds_for_its_family_and_setting_alone(case):
    """One setting, one finding; the same setting of another family is none."""
    change, expected = CASES[case]
    assert [one.what for one in other_results(OLMOE | change)] == [expected] * (
        expected is not None
    )


def test_a_part_of_a_config_is_looked_at_too():
    """Of a model that sees and reads, the part that reads holds the positions."""
    part = {"model_type": "text", "rope_parameters": {"rope_theta": 5e5}}
    (found,) = other_results({"model_type": "both", "text_config": part})
    assert found.engines == "transformers 4" and "rope_theta" in found.what
    assert other_results({"model_type": "both", "text_config": part | {"rope_theta": 5e5}}) == []


@pytest.fixture
def base(tmp_path):
    """In the spelling of transformers 5, with weights that are normalised."""
    place = tmp_path / "base"
    model = tiny_model()
    model.config.norm_topk_prob = True
    model.save_pretrained(place)
    words_tokenizer().save_pretrained(place)
    return place


def test_whoever_writes_a_model_is_told_in_a_line_who_will_misread_it(base, tmp_path, caplog):
    """Once for each set of engines, with the way to more."""
    with open_checkpoint(str(base)) as checkpoint:
        model = load_model(checkpoint)
    write_model(model, str(base), tmp_path / "out", {}, [])
    lines = [one for one in caplog.messages if "compute something else" in one]
    assert len(lines) == 2 and "(norm_topk_prob is true)" in lines[0]
    assert lines[0].endswith(f"see `melinoe doctor {tmp_path / 'out'} --export`")


def test_doctor_tells_the_rules_and_what_is_missing(base, tmp_path):
    """As lines and as JSON."""
    (base / "generation_config.json").unlink(missing_ok=True)
    shown = CliRunner().invoke(app, ["doctor", str(base), "--export"])
    assert shown.exit_code == 0, shown.output
    assert "vLLM, SGLang, llama.cpp: norm_topk_prob is true: their" in shown.output
    assert "no generation_config.json (no other results)" in shown.output
    found = CliRunner().invoke(app, ["doctor", str(base), "--export", "--json"])
    assert {one["what"] for one in json.loads(found.stdout)["export"]} == {
        "norm_topk_prob is true",
        "rope_parameters, and no rope_theta",
        "no generation_config.json",
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    (base / "adapter").mkdir()
    (base / "adapter" / "adapter_config.json").write_text("{}")
    assert {"no tokenizer", "an adapter lies beside the weights"} < {
        one.what for one in find_export_faults(str(base))
    }


def test_a_reference_holds_what_transformers_says(base, tmp_path, monkeypatch):
    """Tokens and log-probabilities of each step equal those of one pass over the whole text."""
    prompts = ("w3 w4", "w5 w6 w7", "w8", "w9 w10 w11 w12")  # in words that the tokenizer knows
    monkeypatch.setattr("melinoe.measure.reference.PROMPTS", prompts)
    place = tmp_path / "reference.json"
    done = CliRunner().invoke(app, ["doctor", str(base), "--export", "--reference", str(place)])
    assert done.exit_code == 0, done.output
    record = json.loads(place.read_text())
    assert record["dtype"] == "float32" and len(record["prompts"]) == 4
    model = AutoModelForCausalLM.from_pretrained(base)
    for row in record["prompts"]:
        start = len(row["prompt_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([row["prompt_ids"] + row["tokens"]])).logits[0]
        said = logits[start - 1 : -1].log_softmax(-1)
        assert said.argmax(-1).tolist() == row["tokens"]
        assert [step[0][0] for step in row["top"]] == row["tokens"]
        expected = said.gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, atol=1e-4, rtol=1e-4)


def test_a_reference_without_export_is_wrong_usage(base, tmp_path):
    """It would be written by nothing."""
    done = CliRunner().invoke(app, ["doctor", str(base), "--reference", str(tmp_path / "r.json")])
    assert done.exit_code == 2 and "--export" in done.output
    for other in (["--verify"], ["--expert-memory", "1MiB"]):
        done = CliRunner().invoke(app, ["doctor", str(base), "--export", *other])
        assert done.exit_code == 2 and "takes neither" in done.output
