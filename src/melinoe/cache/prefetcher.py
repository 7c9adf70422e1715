"""
Prefetchers: what is loaded before anybody asks for it.

A prefetcher is asked at three moments, and answers with experts, the most wanted first. To add
one, subclass `Prefetcher`, give it a name and answer at one or more of the moments (see
`melinoe.prefetch` for ours and for how one is found by name). The simulator and the runtime ask
through the same `LoadsAhead`, in the same order, so simulated counts equal measured ones.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from melinoe.cache.residency import Plan
from melinoe.errors import MelinoeError

ByLayer = Sequence[Sequence[int]]
Prefetch = Callable[[int], ByLayer | None] | Mapping[int, ByLayer]

# Guesses for a pass of many rows would together name most experts of a layer.
MOST_ROWS = 8


@dataclass(frozen=True)
class Prompt:
    """
    What is known of a sequence when experts are loaded ahead for it.

    Attributes:
        slots: Of each layer.
        num_experts: Of each layer; ids lie below it.
        ids: Token ids of the prompt; None where the prefetcher does not ask for them
            (`Prefetcher.uses_ids`) or nobody knows them.
        uses: int64 (layers, num_experts), how many (token, choice) pairs of the prompt's own
            tokens picked each expert; None before the prompt was read.
        sequence: Its number in the trace; None while serving.
    """

    slots: tuple[int, ...]
    num_experts: int
    ids: tuple[int, ...] | None = None
    uses: np.ndarray | None = None
    sequence: int | None = None


@dataclass(frozen=True)
class Given:
    """
    What prefetchers are made of when they are asked for by name; each takes what it needs.

    Attributes:
        popularity: How often each expert was chosen, (layers, num_experts).
        predictor: Names experts for a prompt: ``top(ids, slots)``, ``bind(model, tokenizer)``.
        store: A `melinoe.prefetch.store.PromptStore`.
        at: ``prompt`` or ``completion``, for those that can be either; None for their default.
    """

    popularity: np.ndarray | None = None
    predictor: Any = None
    store: Any = None
    at: str | None = None


class Prefetcher:
    """
    What is asked which experts to load ahead of need.

    All answers must be deterministic, and depend on nothing but the arguments and what the object
    was made of: the same calls give the same answers. Ids are distinct, the most wanted come
    first, and those beyond a layer's slots are dropped; those resident are not loaded again.

    Attributes:
        name: By which it is chosen; the entry point that declares it has the same name.
        uses_ids: Whether `Prompt.ids` must be given.
        uses_guesses: Whether `after_router` must be told what the next layer's router says.
    """

    name: ClassVar[str] = ""
    uses_ids: ClassVar[bool] = False
    uses_guesses: ClassVar[bool] = False

    @classmethod
    def make(cls, given: Given) -> "Prefetcher":
        """
        Make one of what there is, for `melinoe.prefetch.prefetcher` and the command line.

        A class that is made of something overrides this.

        Raises:
            MelinoeError: something that it is made of is missing, or a moment that is not its own.
        """
        if given.at is not None:
            raise MelinoeError(
                f"prefetch {cls.name!r} has a moment of its own; leave --prefetch-at out"
            )
        return cls()

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """
        Take what belongs to *model*, a transformers model, before its first prompt.

        Args:
            model: Served.
            tokenizer: Its own, for those that read prompts as text.

        Raises:
            ModelError: it was made for another model.
        """

    def before_prompt(self, prompt: Prompt) -> ByLayer | None:
        """Name experts of every layer before the prompt's first forward pass; None for none."""
        return None

    def before_completion(self, prompt: Prompt) -> ByLayer | None:
        """Name experts of every layer once the prompt was read, before anything is decoded."""
        return None

    def after_router(
        self, layer: int, chosen: Sequence[int], guess: Sequence[int]
    ) -> Sequence[int]:
        """
        Name experts of layer ``layer + 1`` while decoding, before those of *layer* are computed.

        Asked in each forward pass of the completion with at most `MOST_ROWS` rows, for every
        layer but the last whose tokens chose some expert.

        Args:
            layer: MoE layer whose router has just chosen.
            chosen: Distinct ids that its tokens chose, ascending.
            guess: What the router of ``layer + 1`` says of what this one's router saw, the most
                wanted first; empty unless `uses_guesses`.
        """
        return ()

    @property
    def between_layers(self) -> bool:
        """Whether it has something to say in `after_router`."""
        return type(self).after_router is not Prefetcher.after_router

    @property
    def for_prompt(self) -> bool:
        """Whether it has something to say of one sequence's prompt."""
        own = type(self)
        return (
            own.before_prompt is not Prefetcher.before_prompt
            or own.before_completion is not Prefetcher.before_completion
        )

    @property
    def when(self) -> str | None:
        """For records: ``prompt``, ``completion``, ``layers``, several with ``+``; None: never."""
        own = type(self)
        moments = {
            "prompt": own.before_prompt is not Prefetcher.before_prompt,
            "completion": own.before_completion is not Prefetcher.before_completion,
            "layers": self.between_layers,
        }
        return "+".join(name for name, used in moments.items() if used) or None


class Timed(Prefetcher):
    """
    A prefetcher that knows its experts before the prompt was read, and can wait until after it.

    Args:
        at: ``prompt``: before the prompt's first forward pass, which then waits for fewer loads,
            but evicts what was prefetched if it uses more experts than there are slots.
            ``completion``: between the prompt and the first pass of the completion.

    Raises:
        ValueError: another *at*.
    """

    @classmethod
    def make(cls, given: Given) -> Prefetcher:
        """As `Prefetcher.make`."""
        return cls() if given.at is None else cls(at=given.at)

    def __init__(self, at: str = "completion") -> None:
        if at not in ("prompt", "completion"):
            raise ValueError(f"a prefetch is at prompt or completion, not at {at!r}")
        self.at = at

    def named(self, prompt: Prompt) -> ByLayer | None:
        """The experts of every layer; ``prompt.uses`` is None whatever *at* is."""
        raise NotImplementedError

    def before_prompt(self, prompt: Prompt) -> ByLayer | None:
        """What it names, if this is its moment."""
        return self.named(prompt) if self.at == "prompt" else None

    def before_completion(self, prompt: Prompt) -> ByLayer | None:
        """What it names, if this is its moment."""
        if self.at == "prompt":
            return None
        return self.named(
            Prompt(prompt.slots, prompt.num_experts, prompt.ids, None, prompt.sequence)
        )

    @property
    def when(self) -> str:
        """Its moment."""
        return self.at


class Listed(Timed):
    """
    Lists made beforehand, by number of the sequence; in the simulator only.

    Args:
        wanted: A mapping, which may leave sequences out, or a function of the number.
        at: As `Timed`.
    """

    name = "listed"

    def __init__(self, wanted: Prefetch, at: str = "completion") -> None:
        super().__init__(at)
        self._wanted = wanted

    def named(self, prompt: Prompt) -> ByLayer | None:
        """What was listed for the sequence."""
        assert prompt.sequence is not None
        if isinstance(self._wanted, Mapping):
            return self._wanted.get(prompt.sequence)
        return self._wanted(prompt.sequence)


class LoadsAhead:
    """
    Carries a prefetcher's wishes out, by one rule for the simulator and the runtime.

    The rule between layers: a prefetch evicts nothing that the layer at work needs in this pass,
    nothing that an earlier prefetch named for a layer that has not made a request since, and
    nothing that it names itself. What then finds no slot is dropped, the least wanted first. Whom
    it does evict, the policy says; to it a prefetch is one request (`Residency.prefetch`). Where
    each layer has slots of its own, only earlier prefetches of the same layer can be in question;
    in one cache that all layers share, all of it. Before a prompt or a completion a prefetch
    spares what it names itself, layer by layer, and nothing else.

    Args:
        prefetcher: Asked.
        num_layers: MoE layers.
        load: Begins to load experts of a layer, sparing some residents, and returns how many loads
            that takes: `Residency.prefetch`, and in the runtime the copies too.
        keys: In a cache that all layers share, what each layer's ids grow by to be its names in
            it (`SharedLayer.key`), by which it is told whom to spare; None where each layer has
            slots of its own.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        num_layers: int,
        load: Callable[[int, Sequence[int], Collection[int]], int],
        keys: Sequence[int] | None = None,
    ) -> None:
        self.prefetcher = prefetcher
        self._load = load
        self._keys = keys
        # By layer: named by a prefetch, and no request of that layer has come since.
        self._waiting: list[set[int]] = [set() for _ in range(num_layers)]

    def before_prompt(self, prompt: Prompt) -> list[int]:
        """Ask and load; how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_prompt(prompt))

    def before_completion(self, prompt: Prompt) -> list[int]:
        """Ask and load; how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_completion(prompt))

    def requested(self, layer: int) -> None:
        """A request of *layer* is served: what was brought for it has had its chance."""
        self._waiting[layer].clear()

    def after_router(
        self, layer: int, chosen: Sequence[int], guess: Sequence[int], plan: Plan
    ) -> int:
        """Ask and load for the next layer; *plan*: what holds slots for *layer* right now."""
        if layer + 1 >= len(self._waiting):
            return 0
        wanted = self.prefetcher.after_router(layer, chosen, guess)
        if not len(wanted):
            return 0
        needed = [*plan.hits, *(load.expert for load in plan.loads)]
        spared: set[int] = self._waiting[layer + 1]
        if self._keys is not None:
            spared = {
                self._keys[other] + expert
                for other, waiting in enumerate(self._waiting)
                for expert in (*waiting, *(needed if other == layer else ()))
            }
        return self._one(layer + 1, wanted, spared)

    def _all(self, wanted: ByLayer | None) -> list[int]:
        if wanted is None:
            return [0] * len(self._waiting)
        check_layers(wanted, len(self._waiting))
        return [self._one(layer, experts, ()) for layer, experts in enumerate(wanted)]

    def _one(self, layer: int, experts: Sequence[int], spared: Collection[int]) -> int:
        experts = [int(expert) for expert in experts]
        loads = self._load(layer, experts, spared)
        self._waiting[layer].update(experts)
        return loads


def check_layers(wanted: ByLayer, num_layers: int) -> None:
    """
    Make sure that a prefetch names every layer.

    Raises:
        ValueError: it does not.
    """
    if len(wanted) != num_layers:
        raise ValueError(f"a prefetch names {len(wanted)} layers of {num_layers}")
