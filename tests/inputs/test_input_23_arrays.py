"""Arrays of choices, (tokens, layers, k), as .npy and .npz."""

import numpy as np
import pytest

from melinoe.errors import TraceError
from melinoe.foreign import read_foreign

EXPERTS = np.array([[[3, 1], [2, -1]], [[0, 1], [2, 3]], [[1, 2], [0, 3]]])


def test_one_array_is_a_trace(tmp_path):
    """By itself, under its name, or as the only one of its file."""
    np.save(tmp_path / "t.npy", EXPERTS)
    np.savez(tmp_path / "a.npz", experts=EXPERTS.astype(np.int8))
    np.savez_compressed(tmp_path / "b.npz", EXPERTS.astype(float))
    for name in ("t.npy", "a.npz", "b.npz"):
        found = read_foreign(tmp_path / name, num_experts=4)
        assert np.array_equal(found.trace.experts, EXPERTS)
        assert found.trace.kind.tolist() == [1, 1, 1] and len(found.notes) == 2


def test_what_stands_beside_it_is_taken(tmp_path):
    """Sequences, kinds and passes; weights and other numbers of each token are left out."""
    np.savez(
        tmp_path / "t.npz",
        topk_ids=EXPERTS,
        sequence=[0, 0, 1],
        kind=[0, 1, 0],
        forward=[0, 1, 2],
        scores=np.full(EXPERTS.shape, 0.5),
        mood=[1, 2, 3],
    )
    found = read_foreign(tmp_path / "t.npz", num_experts=4)
    assert found.trace.sequence.tolist() == [0, 0, 1] and found.trace.kind.tolist() == [0, 1, 0]
    assert found.notes == ["columns left out: mood"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"experts": EXPERTS[0]}, "shape"),
        ({"experts": EXPERTS[:0]}, "shape"),
        ({"experts": EXPERTS + 1}, "row 1 has the value 4"),
        ({"experts": EXPERTS + 0.5}, "row 1 has the value 3.5"),
        ({"experts": EXPERTS, "kind": [0, 1]}, "kind has the shape"),
        ({"experts": EXPERTS, "kind": [0, 1, 3]}, "row 5 has the kind 3"),
        ({"experts": EXPERTS, "forward": [2, 1, 0]}, "earlier forward pass"),
        ({"experts": EXPERTS, "scores": [1.0]}, "scores has the shape"),
        ({"one": EXPERTS, "two": EXPERTS}, "which of one, two"),
        ({"experts": np.array([[[{}]]])}, "allow_pickle"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, words):
    """One sentence; objects, which are pickles, are not read."""
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(TraceError, match=words):
        read_foreign(tmp_path / "t.npz", num_experts=4)


def test_a_torn_file_and_a_missing_number_are_refused(tmp_path):
    """So is a file that is no array at all."""
    np.save(tmp_path / "t.npy", EXPERTS)
    with pytest.raises(TraceError, match="--num-experts"):
        read_foreign(tmp_path / "t.npy")
    for blob in ((tmp_path / "t.npy").read_bytes()[:100], b"", b"PK\x03\x04", b"\x80\x04N."):
        (tmp_path / "x.npz").write_bytes(blob)
        with pytest.raises(TraceError, match="cannot be read"):
            read_foreign(tmp_path / "x.npz", num_experts=4)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 1, 1)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1" + "0" * 30 + ", 1, 1)}",
        "{[]: 1}",
        "   if x:\n 'a",
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path, header):
    """It is read as Python's text: numpy raises what the tokenizer, the types, memory raise."""
    length = len(header).to_bytes(2, "little")
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY\x01\x00" + length + header.encode() + bytes(64))
    with pytest.raises(TraceError, match="cannot be read"):
        read_foreign(tmp_path / "t.npy", num_experts=4)
