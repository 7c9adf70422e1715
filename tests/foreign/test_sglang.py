"""SGLang's expert distribution recorder: files of its own code, and of what it may hold."""

import numpy as np
import pytest
import torch
from foreign_files import WRITTEN, same, sample

from melinoe.cache.locality import popularity
from melinoe.errors import TraceError
from melinoe.foreign import read_foreign

# What the recorder was told of layers 1 and 2, pass by pass; rows are tokens.
CHOSEN = [
    ([[3, 4], [0, 5], [0, 1]], [[5, 3], [0, 2], [2, 3]]),
    ([[1, 3], [4, 0]], [[4, 2], [1, 0]]),
    ([[3, 5]], [[1, 3]]),
    ([[2, 1]], [[1, 5]]),
    ([[5, 3], [0, 4]], [[0, 2], [3, 0]]),
    ([[4, 0]], [[0, 3]]),
    ([[0, 5]], [[2, 0]]),
    ([[1, 0]], [[4, 0]]),
]


def test_what_sglang_itself_recorded_is_read():
    """Its own file, mode per_token: every choice, two sequences, the first prompt in two chunks."""
    trace = read_foreign(WRITTEN / "sglang_0.5.23_per_token.pt").trace
    handed = np.concatenate([np.stack(layers, axis=1) for layers in CHOSEN])
    assert np.array_equal(trace.experts, handed) and trace.num_experts == 6
    assert trace.forward.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7]
    assert trace.sequence.tolist() == [0] * 7 + [1] * 5
    assert trace.kind.tolist() == [0] * 5 + [1] * 2 + [0] * 2 + [1] * 3


def test_what_sglang_itself_counted_is_what_it_recorded():
    """Modes stat and per_pass, the latter with copies of experts: SGLang's sums equal ours."""
    for counted, recorded in (("stat", "per_token"), ("per_pass", "per_token_redundant")):
        statistics = read_foreign(WRITTEN / f"sglang_0.5.23_{counted}.pt")
        trace = read_foreign(WRITTEN / f"sglang_0.5.23_{recorded}.pt").trace
        assert statistics.trace is None
        assert np.array_equal(statistics.counts, popularity(trace))
        assert statistics.counts.sum() == 12 * 2 * 2


def per_token(trace, dense_layer=True, chunk=None):
    """What the recorder dumps in mode per_token for one request after another."""
    records = []
    width = 8  # its buffer's, whatever the model's top-k
    for number in range(trace.num_forwards):
        rows = trace.forward == number
        positions = np.flatnonzero(trace.sequence == trace.sequence[rows][0])
        positions = np.searchsorted(positions, np.flatnonzero(rows))
        ids = np.full((trace.num_layers + dense_layer, rows.sum(), width), -1, np.int32)
        ids[dense_layer:, :, : trace.top_k] = trace.experts[rows].transpose(1, 0, 2)
        prompt = trace.kind[rows][0] == 0
        pieces = [(0, len(positions))] if not (prompt and chunk) else [
            (i, min(i + chunk, len(positions))) for i in range(0, len(positions), chunk)
        ]  # fmt: skip
        for low, high in pieces:
            records.append(
                {
                    "forward_pass_id": len(records),
                    "rank": 0,
                    "gatherer_key": "primary",
                    "input_ids": [1] * (high - low),
                    "positions": positions[low:high].tolist(),
                    "extend_seq_lens": [high - low] if prompt else None,
                    "forward_mode": 1 if prompt else 2,
                    "topk_ids_of_layer": torch.tensor(ids[:, low:high]),
                    "misc_objects": [],
                    "global_physical_count": torch.zeros(3, 6),
                }
            )
    identity = torch.arange(6).repeat(trace.num_layers + dense_layer, 1)
    return {"records": records, "last_physical_to_logical_map": identity}


def test_sglang_s_tokens_are_a_trace(tmp_path):
    """Dense layers and the buffer's empty columns are left out; nothing else changes."""
    path = tmp_path / "r.pt"
    torch.save(per_token(sample()), path)
    found = read_foreign(path, num_experts=6)
    assert found.format == "sglang" and same(found.trace, sample())


def test_a_prompt_read_in_chunks_is_one_sequence(tmp_path):
    """Chunks of two tokens: more passes, the same sequences and kinds."""
    path = tmp_path / "r.pt"
    torch.save(per_token(sample(), chunk=2), path)
    trace = read_foreign(path).trace
    assert np.array_equal(trace.experts, sample().experts)
    assert np.array_equal(trace.sequence, sample().sequence)
    assert trace.forward.tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 6]


def test_physical_experts_are_named_by_the_map(tmp_path):
    """With the map turned round, id 0 means expert 5."""
    content = per_token(sample())
    content["last_physical_to_logical_map"] = content["last_physical_to_logical_map"].flip(1)
    path = tmp_path / "r.pt"
    torch.save(content, path)
    trace, plain = read_foreign(path).trace, sample()
    assert np.array_equal(trace.experts, np.where(plain.experts < 0, -1, 5 - plain.experts))


def test_several_requests_at_a_time_are_refused(tmp_path):
    """The recorder does not say whose tokens are whose."""
    content = per_token(sample())
    content["records"][0]["extend_seq_lens"] = [2, 1]
    path = tmp_path / "r.pt"
    torch.save(content, path)
    with pytest.raises(TraceError, match="--max-running-requests 1"):
        read_foreign(path)
    content = per_token(sample())
    content["records"] = content["records"][1:]
    torch.save(content, path)
    with pytest.raises(TraceError, match="middle of an answer"):
        read_foreign(path)


def test_whose_tokens_they_are_does_not_matter_to_counts(tmp_path):
    """What is refused as a trace is counted where statistics are asked for, as the error says."""
    content = per_token(sample())
    content["records"][0]["extend_seq_lens"] = [2, 1]
    content["records"] = content["records"][::-1]
    path = tmp_path / "r.pt"
    torch.save(content, path)
    found = read_foreign(path, statistics=True)
    assert found.trace is None and np.array_equal(found.counts, popularity(sample()))


@pytest.mark.parametrize("mode", [3, 5, 6])
def test_passes_of_another_kind_are_refused(tmp_path, mode):
    """Prompts mixed with answers, guesses verified, guesses made: not one token after the other."""
    content = per_token(sample())
    content["records"][1]["forward_mode"] = mode
    path = tmp_path / "r.pt"
    torch.save(content, path)
    with pytest.raises(TraceError, match=f"forward mode {mode}.*--statistics"):
        read_foreign(path)
    assert read_foreign(path, statistics=True).counts.sum() == popularity(sample()).sum()


def test_shared_experts_among_the_chosen_are_refused(tmp_path):
    """An id beyond the map: SGLang fused the shared expert with the others."""
    content = per_token(sample())
    content["records"][0]["topk_ids_of_layer"][1, 0, 2] = 6
    path = tmp_path / "r.pt"
    torch.save(content, path)
    with pytest.raises(TraceError, match="--disable-shared-experts-fusion"):
        read_foreign(path)


def test_a_number_of_experts_that_the_file_contradicts_is_refused(tmp_path):
    """Ids from the file's six would silently mean no expert in a model of four."""
    for name in ("per_token", "stat", "per_pass"):
        with pytest.raises(TraceError, match="6 experts a layer, not 4"):
            read_foreign(WRITTEN / f"sglang_0.5.23_{name}.pt", num_experts=4)


def test_a_record_without_a_pass_is_refused(tmp_path):
    """Recording was started and dumped, and nothing was served between."""
    path = tmp_path / "r.pt"
    identity = torch.arange(6).repeat(2, 1)
    torch.save({"records": [], "last_physical_to_logical_map": identity}, path)
    with pytest.raises(TraceError, match="no forward pass"):
        read_foreign(path)
    torch.save({"rank": 0, "logical_count": torch.zeros(4, 2, 6)}, path)
    with pytest.raises(TraceError, match="counts no choice"):
        read_foreign(path)


def test_sglang_s_statistics_are_no_trace(tmp_path):
    """Mode stat: steps are summed, dense layers left out; mode per_pass: physical ones mapped."""
    path = tmp_path / "r.pt"
    counts = torch.tensor([[[0, 0, 0], [1, 2, 3]], [[0, 0, 0], [4, 0, 0]]])
    torch.save(
        {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path
    )
    found = read_foreign(path)
    assert found.trace is None and found.counts.tolist() == [[5, 2, 3]]
    record = {"forward_pass_id": 0, "global_physical_count": torch.tensor([[1, 2, 3, 4]])}
    mapped = torch.tensor([[0, 1, 2, 0]])  # expert 0 has a second copy
    torch.save({"records": [record, record], "last_physical_to_logical_map": mapped}, path)
    assert read_foreign(path).counts.tolist() == [[10, 4, 6]]


class Bomb:
    """What a hostile file would hold."""

    def __reduce__(self):
        return (print, ("boom",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    """Only numbers are read: nothing in the file is executed."""
    path = tmp_path / "r.pt"
    torch.save({"records": [Bomb()]}, path)
    with pytest.raises(TraceError, match="more than numbers"):
        read_foreign(path)
    assert "boom" not in capsys.readouterr().out
    path.write_bytes(b"not a torch file")
    with pytest.raises(TraceError, match="torn"):
        read_foreign(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(TraceError, match="no file of SGLang"):
        read_foreign(path)
    torch.save({"records": [{"topk_ids_of_layer": torch.zeros(1)}]}, path)
    with pytest.raises(TraceError, match="not what SGLang"):
        read_foreign(path)
