"""An adapter in memory: what fine-tuning trained, without the model it was trained on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from melinoe.errors import CheckpointError
from melinoe.finetune.parts.adapters import TrainedParts
from melinoe.finetune.parts.low_rank import add_update


@dataclass(frozen=True)
class Adapter:
    """
    What was trained, on the CPU.

    Attributes:
        rank: Of each update.
        alpha: As PEFT's ``lora_alpha``.
        scaling: Updates are ``scaling x B A``.
        factors: Experts module -> projection -> ``(A, B)``, ``(E, r, in)`` and ``(E, out, r)``.
        routers: Router module -> its whole state, buffers included.
        linears: Linear module -> ``(A, B)``, ``(r, in)`` and ``(out, r)``.
    """

    rank: int
    alpha: float
    scaling: float
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
    routers: dict[str, dict[str, Tensor]]
    linears: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Full names of all tensors of the model that `apply` may change."""
        return [
            *(f"{name}.{key}" for name, state in self.routers.items() for key in state),
            *(f"{name}.{projection}" for name, own in self.factors.items() for projection in own),
            *(f"{name}.weight" for name in self.linears),
        ]

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """
        Make the adapter part of *model*'s own weights, in place, each rounded once.

        Raises:
            CheckpointError: layers that share a weight have different updates.
        """
        for name, state in self.routers.items():
            model.get_submodule(name).load_state_dict(state)
        done: dict[int, tuple[Tensor, Tensor]] = {}
        for name, projections in self.factors.items():
            experts = model.get_submodule(name)
            transposed = bool(getattr(experts, "is_transposed", False))
            for projection, (down, up) in projections.items():
                weight = experts.get_parameter(projection)
                if (other := done.get(id(weight))) is not None:
                    _check_shared(name, other, (down, up))
                    continue
                done[id(weight)] = (down, up)
                for expert in range(weight.shape[0]):
                    add_update(weight[expert], down[expert], up[expert], self.scaling, transposed)
        for name, (down, up) in self.linears.items():
            weight = model.get_submodule(name).get_parameter("weight")
            if (other := done.get(id(weight))) is not None:
                _check_shared(name, other, (down, up))
                continue
            done[id(weight)] = (down, up)
            add_update(weight, down, up, self.scaling, False)


def adapter_of(parts: TrainedParts) -> Adapter:
    """
    A copy of what is being trained, gathered from all processes where it is sharded.

    Collective under FSDP2: every process must call it, and gets all of it.
    """
    factors, updates = {}, parts.updates
    if updates is not None:
        for layer in updates.layers:
            own = updates.of(layer)
            factors[layer.name] = {
                name: (_copy(own.lora_A[name]), _copy(own.lora_B[name])) for name in own.names
            }
    routers = {
        router.name: {key: _copy(value) for key, value in router.module.state_dict().items()}
        for router in parts.routers
    }
    linears = {}
    if parts.attention is not None:
        for name in parts.attention.projections:
            one = parts.attention.of(name)
            linears[name] = (_copy(one.lora_A), _copy(one.lora_B))
    rank, alpha = (updates.rank, updates.alpha) if updates is not None else (1, 1.0)
    return Adapter(rank, alpha, alpha / rank, factors, routers, linears)


def _check_shared(name: str, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    if not all(map(torch.equal, one, other)):
        raise CheckpointError(
            f"the weights of {name} are shared with another layer, but the adapter "
            "updates both differently, so it cannot be merged; train with updates that are shared"
        )


def _copy(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", copy=True)
