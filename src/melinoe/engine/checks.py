"""Refuse what would be silently wrong, and check that slots hold what the books say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import unpack_dual
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from melinoe.errors import AttachError
from melinoe.moe.experts import ExpertsLayer


class Guard:
    """Looks at each call of one layer's experts, whichever engine computes them."""

    def __init__(self, device: torch.device, module: nn.Module, names: Sequence[str]) -> None:
        self._device, self._parameters, self._names = device, module._parameters, tuple(names)
        self._kept: dict[str, tuple[torch.dtype, int | None]] = {}  # type, count of writes

    def watch(self) -> None:
        """Refuse from now on to run once an empty parameter is moved, cast, filled or written."""
        for name in self._names:
            kept: Any = self._parameters[name]
            self._kept[name] = kept.dtype, _writes(kept)

    def check(self, hidden_states: Tensor, top_k_weights: Tensor) -> None:
        """Refuse gradients, transforms, and a model that was moved, cast or changed since."""
        if hidden_states.requires_grad or top_k_weights.requires_grad:
            raise AttachError(
                "offloaded experts have no gradient; run the model under torch.no_grad(), or "
                "call handle.detach() to train"
            )
        if (way := _other_way(hidden_states)) is not None:
            raise AttachError(
                f"offloaded experts cannot run under {way}, because which of them are resident is "
                "asked while they run; call the model as it is, or handle.detach() first"
            )
        if hidden_states.device != self._device:
            raise AttachError(
                f"the model's hidden states are on {hidden_states.device} and its experts on "
                f"{self._device}; call handle.detach() first, then move the model and attach again"
            )
        for name, (dtype, writes) in self._kept.items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.shape[0] != 0 or _writes(parameter) != writes:
                raise AttachError(
                    f"the experts were given other weights ({name}) than those that are "
                    "served; call handle.detach() first, then change them and attach again"
                )
            if parameter.dtype is not dtype or parameter.device != self._device:
                raise AttachError(
                    f"the model was moved or cast (to {parameter.device}, {parameter.dtype}) after "
                    "it was attached; call handle.detach() first, then move it and attach again"
                )


def _writes(parameter: Tensor) -> int | None:
    """Count in-place writes, which an empty parameter takes without effect; None if untold."""
    return None if parameter.is_inference() else parameter._version


def _other_way(tensor: Tensor) -> str | None:
    """Name what runs this pass without values, or more than once; None if nothing does."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func (vmap, grad, jvp, functionalize)"
    if torch._C._len_torch_dispatch_stack():
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, FakeTensorMode):
                return "FakeTensorMode"
            if isinstance(mode, ProxyTorchDispatchMode):
                return "make_fx"
    if unpack_dual(tensor).tangent is not None:
        return "forward-mode differentiation"
    return None


def stream_order(device: torch.device) -> Callable[[], None]:
    """Make a check that lets a call on another CUDA stream wait for the call before it."""
    last: Any = None

    def follow() -> None:
        nonlocal last
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        now = torch.cuda.current_stream(device)
        if last is not None and now != last:
            now.wait_stream(last)
        last = now

    return follow


def audit(layers: Sequence[ExpertsLayer], caches: Sequence[Any]) -> int:
    """Compare every resident expert with the store; see `melinoe.engine.handle.Handle.audit`."""

    def fault(what: str) -> AttachError:
        return AttachError(
            f"{what}; call reset_cache(), which empties the slots, and report how it came about"
        )

    compared = 0
    for layer, cache in zip(layers, caches, strict=True):
        residency = cache.residency
        slot_of, expert_of = residency.slot_of, residency.expert_of
        resident = np.flatnonzero(slot_of >= 0)
        try:
            residency.check_invariants()
            books = len(resident) == int((expert_of >= 0).sum())
        except AssertionError:
            books = False
        if not (books and (expert_of[slot_of[resident]] == resident).all()):
            raise fault(f"the books of {layer.name} disagree about which expert is in which slot")
        for expert in resident.tolist():
            slot = int(slot_of[expert])
            for name, kept in cache.read(expert).items():
                if not same_bits(cache.slots[name][slot].cpu(), kept):
                    raise fault(
                        f"slot {slot} of {layer.name} is to hold expert {expert}, and its {name} "
                        "is not what the store holds"
                    )
        compared += len(resident)
    return compared


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the host are equal, NaN and signs of zero included."""
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
