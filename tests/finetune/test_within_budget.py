"""The circle of training, measuring and serving within one budget, and what a run meets there."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import tiny
import torch
from forked import finetuned, run
from small_olmoe import words_tokenizer
from small_runs import settings
from test_stream import pair
from test_stream_runs import RAM, assert_same, streamed, weights
from transformers import OlmoeConfig, OlmoeForCausalLM, TrainerCallback

from melinoe.checkpoint import load_backbone, open_checkpoint, read_metadata
from melinoe.errors import BudgetError, WriteError
from melinoe.finetune.memory import shared_store, stored_layers
from melinoe.host_memory import host_memory
from melinoe.stores.disk_store import DiskStore
from melinoe.stores.ram_store import RamStore
from melinoe.stores.store import read_block

BUDGET = 900 << 20  # bytes; 450 MB of it are Python and torch
GROUP = next(
    (
        Path("/sys/fs/cgroup/memory", line.split(":", 2)[2].strip("/"))
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.split(":")[1] == "memory"
    ),
    Path("/sys/fs/cgroup"),
)


@pytest.fixture
def large(tmp_path):
    """A checkpoint with 600 MB of experts, and texts."""
    config = OlmoeConfig(
        vocab_size=32, hidden_size=512, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, num_experts=64, num_experts_per_tok=2,
        pad_token_id=0, eos_token_id=None, bos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    words_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"w{i} w4", "completion": f" w{i + 3} w5 w6"} for i in range(2, 6)]
    for name, some in (("data", rows[:2]), ("held", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return tmp_path


# The kernel's own count of what the process held, once a command is over.
COMMAND = """
import sys
from pathlib import Path
from melinoe.cli.app import main
try:
    main()
finally:
    print(Path("/proc/self/status").read_text(), file=sys.stderr)
"""


def peak_of(*words, until=None):
    """Run a command of `melinoe` in a process of its own; the most memory that it held."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if until is not None:
        until(process)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return int(re.search(r"VmHWM:\s+(\d+) kB", said)[1]) * 1024


def test_a_model_larger_than_the_budget_is_trained_measured_and_served_within_it(large):
    """Each process's peak, Python and torch in it, is below what they and the experts take."""
    tuned = large / "tuned"

    def serve(process):
        line = ""
        while (address := re.search(r"listening at (\S+)", line)) is None:
            line = process.stderr.readline()
            assert line, process.wait()
        body = json.dumps({"model": "tuned", "prompt": "w3 w4", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{address[1]}/v1/completions", body)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)

    peaks = {
        "finetune and measure": peak_of(
            "finetune", large / "base", "--data", large / "data.jsonl", "--eval-data",
            large / "held.jsonl", "--out", tuned, "--ram", BUDGET, "--steps", 2, "--batch-size", 1,
            "--max-length", 8, "--lambda-replay", 0, "--lora-rank", 2,
        ),
        # Of a model that runs, `--ram` is what its experts may take.
        "serve": peak_of("serve", tuned, "--port", 0, "--ram", BUDGET // 4, until=serve),
    }  # fmt: skip
    assert max(peaks.values()) < BUDGET, peaks
    told = read_metadata(tuned)
    assert told["streamed"]["budget_bytes"] == BUDGET and told["outcome"]["after"]


@pytest.mark.skipif(not os.access(GROUP, os.W_OK), reason="needs a control group of its own")
def test_the_limit_of_a_control_group_is_kept_and_named(checkpoint):
    """A child group of 900 MiB: a run in it ends whole, one that would exceed it is refused."""
    group = GROUP / f"melinoe-test-{os.getpid()}"
    group.mkdir()
    limit = group / "memory.limit_in_bytes"
    limit = limit if limit.exists() else group / "memory.max"
    limit.write_text(str(BUDGET))

    def within():
        (group / "cgroup.procs").write_text(str(os.getpid()))
        assert host_memory().limited_by == f"the limit in {limit}"
        finetuned(checkpoint, "out", ram=RAM, held_out=False, eval_every=None)
        with pytest.raises(BudgetError, match=f"do not fit.*the limit in {limit}"):
            finetuned(
                checkpoint, "more", ram="99GiB", held_out=False, eval_every=None,
                batch_size=4096, max_length=4096,
            )  # fmt: skip

    try:
        assert run(within) == [0]
        assert (checkpoint / "out" / "model.safetensors").is_file()
        assert not (checkpoint / "more").exists()
    finally:
        group.rmdir()


class At(TrainerCallback):
    """Calls a function before a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


def test_a_run_whose_files_are_deleted_meanwhile_goes_on_and_loses_nothing(checkpoint):
    """Open files stay readable: an adapter is written; a checkpoint needs the base, and says so."""
    steps = {"steps": 3, "batch_size": 2}
    streamed(checkpoint, "whole", settings(**steps, save="adapter"))
    shards = {one: one.read_bytes() for one in (checkpoint / "base").glob("*.safetensors")}

    def remove():
        for one in shards:
            one.unlink()

    streamed(checkpoint, "out", settings(**steps, save="adapter"), callbacks=[At(1, remove)])
    assert_same(weights(checkpoint / "whole"), weights(checkpoint / "out"))
    for one, content in shards.items():
        one.write_bytes(content)
    with pytest.raises(WriteError, match=r"kept in .*merged\.checkpoints.*--resume writes it"):
        streamed(checkpoint, "merged", settings(**steps), callbacks=[At(1, remove)])
    for one, content in shards.items():
        one.write_bytes(content)
    streamed(checkpoint, "merged", settings(**steps), resume=True)
    streamed(checkpoint, "expected", settings(**steps))
    assert_same(weights(checkpoint / "expected"), weights(checkpoint / "merged"))


def test_a_wrong_guess_is_never_waited_for():
    """The guessed experts' reads hang until the pass is over, and it ends all the same."""
    _, model, stream = pair("olmoe", buffers=4, chunk=2)
    ids = torch.tensor([[5, 9]])
    with torch.no_grad():
        model(input_ids=ids)
    wrong = [one for one in range(tiny.NUM_EXPERTS) if one not in stream._used[1]]
    stream._used[1] = wrong
    real, begun, over = stream.store.read, threading.Event(), threading.Event()

    def read(layer, expert, into):
        if layer == 1 and expert in wrong:
            begun.set()
            assert over.wait(60)
        real(layer, expert, into)

    stream.store.read = read
    model.model.layers[1].register_forward_pre_hook(lambda *_: begun.wait(60) and None)
    with torch.no_grad():
        model(input_ids=ids)
    assert wrong and begun.is_set() and not over.is_set()
    over.set()
    stream.close()


def test_processes_of_one_machine_share_one_store(checkpoint):
    """Both read the checkpoint's experts, and what one changes the other sees: it is one memory."""

    def share():
        from accelerate import PartialState

        PartialState(cpu=True)
        rank = int(os.environ["RANK"])
        with open_checkpoint(str(checkpoint / "base")) as opened:
            layers = stored_layers(opened, load_backbone(opened))
            store, disk = shared_store(RamStore, opened, layers, rank), DiskStore(opened, layers)
            for layer in layers:
                for expert in range(layer.num_experts):
                    theirs = read_block(layer, disk, expert)
                    for name, part in read_block(layer, store, expert).items():
                        assert torch.equal(part, theirs[name])
        torch.distributed.barrier()
        if rank == 0:
            store.views(1, 5)["down_proj"].fill_(7.0)
        torch.distributed.barrier()
        assert (store.views(1, 5)["down_proj"] == 7.0).all()
        assert not (store.views(1, 4)["down_proj"] == 7.0).any()

    assert run(share, processes=2) == [0, 0]
