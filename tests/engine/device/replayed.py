"""Captured decode steps inside transformers' generate, played by a tape; see tape.py."""

import tape
import torch
from fast_attach import attach as attach_fast
from transformers import CompileConfig

from melinoe import attach as attach_reference

BATCH = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 9, 3, 4], [2, 3, 4, 5]])


def attach(model, **options):
    """The device engine, with steps recorded and played."""
    handle = attach_fast(model, **options)
    tape.play(handle)
    return handle


def static(model, ids, tokens=8, **options):
    """Generate greedily as on a GPU, where a static cache makes generate ask for compiled steps."""
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    return model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=everywhere,
        **options,
    )


def plain(model, ids, tokens=8):
    """Generate on the reference engine, which compiles and captures nothing."""
    with attach_reference(model, slots=8):
        return model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
        )


class Rerun:
    """A captured step that runs its pass again, Python and all, where a tape cannot record it."""

    def __init__(self, run, pool, stream):
        self.replay = lambda: setattr(self, "output", run())


def attach_rerun(model, **options):
    """The device engine, with captured steps run again instead of replayed."""
    handle = attach_fast(model, **options)
    handle.graphs._make = Rerun
    return handle
