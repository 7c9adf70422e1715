"""
Melinoe: run Mixture-of-Experts models in a fraction of their memory.

    model, cache = melinoe.load("path/or/hub-name", slots=16)     # a transformers model
    model.generate(...)                                            # as always
    cache.counters                                                 # what it cost

Names load when first used, so `import melinoe` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melinoe.cache.residency import Residency as Residency
    from melinoe.cache.simulator import simulate as simulate
    from melinoe.cache.trace import Trace as Trace
    from melinoe.engine.handle import Handle as Handle
    from melinoe.engine.load import attach as attach
    from melinoe.engine.load import load as load
    from melinoe.engine.transfer import EmulatedLink as EmulatedLink
    from melinoe.errors import MelinoeError as MelinoeError
    from melinoe.predictor import Predictor as Predictor

_HOMES = {
    "EmulatedLink": "melinoe.engine.transfer",
    "Handle": "melinoe.engine.handle",
    "MelinoeError": "melinoe.errors",
    "Predictor": "melinoe.predictor",
    "Residency": "melinoe.cache.residency",
    "Trace": "melinoe.cache.trace",
    "attach": "melinoe.engine.load",
    "load": "melinoe.engine.load",
    "simulate": "melinoe.cache.simulator",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'melinoe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
