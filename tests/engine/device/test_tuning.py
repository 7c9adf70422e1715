"""The number of programs that copy is tried, and the fastest is used for every block as long."""

import pytest
import torch
from fast_attach import attach
from small_olmoe import tiny_model

from melinoe.engine.device import tuning
from melinoe.engine.device.tuning import best, candidates, tune


@pytest.fixture
def handle():
    with attach(tiny_model(), slots=4) as found:
        yield found


def loaders(handle):
    return [one.loaders for one in handle._caches]


def test_the_fastest_number_is_used_for_every_carrier_of_the_layer(handle, monkeypatch):
    """Seven programs copy in a third of the time; blocks as long are tried once."""
    monkeypatch.setattr(tuning, "candidates", lambda device: [3, 5, 7])
    tried = []

    def seconds(launch):
        launch()
        tried.append(handle._caches[0].loaders[0].plan.programs)
        return {3: 3e-3, 5: 2e-3, 7: 1e-3}[tried[-1]]

    found = tune(loaders(handle), torch.device("cpu"), seconds)
    assert tried == [3, 5, 7]
    size = handle.store.block_bytes(0)
    # Four slots, so four experts are copied.
    assert found == {size: {3: 4 * size / 3e-3, 5: 4 * size / 2e-3, 7: 4 * size / 1e-3}}
    assert {one.plan.programs for group in loaders(handle) for one in group} == {7}


def test_a_trial_copies_what_a_step_would(handle):
    """The slots then hold the first experts; nobody counts as resident."""
    tuning.tune(loaders(handle), torch.device("cpu"), lambda launch: launch() or 1.0)
    first = handle._caches[0].loaders[0]
    which = torch.arange(4, dtype=torch.int32)
    first.plan.launch(which, which, torch.tensor([4], dtype=torch.int32))
    views = handle.store.views(0, 3)
    for name, slots in handle._caches[0].slots.items():
        assert torch.equal(slots[3], views[name])
    assert (handle._caches[0].residency.slot_of == -1).all()


def test_the_usual_number_stays_unless_another_is_clearly_faster():
    """Two per cent are noise."""
    assert best({528: 100.0, 64: 102.0, 16: 50.0}) == 528
    assert best({528: 100.0, 64: 104.0, 16: 50.0}) == 64


def test_nothing_is_tried_without_a_gpu(handle):
    """The interpreter's speed says nothing."""
    assert handle.engine.copies == {} and candidates(torch.device("cpu")) == [3]


def test_on_a_gpu_few_and_many_programs_are_tried(monkeypatch):
    """Of 132 multiprocessors: the usual four each first, none twice."""

    class H100:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    found = candidates(torch.device("cuda"))
    assert found == [528, 16, 32, 64, 132, 264, 1056, 2112]
