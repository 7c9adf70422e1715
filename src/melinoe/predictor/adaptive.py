"""AdaptivePredictor: a prior at work for one key, with a learned predictor or alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from melinoe.cache.prefetcher import most_wanted
from melinoe.errors import DataError, ModelError
from melinoe.moe.routing import find_routers, fingerprint
from melinoe.predictor.model import Predictor
from melinoe.predictor.prior import DEPLOYMENT, Prior, PriorSettings


class AdaptivePredictor:
    """
    Names experts as `Predictor` does, and learns from what is served.

    `melinoe.generate.generate` takes it as a predictor, and tells it of each completion.

    Args:
        prior: What was served; several of these may share one.
        base: A predictor to correct by the prior; ``None``: the prior alone.
        key: Whose requests these are.
        learns: Whether completions that are served change the prior.

    Raises:
        ModelError: the prior was learned on another model than *base* was fitted to.
    """

    def __init__(
        self,
        prior: Prior,
        base: Predictor | None = None,
        key: str = DEPLOYMENT,
        learns: bool = True,
    ) -> None:
        self.prior, self.base, self.key, self._learns = prior, base, key, learns
        if base is not None:
            prior.check_model(base.fingerprint, base.num_layers, base.num_experts)
        self._model: weakref.ref[nn.Module] | None = None
        self._predicted: NDArray | None = None  # what the base said of the prompt in hand

    @property
    def learns(self) -> bool:
        """Whether `observe` would change anything."""
        return self._learns and self.prior.enabled

    def bind(self, model: nn.Module, tokenizer: Any = None) -> None:
        """
        As `Predictor.bind`; without a base, the prior's model is checked.

        Raises:
            ModelError: the prior was learned on another model.
            DependencyError: as `Predictor.bind`.
        """
        if self.base is not None:
            self.base.bind(model, tokenizer)
        elif self._model is None or self._model() is not model:
            if (found := fingerprint(model)) != self.prior.fingerprint:
                raise ModelError(
                    f"the prior was learned on model {self.prior.fingerprint[:12]}, not on "
                    f"{found[:12]}; start another one for this model"
                )
            self._model = weakref.ref(model)

    def top(self, token_ids: Sequence[int], slots: int | None = None) -> list[list[int]]:
        """
        Name the likeliest experts of each layer, likeliest first; as `Predictor.top`.

        Alone, the prior names those that its key has used, whatever the prompt; switched off, it
        leaves the base as it is.

        Raises:
            TokenizerError, ModelError: as `Predictor.predict`.
            ValueError: no *slots*, and no base that knows them.
        """
        if self.base is None:
            if slots is None:
                raise ValueError("a prior alone does not know how many slots there are")
            return self.prior.top(self.key, slots)
        if not self.prior.enabled:
            return self.base.top(token_ids, slots)
        self._predicted = self.base.predict(token_ids)
        scores = self.prior.adjust(self._predicted, self.key)
        known = (self.base.popularity > 0) | self.prior.used(self.key)
        return most_wanted(scores, self.base.slots if slots is None else slots, known)

    def observe(self, usage: NDArray) -> None:
        """Learn from the completion of the prompt that `top` was last asked about."""
        predicted, self._predicted = self._predicted, None
        if self.learns:
            self.prior.observe(self.key, usage, predicted)


def open_prior(path: str | Path, model: nn.Module, half_life: float | None = None) -> Prior:
    """
    Load a model's prior, or begin one where there is no file; nothing is written.

    Args:
        path: Where `Prior.save` will be told to write.
        model: The served one.
        half_life: Of a new one, in requests; ``None`` means the default.

    Raises:
        ModelError: the file is another model's.
        CheckpointError: the file is damaged.
        DataError: *half_life* makes no sense.
    """
    routers = find_routers(model)
    shape = len(routers), max(router.num_experts for router in routers)
    name = fingerprint(model)
    if Path(path).exists():
        prior = Prior.load(path)
        prior.check_model(name, *shape)
        return prior
    try:
        settings = PriorSettings() if half_life is None else PriorSettings(half_life=half_life)
    except ValueError as error:
        raise DataError(f"a prior cannot be begun: {error}; choose another half-life") from None
    return Prior(*shape, name, settings)
