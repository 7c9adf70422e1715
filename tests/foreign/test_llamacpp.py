"""llama.cpp's importance matrix: a file of its own writer, and those that are refused."""

import struct

import pytest
from foreign_files import COUNTS, WRITTEN, gguf

from melinoe.errors import TraceError
from melinoe.foreign import read_foreign


def test_a_file_of_llama_cpp_s_own_writer_is_read():
    """Of layers 1 and 10: experts alone, not attention, routers, shared experts, a dense layer."""
    found = read_foreign(WRITTEN / "imatrix_gguf_0.19.0.gguf")
    assert found.trace is None
    assert found.counts.tolist() == [[11, 0, 5, 3, 4, 1], [2, 2, 9, 8, 0, 3]]
    with pytest.raises(TraceError, match="6 experts a layer, not 8"):
        read_foreign(WRITTEN / "imatrix_gguf_0.19.0.gguf", num_experts=8)


def test_llama_cpp_s_importance_matrix_counts_experts(tmp_path):
    """Layers in the order of their numbers, dense tensors left out."""
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(gguf(COUNTS))
    found = read_foreign(path)
    assert found.trace is None and found.counts.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"\x05\0\0\0", "--output-format gguf"),
        (gguf(COUNTS)[:200], "torn"),
        (gguf(COUNTS)[:-60], "torn"),
        (gguf(COUNTS, version=9), "version 9"),
        (gguf(COUNTS, kind="model"), "not an importance matrix"),
        (gguf({"blk.0.attn_q.weight.counts": [7]}), "no experts"),
        (gguf({"blk.1.ffn_up_exps.weight.counts": [24]}), "one number for all experts"),
        (gguf({"blk.1.ffn_up_exps.weight.counts": [1, float("nan")]}), "counts nothing"),
        (gguf({"blk.1.ffn_up_exps.weight.counts": [1, -1]}), "counts nothing"),
        (
            gguf({f"blk.{n}.ffn_up_exps.weight.counts": [1] * n for n in (2, 3)}),
            "layers with 2 and 3 experts",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "more entries"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 62), "bytes at once"),
    ],
)
def test_another_file_of_llama_cpp_is_refused(tmp_path, blob, words):
    """The old form, a torn file, a model, a dense one, absurd sizes: one sentence each."""
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(blob)
    with pytest.raises(TraceError, match=words):
        read_foreign(path)
