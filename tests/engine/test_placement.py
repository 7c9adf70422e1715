"""What serves a model on a machine is chosen from what the user has, and said in one line."""

import inspect
import logging
import weakref
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from small_olmoe import tiny_model

import melinoe
from melinoe.cache.curves import miss_curves, unit_costs
from melinoe.cache.policy import Static, policy
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.demo import DemoSettings
from melinoe.engine import load as load_module
from melinoe.engine import placement
from melinoe.engine.device import support
from melinoe.engine.device.support import why_not
from melinoe.engine.options import Options
from melinoe.engine.placement import Model
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import AttachError, BudgetError, CheckpointError, PinError
from melinoe.host_memory import HostMemory
from melinoe.moe.experts import find_experts
from melinoe.predictor import compare

IDS = torch.tensor([[3, 4, 5, 6]])
BLOCK = 3 * 16 * 8 * 4  # bytes of one expert: projections x hidden x inner x float32
LAYERS, EXPERTS = 2, 8
ALL = LAYERS * EXPERTS * BLOCK
GPU = torch.device("cuda")


def choose(device=GPU, in_memory=False, backbone=0, packs=False, **options):
    """What is chosen for a small model, as if on that device."""
    layers = find_experts(tiny_model())
    assert [(one.num_experts, one.block_bytes) for one in layers] == [(EXPERTS, BLOCK)] * LAYERS
    return placement.place(
        Options(**options), Model(layers, backbone, in_memory, device, packs=packs)
    )


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that can do all, as far as it is asked, with room for five experts of each layer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    free = int(5 * LAYERS * BLOCK / 0.8) + 9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(placement, "why_not", lambda device: None)


@pytest.fixture
def host(monkeypatch):
    """Say how much host memory is free."""

    def leave(amount):
        left = HostMemory(amount, "the limit of a test")
        monkeypatch.setattr("melinoe.host_memory.host_memory", lambda *_: left)
        monkeypatch.setattr(placement, "host_memory", lambda *_: left)

    return leave


def test_load_and_attach_show_every_option_with_its_default():
    """The same names and defaults as the one class that says what each means."""
    known = {one.name: one.default for one in fields(Options)}
    assert all(one.metadata["help"] for one in fields(Options))
    for call, first in ((melinoe.load, "name"), (melinoe.attach, "model")):
        shown = dict(inspect.signature(call).parameters)
        del shown[first]
        assert not any(one.kind is one.VAR_KEYWORD for one in shown.values())
        assert {n: one.default for n, one in shown.items()} == {n: known[n] for n in shown}
        left_out = known.keys() - shown.keys()
        of_loading = {"dtype", "gpu_memory", "ram", "batch", "context", "backbone"}
        assert left_out == (of_loading if first == "model" else set())


def test_every_call_evicts_by_lfu_unless_told_otherwise():
    """The policy that docs/findings.md finds best; it forgets at .98 a request."""
    calls = (melinoe.load, melinoe.attach, simulate, miss_curves, unit_costs, Residency, compare)
    defaults = {inspect.signature(call).parameters["policy"].default for call in calls}
    assert defaults | {Options().policy, DemoSettings().policy} == {"lfu"}
    assert policy("lfu").gamma == 0.98


def unpopular():
    """A policy that no GPU decides by."""
    return Static([0.0] * 8)


def test_auto_takes_the_fast_engine_where_it_can_run(gpu):
    """On a GPU, by LFU, waiting for misses, with room for all experts; else it says why not."""
    chosen = choose(slots=4)
    assert (chosen.engine, chosen.store, str(chosen.device)) == ("fast", "pinned", "cuda:0")
    for options, reason in (
        ({"policy": unpopular}, "not by static"),
        ({"miss": "cpu"}, "miss"),
        ({"store": "disk"}, "store"),
        ({"ram": "8KiB"}, "do not fit into 8KiB"),
    ):
        other = choose(slots=4, **options)
        assert other.engine == "reference" and reason in other.why[0]
    assert choose(ram="8KiB").store == "disk" and choose(policy=unpopular).store == "pinned"
    assert choose(engine="reference").engine == "reference"


def test_experts_that_the_gpu_cannot_read_are_served_by_the_host(gpu):
    """Those in pageable memory, or on disk, whichever way the store is given."""
    for store in ("ram", SimpleNamespace(kind="disk"), SimpleNamespace(kind="ram")):
        chosen = choose(slots=4, store=store)
        assert chosen.engine == "reference" and "the GPU cannot read experts" in chosen.why[0]
        with pytest.raises(AttachError, match=r"engine cannot run here|belongs to the other"):
            choose(slots=4, store=store, engine="fast")
    assert choose(slots=4, store=SimpleNamespace(kind="pinned")).engine == "fast"


def test_experts_that_are_in_host_memory_already_fit_there(gpu, host):
    """A model attached from the host, or a store that is filled, adds none; packing adds blocks."""
    host(ALL)  # of which four fifths are taken unasked
    filled = SimpleNamespace(kind="pinned")
    assert choose(slots=2, in_memory=True).engine == "fast"
    assert choose(slots=2, store=filled).engine == "fast"
    assert choose(slots=2, in_memory=True, packs=True).engine == "reference"
    assert choose(slots=2).engine == "reference"
    host(ALL - 1)
    with pytest.raises(BudgetError, match="melinoe pack"):
        choose(slots=2, in_memory=True, packs=True)


def test_ram_bounds_packed_experts_on_a_gpu_too(gpu):
    """They cannot stay on disk as the files have them, so they must fit."""
    assert choose(slots=2, packs=True, ram=ALL).engine == "fast"
    with pytest.raises(BudgetError, match=r"more than ram allows.*melinoe pack"):
        choose(slots=2, packs=True, ram=ALL - 1)


def test_the_second_try_begins_when_the_first_ones_memory_is_free(monkeypatch):
    """What the first try held would count as taken when the second is placed."""

    class Held:
        pass

    first = []

    def serve(chosen):
        if not first:
            held = Held()
            first.append(weakref.ref(held))
            raise RuntimeError("no kernel image")
        return chosen.engine

    def chosen(engine):
        return SimpleNamespace(engine=engine, device=torch.device("cpu"), describe=lambda _: "")

    def place(options, model, host_because=None):
        if host_because is None:
            return chosen("fast")
        assert host_because == "no kernel image" and first[0]() is None
        return chosen("reference")

    monkeypatch.setattr(load_module, "place", place)
    assert load_module._best(Options(), Model([]), serve) == "reference"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, CheckpointError, BudgetError])
def test_what_the_host_could_not_do_either_is_not_tried_again(monkeypatch, error):
    """A GPU that is full, files that are torn, too little memory: the first error stands."""
    chosen = SimpleNamespace(engine="fast", device=torch.device("cpu"))
    monkeypatch.setattr(load_module, "place", lambda *_: chosen)

    def serve(_):
        raise error("pinned or not")

    with pytest.raises(error, match="pinned or not"):
        load_module._best(Options(), Model([]), serve)


def test_without_a_device_named_a_gpu_is_taken_if_there_is_one(gpu, monkeypatch):
    """Else the CPU; a model in memory stays where it is."""
    assert choose(None).device == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(None).device == torch.device("cpu")
    assert choose(torch.device("cpu"), in_memory=True).device == torch.device("cpu")


def test_as_many_slots_as_fit_into_what_is_free_on_the_gpu(gpu):
    """Five of each layer in a fifth less than what is free; fewer beside a backbone."""
    assert choose().slots == (5, 5)
    assert choose(backbone=2 * LAYERS * BLOCK).slots == (3, 3)
    assert choose(slots=[2, 1]).slots == (2, 1)
    assert choose(expert_memory=3 * LAYERS * BLOCK).slots == (3, 3)


def test_as_many_slots_as_fit_into_host_memory_on_the_cpu(host):
    """All of them where they fit; the others stay on disk, as slots use the memory better."""
    cpu = torch.device("cpu")
    host(int(5.5 * LAYERS * BLOCK / 0.8))
    assert (choose(cpu).slots, choose(cpu).store) == ((5, 5), "disk")
    assert choose(cpu, backbone=2 * LAYERS * BLOCK).slots == (3, 3)
    assert choose(cpu, ram=2 * LAYERS * BLOCK).slots == (2, 2)
    assert choose(cpu, in_memory=True).store == "ram"
    host(100 * ALL)
    assert (choose(cpu).slots, choose(cpu).store) == ((EXPERTS, EXPERTS), "disk")
    with pytest.raises(BudgetError, match="that ram allows; give more ram"):
        choose(cpu, ram=BLOCK)


def test_too_little_host_memory_is_said_with_whose_limit_it_is(host):
    """Nobody named an amount for experts, so none is quoted; each sentence has its own way out."""
    cpu, layer = torch.device("cpu"), LAYERS * BLOCK
    host(int(2.5 * layer / 0.8))
    for given, words in (
        (dict(backbone=2 * layer), r"does not fit beside 6KiB of other weights into the 7.5KiB of "
         r"host memory that may be taken \(the limit of a test\); free some, or raise"),
        (dict(store="ram"), r"beside 24KiB of all experts .* or choose the disk store"),
        (dict(store="ram", packs=True), "beside 24KiB of all experts .* `melinoe pack`"),
    ):  # fmt: skip
        with pytest.raises(BudgetError, match=words):
            choose(cpu, **given)


def test_ram_says_whether_experts_wait_in_memory_or_on_disk(host):
    """With slots that are given, on the CPU: all experts and the slots fit into it, or not."""
    host(100 * ALL)
    cpu, slots = torch.device("cpu"), 2 * LAYERS * BLOCK
    assert choose(cpu, slots=2, ram=ALL + slots).store == "ram"
    assert choose(cpu, slots=2, ram=ALL + slots - 1).store == "disk"
    assert choose(cpu, slots=2).store == "disk"
    with pytest.raises(BudgetError, match="more than ram allows"):
        choose(cpu, slots=2, ram=slots - 1)
    with pytest.raises(BudgetError, match="more than ram allows"):
        choose(cpu, slots=2, store="ram", ram=ALL - 1)


def test_what_only_the_fast_engine_can_do_is_refused_where_it_cannot_run(gpu, monkeypatch):
    """The reason by name: what was asked for would change the answers or the memory."""
    reason = "the GPU has compute capability 7.5, and 8.0 is the least that works"
    monkeypatch.setattr(placement, "why_not", lambda device: reason)
    assert choose().why[0] == reason
    for option in ({"graphs": True}, {"graphs": False}):
        with pytest.raises(AttachError, match=rf"7\.5.*leave {next(iter(option))} out"):
            choose(**option)
    with pytest.raises(AttachError, match=r"7\.5"):
        choose(engine="fast")
    with pytest.raises(BudgetError, match="more than ram allows"):
        choose(store="pinned", ram="8KiB")


def test_an_emulated_link_on_a_gpu_is_refused(gpu):
    """There is a real one."""
    with pytest.raises(AttachError, match="emulated link works on the CPU only"):
        choose(link=EmulatedLink(1e9))


def test_without_triton_the_reason_is_named(gpu, monkeypatch):
    """An error for fast, a reason for auto."""
    monkeypatch.setattr(placement, "why_not", why_not)

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(support, "version", absent)
    assert choose().why[0] == "Triton is not installed"
    with pytest.raises(AttachError, match="Triton is not installed"):
        choose(engine="fast")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory": "8GiB"}, "give ram instead"),
        ({"gpu_memory": "8GiB", "slots": 2}, "not both"),
        ({"slots": 2, "batch": 4}, "batch and context"),
        ({"batch": 4}, "the model runs on the CPU; leave them out"),
        ({"graphs": True}, "no GPU is used; leave graphs out"),
        ({"engine": "reference", "graphs": True}, r'graphs belongs.*engine="fast"'),
        ({"engine": "fast", "miss": "cpu"}, r'miss belongs.*"reference"'),
        ({"engine": "quick"}, "no engine 'quick'"),
        ({"store": "tape"}, "no store 'tape'"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(options, message):
    """With the way out, and before anything is read."""
    with pytest.raises((AttachError, BudgetError), match=message) as error:
        choose(torch.device("cpu"), **options)
    assert "\n" not in str(error.value)


def test_what_the_user_got_wrong_is_not_hidden_by_auto(tmp_path):
    """A missing checkpoint, an impossible number of slots."""
    with pytest.raises(CheckpointError):
        melinoe.load(tmp_path / "nowhere", slots=4)
    with pytest.raises(BudgetError, match="between 1 and 8"):
        choose(slots=9)


@pytest.mark.parametrize("engine", ["fast", "auto"])
def test_pinned_memory_that_cannot_be_had_falls_back_or_fails(
    tmp_path, monkeypatch, caplog, engine
):
    """auto serves by reference and says so in one line; fast passes the error on."""
    whole = tiny_model()
    whole.save_pretrained(tmp_path)
    expected = whole.generate(IDS, max_new_tokens=6, do_sample=False)
    fill, tried = load_module._fill, []

    def refuse_first(*arguments):
        tried.append(1)
        if len(tried) == 1:
            raise PinError("the system refuses to pin 58GiB (CUDA error 2); raise ulimit -l")
        return fill(*arguments)

    monkeypatch.setattr(load_module, "_fill", refuse_first)
    monkeypatch.setattr(placement, "_why_host", lambda *_: None)  # as if the CPU were a GPU
    if engine == "fast":
        with pytest.raises(BudgetError, match="refuses to pin"):
            melinoe.load(tmp_path, "cpu", engine="fast", slots=4)
        return
    caplog.set_level(logging.INFO)
    model, handle = melinoe.load(tmp_path, "cpu", slots=4)
    assert handle.engine.name == "reference"
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
    said = [r.getMessage() for r in caplog.records if "refuses to pin" in r.getMessage()]
    assert said == [handle.placement] and "slots for 4 of 8 experts" in said[0]
