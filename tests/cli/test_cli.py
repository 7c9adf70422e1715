"""The command line: what it prints, and that bad input gives one sentence and an exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from data_rows import write
from safetensors.torch import load_file, save_file
from small_olmoe import write_checkpoint
from typer.testing import CliRunner

from melinoe.cli.app import app
from tests.fuzz.options import commands, key_of

COMMANDS = [
    "bench",
    "plan",
    "demo",
    "doctor",
    "finetune",
    "card",
    "merge",
    "pack",
    "prune",
    "trace",
    "predictor",
    "generate",
    "simulate",
    "evaluate",
    "report",
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": "w5 w6"} for i in range(2, 27)]
    write(path, *rows)
    return path


def refused(result, *words):
    """One line on stderr that holds *words*, nothing on stdout, exit 1."""
    code, out, err = result
    assert code == 1
    assert out == ""
    assert err.startswith("melinoe: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err, err


def test_help_is_shown_before_any_large_library_is_imported():
    """So it takes a fraction of a second; typer is all that it needs."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "melinoe", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "numpy", "numba", "matplotlib", "fastapi"}
    assert all(name in result.stdout for name in COMMANDS)


def helped(command, *more):
    """The help of a command: its text, and the options that it lists."""
    out = CliRunner().invoke(app, [*command, *more]).stdout
    listed = out[out.index("\nOptions:") :]
    return out, set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", listed, re.MULTILINE))


def test_help_lists_at_most_a_dozen_everyday_options_and_the_long_help_all(monkeypatch):
    """Of every command; what `--help` leaves out is counted there, and `--help-all` has it."""
    monkeypatch.setenv("COLUMNS", "200")
    for command, parameters in commands():
        out, everyday = helped(command, "--help")
        assert "Usage: " in out and " ".join(command) in out
        named = {key_of(one) for one in parameters if key_of(one).startswith("--")}
        every = helped(command, "--help-all")[1]
        assert every == named | {"--help"}, command
        assert len(everyday - {"--help", "--help-all"}) <= 12, command
        left = len(every) - len(everyday - {"--help-all"})
        assert (f"Show {left} more options" in out) == ("--help-all" in everyday) == (left > 0)


def test_readme_and_docs_name_no_option_that_no_command_has():
    """But for lines that show other tools; the log tells of what was."""
    known = {one for _, parameters in commands() for p in parameters for one in p.opts}
    known |= {one.replace("--", "--no-", 1) for one in known} | {"--help", "--help-all"}
    known |= {"--multi_gpu", "--tuned", "--outfile", "--figures"}  # other tools', and benchmarks'
    root = Path(__file__).parents[2]
    wrong = []
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            if page.name == "log.md" or re.search(
                "sglang|expert-distribution|--outfile|vllm", line
            ):
                continue
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", line)) - known
            wrong += [f"{page.name}:{number}: {one}" for one in sorted(named)]
    assert not wrong


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "somewhere", "--no-such-option"),
        ("generate", "somewhere", "w3", "--dtype", "int99"),
        ("generate", "somewhere", "w3", "--prefetch", "never"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, melinoe):
    """An unknown option, type or moment is wrong usage, seen before any file is read."""
    code, out, err = melinoe(*arguments)
    assert (code, out) == (2, "")
    assert arguments[-1] in err


def test_doctor_states_bytes_that_follow_from_the_shape(checkpoint, melinoe):
    """Hidden 16, expert width 8, float32: one expert is 3 x 16 x 8 x 4 = 1,536 bytes."""
    code, out, _ = melinoe("doctor", checkpoint, "--json", "--expert-memory", "6KiB")
    about = json.loads(out)
    assert code == 0
    assert about["bytes_per_expert"] == 1536
    assert about["expert_bytes"] == 1536 * 8 * 2
    assert (about["moe_layers"], about["num_experts"], about["top_k"]) == (2, 8, 2)
    assert about["budgets"] == [{"expert_memory": "6KiB", "slots": 2, "bytes": 6144}]


def test_doctor_says_what_the_fast_engine_can_do(checkpoint, tmp_path, melinoe):
    """Of a checkpoint and of a config without weights: whether it runs here, and is captured."""
    model = tiny.tiny_model("deepseek_v4")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    for asked, captured in ((checkpoint, True), (tmp_path, False)):
        code, out, _ = melinoe("doctor", asked, "--json")
        fast = json.loads(out)["fast_engine"]
        assert code == 0 and (fast["not_captured"] is None) == captured
        assert captured or fast["not_captured"] == "deepseek_v4 has no static cache"
        assert torch.cuda.is_available() or fast["cannot_run"] == "this machine has no CUDA device"


def test_doctor_prints_a_table(checkpoint, melinoe):
    """The same for people."""
    code, out, _ = melinoe("doctor", checkpoint)
    assert code == 0
    assert "olmoe (OlmoeForCausalLM)" in out and "1.5KiB" in out
    assert "yes, a static one" in out


def test_a_budget_below_the_smallest_is_refused_with_the_smallest(checkpoint, melinoe):
    """One expert in each of two layers is 3,072 bytes."""
    refused(melinoe("doctor", checkpoint, "--expert-memory", "3000"), "3072")
    refused(melinoe("generate", checkpoint, "w3", "--expert-memory", "3000"), "3072")


def test_generate_is_the_same_at_every_budget(checkpoint, melinoe):
    """One slot and all slots give the same ids, and the text goes to stdout alone."""
    ids = []
    for slots in (1, 8):
        code, out, _ = melinoe(
            "generate", checkpoint, "w3 w4 w5", "--slots", slots, "--max-new-tokens", 6, "--json"
        )
        assert code == 0
        ids.append(json.loads(out)["ids"])
    assert ids[0] == ids[1] and len(ids[0]) == 6


def test_generate_is_the_same_wherever_misses_are_computed(checkpoint, melinoe):
    """On the CPU nothing is transferred, which stderr says; an unknown way is wrong usage."""
    command = ("generate", checkpoint, "w3 w4 w5", "--slots", 2, "--max-new-tokens", 6, "--json")
    found = {}
    for miss in ("wait", "cpu", "split"):
        code, out, err = melinoe(*command, "--miss", miss)
        assert code == 0, err
        assert ("only a prefetch fills the slots" in err) == (miss == "cpu")
        found[miss] = json.loads(out)
    assert found["wait"]["ids"] == found["cpu"]["ids"] == found["split"]["ids"]
    assert found["cpu"]["transfers_per_token"] == 0 < found["wait"]["transfers_per_token"]
    assert found["cpu"]["computed_there_per_token"] == 2 * 2  # layers x experts a token
    assert found["wait"]["computed_there_per_token"] == 0
    code, out, err = melinoe(*command, "--miss", "hope")
    assert (code, out) == (2, "") and "hope" in err
    refused(melinoe(*command, "--miss", "cpu", "--engine", "fast"), "reference")


def test_trace_predict_simulate_and_generate_in_a_row(checkpoint, prompts, tmp_path, melinoe):
    """Each stage reads what the one before wrote."""
    trace, predictor = tmp_path / "trace.safetensors", tmp_path / "predictor"
    code, _, err = melinoe(
        "trace", checkpoint, "--data", prompts, "--out", trace, "--max-new-tokens", 4
    )
    assert code == 0, err
    code, out, _ = melinoe("simulate", trace, "--slots", 8, "--slots", 1, "--json")
    rows = json.loads(out)
    assert [(r["policy"], r["slots"]) for r in rows][:2] == [("lru", 8), ("lru", 1)]
    # With every expert resident nothing is loaded twice, and one slot can serve no second expert.
    assert rows[0]["transfers_per_token"] <= 16 / 75
    assert rows[1]["transfers_per_token"] >= 2.0
    code, out, err = melinoe(
        "predictor",
        "fit",
        trace,
        "--model",
        checkpoint,
        "--out",
        predictor,
        "--json",
    )
    assert code == 0, err
    assert set(json.loads(out)["recall"]) == {"empty", "popularity", "prefill", "learned"}
    saved = json.loads((predictor / "predictor.json").read_text())
    assert saved["comparison"] == json.loads(out)
    code, out, err = melinoe(
        "generate",
        checkpoint,
        "w3 w4",
        "--predictor",
        predictor,
        "--max-new-tokens",
        3,
        "--json",
    )
    assert code == 0, err
    assert len(json.loads(out)["ids"]) == 3


def test_finetune_then_evaluate_against_the_base(checkpoint, prompts, tmp_path, melinoe):
    """Two steps write a checkpoint that the other commands open."""
    out = tmp_path / "tuned"
    code, _, err = melinoe(
        "finetune", checkpoint, "--data", prompts, "--out", out, "--steps", 2, "--batch-size", 2
    )
    assert code == 0, err
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in load_file(out / "model.safetensors")
    code, stdout, err = melinoe("evaluate", out, checkpoint, "--data", prompts, "--json")
    assert code == 0, err
    records = json.loads(stdout)
    assert [record["kind"] for record in records] == ["quality", "quality", "comparison"]
    again = melinoe("finetune", checkpoint, "--data", prompts, "--out", out, "--steps", 2)
    refused(again, out)


def test_bad_data_names_the_file_and_the_line(checkpoint, tmp_path, melinoe):
    """Empty, malformed and missing files."""
    out = tmp_path / "out"
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    broken.write_text('{"text": "w3"}\n{"text": \n')
    for arguments, words in (
        ((empty,), ("empty.jsonl", "no rows")),
        ((broken,), ("broken.jsonl:2",)),
        ((tmp_path / "absent.jsonl",), ("absent.jsonl",)),
    ):
        refused(melinoe("finetune", checkpoint, "--data", *arguments, "--out", out), *words)
        assert not out.exists()


def copy_of(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_torn_shard_is_named(checkpoint, tmp_path, melinoe):
    """A file that ends early is no checkpoint."""
    copy = copy_of(checkpoint, tmp_path)
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(melinoe("generate", copy, "w3"), "model.safetensors")


def test_a_missing_expert_is_named(checkpoint, tmp_path, melinoe):
    """Experts are never made up."""
    copy = copy_of(checkpoint, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(melinoe("generate", copy, "w3"), "experts")


def test_a_dense_model_an_undecorated_and_a_quantised_one_are_refused(
    checkpoint, tmp_path, melinoe
):
    """By name, before any weight is read."""
    for name, change, words in (
        ("dense", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ("expert",)),
        (
            "undecorated",
            {"model_type": "switch_transformers", "architectures": ["SwitchTransformersModel"]},
            ("switch_transformers",),
        ),
        ("unknown", {"model_type": "no_such_family", "architectures": ["NoSuch"]}, ("no_such",)),
        ("quantised", {"quantization_config": {"quant_method": "hqq"}}, ("hqq",)),
    ):
        directory = tmp_path / name
        directory.mkdir()
        config = json.loads((checkpoint / "config.json").read_text()) | change
        (directory / "config.json").write_text(json.dumps(config))
        refused(melinoe("doctor", directory), *words)


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tmp_path, melinoe):
    """One with more tokens than the model has embeddings would index outside of them."""
    copy = copy_of(checkpoint, tmp_path)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"x{i}": 32 + i for i in range(8)}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(melinoe("generate", copy, "w3"), "token")


def test_a_malformed_trace_is_refused(tmp_path, melinoe):
    """Text, and a truncated file."""
    trace = tmp_path / "trace.safetensors"
    trace.write_text("no trace")
    refused(melinoe("simulate", trace), "trace.safetensors")
    refused(melinoe("simulate", tmp_path / "absent.safetensors"), "absent.safetensors")


def test_a_trace_of_another_model_fits_no_predictor(checkpoint, prompts, tmp_path, melinoe):
    """The fingerprint of the routers tells models of one shape apart."""
    other = tmp_path / "other"
    write_checkpoint(other, 7)
    trace = tmp_path / "trace.safetensors"
    assert melinoe("trace", other, "--data", prompts, "--out", trace, "--max-new-tokens", 3)[0] == 0
    result = melinoe(
        "predictor",
        "fit",
        trace,
        "--model",
        checkpoint,
        "--out",
        tmp_path / "predictor",
    )
    refused(result, "another model")
    assert not (tmp_path / "predictor").exists()


def test_an_unknown_policy_names_the_known_ones(checkpoint, melinoe):
    """So that the next try works."""
    refused(melinoe("generate", checkpoint, "w3", "--policy", "magic"), "lru", "lfu")


def test_the_demo_refuses_a_directory_that_is_not_empty(tmp_path, melinoe):
    """Nothing written before is lost."""
    (tmp_path / "mine").write_text("precious")
    refused(melinoe("demo", "--out", tmp_path), tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"
