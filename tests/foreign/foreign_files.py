"""A trace, a table by hand and a GGUF file, for the tests of what other tools write."""

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from melinoe.cache.trace import TraceBuilder

# What other tools' own code wrote; its README says how.
WRITTEN = Path(__file__).parent / "written"


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


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors, kind="imatrix", version=3):
    """A GGUF file as llama-imatrix writes it: metadata, tensors, data aligned to 32 bytes."""
    metadata = [
        text("general.type") + struct.pack("<I", 8) + text(kind),
        text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + text("calibration.txt"),
        text("imatrix.chunk_count") + struct.pack("<II", 4, 12),
    ]
    blob = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + b"".join(metadata)
    data = b""
    for name, values in tensors.items():
        values = np.asarray(values, "<f4")
        shape = (1, len(values))
        blob += text(name) + struct.pack("<I", 2) + struct.pack("<2Q", *shape)
        blob += struct.pack("<IQ", 0, len(data))
        data += values.tobytes() + b"\0" * (-values.nbytes % 32)
    return blob + b"\0" * (-len(blob) % 32) + data


COUNTS = {
    "blk.0.attn_q.weight.counts": [7],
    "blk.10.ffn_down_exps.weight.counts": [4, 5, 6],
    "blk.10.ffn_down_exps.weight.in_sum2": [1, 1, 1],
    "blk.2.ffn_gate_up_exps.weight.counts": [1, 2, 3],
    "blk.2.ffn_down_exps.weight.counts": [1, 2, 3],
}
