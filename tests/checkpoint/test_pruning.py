"""A pruned checkpoint has the rows of the experts that stay, and nothing else changed."""

import json

import damaged
import packed_checkpoints
import pytest
import tiny
import torch

from melinoe.checkpoint import open_checkpoint, read_metadata, write_metadata
from melinoe.checkpoint.pruning import prune
from melinoe.checkpoint.verifying import verify
from melinoe.errors import UnsupportedModelError
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers


def kept_of(layers, count):
    """Other experts in each layer, not in their order."""
    return [
        [(3 * number + layer.index) % layer.num_experts for number in range(count)][::-1]
        for layer in layers
    ]


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "ernie4_5_moe"])
def test_transformers_loads_the_base_s_tensors_without_the_experts_that_went(family, tmp_path):
    """
    Stored one by one, renamed or stacked, with biases: experts and router rows, in order; a
    correction of a router's scores is one row, of which columns stay.
    """
    model = tiny.tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    layers, routers = find_experts(model), find_routers(model)
    before = layers[0].num_experts
    kept = kept_of(layers, before - 1)
    prune(str(tmp_path / "base"), kept, tmp_path / "out")
    with open_checkpoint(str(tmp_path / "out")) as checkpoint:
        found = checkpoint.model_class.from_pretrained(tmp_path / "out").state_dict()
        assert {layer.num_experts for layer in checkpoint.layers} == {before - 1}
    expected, rows = model.state_dict(), {}
    for layer, router, ids in zip(layers, routers, kept, strict=True):
        rows |= {f"{layer.name}.{tensor.name}": sorted(ids) for tensor in layer.tensors}
        for name, tensor in router.module.state_dict(prefix=f"{router.name}.").items():
            if before in tensor.shape:
                rows[name] = sorted(ids)
    assert found.keys() == expected.keys() and len(rows) > 2 * len(layers)
    for name, tensor in expected.items():
        wanted = tensor[:, rows[name]] if name in rows and len(tensor) == 1 else tensor
        wanted = tensor[rows[name]] if name in rows and len(tensor) > 1 else wanted
        assert torch.equal(found[name], wanted), name
    assert verify(str(tmp_path / "out")).recorded >= 2


@pytest.mark.parametrize(
    ("count", "changes", "words"),
    [
        (1, {}, r"each token uses 2 experts, and 1 would stay; keep 2 or more"),
        (3, {"n_group": 2}, "chooses experts by groups"),
    ],
)
def test_what_could_not_run_is_refused_before_anything_is_written(tmp_path, count, changes, words):
    """Fewer experts than a token uses; groups that would be cut."""
    base = damaged.write_olmoe(tmp_path / "base")
    damaged.edit_json(base / "config.json", lambda config: config.update(changes))
    with open_checkpoint(str(base)) as checkpoint:
        kept = kept_of(checkpoint.layers, count)
    with pytest.raises(UnsupportedModelError, match=words):
        prune(str(base), kept, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_experts_are_to_be_written_plain_first(tmp_path):
    """The sentence names the command."""
    packed = packed_checkpoints.write_packed(tmp_path / "base", packed_checkpoints.FP8)
    with pytest.raises(UnsupportedModelError, match="melinoe pack --format plain"):
        prune(str(packed), [[0, 1]] * 2, tmp_path / "out")


def test_other_files_are_the_base_s_and_the_config_says_the_new_number(tmp_path):
    """Sharded; the rest of the config stays to the letter. What told of the whole does not pass."""
    base = damaged.write_olmoe(tmp_path / "base")
    (base / "notes.txt").write_text("kept")
    (base / "README.md").write_text("of eight experts")
    write_metadata(base, {"base": "org/model", "fingerprint": "of eight experts"})
    with open_checkpoint(str(base)) as checkpoint:
        kept = kept_of(checkpoint.layers, 3)
    prune(str(base), kept, tmp_path / "out")
    ours, theirs = (
        json.loads((one / "config.json").read_text()) for one in (tmp_path / "out", base)
    )
    assert ours == theirs | {"num_experts": 3}
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    assert (tmp_path / "out" / "BASE_README.md").read_text() == "of eight experts"
    assert not (tmp_path / "out" / "README.md").exists()
    assert read_metadata(tmp_path / "out").keys() & {"base", "fingerprint"} == {"base"}
