"""Every option of a served model, once, for Python and the command line: default, unit, help."""
# ruff: noqa: RUF009  (a setting is a field)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from melinoe.cache import DEFAULT_POLICY
from melinoe.config import MISSES, STORES
from melinoe.config.setting import setting
from melinoe.errors import AttachError, BudgetError

ENGINES = ("auto", "reference", "fast")
# Experts that one of the two staging blocks holds: enough for a copy to outlast its launch.
STAGING_EXPERTS = 4


def _formats() -> tuple[str, ...]:
    from melinoe.experts.formats import FORMATS  # here: the command line's help needs no torch

    return tuple(FORMATS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """
    How a model is served with few resident experts. AttachError: an unknown word; options that
    contradict each other. BudgetError: slots or memory given in two ways; half of a budget.
    """

    device: Any = setting(
        None, "where the model runs: cpu, cuda, cuda:1; absent: CUDA if there is one, else the CPU"
    )
    gpu_memory: str | int | None = setting(
        None, "limit on everything on the GPU, as in 8GiB; absent: what is free", unit="bytes"
    )
    ram: str | int | None = setting(
        None, "limit on experts in host memory, as in 32GiB; absent: what is free", unit="bytes"
    )
    batch: int | None = setting(
        None, "sequences at once that the GPU's memory is to hold; absent: 1", unit="sequences"
    )
    context: int | None = setting(
        None, "tokens of a sequence that it is to hold; absent: 2048", unit="tokens"
    )
    dtype: Any = setting("auto", "type of the weights; auto: as they are stored")
    slots: int | Sequence[int] | None = setting(
        None, "experts of each layer to keep in slots; absent: as many as fit", unit="experts"
    )
    expert_memory: str | int | None = setting(
        None, "instead of slots: memory of the slots of all layers, as in 8GiB", unit="bytes"
    )
    policy: str | Callable[[], Any] = setting(
        DEFAULT_POLICY, "which resident expert is evicted first: lfu or lru"
    )
    policy_options: Mapping[str, Any] | None = setting(None, "what the policy takes, by name")
    engine: str = setting(
        "auto",
        "who decides what is loaded: reference, the host, everywhere; fast, the GPU itself, with "
        "lru or lfu and all experts in pinned memory; auto: fast where it can run",
        choices=ENGINES,
    )
    store: Any = setting(
        "auto", "where experts wait that are not resident; auto: the fastest that has the room",
        choices=STORES,
    )  # fmt: skip
    format: str | None = setting(
        None,
        "how experts are stored: int8, int4, mxfp4, fp8, ...; packing changes what the model "
        "writes; absent: as the checkpoint has them",
        choices=_formats,
    )
    backbone: str = setting(
        "plain",
        "how attention, shared experts and the head are stored, on the CPU: plain, or int8, which "
        "reads half the bytes a token and changes what the model writes a little",
        choices=("plain", "int8", "int4"),
    )
    miss: Any = setting(
        "wait",
        "on a miss: wait for the expert; cpu, compute it on the host; split, both, by cost",
        choices=MISSES,
    )
    graphs: bool | None = setting(None, "replay decode steps from CUDA graphs; absent: on a GPU")
    link: Any = setting(None, "emulate a slow link to the slots, on the CPU")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            choices = choices() if callable(choices) else choices
            if choices and isinstance(value, str) and value not in choices:
                raise AttachError(
                    f"there is no {one.name} {value!r}; choose one of {', '.join(choices)}"
                )
        given = [
            name
            for name in ("slots", "expert_memory", "gpu_memory", "batch", "context")
            if getattr(self, name) is not None
        ]
        if len({"slots", "expert_memory", "gpu_memory"}.intersection(given)) > 1:
            raise BudgetError(
                "give one of slots, expert_memory and gpu_memory, and not both of two: each says "
                "how many experts are resident"
            )
        if given and given[0] in ("slots", "expert_memory") and len(given) > 1:
            raise BudgetError(
                "batch and context share a GPU's memory out, and slots or expert_memory do that "
                "already; give gpu_memory, or leave them out"
            )
        for engine, other in (("reference", "fast"), ("fast", "reference")):
            name = self.needs_device if other == "fast" else self.needs_host
            if self.engine == engine and name is not None:
                raise AttachError(
                    f'{name} belongs to the other engine; leave it out, or give engine="{other}"'
                )

    @property
    def needs_device(self) -> str | None:
        """The first option given that only the device engine knows; None if none is."""
        return None if self.graphs is None else "graphs"

    @property
    def needs_host(self) -> str | None:
        """The first option given that only the reference engine knows; None if none is."""
        given = {
            "miss": getattr(self.miss, "kind", self.miss) != "wait",
            "link": self.link is not None,
            "store": self.store == "disk",
        }
        return next((name for name, is_given in given.items() if is_given), None)
