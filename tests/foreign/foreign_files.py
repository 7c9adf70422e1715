"""A trace and a table by hand, for the tests of what other tools write."""

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet
from trace_builder import TraceBuilder


def sample():
    """Two sequences, two layers, top-2 of 6: prompts of 3 and 2 tokens, two more each."""
    rng = np.random.default_rng(0)
    builder = TraceBuilder(2, 6, 2)
    for sequence, length in enumerate((3, 2)):
        for rows, kind in ((length, 0), (1, 1), (1, 1)):
            chosen = np.argsort(rng.random((rows, 2, 6)))[..., :2]
            if kind:
                chosen[0, 1, 1] = -1
            builder.add_forward(chosen, sequence, kind)
    return builder.trace("m")


def same(one, other):
    """Equal in everything that was run."""
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("experts", "forward", "sequence", "kind")
    )


def write_table(trace, path):
    """One row for each token and layer, every column that docs/traces.md has."""
    rows, layers, top_k = trace.experts.shape
    columns = {
        "token": np.repeat(np.arange(rows), layers),
        "layer": np.tile(np.arange(layers), rows),
        "sequence": np.repeat(trace.sequence, layers),
        "kind": np.array(["prompt", "completion", "padding"])[np.repeat(trace.kind, layers)],
        "forward": np.repeat(trace.forward, layers),
        **{f"expert_{k}": trace.experts[:, :, k].ravel() for k in range(top_k)},
    }
    write = {".csv": csv.write_csv, ".parquet": parquet.write_table}[path.suffix]
    write(pa.table(columns), path)


CSV = """token,layer,sequence,kind,expert_0,expert_1
0,0,0,prompt,3,1
0,1,0,prompt,2,
1,0,0,prompt,0,1
1,1,0,prompt,2,5
2,0,0,completion,3,-1
2,1,0,completion,4,5
5,0,1,0,3,1
5,1,1,0,2,0
7,0,1,1,3,1
7,1,1,1,2,0
8,0,1,1,3,1
8,1,1,1,2,0
"""
