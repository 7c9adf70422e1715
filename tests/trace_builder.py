"""A trace, put together pass by pass."""

import numpy as np

from melinoe.cache.trace import Trace, known_ids


class TraceBuilder:
    """Collects forward passes: any integers (rows, layers, top_k), and whose they are."""

    def __init__(self, num_layers, num_experts, top_k):
        self.shape, self.num_experts, self.passes = (num_layers, top_k), num_experts, []

    def add_forward(self, experts, sequence, kind):
        experts = known_ids(np.asarray(experts), self.num_experts)
        assert experts.shape[1:] == self.shape
        self.passes.append(
            (
                experts,
                np.broadcast_to(np.asarray(sequence, np.int32), len(experts)),
                np.broadcast_to(np.asarray(kind, np.uint8), len(experts)),
            )
        )

    def trace(self, model="", fingerprint="", versions=None, note=""):
        empty = (np.zeros((0, *self.shape), np.int16), np.zeros(0, np.int32), np.zeros(0, np.uint8))
        experts, sequence, kind = map(np.concatenate, zip(empty, *self.passes, strict=True))
        lengths = [len(rows) for rows, _, _ in self.passes]
        forward = np.repeat(np.arange(len(lengths), dtype=np.int32), np.array(lengths, np.int64))
        return Trace(
            experts, forward, sequence, kind, self.num_experts, model, fingerprint, versions or {},
            note,
        )  # fmt: skip
