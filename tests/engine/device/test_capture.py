"""Steps that a CUDA graph cannot hold, and captures that fail, seen without CUDA."""

import gc
import warnings
from contextlib import contextmanager

import fast_attach
import pytest
import torch
from replayed import BATCH, attach, plain, static
from small_olmoe import tiny_model
from tape import WAITING
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from melinoe.engine.device import capture, graphs
from melinoe.engine.device.support import grouped_mm_waits
from melinoe.engine.passes import Batch


class Cuda:
    """
    The allocator, the generator and the stream as torch 2.11 leaves them when a capture fails.

    ``capture_end`` raises before it tells the allocator; until the pool has been ended and released
    and the generator has a new state, no capture begins and no number is drawn.
    """

    def __init__(self, monkeypatch, version):
        self.allocating, self.held, self.generator_captures = [], [], False
        self.stream, self.device_index = "default", 0
        self.version = version
        monkeypatch.setattr(torch, "__version__", version)
        for name, value in {
            "synchronize": lambda: None, "empty_cache": lambda: None, "CUDAGraph": self.graph,
            "stream": self.on, "default_generators": [self],
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    @contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def graph(self):
        return self

    def capture_begin(self, pool, capture_error_mode):
        assert not self.allocating and not self.generator_captures, "captures are poisoned"
        self.allocating.append(pool)
        self.held.append(pool)
        self.generator_captures, self.broken = True, False

    def capture_end(self):
        if self.broken:
            if self.version >= "2.12":
                self.allocating.clear()
            raise RuntimeError("operation failed due to a previous error during capture")
        self.allocating.clear()
        self.generator_captures = False

    def end(self, device, pool):
        if pool not in self.allocating:
            raise RuntimeError("not currently recording to the pool")
        self.allocating.remove(pool)

    def release(self, device, pool):
        self.held.remove(pool)

    def clone_state(self):
        return "fresh"

    def graphsafe_set_state(self, state):
        assert state == "fresh"
        self.generator_captures = False


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0"])
@pytest.mark.parametrize("raises", [True, False])
def test_after_a_failed_capture_the_next_one_succeeds(monkeypatch, version, raises):
    """The pass raises, or only the end of the capture does; the caller's stream comes back."""
    cuda = Cuda(monkeypatch, version)

    class Stream(str):
        device_index = 0

    def run():
        assert cuda.stream == "side"
        cuda.broken = True
        if raises:
            raise ValueError("operation not permitted when stream is capturing")

    with pytest.raises(ValueError if raises else RuntimeError, match=r"not permitted|previous"):
        capture.CudaStep(run, "pool", Stream("side"))
    assert cuda.stream == "default"
    assert (cuda.allocating, cuda.held, cuda.generator_captures) == ([], [], False)
    step = capture.CudaStep(lambda: "output", "pool", Stream("side"))
    assert step.output == "output" and cuda.held == ["pool"]


def test_a_step_that_waits_is_never_captured(model, monkeypatch, caplog):
    """Told thrice; the same tokens, one warning that names the place, and no capture."""
    expected = plain(model, BATCH[:1])

    @contextmanager
    def waited(device):
        found = []
        yield found
        found.append("modeling.py:7")

    monkeypatch.setattr(graphs, "waits", waited)
    with attach(model, slots=8, graphs=True) as handle:
        for _ in range(2):
            assert torch.equal(static(model, BATCH[:1]), expected)
        assert (handle.graphs.captured, handle.graphs.replayed) == (0, 0)
    said = [r.getMessage() for r in caplog.records if "not as CUDA graphs" in r.getMessage()]
    assert len(said) == 1 and "they wait for the device, at modeling.py:7" in said[0]


def test_a_first_step_that_waits_is_no_reason(model, monkeypatch):
    """A cache that is made once may wait; the next step shows that the kind does not."""
    expected, told = plain(model, BATCH[:1]), iter([["modeling.py:7"]])

    @contextmanager
    def waited(device):
        found = []
        yield found
        found += next(told, [])

    monkeypatch.setattr(graphs, "waits", waited)
    with attach(model, slots=8, graphs=True) as handle:
        assert torch.equal(static(model, BATCH[:1]), expected)
        assert handle.graphs.captured == 1 and handle.graphs.replayed > 0


def test_only_calls_that_wait_are_collected():
    """PyTorch's own words; its note on the mode itself is dropped, other warnings are passed on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in (
            "called a synchronizing CUDA operation (Triggered internally at x.cpp:12.)",
            "Synchronization debug mode is a prototype feature",
            "something else",
        ):
            warnings.warn(text, stacklevel=1)
    with pytest.warns(UserWarning, match="something else") as passed_on:
        found = capture.calls_that_wait(caught)
    assert len(found) == 1 and found[0].startswith("test_capture.py:")
    assert len(passed_on) == 1


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 0), torch.bfloat16, True),  # A100
        ((8, 6), torch.bfloat16, True),  # RTX 3090
        ((8, 9), torch.bfloat16, True),  # RTX 4090
        ((9, 0), torch.bfloat16, False),  # H100
        ((9, 0), torch.float16, True),
        ((9, 0), torch.float32, True),
        ((10, 0), torch.bfloat16, False),  # B200
        ((12, 0), torch.bfloat16, True),  # RTX 5090
    ],
)
def test_grouped_products_wait_but_on_two_chips(capability, dtype, expected):
    """From PyTorch's sources and pytorch#169970; the card that each stands for beside it."""
    assert grouped_mm_waits(capability, dtype) is expected


class Waits(TorchDispatchMode):
    """Notes each operation for which the host would wait for a GPU, and counts all."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        if any(name in str(function) for name in WAITING):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("format", [None, "int4"])
def test_a_decode_step_asks_no_tensor_what_it_holds(slots, format):
    """Of the model, the engine and the kernels' callers; a prompt does, which shows the watcher."""
    model = tiny_model()
    watch = Waits()
    with fast_attach.attach(model, slots=slots, format=format) as handle:
        cache = StaticCache(config=model.config, max_cache_len=16)
        position = torch.tensor([[3]])
        mask = (torch.arange(16) <= 3)[None, None, None]
        options = {"past_key_values": cache, "position_ids": position, "attention_mask": mask}
        with torch.no_grad():
            model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
            handle._passes.given = Batch(1, 1, 1, 0, None)
            with watch:
                model(torch.tensor([[7]]), **options)
            handle._passes.given = None
            assert watch.seen > 50 and watch.found == []
            with watch:
                model(torch.tensor([[7]]), **options)  # asks the cache how much came before
            assert watch.found


def test_no_garbage_is_collected_while_a_step_is_captured():
    """Page-locked memory among it would wait for the device, and the capture be lost."""
    assert gc.isenabled()
    with capture.uncollected():
        assert not gc.isenabled()
        with pytest.raises(ZeroDivisionError), capture.uncollected():
            1 / 0  # noqa: B018
        assert not gc.isenabled()  # as it was before the inner one
    assert gc.isenabled()


WAIT = "called a synchronizing CUDA operation"


def test_a_wait_is_told_though_constants_are_watched():
    """PyTorch names the innermost Python frame, which is ours for every call that is watched."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture.Constants().learning():
            torch.tensor([1, 2])
            warnings.warn_explicit(WAIT, UserWarning, capture.__file__, 1)
    assert len(capture.calls_that_wait(caught)) == 1


def test_a_constant_that_is_learnt_is_no_wait(monkeypatch):
    """A captured step is given what ``torch.tensor`` made, so it will not wait there."""
    plain = torch.tensor

    def waits(values):
        warnings.warn(WAIT, UserWarning, stacklevel=1)
        return plain(values)

    monkeypatch.setattr(torch, "tensor", waits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = capture.Constants().learning()
        watch.__torch_function__(waits, (), ([1, 2],))
        assert not caught
        waits([1])
    assert len(capture.calls_that_wait(caught)) == 1
