"""Whether a layer gives the library's bits on its slots, and if those depend on their number."""

import torch

from melinoe.engine.device.passes import DEVICE
from melinoe.moe.compute import StandIn
from melinoe.moe.experts import find_experts


class LibraryBits:
    """
    Computes each decode step's experts again, without the engine, as it goes.

    Once with transformers' function on the experts that are resident, stacked anew from the model's
    own weights in the order of the slots; once on all experts.

    Args:
        network: before an engine is attached.

    Attributes:
        compared: layers of steps seen.
        engine: of those, where the engine gave the bits of the library on as many experts.
        fewer: of those, where the library gives the same bits for fewer experts as for all.
    """

    def __init__(self, network):
        self.whole = [
            {t.name: layer.module.get_parameter(t.name).detach().clone() for t in layer.tensors}
            for layer in find_experts(network)
        ]
        self.compared = self.engine = self.fewer = 0

    def watch(self, handle):
        """Compare what *handle*'s layers give from now on."""
        for experts, whole in zip(handle._caches, self.whole, strict=True):
            experts._on_device = self._compared(experts, experts._on_device, whole)

    def _compared(self, experts, on_device, whole):
        library = experts._forward

        def compute(hidden, index, weights):
            assert experts._passes.mode == DEVICE
            found = on_device(hidden, index, weights)
            residency = experts.residency
            order = torch.from_numpy(residency.expert_of).to(hidden.device)
            assert (order >= 0).all()  # full, or there would be nothing to stack
            few = {name: tensor[order].contiguous() for name, tensor in whole.items()}
            slots = torch.from_numpy(residency.slot_of).to(hidden.device)[index]
            module = experts.layer.module
            of_few = library(StandIn(module, few, len(order)), hidden, slots, weights)
            of_all = library(
                StandIn(module, whole, experts.layer.num_experts), hidden, index, weights
            )
            self.compared += 1
            self.engine += torch.equal(found, of_few)
            self.fewer += torch.equal(of_few, of_all)
            return found

        return compute
