"""Traces: round trip, views, requests; and every way in which a file can be bad."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from cache_traces import random_trace, trace_of
from safetensors.numpy import save
from trace_builder import TraceBuilder

from melinoe.cache.trace import Trace, known_ids
from melinoe.errors import TraceError

ARRAYS = ("experts", "forward", "sequence", "kind")


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


def test_a_saved_trace_loads_as_it_was(tmp_path):
    """Arrays with their types, header, and nothing left beside the file."""
    trace = random_trace(0, batch=2)
    trace.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert same(trace, loaded)
    for name in ("num_experts", "model", "fingerprint", "versions", "note", "top_k"):
        assert getattr(loaded, name) == getattr(trace, name)
    assert loaded.experts.dtype == np.int16
    assert [path.name for path in tmp_path.iterdir()] == ["trace.safetensors"]


def test_an_empty_trace_round_trips(tmp_path):
    """No rows are no error."""
    trace = TraceBuilder(3, 8, 2).trace()
    trace.save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    assert (len(loaded), loaded.num_layers, loaded.num_sequences, loaded.num_forwards) == (
        0,
        3,
        0,
        0,
    )
    assert list(loaded.passes()) == []


def test_saving_over_a_trace_replaces_it_whole_and_a_failure_leaves_it(tmp_path):
    """A second save replaces; a place that cannot be written to is a TraceError."""
    path = tmp_path / "t"
    random_trace(0).save(path)
    random_trace(1).save(path)
    assert same(Trace.load(path), random_trace(1))
    with pytest.raises(TraceError, match="cannot be written"):
        random_trace(0).save(tmp_path / "absent" / "t")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError, match="cannot be written"):
        random_trace(0).save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "t"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_torn_file_is_refused(tmp_path, share):
    """Cut off anywhere: in the length, in the header, in the arrays."""
    path = tmp_path / "t"
    random_trace(0).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(TraceError, match="torn"):
        Trace.load(path)


def test_every_flipped_header_byte_is_refused_or_harmless(tmp_path):
    """No byte of the header, changed, ends in anything but a TraceError or a valid trace."""
    path = tmp_path / "t"
    random_trace(0, sequences=1, completion=1).save(path)
    whole = bytearray(path.read_bytes())
    length = struct.unpack_from("<Q", whole)[0]
    refused = 0
    for position in range(8 + length):
        torn = whole.copy()
        torn[position] ^= 0x15
        path.write_bytes(torn)
        try:
            Trace.load(path)
        except TraceError:
            refused += 1
    assert refused > length / 2


def write(path, arrays=None, header=None, metadata=None):
    """A file like ours with something changed."""
    trace = random_trace(0)
    fields = {
        "version": 1,
        "model": "m",
        "fingerprint": "f",
        "num_experts": 8,
        "top_k": 2,
        "versions": {},
        "note": "",
    }
    tensors = {name: getattr(trace, name).copy() for name in ARRAYS} | (arrays or {})
    tensors = {name: array for name, array in tensors.items() if array is not None}
    fields = fields | (header or {})
    metadata = metadata or {"format": "melinoe-trace", "header": json.dumps(fields)}
    path.write_bytes(save(tensors, metadata=metadata))
    return path


def test_the_file_is_plain_safetensors_with_a_json_header(tmp_path):
    """One written by hand to the documented form loads; so the form is what we say it is."""
    assert same(Trace.load(write(tmp_path / "t")), random_trace(0))


def test_what_older_files_hold_beside_choices_is_left_out(tmp_path):
    """Version 2 held a weight for each choice, version 3 guesses, and perhaps weights too."""
    trace, shape = random_trace(0), (ROWS, 2, 2)
    old = {"scores": np.ones(shape, np.float16)}
    assert same(Trace.load(write(tmp_path / "t", old, {"version": 2})), trace)
    both = old | {"guesses": np.zeros(shape, np.int16)}
    assert same(Trace.load(write(tmp_path / "u", both, {"version": 3})), trace)


ROWS = len(random_trace(0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"arrays": {"kind": None}}, "instead of"),
        ({"arrays": {"extra": np.zeros(1)}}, "instead of"),
        ({"arrays": {"experts": np.zeros((ROWS, 2, 2), np.int64)}}, "int16"),
        ({"arrays": {"experts": np.zeros((ROWS, 4), np.int16)}}, "2 dimensions"),
        ({"arrays": {"experts": np.zeros((ROWS, 0, 2), np.int16)}}, "0 layers"),
        ({"arrays": {"experts": np.full((ROWS, 2, 2), 8, np.int16)}}, "from 8 to 8"),
        ({"arrays": {"experts": np.full((ROWS, 2, 2), -2, np.int16)}}, "from -2 to -2"),
        ({"arrays": {"experts": np.zeros((ROWS, 2, 3), np.int16)}}, "top-2"),
        ({"arrays": {"forward": np.arange(ROWS, 0, -1, dtype=np.int32)}}, "decrease"),
        ({"arrays": {"forward": np.full(ROWS, -1, np.int32)}}, "decrease"),
        ({"arrays": {"forward": np.zeros(ROWS - 1, np.int32)}}, f"{ROWS - 1} rows"),
        ({"arrays": {"sequence": np.full(ROWS, -1, np.int32)}}, "negative"),
        ({"arrays": {"kind": np.full(ROWS, 3, np.uint8)}}, "kind 3"),
        ({"header": {"version": 4}}, "version 4"),
        ({"arrays": {"scores": np.zeros((ROWS, 2, 2), np.float16)}}, "instead of"),
        ({"header": {"num_experts": 0}}, "0 experts"),
        ({"header": {"num_experts": "8"}}, "header does not hold"),
        ({"header": {"surprise": 1}}, "header does not hold"),
        ({"metadata": {"format": "melinoe-trace", "header": "{"}}, "not readable"),
        ({"metadata": {"format": "melinoe-trace", "header": "[1]"}}, "not readable"),
        ({"metadata": {"format": "melinoe-trace"}}, "not readable"),
        ({"metadata": {"format": "pt"}}, "holds no trace"),
    ],
)
def test_a_file_with_other_contents_is_refused(tmp_path, change, text):
    """Missing and extra arrays, wrong types and shapes, ids out of range, unknown versions."""
    path = write(tmp_path / "t", **change)
    with pytest.raises(TraceError, match=text) as caught:
        Trace.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    """The message names the path."""
    with pytest.raises(TraceError, match="absent cannot be read"):
        Trace.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("fingerprint", "shape"),
    [("other", (2, 8, 2)), ("seed 0", (3, 8, 2)), ("seed 0", (2, 9, 2)), ("seed 0", (2, 8, 1))],
)
def test_a_trace_of_another_model_is_refused(fingerprint, shape):
    """Another fingerprint or shape; its own passes."""
    trace = random_trace(0)
    trace.check_model("seed 0", 2, 8, 2)
    with pytest.raises(TraceError, match="the trace is of another model"):
        trace.check_model(fingerprint, *shape)


def test_requests_list_distinct_ids_ascending_with_their_uses():
    """Rows (3,1) (1,-1) in one pass: expert 1 twice, 3 once; then a row of none."""
    trace = trace_of([[3, 1], [1, -1]], [[-1, -1]], num_experts=4, top_k=2, kind=0)
    first, second = trace.passes()
    assert first.requests == [([1, 3], [2, 1])]
    assert second.requests == [([], [])]
    assert (first.rows, first.phase, first.sequences) == (slice(0, 2), 0, [0])


def test_forward_numbers_may_have_gaps():
    """Passes 2, 2, 9 are two passes."""
    trace = random_trace(0, sequences=1, prompt=2, completion=1)
    gaps = Trace(trace.experts, np.array([2, 2, 9], np.int32), trace.sequence, trace.kind, 8)
    assert list(gaps.passes()) == list(trace.passes())
    assert gaps.num_forwards == 2


def test_select_keeps_the_rows_of_some_sequences_and_numbers_anew():
    """Sequences 1 and 2 of three become 0 and 1, their passes dense from 0, header kept."""
    trace = random_trace(0)
    part = trace.select([2, 1])
    assert part.num_sequences == 2
    assert np.array_equal(part.completion(0), trace.completion(1))
    assert np.array_equal(part.prompt(1), trace.prompt(2))
    assert part.forward[0] == 0 and set(np.diff(part.forward)) == {0, 1}
    assert (part.fingerprint, part.note) == (trace.fingerprint, trace.note)
    with pytest.raises(ValueError, match=r"no rows of sequences \[3\]"):
        trace.select([1, 3])


def test_ids_of_no_expert_are_marked():
    """Ids at or above num_experts, and negative ones, become -1."""
    assert known_ids(np.array([[4, 3], [-7, 0]]), 4).tolist() == [[-1, 3], [-1, 0]]


def test_the_cache_room_never_imports_torch():
    """A fresh interpreter that imports all of it has no torch, transformers or pandas."""
    code = (
        "import sys, pkgutil, importlib, melinoe.cache as room\n"
        "for m in pkgutil.iter_modules(room.__path__):\n"
        "    importlib.import_module('melinoe.cache.' + m.name)\n"
        "assert 'melinoe.cache.simulator' in sys.modules\n"
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
