"""Measure the price of a cache-aware choice in perplexity, and its saving in transfers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from melinoe.data import Encoded
from melinoe.engine.handle import Handle
from melinoe.errors import AttachError
from melinoe.evaluate.compare import Comparison, Rate, compare_perplexity, compare_rates
from melinoe.evaluate.perplexity import Decoded, decoded_perplexity
from melinoe.evaluate.scores import quality_record
from melinoe.moe.choice import ChoiceSettings
from melinoe.stats import bootstrap


@dataclass(frozen=True)
class ChoicePrice:
    """
    One model on one text, read token by token with its own choices and with changed ones.

    *cache* names policy and slots for people; *changed_choices* counts those that were replaced.
    """

    model: str
    domain: str
    in_domain: bool
    settings: ChoiceSettings
    cache: str
    exact: Decoded
    changed: Decoded
    changed_choices: int

    @property
    def label(self) -> str:
        """Label of the model with changed choices."""
        return f"{self.model}, {self.settings.kind} {self.settings.strength:g}"

    @property
    def metric(self) -> str:
        """Name of the transfers per token."""
        return f"transfers per decoded token ({self.cache})"

    def records(self) -> list[dict[str, Any]]:
        """Return a record of kind ``quality``: perplexity with changed choices, both transfers."""
        both = ((self.model, self.exact), (self.label, self.changed))
        about = {
            "choice": asdict(self.settings),
            "changed_choices": self.changed_choices,
            "transfers_metric": self.metric,
            "transfers": {label: bootstrap(*_rate(one)).to_dict() for label, one in both},
            "how": "demand loads while reading token by token, the cache emptied before each text",
        }
        perplexity = self.changed.perplexity
        return [quality_record(perplexity, self.label, self.domain, self.in_domain, **about)]

    def against(self, other: "ChoicePrice") -> list[Comparison]:
        """
        Compare this model with changed choices with *other*, itself too, with its own.

        Raises:
            DataError: the two did not read the same tokens.
        """
        names, exact = (self.label, other.model, self.domain), other.exact
        found = [compare_perplexity(self.changed.perplexity, exact.perplexity, *names)]
        if exact.loads.sum():  # else there is no transfer to save
            found.append(compare_rates(_rate(self.changed), _rate(exact), *names, self.metric))
        return found


def _rate(one: Decoded) -> Rate:
    """Transfers and tokens by text."""
    return one.loads.tolist(), one.tokens.tolist()


def price_of_choice(
    model: Any,
    handle: Handle,
    encoded: Sequence[Encoded],
    settings: ChoiceSettings,
    label: str,
    domain: str,
    *,
    in_domain: bool = True,
    progress: Callable[[str], None] | None = None,
) -> ChoicePrice:
    """
    Read *encoded* token by token with exact choices and with changed ones: two passes a token.

    The choices of *handle* are exact afterwards, whatever they were; *label* and *domain* name
    model and text in records.

    Raises:
        AttachError: *settings* change nothing, or the engine cannot change choices.
        UnsupportedModelError: routers whose choices cannot be changed.
        DataError: as `decoded_perplexity`.
    """
    if settings.kind == "exact":
        raise AttachError("the exact choice has no price; name cache-prior")
    handle.choose(settings)  # refused, if at all, before minutes of reading
    handle.choose(ChoiceSettings())
    exact = decoded_perplexity(model, handle, encoded, progress=progress)
    handle.choose(settings)
    try:
        changed = decoded_perplexity(model, handle, encoded, progress=progress)
        replaced = handle.changed_choices
    finally:
        handle.choose(ChoiceSettings())
    cache = f"{handle.policy.upper()}, {handle.slots} slots"
    return ChoicePrice(label, domain, in_domain, settings, cache, exact, changed, replaced)
