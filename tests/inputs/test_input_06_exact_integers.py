"""Numbers of an imported table: exact and in range, or refused by row and value."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from melinoe.errors import TraceError
from melinoe.foreign import read_foreign

GOOD = {
    "token": [0, 0, 1, 1],
    "layer": [0, 1, 0, 1],
    "sequence": [0, 0, 0, 0],
    "kind": [0, 0, 1, 1],
    "forward": [0, 0, 1, 1],
    "expert_0": [0, 1, 2, 3],
}


def table(path, **changes):
    columns = {**GOOD, **changes}
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        rows = zip(*columns.values(), strict=True)
        lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        arrays = {name: np.array(values)[::2] for name, values in columns.items()}
        experts = np.array(columns["expert_0"]).reshape(2, 2, 1)
        kept = {name: arrays[name] for name in ("sequence", "kind", "forward")}
        np.savez(path, experts=experts, **kept)
    return path


def test_whole_numbers_are_the_same_in_every_type(tmp_path):
    """Integers, whole floats and texts of digits make one trace."""
    want = read_foreign(table(tmp_path / "t.csv"), num_experts=4).trace
    for other in (np.float64, np.uint64, str):
        columns = {name: np.array(values).astype(other).tolist() for name, values in GOOD.items()}
        found = read_foreign(table(tmp_path / "t.parquet", **columns), num_experts=4).trace
        for name in ("experts", "sequence", "kind", "forward"):
            assert np.array_equal(getattr(found, name), getattr(want, name))
    assert want.kind.tolist() == [0, 1] and want.experts.ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("column", ["token", "layer", "sequence", "kind", "forward", "expert_0"])
@pytest.mark.parametrize("value", [1.7, -2, float("inf"), "x", 2**63, "1_0", "\u0661"])
def test_what_is_no_number_of_its_column_is_refused(tmp_path, suffix, column, value):
    """The sentence names the row and the value, whatever the column."""
    values = [*GOOD[column][:2], value, value]
    if suffix == ".parquet":
        kind = float if isinstance(value, float) else np.uint64 if value == 2**63 else type(value)
        values = np.array(values, dtype=object if kind is str else kind).tolist()
        values = [str(one) for one in values] if kind is str else values
        values = pa.array(values, pa.uint64()) if kind is np.uint64 else values
    if column == "sequence" and isinstance(value, str):
        values = [1, 1, -1, -1]  # a request may have any name, but no other number
        value = -1
    with pytest.raises(TraceError, match=r"row 3 has the (value|kind)") as error:
        read_foreign(table(tmp_path / f"t{suffix}", **{column: values}), num_experts=4)
    assert str(value)[:4] in str(error.value).replace("9.22", "9223")


@pytest.mark.parametrize("value", [257, 258, 3, 1.7, -1, float("nan"), "", True])
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_a_kind_is_one_of_three(tmp_path, suffix, value):
    """257 is no completion, 258 no padding, and -1 not 255."""
    if suffix == ".npz" and isinstance(value, str):
        value = 300
    values = [0, 0, value, value]
    if suffix == ".parquet" and isinstance(value, str | bool):
        values = [str(one) for one in values]
    if suffix == ".parquet" and isinstance(value, float):
        values = [float(one) for one in values]
    path = table(tmp_path / f"t{suffix}", kind=values)
    if suffix == ".npz" and value is True:
        return  # numpy has made it 1
    with pytest.raises(TraceError, match=r"row \d has (the kind|no kind|the value)"):
        read_foreign(path, num_experts=4)


def test_a_missing_expert_is_none_and_a_missing_layer_is_refused(tmp_path):
    """Empty where a token chose no expert; nowhere else."""
    trace = read_foreign(
        table(tmp_path / "t.parquet", expert_0=pa.array([0, None, 2, 3])), num_experts=4
    ).trace
    assert trace.experts.ravel().tolist() == [0, -1, 2, 3]
    with pytest.raises(TraceError, match="row 2 has no layer"):
        read_foreign(table(tmp_path / "t.parquet", layer=pa.array([0, None, 0, 1])), num_experts=4)
