"""Whole runs with the experts on disk: the resident run's checkpoint, within a budget."""

import re
import signal

import pytest
import torch
from forked import finetuned, run
from packed_checkpoints import MXFP4, write_packed
from safetensors.torch import load_file
from small_runs import settings
from transformers import TrainerCallback

from melinoe.checkpoint import read_metadata
from melinoe.checkpoint.tokenizer import copy_tokenizer
from melinoe.data import load_examples
from melinoe.errors import (
    BudgetError,
    CheckpointError,
    TrainingError,
    UnsupportedModelError,
)
from melinoe.finetune import finetune
from melinoe.finetune.saving import merge_adapter
from melinoe.shipped import GSM8K_TRAIN, TINY_OLMOE

RAM = "2GiB"


def weights(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def both(checkpoint, settings, **options):
    """The weights that a resident run writes, and those of the same run from disk."""
    made = []
    for name, given in (("resident", {}), ("streamed", {"ram": RAM})):
        finetune(
            checkpoint / "base", checkpoint / "data.jsonl", checkpoint / name, settings,
            **given, **options,
        )  # fmt: skip
        made.append(weights(checkpoint / name))
    return made


def assert_same(resident, streamed):
    assert resident.keys() == streamed.keys()
    for name, tensor in resident.items():
        assert torch.equal(streamed[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": "router"},
        {"train": "router+experts+attention", "gradient_accumulation": 2},
        {"lambda_replay": 0.1, "own_texts": 2},
        {"compute_dtype": "bfloat16"},
        {"train": "router", "compute_dtype": "bfloat16"},
    ],
)
def test_the_checkpoint_is_the_resident_runs_to_the_bit(checkpoint, changes):
    """Every term, everything that can be trained, in both types."""
    resident, streamed = both(checkpoint, settings(steps=3, **changes))
    assert_same(resident, streamed)
    base = weights(checkpoint / "base")
    moved = [name for name in base if not torch.equal(base[name], streamed[name])]
    assert any("gate.weight" in name for name in moved)
    assert any("experts" in name for name in moved) == (changes.get("train") != "router")
    told = read_metadata(checkpoint / "streamed")["streamed"]
    assert told["store"] == "disk" and told["reads"]["forward"] > 0


def streamed(checkpoint, out, given=None, **options):
    return finetune(
        checkpoint / "base", checkpoint / "data.jsonl", checkpoint / out,
        given or settings(), **{"ram": RAM} | options,
    )  # fmt: skip


def test_an_adapter_of_a_streamed_run_merges_to_its_checkpoint(checkpoint):
    """Written beside the checkpoint, and merged expert by expert."""
    streamed(checkpoint, "out", settings(save="both"))
    merge_adapter(checkpoint / "out" / "adapter", checkpoint / "merged")
    assert_same(weights(checkpoint / "out"), weights(checkpoint / "merged"))


def test_a_killed_run_goes_on_to_the_same_weights(checkpoint):
    """SIGKILL in the middle, then the same command with resume; or a resident run goes on so."""
    steps = {"steps": 5, "save_every": 2, "batch_size": 2}
    assert run(lambda: finetuned(checkpoint, "whole", **steps)) == [0]
    for name, first in (("ours", RAM), ("theirs", None)):
        killed = run(lambda n=name, f=first: finetuned(checkpoint, n, kill_at=3, ram=f, **steps))
        assert killed == [-signal.SIGKILL]
        again = run(lambda n=name: finetuned(checkpoint, n, resume=True, ram=RAM, **steps))
        assert again == [0]
        assert_same(weights(checkpoint / "whole"), weights(checkpoint / name))


def test_two_processes_take_the_steps_of_one(checkpoint):
    """Each reads the same file; together they see one process's batch."""
    kept = {"save_every": None, "eval_every": None}
    assert run(lambda: finetuned(checkpoint, "one", batch_size=2, ram=RAM, **kept)) == [0]
    both = run(lambda: finetuned(checkpoint, "two", batch_size=1, ram=RAM, **kept), processes=2)
    assert both == [0, 0]
    one, two = weights(checkpoint / "one"), weights(checkpoint / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-2, atol=2e-3)


def test_a_budget_that_is_too_small_names_the_smallest_that_works(checkpoint):
    """Nothing is written; the named one then works, and the run says what it takes."""
    with pytest.raises(BudgetError, match=r"training takes at least .* raise --ram to") as refused:
        streamed(checkpoint, "out", ram="500MiB")
    assert not (checkpoint / "out").exists()
    said = []
    least = re.search(r"raise --ram to (\S+),", str(refused.value))[1]
    streamed(checkpoint, "out", ram=least, say=said.append)
    assert said[0].startswith("training takes") and "experts wait on disk" in said[0]


def test_a_budget_of_a_gpu_is_refused_without_one(checkpoint):
    """The sentence names the option that there is."""
    with pytest.raises(BudgetError, match=r"--gpu-memory is for a GPU.*--ram"):
        streamed(checkpoint, "out", gpu_memory="1GiB")


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_a_sharded_run_with_experts_on_disk_is_refused_by_name(checkpoint, monkeypatch, kind):
    """As `accelerate launch` says it; sharding and offloading together are not right yet."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    with pytest.raises(TrainingError, match=rf"sharded run \({kind}\)"):
        streamed(checkpoint, "out")


def test_a_shard_that_is_written_to_ends_the_run_by_its_name(checkpoint):
    """In the middle of a step; what was trained before stays in the run's checkpoints."""
    shard = next((checkpoint / "base").glob("*.safetensors"))

    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                shard.touch()

    with pytest.raises(CheckpointError, match=f"{shard.name} was changed"):
        streamed(
            checkpoint, "out", settings(steps=4, save_every=1, batch_size=2), callbacks=[Change()]
        )
    assert (checkpoint / "out.checkpoints" / "step-000002").is_dir()


def test_packed_experts_are_read_as_they_are_stored(checkpoint):
    """MXFP4 blocks on disk train an adapter, and the record says against what."""
    write_packed(checkpoint, MXFP4)
    copy_tokenizer(str(checkpoint / "base"), checkpoint / "packed")
    made = finetune(
        checkpoint / "packed", checkpoint / "data.jsonl", checkpoint / "out",
        settings(save="adapter"), ram=RAM,
    )  # fmt: skip
    assert made.metadata["streamed"]["format"] == "mxfp4"
    with pytest.raises(UnsupportedModelError, match=r"stored packed .*--save adapter"):
        finetune(
            checkpoint / "packed", checkpoint / "data.jsonl", checkpoint / "merged",
            settings(), ram=RAM,
        )  # fmt: skip


def test_the_shipped_models_run_is_the_resident_one_and_its_reads_are_those_of_its_routing(
    tmp_path,
):
    """Two steps, a few experts of 64 at a time."""
    data = load_examples(GSM8K_TRAIN)[:8]
    given = settings(steps=2, batch_size=2, max_length=48, learning_rate=None, capacity=0.25)
    for name, ram in (("resident", None), ("streamed", RAM)):
        finetune(TINY_OLMOE, data, tmp_path / name, given, ram=ram)
    assert_same(weights(tmp_path / "resident"), weights(tmp_path / "streamed"))
    reads = read_metadata(tmp_path / "streamed")["streamed"]["reads"]
    assert reads["forward"] == reads["backward"] > 0
