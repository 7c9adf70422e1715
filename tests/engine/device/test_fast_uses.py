"""Uses that the fast engine counts are those of the reference engine."""

import logging

import numpy as np
import tiny
import torch
from fast_attach import attach

from melinoe import attach as attach_reference

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.tensor([[5, 6, 7, 8]])


def test_uses_equal_the_reference_engines_and_lost_graphs_are_logged_once(caplog):
    """Steps planned on the device; where graphs would have been used, one line says so."""
    model, counts = tiny.tiny_model("olmoe"), []
    for way in (attach_reference, attach):
        with way(model, slots=3) as handle:
            handle.engine._use_graphs = True  # as on a GPU; what is counted does not depend on it
            for _ in range(2):
                with handle.measure_uses() as meter:
                    model.generate(PROMPT, **GREEDY)
                counts.append(meter.counts())
                if way is attach:
                    assert handle.graphs._paused == 0
    assert counts[0].sum() > 0
    assert all(np.array_equal(one, counts[0]) for one in counts)
    said = [one for one in caplog.records if "CUDA graphs" in one.message]
    assert len(said) == 1 and said[0].levelno == logging.WARNING
