"""
Prefetchers: what is loaded before anybody asks for it.

A prefetcher is asked at three moments, and answers with experts, the most wanted first. To add
one, subclass `Prefetcher`, give it a name and answer at one or more of the moments (see
`melinoe.prefetch` for ours and for how one is found by name). The simulator and the runtime ask
through the same class, `melinoe.cache.loads_ahead.LoadsAhead`, in the same order, so that simulated
counts equal measured ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from melinoe.config import PREFETCH_AT, PREFETCH_MOMENTS
from melinoe.errors import MelinoeError

ByLayer = Sequence[Sequence[int]]
Prefetch = Callable[[int], ByLayer | None] | Mapping[int, ByLayer]

# Guesses for a pass of many rows would together name most experts of a layer.
MOST_ROWS = 8


def most_wanted(wanted: np.ndarray, slots: int, known: np.ndarray | None = None) -> list[list[int]]:
    """
    Name the experts of each layer that are wanted most, the most wanted first.

    Layers may have different numbers of experts while all have one row length here, so what nobody
    ever chose may not exist at all; it is not named.

    Args:
        wanted: (layers, num_experts), more where more; ties go to the lower id.
        slots: At most so many of each layer.
        known: Bool, as *wanted*: those that may be named; absent, those above 0.
    """
    known = np.asarray(wanted) > 0 if known is None else known
    order = np.argsort(-np.where(known, wanted, -np.inf), axis=1, kind="stable")[:, :slots]
    counts = np.minimum(known.sum(axis=1), slots).tolist()
    return [ids[:count] for ids, count in zip(order.tolist(), counts, strict=True)]


@dataclass(frozen=True)
class Prompt:
    """
    What is known of a sequence when experts are loaded ahead for it.

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
    What prefetchers are made of when they are asked for by name; each takes what it needs.

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
        Name experts of the layer that comes next while decoding, before those of *layer* are
        computed.

        That is ``layer + 1``, but in models whose passes leave layers out, such as those with one
        stack of experts for text and another for images in a decoder layer: there it is the layer
        that asked next in the pass before (`melinoe.cache.route.Route`). Asked in each forward
        pass of the completion with at most `MOST_ROWS` rows, for every layer whose tokens chose
        some expert and that another follows.

        Args:
            layer: MoE layer whose router has just chosen.
            chosen: Distinct ids that its tokens chose, ascending.
            guess: What the next layer's router says of what this one's router saw, the most
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

    def __init__(self, at: str = PREFETCH_AT) -> None:
        if at not in PREFETCH_MOMENTS:
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

    def __init__(self, wanted: Prefetch, at: str = PREFETCH_AT) -> None:
        super().__init__(at)
        self._wanted = wanted

    def named(self, prompt: Prompt) -> ByLayer | None:
        """What was listed for the sequence."""
        assert prompt.sequence is not None
        if isinstance(self._wanted, Mapping):
            return self._wanted.get(prompt.sequence)
        return self._wanted(prompt.sequence)
