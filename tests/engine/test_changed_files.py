"""Files that change while a model is served from them: the right text, or one sentence."""

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch
from damaged import write_olmoe
from small_olmoe import words_tokenizer

import melinoe
from melinoe.checkpoint import open_checkpoint, safetensors_file
from melinoe.checkpoint.safetensors_file import SafetensorsFile, check_same
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import CheckpointError, WriteError
from melinoe.finetune import finetune
from melinoe.finetune.saving import merge_adapter

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
SHARD = "model.safetensors"


def zero(path):
    """Zeros over all tensors, in place; the file keeps its length."""
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(path.stat().st_size - start))


def flip(path):
    """One bit of the last tensor."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 64]))


def overwrite(path):
    """Another model's file of the same length, as `cp` writes it."""
    other = path.parent.parent / "other"
    write_olmoe(other, shard="1GB")
    zero(other / SHARD)
    path.write_bytes((other / SHARD).read_bytes())


def cut(path):
    """The second half is gone."""
    os.truncate(path, path.stat().st_size // 2)


def flip_and_set_back(path):
    """A change after which the file's own time is set back, as `cp -p` and `touch -r` do."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def map_and_zero(path):
    """The same through memory, without a call to write."""
    import mmap

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[-2000:] = bytes(2000)
        mapped.flush()


CHANGES = [zero, flip, overwrite, cut, flip_and_set_back, map_and_zero]


@pytest.fixture
def olmoe(tmp_path):
    return write_olmoe(tmp_path / "model", shard="1GB")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_in_place_is_refused_and_never_served(olmoe, change, monkeypatch):
    """This call, the next, and what a prefetch begins say so; the weights do not come back."""
    monkeypatch.setattr("melinoe.engine.reference.read_by_threads", lambda layers: True)
    model, handle = melinoe.load(olmoe, slots=2, store="disk")
    logits(model)
    change(olmoe / SHARD)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"was changed after it was opened.*load the"):
            logits(model)
        assert handle.resident()[0] == []
    handle.prefetch([[0, 1], [0, 1]])  # read while something else is done
    with pytest.raises(CheckpointError, match="was changed"), torch.no_grad():
        model(torch.arange(3, 20)[None])  # some token wants one of them
    with pytest.raises(CheckpointError, match="was changed"):
        handle.detach()


def test_a_prefetch_that_reads_small_experts_itself_says_so_itself(olmoe):
    _, handle = melinoe.load(olmoe, slots=2, store="disk")
    flip(olmoe / SHARD)
    with pytest.raises(CheckpointError, match="was changed"):
        handle.prefetch([[0, 1], [0, 1]])
    assert handle.resident()[0] == []


@pytest.mark.parametrize("change", CHANGES)
def test_loading_again_serves_what_is_there_now(olmoe, change):
    """Once the file is right again a new load is right; the old one still refuses."""
    model, _ = melinoe.load(olmoe, slots=2, store="disk")
    expected = logits(model)
    whole = (olmoe / SHARD).read_bytes()
    change(olmoe / SHARD)
    (olmoe / SHARD).write_bytes(whole)
    with pytest.raises(CheckpointError, match="was changed"):
        logits(model)
    again, _ = melinoe.load(olmoe, slots=2, store="disk")
    assert torch.equal(logits(again), expected)


def replace(path):
    """Another file takes the name, as every careful writer does."""
    shutil.copy(path, path.with_name("new"))
    zero(path.with_name("new"))
    os.replace(path.with_name("new"), path)


def remove(path):
    path.unlink()


def rename(path):
    path.rename(path.with_name("elsewhere"))


def link(path):
    """A further name, as tools give that spare equal files."""
    os.link(path, path.with_name("further"))


def remove_directory(path):
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("harmless", [replace, remove, rename, link, remove_directory])
def test_a_file_that_is_replaced_goes_on_being_served(olmoe, harmless):
    """The bytes that were opened stay until they are closed: the same logits from disk."""
    model, handle = melinoe.load(olmoe, slots=2, store="disk")
    expected = logits(model)
    harmless(olmoe / SHARD)
    handle.reset_cache()
    assert torch.equal(logits(model), expected)


def test_a_change_behind_a_replacement_is_refused(olmoe):
    """The file got a further name, and was then written to under that."""
    model, _ = melinoe.load(olmoe, slots=2, store="disk")
    link(olmoe / SHARD)
    logits(model)
    flip(olmoe / "further")
    with pytest.raises(CheckpointError, match="was changed"):
        logits(model)


def test_a_hub_cache_that_moves_on_goes_on_being_served(olmoe, tmp_path):
    """A snapshot's link comes to name another blob, and the old blob goes."""
    blob = tmp_path / "blob"
    os.replace(olmoe / SHARD, blob)
    (olmoe / SHARD).symlink_to(blob)
    model, handle = melinoe.load(olmoe, slots=2, store="disk")
    expected = logits(model)
    shutil.copy(blob, tmp_path / "newer")
    zero(tmp_path / "newer")
    (olmoe / SHARD).unlink()
    (olmoe / SHARD).symlink_to(tmp_path / "newer")
    blob.unlink()
    handle.reset_cache()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_a_file_that_changes_while_it_is_loaded_is_refused(olmoe, monkeypatch, store):
    """After the first tensor of many: in the store, or in the weights beside the experts."""
    real, reads = SafetensorsFile.read, []

    def read(self, name, into, first=0):
        real(self, name, into, first)
        if not reads:
            zero(self.path)
        reads.append(name)

    monkeypatch.setattr(SafetensorsFile, "read", read)
    with pytest.raises(CheckpointError, match="was changed"):
        melinoe.load(olmoe, slots=2, store=store)


def test_a_change_within_the_same_tick_of_the_clock_is_seen(olmoe):
    """Written, opened and changed at once: file systems note times in steps of milliseconds."""
    for _ in range(20):
        (olmoe / SHARD).write_bytes((olmoe / SHARD).read_bytes())
        file = SafetensorsFile(olmoe / SHARD)
        flip(olmoe / SHARD)
        with pytest.raises(CheckpointError, match="was changed"):
            file.check_unchanged()
        file.close()


def test_a_disk_that_fails_once_fails_one_call(olmoe, monkeypatch):
    """One sentence; the next call reads again and is right, and short reads are read on."""
    model, handle = melinoe.load(olmoe, slots=2, store="disk")
    expected = logits(model)
    handle.reset_cache()
    real, read_at = safetensors_file.read_at, "melinoe.checkpoint.safetensors_file.read_at"

    def failing(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(read_at, failing)
        with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\); check"):
            logits(model)
    assert handle.resident() == [[], []]
    with monkeypatch.context() as patch:
        patch.setattr(read_at, lambda fd, view, at: real(fd, view[:100], at))
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)


# --- others that read a model's files -----------------------------------------------------------


@pytest.fixture
def base(olmoe):
    words_tokenizer().save_pretrained(olmoe)
    return olmoe


DATA = [Example("w3 w4", "w5 w6 w7", "here")] * 4
SETTINGS = FinetuneSettings(capacity=0.5, steps=1, batch_size=2, save="both")


@pytest.mark.parametrize("change", [flip, replace, remove])
def test_a_base_that_changes_while_it_is_trained_on_is_refused(base, tmp_path, change):
    """What did not change is copied from its files in the end: no mixture of two is written."""

    def once(row):
        if (base / SHARD).exists() and (base / SHARD).read_bytes() == whole:
            change(base / SHARD)

    whole = (base / SHARD).read_bytes()
    with pytest.raises((CheckpointError, WriteError), match=r"was changed .*--resume|has no"):
        finetune(base, DATA, tmp_path / "out", SETTINGS, progress=once)
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_while_it_is_copied_is_refused(base, tmp_path, monkeypatch):
    """Between its opening and the copy, which is made by path."""
    from melinoe.checkpoint import writing

    def copy(source, target):
        replace(Path(source))
        shutil.copyfile(source, target)

    monkeypatch.setattr(writing, "copyfile", copy)
    with pytest.raises(WriteError, match=r"was changed .*--resume"):
        finetune(base, DATA, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_while_it_is_merged_is_refused(base, tmp_path, monkeypatch):
    """Between opening and reading, and between reading and writing."""
    finetune(base, DATA, tmp_path / "out", SETTINGS)
    from melinoe.finetune import saving

    real = saving.read_adapter

    def changing(adapter, model, layers):
        flip(base / SHARD)
        return real(adapter, model, layers)

    monkeypatch.setattr(saving, "read_adapter", changing)
    with pytest.raises(CheckpointError, match="was changed"):
        merge_adapter(tmp_path / "out" / "adapter", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", [flip, replace, remove])
def test_what_will_be_read_again_must_be_what_was_read(olmoe, change):
    """Changed, replaced or gone."""
    with open_checkpoint(olmoe) as checkpoint:
        stamps = checkpoint.stamps
    check_same(stamps)
    change(olmoe / SHARD)
    with pytest.raises(CheckpointError, match="was changed"):
        check_same(stamps)


def test_nothing_that_is_kept_of_a_file_is_the_file_itself(base, tmp_path):
    """An adapter read for a run: its file may be overwritten or cut while the run goes on."""
    from melinoe.finetune.adapter import WEIGHTS, read_adapter

    finetune(base, DATA, tmp_path / "out", SETTINGS)
    model, handle = melinoe.load(base, slots=4)
    handle.detach()
    adapter = read_adapter(tmp_path / "out" / "adapter", model)
    gc.collect()  # of tests before
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what is mapped")
    kept = [line for line in maps.read_text().splitlines() if WEIGHTS in line]
    assert adapter is not None
    assert kept == []
