"""
Prefetch rules: which experts are loaded before anybody asks for them.

A prefetcher is asked at three moments, and answers with experts, the most wanted first. To add one,
write a subclass of `Prefetcher` with a name here under ``@_registry.own``; or outside, decorated
with `register` or declared as an entry point of an installed package, which melinoe finds wherever
prefetches are named:

    [project.entry-points."melinoe.prefetchers"]
    pairs = "my_package.pairs:Pairs"

The simulator and the runtime ask through the same class, `melinoe.cache.ahead.LoadsAhead`, in the
same order, so that simulated counts equal measured ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from melinoe.cache import PREFETCH_AT, PREFETCH_MOMENTS
from melinoe.cache.registry import Registry
from melinoe.errors import MelinoeError

ENTRY_POINTS = "melinoe.prefetchers"
NONE = "none"

ByLayer = Sequence[Sequence[int]]
Prefetch = Callable[[int], ByLayer | None] | Mapping[int, ByLayer]

# Guesses for a pass of many rows would together name most experts of a layer.
MOST_ROWS = 8


@dataclass(frozen=True)
class Prompt:
    """
    A sequence for which experts are loaded ahead.

    Attributes:
        slots: Of each layer.
        num_experts: Of each layer, the most where layers differ; ids lie below it.
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
    Parts for prefetchers that are asked for by name; each takes those that it needs.

    Attributes:
        popularity: How often each expert was chosen, (layers, num_experts).
        predictor: Names experts for a prompt: ``top(ids, slots)``, ``bind(model, tokenizer)``.
        at: ``prompt`` or ``completion``, for those that can be either; None for their default.
    """

    popularity: np.ndarray | None = None
    predictor: Any = None
    at: str | None = None


class Prefetcher:
    """
    Name experts to load ahead of need.

    All answers must be deterministic, and depend on nothing but the arguments and what the object
    was made of: the same calls give the same answers. Ids are distinct, the most wanted come
    first, and those beyond a layer's slots are dropped; those resident are not loaded again.

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
        """
        Make one for `prefetcher` and the command line; override it if it is made of something.

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
        Name experts of the layer that comes next while decoding, before those of *layer* are
        computed.

        That is ``layer + 1``, but in models whose passes leave layers out, such as those with one
        stack of experts for text and another for images in a decoder layer: there it is the layer
        that asked next in the pass before (`melinoe.cache.ahead.Route`). Asked in each forward
        pass of the completion with at most `MOST_ROWS` rows, for every layer whose tokens chose
        some expert and that another follows.

        Args:
            layer: MoE layer whose router has just chosen.
            chosen: Distinct ids that its tokens chose, ascending.
            guess: Choices of the next layer's router for the input of this one's, the most
                wanted first; empty unless `uses_guesses`.
        """
        return ()

    @property
    def between_layers(self) -> bool:
        """Whether it answers `after_router`."""
        return type(self).after_router is not Prefetcher.after_router

    @property
    def for_prompt(self) -> bool:
        """Whether it names experts for one sequence's prompt."""
        return self._answers("before_prompt") or self._answers("before_completion")

    @property
    def when(self) -> str | None:
        """For records: ``prompt``, ``completion``, ``layers``, several with ``+``; None: never."""
        moments = {
            "prompt": "before_prompt",
            "completion": "before_completion",
            "layers": "after_router",
        }
        return "+".join(name for name, call in moments.items() if self._answers(call)) or None

    def _answers(self, call: str) -> bool:
        return getattr(type(self), call) is not getattr(Prefetcher, call)


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
        """Make one for the moment that is asked for."""
        return cls() if given.at is None else cls(at=given.at)

    def __init__(self, at: str = PREFETCH_AT) -> None:
        if at not in PREFETCH_MOMENTS:
            raise ValueError(f"a prefetch is at prompt or completion, not at {at!r}")
        self.at = at

    def named(self, prompt: Prompt) -> ByLayer | None:
        """Name experts of every layer; ``prompt.uses`` is None whatever *at* is."""
        raise NotImplementedError

    def before_prompt(self, prompt: Prompt) -> ByLayer | None:
        """Name its experts, if this is its moment."""
        return self.named(prompt) if self.at == "prompt" else None

    def before_completion(self, prompt: Prompt) -> ByLayer | None:
        """Name its experts, if this is its moment."""
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

    def __init__(self, wanted: Prefetch, at: str = PREFETCH_AT) -> None:
        super().__init__(at)
        self._wanted = wanted

    def named(self, prompt: Prompt) -> ByLayer | None:
        """Look the sequence up."""
        assert prompt.sequence is not None
        if isinstance(self._wanted, Mapping):
            return self._wanted.get(prompt.sequence)
        return self._wanted(prompt.sequence)


# --- the rules ------------------------------------------------------------------------------------

_registry = Registry(ENTRY_POINTS, Prefetcher, kind="prefetch", word="prefetcher", none=NONE)
_Class = TypeVar("_Class", bound=type[Prefetcher])


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
class Popularity(Timed):
    """
    Load the experts that other texts chose most often, whatever the prompt; ties to the lower id.

    Those that were never chosen are not named.

    Args:
        popularity: How often, (layers, num_experts).
        at: As `Timed`.

    Raises:
        ValueError: another shape.

    Source:
        Static placement by popularity: Fiddler, arXiv:2402.07033.
    """

    name = "popularity"

    def __init__(self, popularity: np.ndarray, at: str = PREFETCH_AT) -> None:
        super().__init__(at)
        counts = np.asarray(popularity)
        if counts.ndim != 2:
            raise ValueError(f"a popularity has layers and experts, not the shape {counts.shape}")
        self._counts = counts

    @classmethod
    def make(cls, given: Given) -> Popularity:
        """Make one of the popularity that is given."""
        if given.popularity is None:
            raise MelinoeError(
                "prefetch 'popularity' needs to know which experts are popular; give --popularity "
                "(a trace or statistics) or --predictor"
            )
        return cls(given.popularity, given.at or PREFETCH_AT)

    def named(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
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

    They are known once the prompt was read, and cost nothing to know. Those that the prompt's pass
    left resident are not loaded again; this brings back those that it evicted.

    Source:
        Prompt-aware placement at the end of prefill is folklore of MoE serving; we know of no
        first source.
    """

    name = "prefill"

    def before_completion(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        assert prompt.uses is not None
        return most_wanted(prompt.uses, max(prompt.slots))


@_registry.own
class Predicted(Timed):
    """
    Load the experts that a fitted predictor finds likeliest for the prompt.

    Args:
        predictor: Has ``top(ids, slots)``: per layer the likeliest ids, likeliest first; and
            ``bind(model, tokenizer)``. Those of `melinoe.predictor` do, and so may others.
        at: As `Timed`.

    Source:
        Loading the predicted top experts of each layer before generation: arXiv:2602.11192.
    """

    name = "predictor"
    uses_ids = True

    def __init__(self, predictor: Any, at: str = PREFETCH_AT) -> None:
        super().__init__(at)
        self.predictor = predictor

    @classmethod
    def make(cls, given: Given) -> Predicted:
        """Make one of the predictor that is given."""
        if given.predictor is None:
            raise MelinoeError(
                "prefetch 'predictor' needs one; give --predictor (see `melinoe predictor fit`)"
            )
        return cls(given.predictor, given.at or PREFETCH_AT)

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """Bind the predictor to the model."""
        self.predictor.bind(model, tokenizer)

    def named(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        assert prompt.ids is not None
        return self.predictor.top(prompt.ids, max(prompt.slots))


@_registry.own
class NextRouter(Prefetcher):
    """
    Load the experts that the next layer's router chooses when it is shown this layer's input.

    Issued while decoding, behind this layer's own loads and before its experts are computed, so
    that the next layer's come over the link meanwhile. A trace holds those choices if it was
    recorded with guesses, and then the simulator replays it exactly.

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


# --- rules by name --------------------------------------------------------------------------------


def register(cls: _Class) -> _Class:
    """Make a prefetcher known by its `name` in this process; a decorator."""
    return _registry.register(cls)


def prefetcher_names() -> list[str]:
    """All names: ``none``, built-in ones, then registered ones and installed entry points."""
    return _registry.names()


def prefetcher_class(name: str) -> type[Prefetcher]:
    """
    Look a prefetcher up; a built-in name always means the built-in class.

    Raises:
        MelinoeError: unknown name (the message lists the known ones), or an installed package that
            declares it cannot be loaded or declares something else.
    """
    return _registry.find(name)


def prefetcher(name: str, given: Given | None = None) -> Prefetcher | None:
    """
    Make a prefetcher; None for ``none``.

    Args:
        name: One of `prefetcher_names`.
        given: What it may be made of.

    Raises:
        MelinoeError: unknown name, or what it is made of is missing.
    """
    if name == NONE:
        return None
    return prefetcher_class(name).make(given or Given())
