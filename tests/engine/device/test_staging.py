"""
A prompt's copies run beside its computation, and nothing reads what has not arrived.

The copy stream is played by a list: a copy is done when the computation says that it waits for it,
and no earlier; and a block that the computation may still read must be waited for before it is
copied over.
"""

from contextlib import contextmanager

import pytest
import torch
from fast_attach import attach
from small_olmoe import tiny_model

from melinoe.engine.device.copying import Loader

IDS = torch.arange(3, 31)[None]


class LateCopies:
    """In the place of a handle's `Staging` methods; what is copied comes as late as it may."""

    def __init__(self, handle, monkeypatch):
        self.waiting, self.copying_now, self.after = [], False, None
        self.begun = self.marks = self.staged = self.most_waiting = 0
        self.blocks = [b for one in handle._caches for b in one.loaders[1:]]
        staging = handle.engine.staging
        for name in ("begin", "copying", "arrive", "mark"):
            monkeypatch.setattr(staging, name, getattr(self, name))
        load = Loader.load

        def late(loader, pairs):
            if not self.copying_now:
                return load(loader, pairs)
            assert self.begun, "copies may come before what was queued earlier"
            if any(loader is block for block in self.blocks):
                # Two blocks take turns: the one to fill was last read two rounds ago.
                expected = self.staged - 1 if self.staged >= 2 else None
                assert self.after == expected, "a block is filled while it may be read"
                self.staged += 1
            self.waiting.append(lambda: load(loader, pairs))
            self.most_waiting = max(self.most_waiting, len(self.waiting))

        monkeypatch.setattr(Loader, "load", late)
        for pair in staging._blocks.values():
            for block in pair:
                for tensor in block.values():
                    tensor.fill_(float("nan"))

    def begin(self):
        self.begun += 1
        self.staged = self.marks = 0

    @contextmanager
    def copying(self, after=None):
        self.copying_now, self.after = True, after
        yield
        self.copying_now = False

    def arrive(self):
        for copy in self.waiting:
            copy()
        self.waiting.clear()

    def mark(self):
        self.marks += 1
        return self.marks


@pytest.mark.parametrize("staging_experts", [1, 2])
@pytest.mark.parametrize("admit", [0, None])
def test_a_prompt_waits_for_what_it_reads(monkeypatch, staging_experts, admit):
    """Two slots, so most experts pass through the two blocks, in several rounds."""
    model = tiny_model()
    with torch.no_grad():
        expected = model(IDS).logits
    with attach(model, slots=2, staging_experts=staging_experts, admit=admit) as handle:
        late = LateCopies(handle, monkeypatch)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
        assert late.begun == 2 and late.staged >= 3 and late.most_waiting == 1
        assert not late.waiting


def test_what_has_not_arrived_shows(monkeypatch):
    """The control of the test above: copies that nobody waits for give other logits."""
    model = tiny_model()
    with torch.no_grad():
        expected = model(IDS).logits
    with attach(model, slots=2, staging_experts=1) as handle:
        LateCopies(handle, monkeypatch)
        monkeypatch.setattr(handle.engine.staging, "arrive", lambda: None)
        with torch.no_grad():
            assert not torch.equal(model(IDS).logits, expected)
