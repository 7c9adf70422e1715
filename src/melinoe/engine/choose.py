"""Load a model with the engine that was asked for, or with the one that works here."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from melinoe.engine.handle import Handle
from melinoe.errors import AttachError, MelinoeError

_log = logging.getLogger("melinoe")

ENGINES = ("reference", "fast", "auto")
# What only the fast engine knows; what only the reference engine knows.
_FAST_ONLY = (
    "gpu_memory", "batch", "context", "compression", "admit", "staging_experts", "graphs",
    "compile",
)  # fmt: skip
_REFERENCE_ONLY = ("store", "link", "miss_threads")


def load(
    name: str | Path, device: Any = "cpu", *, engine: str = "reference", **options: Any
) -> tuple[Any, Handle]:
    """
    Load a checkpoint for offloaded use, by the engine of choice.

    Args:
        name: A directory in the hub's layout, or the name of a repository on the hub.
        device: Where the backbone and the slots go: "cpu", "cuda", "cuda:1".
        engine: ``reference`` runs everywhere and asks the host in every layer. ``fast`` needs a
            GPU, LRU or LFU, and host memory that can be pinned for all experts; a decode step never
            asks the host. ``auto`` is ``fast`` where it can run, and else ``reference``, with one
            warning that says why.
        options: As `melinoe.engine.load.load` and `melinoe.engine.device.attach.load` take them:
            ``slots`` or ``expert_memory`` or, of the fast engine, ``gpu_memory`` with ``batch`` and
            ``context``, and ``compile``; ``policy``, ``policy_options``, ``dtype``. Options that
            only one engine knows are refused with the other; with ``auto`` those of the fast engine
            are left out where it cannot run.

    Returns:
        The transformers model, in evaluation mode, and the handle.

    Raises:
        AttachError: an unknown engine; an option of the other one; an engine that cannot run.
        MelinoeError: as the two functions.
    """
    _check(engine, options)
    if engine != "reference":
        try:
            return _fast(device).load(name, device, **options)
        except (MelinoeError, RuntimeError) as error:
            if engine == "fast" or not _differs(error):
                raise
            _warn(error)
    from melinoe.engine.load import load as load_reference

    return load_reference(name, device, **_known_to_both(options))


def attach(model: Any, *, engine: str = "reference", **options: Any) -> Handle:
    """
    Offload the experts of a model in memory, by the engine of choice.

    Args:
        model: A transformers model of a decorated family.
        engine: As `load`.
        options: As `melinoe.engine.attach.attach` and `melinoe.engine.device.attach.attach` take.

    Raises:
        AttachError: as `load`.
        MelinoeError: as the two functions; the model is as before.
    """
    _check(engine, options)
    if engine != "reference":
        try:
            return _fast(options.get("device") or model.device).attach(model, **options)
        except (MelinoeError, RuntimeError) as error:
            if engine == "fast" or not _differs(error):
                raise
            _warn(error)
    from melinoe.engine.attach import attach as attach_reference

    return attach_reference(model, **_known_to_both(options))


def _check(engine: str, options: dict[str, Any]) -> None:
    if engine not in ENGINES:
        raise AttachError(f"there is no engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if engine != "reference":
        way = options.pop("miss", None) or "wait"
        if getattr(way, "kind", way) != "wait":
            raise AttachError(
                "the fast engine waits for missing experts and cannot have the CPU compute them; "
                'leave miss out, or give engine="reference"'
            )
    foreign = _FAST_ONLY if engine == "reference" else _REFERENCE_ONLY
    given = [name for name in foreign if options.get(name) is not None]
    if given:
        other = "fast" if engine == "reference" else "reference"
        raise AttachError(
            f"{', '.join(given)} belongs to the other engine; leave it out, or give "
            f'engine="{other}"'
        )
    for name in foreign:
        options.pop(name, None)


def _fast(device: Any) -> Any:
    """The fast engine's entry; imported only now, because it imports Triton."""
    if find_spec("triton") is None:
        raise AttachError(
            "the fast engine cannot run here: Triton is not installed; "
            'install it, or use engine="reference"'
        )
    return import_module("melinoe.engine.device.attach")


def _differs(error: Exception) -> bool:
    """Whether the reference engine may do what the fast one could not."""
    from melinoe.errors import BudgetError, CheckpointError, UnsupportedModelError

    if isinstance(error, BudgetError):
        return "pin" in str(error)
    return not isinstance(error, CheckpointError | UnsupportedModelError)


def _known_to_both(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("gpu_memory") is not None:
        raise AttachError(
            "a budget of gpu_memory is kept by the fast engine alone, which cannot run here; give "
            "slots or expert_memory for the reference engine"
        )
    return {name: value for name, value in options.items() if name not in _FAST_ONLY}


def _warn(error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    _log.warning("the reference engine serves this model, which is slower: %s", reason)
