"""Traces and statistics of other tools: what each really writes, read exactly or refused."""

import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from melinoe.cache.locality import popularity
from melinoe.cache.statistics import load_statistics
from melinoe.cache.trace import Trace, TraceBuilder
from melinoe.cli.app import app
from melinoe.errors import MelinoeError, TraceError
from melinoe.foreign import read_foreign
from melinoe.foreign.tables import write_table


def sample(scores=False):
    """Two sequences, two layers, top-2 of 6: prompts of 3 and 2 tokens, two more each."""
    rng = np.random.default_rng(0)
    builder = TraceBuilder(2, 6, 2)
    for sequence, length in enumerate((3, 2)):
        for rows, kind in ((length, 0), (1, 1), (1, 1)):
            chosen = np.argsort(rng.random((rows, 2, 6)))[..., :2]
            if kind:
                chosen[0, 1, 1] = -1
            weights = np.float16(rng.random(chosen.shape)) if scores else None
            builder.add_forward(chosen, sequence, kind, weights)
    return builder.trace("m")


def same(one, other):
    """Equal in everything that was run."""
    arrays = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("experts", "forward", "sequence", "kind")
    )
    scores = (one.scores is None) == (other.scores is None)
    return arrays and scores and (one.scores is None or np.array_equal(one.scores, other.scores))


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("scores", [False, True])
def test_a_table_holds_a_trace(tmp_path, suffix, scores):
    """Written and read again, everything is there, weights too."""
    path = tmp_path / f"t{suffix}"
    write_table(sample(scores), path)
    found = read_foreign(path, num_experts=6)
    assert same(found.trace, sample(scores))
    assert (found.counts == popularity(sample(scores))).all()


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


def test_a_table_by_hand_needs_no_passes(tmp_path):
    """Prompts are one pass, completions one each; words and numbers for kinds, empty for none."""
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    trace = read_foreign(path, num_experts=6).trace
    assert trace.forward.tolist() == [0, 0, 1, 2, 3, 4]
    assert trace.kind.tolist() == [0, 0, 1, 0, 1, 1]
    assert trace.experts[0].tolist() == [[3, 1], [2, -1]]
    assert trace.experts[2].tolist() == [[3, -1], [4, 5]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda csv: csv.replace("kind", "sort"), "no column kind"),
        (lambda csv: csv.replace("expert_", "e"), "no column expert_0"),
        (lambda csv: csv.replace("expert_1", "expert_2"), "expert_1"),
        (
            lambda csv: csv.replace(",expert_1", ",expert_1,mood").replace(",1\n", ",1,x\n"),
            "mood|Exp",
        ),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,9"), "3|expert ids|0 to 9"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,x"), "no number"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,prompt,1.5"), "fraction"),
        (lambda csv: csv.replace("0,0,0,prompt,3", "0,0,0,story,3"), "no number"),
        (lambda csv: csv[: csv.rindex("8,1")], "not every layer"),
        (lambda csv: csv.replace("1,0,0,prompt", "1,1,0,prompt"), "layers of each in order"),
        (lambda csv: csv.replace("\n8,", "\n6,"), "do not ascend"),
        (lambda csv: csv.replace("0,1,0,prompt", "0,1,1,prompt"), "differ in sequence"),
        (lambda csv: csv.splitlines()[0] + "\n", "not every layer"),
        (lambda csv: "", "cannot be read"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path, change, text):
    """One sentence: what is wrong, and where the form stands."""
    path = tmp_path / "t.csv"
    path.write_text(change(CSV))
    with pytest.raises(TraceError, match=text):
        read_foreign(path, num_experts=6)


def test_a_table_must_be_told_its_experts(tmp_path):
    """Nobody can see in it the experts that were never chosen."""
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    with pytest.raises(TraceError, match="--num-experts"):
        read_foreign(path)
    with pytest.raises(TraceError, match="neither"):
        write_table(sample(), tmp_path / "t.txt")


# --- SGLang ---------------------------------------------------------------------------------------


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


# --- llama.cpp ------------------------------------------------------------------------------------


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


# --- the command ----------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["import-trace", *map(str, arguments)])


def test_the_command_writes_traces_and_statistics(tmp_path):
    """A table becomes a trace; its counts, and llama.cpp's, become statistics that static takes."""
    table, out, stats = (tmp_path / name for name in ("t.csv", "t.safetensors", "s.json"))
    table.write_text(CSV)
    assert run(table, "--num-experts", 6, "--out", out).exit_code == 0
    trace = Trace.load(out)
    assert trace.num_sequences == 2
    assert run(table, "--num-experts", 6, "--statistics", "--out", stats).exit_code == 0
    assert (load_statistics(stats, trace) == popularity(trace)).all()
    matrix, other = tmp_path / "i.gguf", tmp_path / "o.json"
    matrix.write_bytes(gguf(COUNTS))
    assert run(matrix, "--statistics", "--out", other).exit_code == 0
    assert '"counts": [[1.0, 2.0, 3.0]' in other.read_text()


def test_the_command_refuses_what_has_no_order_as_a_trace(tmp_path):
    """Statistics give popularity and no trace; the way out is named. So are other mistakes."""
    matrix = tmp_path / "i.gguf"
    matrix.write_bytes(gguf(COUNTS))
    for arguments, words in (
        ((matrix, "--out", tmp_path / "x"), "--statistics"),
        ((matrix, "--out", matrix), "exists"),
        ((tmp_path / "absent.csv", "--out", tmp_path / "x"), "no file"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, MelinoeError) and words in str(error)
    odd = tmp_path / "odd.xyz"
    odd.write_text("")
    assert "--format" in str(run(odd, "--out", tmp_path / "x").exception)
    assert run(matrix, "--format", "vllm", "--out", tmp_path / "x").exit_code == 2
