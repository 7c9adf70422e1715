"""Two processes whose tokens go to different experts: DDP and FSDP2 wait for no gradient."""

import forked
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from melinoe.finetune.adapter import adapter_of
from melinoe.finetune.parts import LowRankUpdates, TrainedParts
from melinoe.moe.experts import find_experts

# One token repeated, another in each process: few experts run, and not the same ones.
IDS = torch.tensor([[5] * 6, [40] * 6])


def build():
    model = tiny.tiny_model("olmoe").requires_grad_(False)
    updates = LowRankUpdates(model, find_experts(model), rank=4, alpha=8, seed=0)
    torch.manual_seed(3)
    for name, parameter in updates.parameters().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, updates


def loss_of(model, ids):
    return model(input_ids=ids).logits.square().mean()


def flat(adapter):
    return {
        f"{name} {projection} {kind}": factor
        for name, projections in adapter.factors.items()
        for projection, pair in projections.items()
        for kind, factor in zip("AB", pair, strict=True)
    }


def backward_in_a_process(way, place):
    """Half of a backward pass; the first process writes gathered gradients and factors."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model, updates = build()
    if way == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            torch.distributed.fsdp.fully_shard(layer)
        wrapped = torch.distributed.fsdp.fully_shard(model)
    loss_of(wrapped, IDS[rank : rank + 1]).backward()
    # By name from the model: sharding has put other parameters in the place of those at first.
    found = {n: p.grad for n, p in model.named_parameters() if ".low_rank." in n}
    whole = {n: g.full_tensor() if way == "fsdp2" else g for n, g in found.items()}
    adapter = adapter_of(TrainedParts({}, {}, [], updates))
    if rank == 0:
        save_file(whole | flat(adapter), place)
    forked.KEPT.append((model, wrapped))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_gradients_are_the_mean_over_processes_that_used_other_experts(way, tmp_path):
    """Against one process over both rows; where no token went, zeros came from both."""
    ended = forked.run(backward_in_a_process, way, tmp_path / "found", processes=2)
    assert ended == [0, 0]
    found = load_file(tmp_path / "found")
    used = []
    for rows in (IDS[:1], IDS[1:]):
        model, updates = build()
        loss_of(model, rows).backward()
        first = updates.of(updates.layers[0]).lora_A["down_proj"].grad
        used.append({expert for expert in range(8) if first[expert].any()})
    assert used[0] != used[1] and len(used[0] | used[1]) < 8
    model, updates = build()
    loss_of(model, IDS).backward()
    for name, parameter in updates.parameters().items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)
    for name, factor in flat(adapter_of(TrainedParts({}, {}, [], updates))).items():
        assert torch.equal(found[name], factor)
