"""
Prefetch: which experts are loaded before anybody asks for them, and how that is carried out.

To add a rule, write a subclass of `Prefetcher` with a name here under ``@_registry.own``; or
outside, decorated with `register` or declared as an entry point of an installed package:

    [project.entry-points."melinoe.prefetchers"]
    pairs = "my_package.pairs:Pairs"

The simulator and both engines ask through `LoadsAhead`, so simulated counts equal measured ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from melinoe.cache.registry import Registry
from melinoe.errors import MelinoeError

ENTRY_POINTS = "melinoe.prefetchers"
NONE = "none"

ByLayer = Sequence[Sequence[int]]

# Guesses for a pass of many rows would together name most experts of a layer.
MOST_ROWS = 8


@dataclass(frozen=True)
class Prompt:
    """
    A sequence for which experts are loaded ahead.

    *ids* are the prompt's tokens, None where the prefetcher does not ask for them. *uses*, int64
    (layers, num_experts), counts the (token, choice) pairs of the prompt that picked each expert,
    None before it was read.
    """

    slots: tuple[int, ...]  # of each layer
    num_experts: int  # of the layer that has most
    ids: tuple[int, ...] | None = None
    uses: np.ndarray | None = None
    sequence: int | None = None  # its number in the trace; None while serving


@dataclass(frozen=True)
class Given:
    """Hold what prefetchers are made of when they are asked for by name; each takes its part."""

    popularity: np.ndarray | None = None  # (layers, num_experts)
    predictor: Any = None  # as of `Predicted`


class Prefetcher:
    """
    Name experts to load ahead of need.

    The same calls must give the same answers. Ids are distinct, the most wanted first; those
    beyond a layer's slots are dropped, those resident are not loaded again.

    Attributes:
        name: By which it is chosen; the entry point that declares it has the same name.
        uses_ids: Whether `Prompt.ids` must be given.
        uses_guesses: Whether `after_router` must be told the choices of the next layer's router.
    """

    name: ClassVar[str] = ""
    uses_ids: ClassVar[bool] = False
    uses_guesses: ClassVar[bool] = False

    @classmethod
    def make(cls, given: Given) -> Prefetcher:
        """Make one of what is given; MelinoeError if something that it needs is missing."""
        return cls()

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """Take what belongs to *model* before its first prompt; ModelError if made for another."""

    def before_prompt(self, prompt: Prompt) -> ByLayer | None:
        """Name experts of every layer before the prompt is read, which may evict them again."""
        return None

    def before_completion(self, prompt: Prompt) -> ByLayer | None:
        """Name experts of every layer once the prompt was read, before anything is decoded."""
        return None

    def after_router(
        self, layer: int, chosen: Sequence[int], guess: Sequence[int]
    ) -> Sequence[int]:
        """
        Name experts of the layer that comes next (see `Route`), before those of *layer* compute.

        Asked in each forward pass of the completion with at most `MOST_ROWS` rows, for every layer
        whose tokens chose some expert and that another follows.

        Args:
            layer, chosen: Layer whose router has just chosen these ids, ascending.
            guess: Choices of the next layer's router for the input of this one's, the most
                wanted first; empty unless `uses_guesses`.
        """
        return ()

    @property
    def between_layers(self) -> bool:
        """Whether it answers `after_router`."""
        return self._answers("after_router")

    @property
    def for_prompt(self) -> bool:
        """Whether it names experts for one sequence's prompt."""
        return self._answers("before_prompt") or self._answers("before_completion")

    @property
    def when(self) -> str | None:
        """For records: ``prompt``, ``completion``, ``layers``, several with ``+``; None: never."""
        calls = {
            "prompt": "before_prompt",
            "completion": "before_completion",
            "layers": "after_router",
        }
        return "+".join(name for name, call in calls.items() if self._answers(call)) or None

    def _answers(self, call: str) -> bool:
        return getattr(type(self), call) is not getattr(Prefetcher, call)


# --- carrying it out ------------------------------------------------------------------------------


class Route:
    """
    Know which layer a forward pass reaches next, from the pass before.

    Some models hold several stacks of experts in one decoder layer (for text and for images, say),
    so the next number is not always the layer that asks next. Until a pass has shown otherwise it
    is. Only layers that made a request count, in ascending order: the simulator has no others.
    """

    def __init__(self, num_layers: int) -> None:
        self._next: list[int | None] = [*range(1, num_layers), None]
        self._order: list[int] = []  # of the open pass, so far

    def reached(self, layer: int) -> None:
        """Note that *layer* made a request in the open pass."""
        if not self._order or layer > self._order[-1]:
            self._order.append(layer)

    def end_pass(self) -> None:
        """End the open pass, if there is one, and learn its order."""
        for layer, following in zip(self._order, [*self._order[1:], None], strict=False):
            self._next[layer] = following
        self._order = []

    def drop_pass(self) -> None:
        """Learn nothing from the open pass, which broke off."""
        self._order = []

    def after(self, layer: int) -> int | None:
        """The layer that is expected to make the next request after *layer*; None for none."""
        return self._next[layer]


def merge_guesses(rows: Sequence[Sequence[int]]) -> list[int]:
    """
    Merge the guesses for all rows of a pass, the most wanted first.

    The more rows guess an expert, the more it is wanted; of equally wanted ones the one that
    stands further in front in some row, then the lower id.

    Args:
        rows: Of each row ids, the most wanted first; negative ones mean none.
    """
    places: dict[int, list[int]] = {}
    for row in rows:
        for at, expert in enumerate(dict.fromkeys(row)):
            if expert >= 0:
                places.setdefault(expert, []).append(at)
    return sorted(places, key=lambda one: (-len(places[one]), min(places[one]), one))


class LoadsAhead:
    """
    Ask a prefetcher, and load what it names.

    Between layers a prefetch evicts nothing that an earlier prefetch named for the same layer if
    that has not made a request since, and nothing that it names itself. What then finds no slot is
    dropped, the least wanted first. To the policy a prefetch is one request
    (`Residency.prefetch`).

    Args:
        prefetcher: Asked.
        route: Says which layer comes next; told of the requests by whoever serves them.
        num_layers: MoE layers.
        load: Begins to load experts of a layer, sparing some residents, and returns how many loads
            that takes: `Residency.prefetch`, and in an engine the copies too.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        route: Route,
        num_layers: int,
        load: Callable[[int, Sequence[int], Collection[int]], int],
    ) -> None:
        self.prefetcher = prefetcher
        self._route = route
        self._load = load
        # By layer: named by a prefetch, and no request of that layer has come since.
        self._waiting: list[set[int]] = [set() for _ in range(num_layers)]

    def before_prompt(self, prompt: Prompt) -> list[int]:
        """Ask and load; returns how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_prompt(prompt))

    def before_completion(self, prompt: Prompt) -> list[int]:
        """Ask and load; returns how many loads of each layer that takes."""
        return self._all(self.prefetcher.before_completion(prompt))

    def _all(self, wanted: ByLayer | None) -> list[int]:
        layers = len(self._waiting)
        if wanted is None:
            return [0] * layers
        if len(wanted) != layers:
            raise ValueError(f"a prefetch names {len(wanted)} layers of {layers}")
        return [self._one(layer, experts, ()) for layer, experts in enumerate(wanted)]

    def requested(self, layer: int) -> None:
        """Note that a request of *layer* is served: experts brought for it had their chance."""
        self._waiting[layer].clear()

    def after_router(self, layer: int, chosen: Sequence[int], guess: Sequence[int]) -> int:
        """Ask and load for the layer that comes next; returns how many loads of it that takes."""
        target = self._route.after(layer)
        if target is None:
            return 0
        early = guess if self.prefetcher.uses_guesses else ()
        wanted = self.prefetcher.after_router(layer, chosen, early)
        return self._one(target, wanted, self._waiting[target]) if len(wanted) else 0

    def _one(self, layer: int, experts: Sequence[int], spared: Collection[int]) -> int:
        experts = [int(expert) for expert in experts]
        loads = self._load(layer, experts, spared)
        self._waiting[layer].update(experts)
        return loads


# --- the rules ------------------------------------------------------------------------------------

_registry = Registry(ENTRY_POINTS, Prefetcher, kind="prefetch", word="prefetcher", none=NONE)
register = _registry.register
# All names: ``none``, built-in ones, then registered ones and installed entry points.
prefetcher_names = _registry.names
prefetcher_class = _registry.find


def prefetcher(name: str, given: Given | None = None) -> Prefetcher | None:
    """
    Make a prefetcher of what is given; None for ``none``.

    Raises:
        MelinoeError: unknown name, or what it is made of is missing.
    """
    return None if name == NONE else prefetcher_class(name).make(given or Given())


def most_wanted(wanted: np.ndarray, slots: int, known: np.ndarray | None = None) -> list[list[int]]:
    """
    Name the experts of each layer that are wanted most, the most wanted first.

    Layers may have different numbers of experts while all have one row length here, so an expert
    that nobody ever chose may not exist at all; it is not named.

    Args:
        wanted: (layers, num_experts), more where more; ties go to the lower id.
        slots: At most so many of each layer.
        known: Bool, as *wanted*: those that may be named; absent, those above 0.
    """
    known = np.asarray(wanted) > 0 if known is None else known
    order = np.argsort(-np.where(known, wanted, -np.inf), axis=1, kind="stable")[:, :slots]
    counts = np.minimum(known.sum(axis=1), slots).tolist()
    return [ids[:count] for ids, count in zip(order.tolist(), counts, strict=True)]


@_registry.own
class Popularity(Prefetcher):
    """
    Load the experts that other texts chose most often, whatever the prompt; ties to the lower id.

    Args:
        popularity: How often, (layers, num_experts); those never chosen are not named.

    Source:
        Static placement by popularity: Fiddler, arXiv:2402.07033.
    """

    name = "popularity"

    def __init__(self, popularity: np.ndarray) -> None:
        self._counts = np.asarray(popularity)
        if self._counts.ndim != 2:
            raise ValueError(
                f"a popularity has layers and experts, not the shape {self._counts.shape}"
            )

    @classmethod
    def make(cls, given: Given) -> Popularity:
        """Make one of the popularity that is given."""
        if given.popularity is None:
            raise MelinoeError(
                "prefetch 'popularity' needs to know which experts are popular; give --popularity "
                "(a trace) or --predictor"
            )
        return cls(given.popularity)

    def before_completion(self, prompt: Prompt) -> ByLayer:
        """Name at most as many of each layer as there are slots."""
        layers, experts = self._counts.shape
        if layers != len(prompt.slots) or experts != prompt.num_experts:
            raise MelinoeError(
                f"the popularity is of another model: it has {layers} layers of {experts} experts, "
                f"and the model {len(prompt.slots)} of {prompt.num_experts}; count this model's"
            )
        return most_wanted(self._counts, max(prompt.slots))


@_registry.own
class Prefill(Prefetcher):
    """
    Load the experts that the prompt's own tokens chose, the most used first, ties to the lower id.

    They cost nothing to know. This brings back those that the prompt's own pass evicted.
    """

    name = "prefill"

    def before_completion(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        assert prompt.uses is not None
        return most_wanted(prompt.uses, max(prompt.slots))


@_registry.own
class Predicted(Prefetcher):
    """
    Load the experts that a fitted predictor finds likeliest for the prompt.

    Args:
        predictor: Has ``top(ids, slots)``: per layer the likeliest ids, likeliest first; and
            ``bind(model, tokenizer)``. `melinoe.predictor.Predictor` does, and so may others.

    Source:
        Loading the predicted top experts of each layer before generation: arXiv:2602.11192.
    """

    name = "predictor"
    uses_ids = True

    def __init__(self, predictor: Any) -> None:
        self.predictor = predictor

    @classmethod
    def make(cls, given: Given) -> Predicted:
        """Make one of the predictor that is given."""
        if given.predictor is None:
            raise MelinoeError(
                "prefetch 'predictor' needs one; give --predictor (see `melinoe predictor fit`)"
            )
        return cls(given.predictor)

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """Bind the predictor to the model."""
        self.predictor.bind(model, tokenizer)

    def before_completion(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        assert prompt.ids is not None
        return self.predictor.top(prompt.ids, max(prompt.slots))


@_registry.own
class NextRouter(Prefetcher):
    """
    Load the experts that the next layer's router chooses when it is shown this layer's input.

    The next layer's experts come over the link while this layer computes. A trace holds those
    choices if it was recorded with guesses, and then the simulator replays it exactly.

    Source:
        Speculative loading: Eliseev and Mazur, arXiv:2312.17238.
    """

    name = "next-router"
    uses_guesses = True

    def after_router(
        self, layer: int, chosen: Sequence[int], guess: Sequence[int]
    ) -> Sequence[int]:
        """Name the router's choices."""
        return guess


class Listed(Prefetcher):
    """Lists made beforehand, sequence -> layer -> ids; a sequence may be left out. To simulate."""

    name = "listed"

    def __init__(self, wanted: Mapping[int, ByLayer]) -> None:
        self._wanted = wanted

    def before_completion(self, prompt: Prompt) -> ByLayer | None:
        """Look the sequence up."""
        assert prompt.sequence is not None
        return self._wanted.get(prompt.sequence)
