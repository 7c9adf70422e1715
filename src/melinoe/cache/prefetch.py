"""
Prefetch: experts that are loaded once a prompt was read, before its completion asks for any.

To add a rule, write a subclass of `Prefetcher` with a name here under ``@register``, or decorate
one of your own. Simulator and engines ask through `load_ahead`, so their counts are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from melinoe.errors import MelinoeError

NONE = "none"  # the default: every other copies more in all, docs/findings.md#which-prefetch

ByLayer = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prompt:
    """A sequence whose prompt was read."""

    slots: tuple[int, ...]  # of each layer
    num_experts: int  # of the layer that has most
    ids: tuple[int, ...] | None  # its tokens; None where the prefetcher does not ask for them
    uses: np.ndarray  # int64 (layers, num_experts), its (token, choice) pairs that picked each
    sequence: int | None = None  # its number in the trace; None while serving


@dataclass(frozen=True)
class Given:
    """Hold what prefetchers are made of when they are asked for by name; each takes its part."""

    popularity: np.ndarray | None = None  # (layers, num_experts)
    predictor: Any = None  # as of `Predicted`


class Prefetcher:
    """
    Name experts to load ahead of need; the same calls give the same answers. Ids are distinct, the
    most wanted first; those beyond a layer's slots are dropped, those resident are not loaded
    again. *uses_ids*: whether `Prompt.ids` must be given.
    """

    name: ClassVar[str] = ""
    uses_ids: ClassVar[bool] = False

    @classmethod
    def make(cls, given: Given) -> Prefetcher:
        """Make one of what is given; MelinoeError if something that it needs is missing."""
        return cls()

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """Take what belongs to *model* before its first prompt; ModelError if made for another."""

    def before_completion(self, prompt: Prompt) -> ByLayer | None:
        """Name experts of every layer once the prompt was read; None for nothing."""
        raise NotImplementedError


def load_ahead(
    prefetcher: Prefetcher, prompt: Prompt, load: Callable[[int, list[int]], int]
) -> list[int]:
    """
    Ask *prefetcher* once a prompt was read, and *load* what it names, layer by layer. Returns how
    many loads of each layer that took, as *load* says: `Residency.prefetch`, and in an engine the
    copies too. ValueError for an answer that does not name every layer.
    """
    wanted = prefetcher.before_completion(prompt)
    if wanted is None:
        return [0] * len(prompt.slots)
    if len(wanted) != len(prompt.slots):
        raise ValueError(f"a prefetch names {len(wanted)} layers of {len(prompt.slots)}")
    return [load(layer, list(map(int, experts))) for layer, experts in enumerate(wanted)]


_known: dict[str, type[Prefetcher]] = {}


def register(cls: type[Prefetcher]) -> type[Prefetcher]:
    """Make a rule known by its name; a decorator. ValueError if the name is taken."""
    if cls.name in ("", NONE, *_known):
        raise ValueError(f"a prefetcher needs a name of its own, and {cls.name!r} is not one")
    _known[cls.name] = cls
    return cls


def prefetcher_names() -> list[str]:
    """All names: ``none``, built-in ones, then registered ones."""
    return [NONE, *_known]


def prefetcher(name: str, given: Given | None = None) -> Prefetcher | None:
    """Make a prefetcher, None for ``none``; MelinoeError if what it is made of is missing."""
    if name == NONE:
        return None
    if name not in _known:
        raise MelinoeError(
            f"there is no prefetch {name!r}; choose one of {', '.join(prefetcher_names())}"
        )
    return _known[name].make(given or Given())


def most_wanted(wanted: np.ndarray, slots: int, known: np.ndarray | None = None) -> list[list[int]]:
    """
    Name the *slots* experts of each layer that are wanted most, the most wanted first. *wanted* is
    (layers, num_experts), ties go to the lower id. Only *known* ones are named, by default those
    above 0: where layers differ an expert that nobody ever chose may not exist at all.
    """
    known = np.asarray(wanted) > 0 if known is None else known
    order = np.argsort(-np.where(known, wanted, -np.inf), axis=1, kind="stable")[:, :slots]
    counts = np.minimum(known.sum(axis=1), slots).tolist()
    return [ids[:count] for ids, count in zip(order.tolist(), counts, strict=True)]


@register
class Popularity(Prefetcher):
    """
    Load the experts that other texts chose most often: *popularity*, (layers, num_experts).

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


@register
class Prefill(Prefetcher):
    """Load the experts that the prompt's own tokens chose, the most used first."""

    name = "prefill"

    def before_completion(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        return most_wanted(prompt.uses, max(prompt.slots))


@register
class Predicted(Prefetcher):
    """
    Load the experts that a *predictor* finds likeliest for the prompt: ``top(ids, slots)`` names
    them.

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


class Listed(Prefetcher):
    """Lists made beforehand, sequence -> layer -> ids; a sequence may be left out. To simulate."""

    name = "listed"

    def __init__(self, wanted: Mapping[Any, ByLayer]) -> None:
        self._wanted = wanted

    def before_completion(self, prompt: Prompt) -> ByLayer | None:
        """Look the sequence up."""
        return self._wanted.get(prompt.sequence)
