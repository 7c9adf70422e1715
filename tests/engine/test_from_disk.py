"""Experts that come from disk while others are computed: the same bits, the same counts."""

import errno
import os
import threading
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_attach import BATCH, GREEDY, MASK, PROMPT

import melinoe
from melinoe.cache.residency import Load
from melinoe.cache.simulator import simulate
from melinoe.engine import reference
from melinoe.engine.transfer import DiskTransfer, Transfer, read_by_threads, staging_blocks
from melinoe.errors import CheckpointError
from melinoe.moe.next_router import NextRouters
from melinoe.stores.disk_store import DiskStore


@pytest.fixture(params=[True, False], ids=["past the page cache", "through it"])
def saved(request, model, tmp_path, monkeypatch):
    """A checkpoint, read either way, with room for three experts in staging."""
    free = 1 if request.param else None
    monkeypatch.setattr("melinoe.engine.load.free_host_bytes", lambda: free)
    monkeypatch.setattr(reference, "staging_blocks", lambda slots: 3)
    monkeypatch.setattr(reference, "read_by_threads", lambda layers: True)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(path, **options):
    return melinoe.load(path, "cpu", store="disk", dtype="float32", **options)


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_tokens_logits_and_counts_are_those_of_the_resident_model(model, saved, slots):
    """Prompts, completions and a padded batch; as simulated, and every slot holds its expert."""
    expected = model.generate(PROMPT, **GREEDY)
    with torch.no_grad():
        logits = model(BATCH, attention_mask=MASK).logits
    loaded, handle = load(saved, slots=slots)
    assert isinstance(handle.engine.transfer, DiskTransfer)
    with handle.record() as recorder:
        assert torch.equal(loaded.generate(PROMPT, **GREEDY), expected)
        with torch.no_grad():
            assert torch.equal(loaded(BATCH, attention_mask=MASK).logits, logits)
    assert simulate(recorder.trace(), slots).counters == handle.counters
    transfer = handle.engine.transfer
    assert transfer.transferred_bytes == handle.counters.loads.sum() * handle.store.block_bytes(0)
    assert transfer.ahead_used <= transfer.ahead_reads
    assert slots == 8 or transfer.ahead_used > 0
    handle.audit()
    handle.detach()


@pytest.mark.parametrize("guess", ["wrong", "none"])
def test_a_wrong_guess_or_none_changes_nothing_but_reads(model, saved, monkeypatch, guess):
    """Staging fills with what nobody asks for, or routers cannot be asked: the same tokens."""
    expected = model.generate(PROMPT, **GREEDY)

    def wrong(self, layer, target, rows, top_k):
        self._inputs.pop(layer)
        return torch.full((rows, top_k), tiny.NUM_EXPERTS - 1)

    def none(self, *_):
        raise melinoe.errors.UnsupportedModelError("cannot be asked")

    monkeypatch.setattr(NextRouters, "guess", wrong if guess == "wrong" else none)
    loaded, handle = load(saved, slots=2)
    assert torch.equal(loaded.generate(PROMPT, **GREEDY), expected)
    if guess == "none":  # and none is asked again
        assert handle.engine.passes._routers is None
        assert loaded.generate(PROMPT, **GREEDY).equal(expected)
    handle.audit()


def test_a_read_ahead_that_fails_is_no_error_until_its_expert_is_wanted(model, saved, monkeypatch):
    """The first read into staging fails: the pass that wants it says so, and the next is right."""
    expected = model.generate(PROMPT, **GREEDY)
    real, failed = DiskStore.read, []

    def read(self, layer, expert, into):
        staged = threading.current_thread().name.startswith("melinoe-read") and any(
            block is into for _, block in handle.engine.transfer._staged.values()
        )
        if staged and not failed:
            failed.append((layer, expert))
            raise CheckpointError("the shard cannot be read")
        real(self, layer, expert, into)

    loaded, handle = load(saved, slots=2)
    monkeypatch.setattr(DiskStore, "read", read)
    try:
        found = loaded.generate(PROMPT, **GREEDY)
    except CheckpointError:
        found = loaded.generate(PROMPT, **GREEDY)
    assert failed and torch.equal(found, expected)
    handle.audit()


@pytest.mark.parametrize("fault", ["error", "end"])
def test_a_disk_that_fails_fails_one_request(model, saved, monkeypatch, fault):
    """A read that fails, or ends too early, names the shard; the next request is right."""
    expected = model.generate(PROMPT, **GREEDY)
    loaded, handle = load(saved, slots=2)
    real, failed = os.preadv, []

    def preadv(fd, buffers, offset):
        if not failed:
            failed.append(offset)
            if fault == "error":
                raise OSError(errno.EIO, "Input/output error")
            return 0
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"model\.safetensors (cannot be read|is torn)"):
        loaded.generate(PROMPT, **GREEDY)
    assert torch.equal(loaded.generate(PROMPT, **GREEDY), expected)
    handle.audit()
    handle.detach()


def test_copies_into_one_slot_keep_their_order(model, saved):
    """The first copy is slow and the second is fast: the second's expert stays."""

    class Slow:
        kind = "disk"

        def block_bytes(self, layer):
            return 1

        def read(self, layer, expert, into):
            if expert == 3:
                time.sleep(0.1)
            into["down_proj"].fill_(expert)

    _, handle = load(saved, slots=2)
    transfer = DiskTransfer(Slow(), handle.layers, 0)
    slot = {"down_proj": torch.zeros(4)}
    transfer.issue(0, [Load(3, 0, None)], [slot])
    transfer.wait(transfer.issue(0, [Load(5, 0, 3)], [slot]))
    assert slot["down_proj"].tolist() == [5.0] * 4


def test_small_experts_are_read_by_the_pass_itself(model, tmp_path):
    """No thread, nothing ahead, no router asked early: the same tokens, all loads on demand."""
    model.save_pretrained(tmp_path)
    loaded, handle = load(tmp_path, slots=2)
    assert type(handle.engine.transfer) is Transfer
    assert loaded.generate(PROMPT, **GREEDY).equal(model.generate(PROMPT, **GREEDY))
    assert handle.engine.passes._routers is None
    assert handle.transferred_bytes == handle.counters.loads.sum() * handle.store.block_bytes(0)


@pytest.mark.parametrize(("sizes", "threads"), [((1, 2**18 - 1), False), ((1, 2**18), True)])
def test_the_largest_block_decides_who_reads(sizes, threads):
    assert read_by_threads([SimpleNamespace(block_bytes=size) for size in sizes]) is threads


def test_staging_is_few_beside_the_slots():
    """A sixteenth, and eight at most."""
    assert [staging_blocks([n] * 16) for n in (0, 1, 4, 16, 64)] == [0, 1, 4, 8, 8]
