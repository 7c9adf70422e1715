"""What a CUDA graph could not hold, a decode step does not do; seen on the CPU."""

import gc

import pytest
import torch
from small_olmoe import tiny_model
from tape import WAITING
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from melinoe import attach
from melinoe.engine.device.capture import uncollected
from melinoe.engine.passes import Batch


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
@pytest.mark.parametrize("compression", [None, "int4"])
def test_a_decode_step_asks_no_tensor_what_it_holds(slots, compression):
    """Of the model, the engine and the kernels' callers; a prompt does, which shows the watcher."""
    model = tiny_model()
    watch = Waits()
    with attach(model, engine="fast", slots=slots, compression=compression) as handle:
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
    with uncollected():
        assert not gc.isenabled()
        with pytest.raises(ZeroDivisionError), uncollected():
            1 / 0  # noqa: B018
        assert not gc.isenabled()  # as it was before the inner one
    assert gc.isenabled()
