"""A loaded model computes what from_pretrained computes, from any store, with few slots."""

import os
from pathlib import Path

import pytest
import torch
from damaged import write_olmoe
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

import melinoe
from melinoe.checkpoint import load_backbone, open_checkpoint
from melinoe.checkpoint.safetensors_file import SafetensorsFile
from melinoe.errors import AttachError, BudgetError
from melinoe.host_memory import HostMemory

IDS = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return write_olmoe(tmp_path_factory.mktemp("load") / "olmoe")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def eager(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager", **options)


@pytest.mark.parametrize(("store", "slots"), [("disk", 1), ("disk", 3), ("ram", 2), ("auto", 4)])
def test_logits_and_generation_equal_eager(olmoe, store, slots):
    """Several shards, fewer slots than experts: the same logits, and the same tokens."""
    model, handle = melinoe.load(olmoe, slots=slots, store=store)
    expected = eager(olmoe)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    assert handle.store.kind == ("ram" if store == "ram" else "disk")
    assert sum(map(sum, handle.counters.loads)) > 0
    assert type(model) is OlmoeForCausalLM


def test_an_expert_read_wrong_shows_in_the_logits(olmoe, monkeypatch):
    """The control: with every expert answering for its neighbour the logits differ."""
    from melinoe.stores.disk_store import DiskStore

    read = DiskStore.read
    monkeypatch.setattr(DiskStore, "read", lambda *a: read(*a[:2], (a[2] + 1) % 4, a[3]))
    model, _ = melinoe.load(olmoe, slots=2, store="disk")
    assert (logits(model) - logits(eager(olmoe))).abs().max() > 1e-2


def test_detaching_gives_the_model_that_from_pretrained_gives(olmoe):
    """Every parameter and buffer, bit for bit, and the generation config."""
    model, handle = melinoe.load(olmoe, slots=2, store="disk")
    handle.detach()
    expected = OlmoeForCausalLM.from_pretrained(olmoe)
    own = model.state_dict()
    assert own.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(own[name], tensor), name
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.config.to_dict() == expected.config.to_dict()


def test_the_backbone_is_loaded_without_one_expert_byte(olmoe, monkeypatch):
    """Reading any expert's tensor would raise; the backbone still loads, its experts empty."""
    read = SafetensorsFile.read

    def guarded(self, name, into, first=0):
        assert ".experts." not in name
        read(self, name, into, first)

    monkeypatch.setattr(SafetensorsFile, "read", guarded)
    with open_checkpoint(str(olmoe)) as checkpoint:
        model = load_backbone(checkpoint)
        assert all(".experts." not in place.name for place in checkpoint.backbone)
        with pytest.raises(AssertionError):
            into = {t.name: torch.empty(t.shape) for t in checkpoint.layers[0].tensors}
            checkpoint.experts[0].read(0, into)
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert len(experts) == 4 and all(p.numel() == 0 for p in experts)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("store", ["disk", "ram"])
def test_a_bf16_checkpoint_is_read_as_float32(tmp_path, store):
    """Every bf16 number is a float32 number: equal to from_pretrained in float32."""
    path = write_olmoe(tmp_path / "bf16", dtype=torch.bfloat16)
    model, _ = melinoe.load(path, slots=2, store=store, dtype="float32")
    assert model.dtype == torch.float32
    expected = eager(path, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    own, _ = melinoe.load(path, slots=2, store=store)
    assert own.dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(tmp_path):
    """The output layer is the input embedding itself, not a second copy of it."""
    path = write_olmoe(tmp_path / "tied", tie_word_embeddings=True)
    model, _ = melinoe.load(path, slots=2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(eager(path)), atol=1e-5, rtol=1e-5)


def test_already_stacked_experts_are_read_by_their_ranges(tmp_path):
    """A checkpoint that keeps the model's own stacked tensors gives the same logits."""
    path = write_olmoe(tmp_path / "hub")
    stacked = tmp_path / "stacked"
    OlmoeForCausalLM.from_pretrained(path).save_pretrained(stacked, save_original_format=False)
    model, _ = melinoe.load(stacked, slots=2)
    torch.testing.assert_close(logits(model), logits(eager(path)), atol=1e-5, rtol=1e-5)


def test_settings_are_refused_before_anything_is_read(olmoe, monkeypatch):
    """A wrong budget, slot count, store, device or policy costs no reading."""

    def unread(*_):
        raise AssertionError("read")

    monkeypatch.setattr(SafetensorsFile, "read", unread)
    one_each = 2 * 3 * 16 * 8 * 4  # layers x projections x hidden x inner x float32
    with pytest.raises(BudgetError, match=f"at least {one_each} bytes"):
        melinoe.load(olmoe, expert_memory=one_each - 1)
    with pytest.raises(BudgetError, match="one of slots, expert_memory and gpu_memory"):
        melinoe.load(olmoe, slots=2, expert_memory="1GiB")
    with pytest.raises(BudgetError, match="5 slots per layer do not work with 4 experts"):
        melinoe.load(olmoe, slots=5)
    with pytest.raises(AttachError, match="no store 'tape'"):
        melinoe.load(olmoe, slots=2, store="tape")
    with pytest.raises(AttachError, match="no device 'abacus'"):
        melinoe.load(olmoe, "abacus", slots=2)
    with pytest.raises(AttachError, match="this machine has no device cuda:99"):
        melinoe.load(olmoe, "cuda:99", slots=2)
    with pytest.raises(melinoe.MelinoeError):
        melinoe.load(olmoe, slots=2, policy="no-such-policy")


def open_files(directory) -> int:
    """How many descriptors of this process lead into *directory*."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(str(directory) in os.readlink(link) for link in links if link.is_symlink())


@pytest.mark.parametrize("store", ["disk", "ram"])
def test_shards_are_open_as_long_as_they_are_needed(tmp_path, store):
    """On disk until the runtime leaves, in RAM until all is read; the model runs on without."""
    olmoe = write_olmoe(tmp_path / "olmoe")
    assert open_files(olmoe) == 0
    model, handle = melinoe.load(olmoe, slots=2, store=store)
    assert open_files(olmoe) == (0 if store == "ram" else len(list(olmoe.glob("*.safetensors"))))
    expected = logits(model)
    handle.detach()
    assert open_files(olmoe) == 0
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)


def test_a_failing_detach_leaves_the_shards_open(tmp_path, monkeypatch):
    """It can be repeated, so what it reads from is still there."""
    olmoe = write_olmoe(tmp_path / "olmoe")
    _, handle = melinoe.load(olmoe, slots=2, store="disk")
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsFile, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handle.detach()
    handle.detach()
    assert open_files(olmoe) == 0


def test_a_closed_store_is_refused_before_the_weights_are_given_up(olmoe):
    """Attached again with the store whose shards are closed, the model would lose its experts."""
    model, handle = melinoe.load(olmoe, slots=2, store="disk")
    handle.detach()
    expected = logits(model)
    with pytest.raises(AttachError, match="is closed"):
        melinoe.attach(model, slots=2, store=handle.store)
    assert torch.equal(logits(model), expected)


def test_a_store_of_another_checkpoint_is_refused(olmoe, tmp_path):
    """Of the same shapes, in memory or on disk; that of the same checkpoint serves it again."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        other = OlmoeForCausalLM(AutoModelForCausalLM.from_pretrained(olmoe).config)
    other.save_pretrained(tmp_path)
    for store in ("ram", "disk"):
        model, handle = melinoe.load(olmoe, slots=2, store=store)
        with pytest.raises(AttachError, match="other experts than this model's"):
            melinoe.load(tmp_path, slots=2, store=handle.store)
        again, _ = melinoe.load(olmoe, slots=3, store=handle.store)
        assert torch.equal(logits(again), logits(model))


def leave(monkeypatch, amount):
    """Let the host have *amount* bytes left."""
    left = None if amount is None else HostMemory(amount, "the limit of a test")
    monkeypatch.setattr("melinoe.host_memory.host_memory", lambda *_: left)


@pytest.mark.parametrize(("store", "experts"), [("ram", 12288), ("disk", 0)])
def test_what_does_not_fit_into_memory_is_refused(olmoe, monkeypatch, store, experts):
    """Before it is read: experts, two slots of 1.5 KiB in each of two layers, and all else."""
    with open_checkpoint(olmoe) as checkpoint:
        needed = experts + 2 * 2 * 1536 + checkpoint.backbone_bytes
    leave(monkeypatch, needed - 1)
    with pytest.raises(BudgetError, match=r"6KiB of slots and .* of a test\); .*fewer slots"):
        melinoe.load(olmoe, slots=2, store=store)
    leave(monkeypatch, needed)
    melinoe.load(olmoe, slots=2, store=store)
    leave(monkeypatch, None)
    melinoe.load(olmoe, slots=2, store=store)


def test_slots_that_do_not_fit_into_memory_are_refused_at_attach(olmoe, monkeypatch):
    """The model stays as it was, and can be attached with fewer."""
    model = AutoModelForCausalLM.from_pretrained(olmoe)
    leave(monkeypatch, 2 * 1536)
    with pytest.raises(BudgetError, match=r"6KiB of slots do not fit .* give fewer slots"):
        melinoe.attach(model, slots=2)
    melinoe.attach(model, slots=1)


def test_a_budget_in_bytes_is_kept(olmoe):
    """Room for two experts in each of two layers, less one byte for the third: two slots."""
    one_each = 2 * 3 * 16 * 8 * 4
    _, handle = melinoe.load(olmoe, expert_memory=3 * one_each - 1)
    assert handle.slots == 2
    assert handle.expert_memory_bytes <= 3 * one_each - 1
