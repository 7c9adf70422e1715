"""
Enter one function, ``melinoe``, into transformers' registry of experts functions, for every family.

transformers looks the function up by the name in ``module.config._experts_implementation`` and
calls it with the experts module. Ours calls the function that `bind` put on that module. A module
without one is an error, never a fallback to weights that may be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.errors import AttachError
from melinoe.experts.format import PackedFormat
from melinoe.experts.packed import PackedExperts
from melinoe.moe.experts import ExpertsLayer, is_experts_module

NAME = "melinoe"
_BOUND = "_melinoe_bound"
NOT_COMPILED = (
    "offloaded experts cannot be compiled, because they ask the host which of them are resident; "
    "leave fullgraph out, or detach() the runtime first"
)

ExpertsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def bind(module: nn.Module, function: ExpertsFunction) -> None:
    """
    Let *function* compute the experts of *module*, from hidden states ``(tokens, hidden)`` and
    choices and weights ``(tokens, top_k)``; AttachError if something is bound already.
    """
    if _BOUND in vars(module):
        raise AttachError("a runtime is attached to this model already; detach() it first")
    vars(module)[_BOUND] = function  # not setattr: must never be registered as a submodule


def unbind(module: nn.Module) -> None:
    """Undo `bind`; without effect on a module that is not bound."""
    vars(module).pop(_BOUND, None)


def bound(module: nn.Module) -> ExpertsFunction | None:
    """The function that `bind` put on *module*, or None."""
    return vars(module).get(_BOUND)


def use_melinoe(model: nn.Module) -> Callable[[], None]:
    """Choose ``melinoe`` as the experts implementation of *model*; returns what undoes it."""
    if NAME not in ALL_EXPERTS_FUNCTIONS:  # not at import, which changes nothing
        ALL_EXPERTS_FUNCTIONS.register(NAME, _melinoe)
    before = [(config, config._experts_implementation_internal) for config in _deciding(model)]
    for config, _ in before:
        config._experts_implementation_internal = NAME

    def restore() -> None:
        for config, name in before:
            config._experts_implementation_internal = name

    return restore


@contextmanager
def computed_by(
    model: nn.Module, modules: Iterable[nn.Module], compute: Callable[..., Tensor]
) -> Iterator[None]:
    """Within it, *compute* computes the experts *modules* of *model* that nothing else computes."""
    ours = [module for module in modules if bound(module) is None]
    for module in ours:
        bind(module, partial(compute, module))
    restore = use_melinoe(model)
    try:
        yield
    finally:
        restore()
        for module in ours:
            unbind(module)


def still_used(model: nn.Module) -> Callable[[], None]:
    """Make a check, after `use_melinoe`, that raises AttachError once another one is chosen."""
    configs = _deciding(model)

    def check() -> None:
        for config in configs:
            chosen = config._experts_implementation_internal
            if chosen != NAME:
                raise AttachError(
                    f"the experts implementation was changed to {chosen!r}, which finds no weights "
                    f"while a runtime is attached; choose {NAME!r} again, or detach() first"
                )

    return check


def _deciding(model: nn.Module) -> list[Any]:
    """List each configuration, once, that an experts module or a generate call reads."""
    # A submodel's own configuration is set too: generate() snapshots and restores the choice
    # through the top-level configuration, and the two must not disagree.
    modules = [m for m in model.modules() if is_experts_module(m) or hasattr(m, "generate")]
    configs: list[Any] = [getattr(module, "config", None) for module in modules]
    known = {id(c): c for c in configs if hasattr(c, "_experts_implementation_internal")}
    return list(known.values())


def transformers_function(module: nn.Module) -> Callable[..., Tensor]:
    """
    Find transformers' function that *module* would use with all experts resident. ``eager``, a loop
    over experts in Python, becomes ``grouped_mm``: the same up to rounding. AttachError where an
    implementation does not take its weights from the module as they are.
    """
    name = getattr(module.config, "_experts_implementation", None)  # type: ignore[union-attr]
    if name in (None, "eager"):
        name = "grouped_mm"
    if name not in ("grouped_mm", "batched_mm"):
        raise AttachError(
            f"the experts implementation {name!r} cannot run on slots; "
            'call model.set_experts_implementation("grouped_mm") first'
        )
    return ALL_EXPERTS_FUNCTIONS[name]


def experts_function(layer: ExpertsLayer) -> Callable[..., Tensor]:
    """The function that computes a layer's experts from slots in the layer's format."""
    if isinstance(layer.format, PackedFormat):
        return PackedExperts(layer.format, layer.tensors)
    return transformers_function(layer.module)


def _melinoe(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    function = vars(module).get(_BOUND)
    if torch.compiler.is_dynamo_compiling():
        refuse_one_graph()
    return _as_it_is(function, hidden_states, top_k_index, top_k_weights)


def refuse_one_graph() -> bool:
    """Raise, while dynamo traces the caller, where nothing may be left out of its graph."""
    from torch._dynamo.exc import Unsupported  # slow to import
    from torch._dynamo.symbolic_convert import InstructionTranslator

    class Refused(AttachError, Unsupported):
        def __init__(self) -> None:
            Unsupported.__init__(self, NOT_COMPILED)

        def __str__(self) -> str:  # without the traced frames that dynamo adds
            return NOT_COMPILED

    tracing = InstructionTranslator.current_tx()
    if tracing.one_graph or tracing.error_on_graph_break:
        raise Refused
    return True


refuse_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


# A compiler that looked inside would keep today's residents for all passes to come.
@torch.compiler.disable(reason=NOT_COMPILED)
def _as_it_is(function: ExpertsFunction | None, *tensors: Tensor) -> Tensor:
    """Compute the experts outside the graph that their model is compiled to."""
    if function is None:
        raise AttachError(
            "the experts implementation 'melinoe' is chosen but no runtime is attached to this "
            "model; call melinoe.attach(model, ...) or choose another implementation"
        )
    return function(*tensors)
