"""
Prior: what was served lately, so that a prefetch follows the traffic.

A predictor knows the prompts that it was fitted to. Traffic drifts: other users, other subjects. A
prior keeps, for each key (a user, or one for a whole deployment), how the completions of its last
requests used the experts of each layer; each request makes all before it count a little less.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors
from torch import nn

from melinoe.cache.prefetch import most_wanted
from melinoe.cache.tensor_file import FileKind
from melinoe.errors import CheckpointError, ModelError, WriteError
from melinoe.lock import held
from melinoe.moe.routing import find_routers, fingerprint
from melinoe.predictor.targets import Floats, shares

DEPLOYMENT = ""  # the key of those who tell no users apart
HALF_LIFE = 8.0  # requests of a key after which a request counts half
MAX_KEYS = 1024  # of more, the longest unused leaves
FORMAT, VERSION = "melinoe-prior", 2
_WAY_OUT = "remove it, and begin another one"
_KIND = FileKind(FORMAT, (VERSION,), "the prior {} is", "prior", _WAY_OUT, CheckpointError)


class Prior:
    """
    Exponentially decayed use of the experts, by key and layer.

    Per key it holds sums of shares that were used, zero at first. A served completion with shares
    of use ``u`` in a layer makes that layer's sums ``s`` into ``2 ** (-1 / HALF_LIFE) s + u``; a
    layer that the completion did not use stays as it is.

    Like the model, it serves one thread at a time. A key costs ``layers x experts`` numbers, and
    there are never more than `MAX_KEYS`.

    Args:
        num_layers: MoE layers.
        num_experts: Experts of each.
        fingerprint: Of the model that is served; no other may use it.
    """

    def __init__(self, num_layers: int, num_experts: int, fingerprint: str) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.fingerprint = fingerprint
        self._known: OrderedDict[str, Floats] = OrderedDict()  # the longest unused first
        # What was learned since the file was read, by key: what that multiplies and what it adds.
        self._news: OrderedDict[str, tuple[Floats, Floats]] = OrderedDict()

    def observe(self, key: str, usage: NDArray) -> None:
        """
        Learn from a completion that was served for *key*.

        Args:
            key: Whose; ``""`` where users are not told apart.
            usage: How often it chose each expert, ``(layers, num_experts)``, 0 or more; one that
                chose none, having only one token, teaches nothing.

        Raises:
            ValueError: of another shape, negative or no number.
        """
        counts, shape = np.asarray(usage, np.float64), (self.num_layers, self.num_experts)
        if counts.shape != shape:
            raise ValueError(f"usage must be of shape {shape}, got {counts.shape}")
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError("usage must be numbers of 0 or more")
        used = counts.sum(axis=1, keepdims=True) > 0
        if not used.any():
            return
        decay, added = np.where(used, 0.5 ** (1 / HALF_LIFE), 1.0), shares(counts) * used
        factor, sums = self._news.get(key, (np.ones_like(decay), np.zeros(shape)))
        self._news[key] = (factor * decay, sums * decay + added)
        self._news.move_to_end(key)
        while len(self._news) > MAX_KEYS:
            self._news.popitem(last=False)
        self._add(key, decay, added)

    def _add(self, key: str, factor: Floats, added: Floats) -> None:
        self._known[key] = self._known.get(key, np.zeros_like(added)) * factor + added
        self._known.move_to_end(key)
        while len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)

    def top(self, key: str, slots: int) -> list[list[int]]:
        """
        Name the *slots* experts of each layer that *key* used most, the most used first.

        An expert that it has not used is not named, so a new key gets empty lists.
        """
        if key not in self._known:
            return [[] for _ in range(self.num_layers)]
        self._known.move_to_end(key)
        return most_wanted(self._known[key], slots)

    def reset(self, key: str | None = None) -> None:
        """Forget *key*, or all keys; a key that is not known is no error."""
        for table in (self._known, self._news):
            if key is None:
                table.clear()
            else:
                table.pop(key, None)

    def keys(self) -> list[str]:
        """Known keys, the longest unused first."""
        return list(self._known)

    def requests(self, key: str) -> float:
        """How many requests of *key* still count, each by its weight; 0 for an unknown key."""
        # The shares of a request add up to 1 in each layer that it used.
        return float(self._known[key].sum(axis=1).max()) if key in self._known else 0.0

    def check_model(self, fingerprint: str, num_layers: int, num_experts: int) -> None:
        """
        Make sure that it was learned on this model.

        Raises:
            ModelError: it was not.
        """
        mine, theirs = (self.num_layers, self.num_experts), (num_layers, num_experts)
        if mine != theirs or self.fingerprint != fingerprint:
            raise ModelError(
                f"the prior was learned on model {self.fingerprint[:12]} ({mine[0]} layers of "
                f"{mine[1]} experts), not on {fingerprint[:12]} ({theirs[0]} of {theirs[1]}); "
                "start another one for this model"
            )

    # --- the file -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """
        Write one safetensors file, whole or not at all; one already there is replaced.

        Raises:
            WriteError: the place cannot be written to.
        """
        # With nothing in front the table has its shape where there are no keys, too.
        empty = np.zeros((self.num_layers, self.num_experts))
        used = np.stack([empty, *self._known.values()])[1:].astype(np.float32)
        header = {"version": VERSION, "fingerprint": self.fingerprint, "keys": self.keys()}
        blob = save_tensors(
            {"used": used}, metadata={"format": FORMAT, "header": json.dumps(header)}
        )
        target, temporary = Path(path), None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Readable by its owner alone, as temporary files are: it says who used the service.
            with tempfile.NamedTemporaryFile(
                dir=target.parent, prefix=f".{target.name}.", delete=False
            ) as file:
                temporary = file.name
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise WriteError(
                f"the prior cannot be written to {target} ({error.strerror}); choose another place"
            ) from error

    def update(self, path: str | Path) -> None:
        """
        Add to the file what was learned since it was read, whoever has written to it meanwhile.

        Waits for others that do the same, and knows afterwards what the file holds: their requests
        first, then its own. A `reset` here is undone by a file that still knows the key.

        Raises:
            CheckpointError: the file is torn, no prior, or of another version.
            ModelError: it is of another model.
            WriteError: the place cannot be written to.
        """
        with held(path, wait=True):
            if Path(path).exists():
                there = Prior.load(path)
                there.check_model(self.fingerprint, self.num_layers, self.num_experts)
                self._known = there._known
                for key, (factor, added) in self._news.items():
                    self._add(key, factor, added)
            self.save(path)
        self._news.clear()

    @classmethod
    def load(cls, path: str | Path) -> Prior:
        """
        Read what `save` wrote, and check all of it.

        Raises:
            CheckpointError: it is missing, torn, no prior, or of another version.
        """
        arrays, header, _ = _KIND.read(path)
        fault = _fault(arrays, header)
        if fault is not None:
            raise CheckpointError(f"the prior {path} is malformed ({fault}); {_WAY_OUT}")
        used = arrays["used"].astype(np.float64)
        prior = cls(used.shape[1], used.shape[2], header["fingerprint"])
        prior._known.update(zip(header["keys"], used, strict=True))
        return prior


def _fault(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> str | None:
    """Say what is inconsistent in a file; None if nothing is."""
    if arrays.keys() != {"used"}:
        return f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
    used, keys = arrays["used"], header.get("keys")
    if not isinstance(header.get("fingerprint"), str):
        return "it names no model"
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        return "its keys are no list of words"
    if len(set(keys)) != len(keys) or len(keys) > MAX_KEYS:
        return "a key occurs twice, or there are more than it may hold"
    if used.dtype != np.float32 or used.ndim != 3 or len(used) != len(keys):
        return "its table does not fit its keys"
    if not used.shape[1] or not used.shape[2]:
        return "it knows no experts"
    if not np.isfinite(used).all() or (used < 0).any():
        return "a use is negative or no number"
    return None


class AdaptivePredictor:
    """
    Names the experts that a key used lately, whatever the prompt, and learns from what is served.

    `melinoe.generate.generate` takes it as a predictor, and tells it of each completion.

    Args:
        prior: What was served; several of these may share one.
        key: Whose requests these are.
    """

    def __init__(self, prior: Prior, key: str = DEPLOYMENT) -> None:
        self.prior, self.key = prior, key
        self._model: weakref.ref[nn.Module] | None = None

    def bind(self, model: nn.Module, tokenizer: Any = None) -> None:
        """
        Check that the prior is of *model*.

        Raises:
            ModelError: it was learned on another model.
        """
        if self._model is None or self._model() is not model:
            self.prior.check_model(fingerprint(model), *_shape(model))
            self._model = weakref.ref(model)

    def top(self, token_ids: Sequence[int], slots: int) -> list[list[int]]:
        """Name at most *slots* experts of each layer, the most used first."""
        return self.prior.top(self.key, slots)

    def observe(self, usage: NDArray) -> None:
        """Learn from a completion, as `Prior.observe`."""
        self.prior.observe(self.key, usage)


def open_prior(path: str | Path, model: nn.Module) -> Prior:
    """
    Load a model's prior, or begin one where there is no file; nothing is written.

    Args:
        path: Where `Prior.save` will be told to write.
        model: The served one.

    Raises:
        ModelError: the file is another model's.
        CheckpointError: the file is damaged.
    """
    name, shape = fingerprint(model), _shape(model)
    if not Path(path).exists():
        return Prior(*shape, name)
    prior = Prior.load(path)
    prior.check_model(name, *shape)
    return prior


def _shape(model: nn.Module) -> tuple[int, int]:
    """Layers, and experts of the layer that has most."""
    routers = find_routers(model)
    return len(routers), max(router.num_experts for router in routers)
