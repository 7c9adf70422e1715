"""Pack the linear layers beside the experts: attention, shared experts, dense layers, the head."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.experts.format import PackedFormat
from melinoe.experts.packed import PackedLinear
from melinoe.moe.experts import is_experts_module
from melinoe.moe.routing import find_routers


@torch.no_grad()
def pack_backbone(model: nn.Module, kind: PackedFormat) -> int:
    """
    Replace the plain linear layers of *model*, on the CPU, by packed ones; returns how many.

    Routers stay as they are, for what they choose hangs on small differences; so do embeddings,
    other kinds of layers, and weights that the format *kind* cannot hold. A head tied to the
    embeddings is packed beside them: fewer bytes are read for a token, and more are held.
    """
    kept = {id(part) for router in find_routers(model) for part in router.module.modules()}
    kept |= {id(p) for m in model.modules() if is_experts_module(m) for p in m.modules()}
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or id(child) in kept:
                continue
            if child.weight.device.type != "cpu":
                raise AttachError(
                    f"the backbone is packed on the CPU alone, and {name} is on "
                    f"{child.weight.device}; leave --backbone out"
                )
            with suppress(UnsupportedModelError):
                setattr(module, name, PackedLinear(child, kind))
                count += 1
    return count
