"""`melinoe plan`: what it prints, its JSON, its exit codes."""

import json

import pytest

from tests.plan.conftest import PUBLISHED, write_config
from tests.plan.test_planner import trace_of


def refused(result, *words):
    """One line on stderr that holds *words*, nothing on stdout, exit 1."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("melinoe: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def test_a_plan_prints_its_tables_and_every_assumption(melinoe, published):
    """Slots, both hit rates, both ends of the speed, the bottleneck; sources; 'not measured'."""
    code, out, _ = melinoe(
        "plan", published["OLMoE-1B-7B"], "--gpu-memory", "8GiB", "--ram", "32GiB",
        "--link", "25GB/s",
    )  # fmt: skip
    assert code == 0
    for words in (
        "30 of 64 experts",
        "fit in host memory",
        "Expected, not measured",
        "46.9%",  # 30 of 64
        "link",
        "25 GB/s, given",
        "arXiv:2602.11192",
        "no card named",
        "Slow end",
    ):
        assert words in out, words


def test_the_json_holds_what_the_tables_show(melinoe, published):
    """8 GiB less 0.8 kept free, 909 MiB of backbone, 512 MiB of keys: 30 slots of 192 MiB."""
    code, out, _ = melinoe(
        "plan", published["OLMoE-1B-7B"], "--gpu-memory", "8GiB", "--card", "rtx4060", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert found["slots"] == 30
    assert found["model"]["kv_bytes"] == 512 * 2**20
    assert found["measured"] is False
    assert found["before"]["hit_rate"]["low"] == 30 / 64
    fast = found["before"]["tokens_per_s"]
    assert fast["bottleneck"] == "link"
    assert fast["high"] == pytest.approx(12.6e9 / (34 / 64 * 1610612736))


def test_the_hub_name_of_a_shipped_config_needs_no_network(melinoe):
    """A card's own memory is the budget, and where the config came from is said."""
    code, out, _ = melinoe("plan", "mistralai/Mixtral-8x7B-v0.1", "--card", "rtx4090")
    assert code == 0
    assert "as shipped with melinoe" in out
    assert "24GiB" in out


def test_the_model_that_ships_fits_whole(melinoe):
    """5.5 M parameters in 1 GiB: nothing to load, nothing that fine-tuning would change."""
    code, out, _ = melinoe("plan", "tiny", "--gpu-memory", "1GiB", "--context", "512")
    assert code == 0
    assert "Every expert fits" in out
    assert "device memory" in out


def test_a_trace_gives_the_hit_rates(melinoe, tmp_path):
    """A trace of the small shape: its rates by policy are printed, Belady's among them."""
    config = PUBLISHED["OLMoE-1B-7B"]
    file = write_config(
        tmp_path / "model", config, hidden_size=64, intermediate_size=32, vocab_size=64,
        num_hidden_layers=10, num_experts=16, num_experts_per_tok=4,
    )  # fmt: skip
    trace_of().save(tmp_path / "trace.safetensors")
    trace_of(layers=9).save(tmp_path / "other.safetensors")
    arguments = ("plan", file, "--gpu-memory", "20MiB", "--context", "64", "--trace")
    code, out, _ = melinoe(*arguments, tmp_path / "trace.safetensors", "--reserve", "18.5MiB")
    assert code == 0
    assert "simulated from the trace" in out and "no policy passes belady" in out
    refused(melinoe(*arguments, tmp_path / "other.safetensors"), "another model")
    refused(melinoe(*arguments, tmp_path / "nowhere.safetensors"), "nowhere.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("OLMoE-1B-7B", "--gpu-memory", "1GiB"), ["does not hold", "give"]),
        (("OLMoE-1B-7B", "--gpu-memory", "0"), ["8GiB"]),
        (("OLMoE-1B-7B", "--gpu-memory", "8GiB", "--link", "0GB/s"), ["above 0"]),
        (("OLMoE-1B-7B", "--gpu-memory", "8GiB", "--link", "25TB/s"), ["check the unit"]),
        (("OLMoE-1B-7B", "--card", "voodoo2"), ["h100"]),
        (("OLMoE-1B-7B", "--gpu-memory", "8GiB", "--bits", "3"), ["16, 8 or 4"]),
        (("OLMoE-1B-7B",), ["--gpu-memory or --card"]),
        (("/no/such/model", "--gpu-memory", "8GiB"), ["/no/such/model"]),
        (("no-such/model", "--gpu-memory", "8GiB"), ["no-such/model"]),
    ],
)
def test_bad_input_gives_one_sentence_and_exit_1(arguments, words, melinoe):
    """Memory too small, figures that no machine has, unknown parts and models."""
    refused(melinoe("plan", *arguments), *words)


@pytest.mark.parametrize(
    "arguments", [(), ("OLMoE-1B-7B", "--out", "x.json"), ("m", "--context", "0")]
)
def test_wrong_usage_exits_with_2(arguments, melinoe):
    """No model and nothing else to do; a record that is not written; a context below one."""
    code, out, _ = melinoe("plan", *arguments)
    assert (code, out) == (2, "")
