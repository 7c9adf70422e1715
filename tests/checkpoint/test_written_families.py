"""What is written is the base's own files with what changed in them, for every decorated family."""

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from melinoe.checkpoint import load_model, open_checkpoint, write_model
from melinoe.checkpoint.writing import check_rewritable, round_as_stored
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers

FAMILIES = [f for f in tiny.families() if f not in {*tiny.CANNOT, *tiny.ATTACHED_ONLY}]
PREDICTS_MORE = {
    "model.mtp.layers.0.weight": torch.arange(6, dtype=torch.int8).reshape(2, 3),
    "mtp.scale": torch.tensor(0.5, dtype=torch.float64),
}


def mixed_base(family, place):
    """A base in bfloat16 with a router in float32 and tensors that transformers does not know."""
    tiny.tiny_model(family, dtype=torch.bfloat16).save_pretrained(place)
    file = place / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name in tensors:
        if "gate.weight" in name or "router" in name:
            tensors[name] = tensors[name].float()
    save_file(tensors | PREDICTS_MORE, file, metadata=metadata | {"of": "the base"})


@torch.no_grad()
def changed_in(model):
    """Move every router and every second expert, and name what may have changed."""
    routers, layers = find_routers(model), find_experts(model)
    names = [name for router in routers for name, _ in router.parameters()]
    for router in routers:
        router.weight.add_(torch.randn(router.weight.shape).to(router.weight.dtype))
    for layer in layers:
        for tensor in layer.tensors:
            names.append(f"{layer.name}.{tensor.name}")
            layer.module.get_parameter(tensor.name)[::2] += 0.5
    return names


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_is_its_base_with_what_changed(family, tmp_path):
    """
    Names, shapes, types, order and the header's bytes are the base's; a tensor differs only if it
    was changed; and transformers loads exactly the model that was written.
    """
    mixed_base(family, tmp_path / "base")
    with open_checkpoint(str(tmp_path / "base")) as checkpoint:
        model = load_model(checkpoint)
        check_rewritable(model, checkpoint)
        names = changed_in(model)
        round_as_stored(model, checkpoint, names)
        write_model(model, str(tmp_path / "base"), tmp_path / "out", {}, names)
        before, after = (tmp_path / one / "model.safetensors" for one in ("base", "out"))
        backbone = {place.name for place in checkpoint.backbone}
        header = min(place.info.start for place in checkpoint.files.values())
        assert after.read_bytes()[:header] == before.read_bytes()[:header]
        loaded = checkpoint.model_class.from_pretrained(tmp_path / "out", dtype=checkpoint.dtype)
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tmp_path / "base" / "config.json"
    ).read_bytes()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    old, new = load_file(before), load_file(after)
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert PREDICTS_MORE.keys() <= same
    moved = old.keys() - same
    assert moved and all("gate" in name or "router" in name for name in moved & backbone)
