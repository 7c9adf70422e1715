"""Reads past the page cache give the file's bytes, wherever they begin and wherever they go."""

import mmap
import os

import pytest
import torch
from safetensors.torch import save_file

from melinoe.checkpoint import direct
from melinoe.checkpoint.direct import DirectReader
from melinoe.checkpoint.safetensors_file import SafetensorsFile

BYTES = torch.randint(0, 256, (50_000,), dtype=torch.uint8, generator=torch.Generator())


def ask_for_direct_reads(path):
    """Ask the system itself, without our code: a fault of ours is no reason to skip."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        pytest.skip("this system or file system has no direct reads")
    try:
        os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
    except OSError:
        pytest.skip("this file system has no direct reads")
    finally:
        os.close(fd)


@pytest.fixture
def file(tmp_path):
    """Some bytes on a file system that lets them be read past its cache."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(BYTES.tolist()))
    ask_for_direct_reads(path)
    with open(path, "rb") as opened:
        yield DirectReader(opened.fileno())


@pytest.mark.parametrize("bounce", [8192, 1 << 20])
@pytest.mark.parametrize("phase", [0, 8, 4095])
@pytest.mark.parametrize("offset", [0, 1, 4096, 5000, 49_999])
@pytest.mark.parametrize("count", [1, 4095, 4096, 20_000])
def test_any_range_is_read_to_any_address(file, monkeypatch, bounce, phase, offset, count):
    """Straight into memory that lies as the file does, else through small or large buffers."""
    monkeypatch.setattr(direct, "_BOUNCE_BYTES", bounce)
    vars(direct._local).clear()
    room = torch.zeros(count + 3 * 4096, dtype=torch.uint8)
    first = -room.data_ptr() % 4096 + phase
    into = room[first : first + count]
    there = BYTES[offset : offset + count]
    assert file.fill(memoryview(into.numpy()), offset) == len(there)
    assert torch.equal(into[: len(there)], there)
    assert not room[:first].any() and not room[first + count :].any()
    vars(direct._local).clear()


def test_a_tensor_is_read_past_the_cache_as_through_it(tmp_path):
    """Also once its file has lost its name: the open one is read, not what the name stands for."""
    tensors = {"a": torch.randn(300, 70), "b": torch.randn(5)}
    save_file(tensors, tmp_path / "x.safetensors")
    ask_for_direct_reads(tmp_path / "x.safetensors")
    shard = SafetensorsFile(tmp_path / "x.safetensors")
    os.unlink(tmp_path / "x.safetensors")
    shard.read_past_cache()
    for name, tensor in tensors.items():
        into = torch.empty_like(tensor)
        shard.read(name, into)
        assert torch.equal(into, tensor)
    shard.close()
    with pytest.raises(ValueError, match="closed"):
        shard.read("a", torch.empty(300, 70))


def test_a_file_system_that_refuses_is_read_through_its_cache(tmp_path, monkeypatch, caplog):
    """One sentence says so, and the experts are the same."""
    from small_olmoe import tiny_model

    import melinoe
    from melinoe.checkpoint.opening import open_checkpoint
    from melinoe.stores.disk_store import DiskStore

    model = tiny_model()
    model.save_pretrained(tmp_path)

    def refuse(fd):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("melinoe.checkpoint.safetensors_file.DirectReader", refuse)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        store = DiskStore(checkpoint, direct=True)
        said = [r.getMessage() for r in caplog.records]
        assert len(said) == 1 and "past the system's page cache (Invalid argument)" in said[0]
        with melinoe.attach(model, slots=2) as handle:
            expected = handle.store.views(1, 3)
            into = {name: torch.empty_like(part) for name, part in expected.items()}
            store.read(1, 3, into)
            assert all(torch.equal(into[name], part) for name, part in expected.items())
