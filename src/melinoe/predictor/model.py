"""Predictor: the fitted network, and the encoder that it reads prompts with."""

import json
import os
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from melinoe.cache.prefetch import most_wanted
from melinoe.errors import (
    CheckpointError,
    DataError,
    ModelError,
    OutputExistsError,
)
from melinoe.moe.routing import fingerprint
from melinoe.predictor.encoders import EMBEDDINGS, SENTENCES, Encoder, as_encoder, encoder_for

FORMAT = 2  # 1 knew one encoder alone
_WEIGHTS, _HEADER = "predictor.safetensors", "predictor.json"


class PredictorNetwork(nn.Module):
    """Features to logits: standardise, one hidden layer, one output for each (layer, expert)."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int, hidden: int, shape: tuple[int, int], dropout: float):
        super().__init__()
        self.shape = shape  # (layers, experts)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.hidden = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, shape[0] * shape[1])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(batch, features)`` to logits ``(batch, layers, experts)``."""
        inner = nn.functional.gelu(self.hidden((features - self.mean) / self.scale))
        return self.output(self.dropout(inner)).unflatten(-1, self.shape)


class Predictor:
    """
    Which experts each layer will use for a prompt.

    Attributes:
        fingerprint: Of the model whose trace it was fitted to; no other model may use it.
        slots: The number of experts per layer that its early stopping looked at.
        popularity: float32 ``(layers, experts)``, the mean over the fitted sequences; what an
            empty prompt gets.
        encoder: What reads prompts; ``None`` until `bind`, for one that was loaded.
        reads_with: What `Encoder.describe` says of it.
        comparison: What `melinoe.predictor.compare` found, if it was saved along.
    """

    def __init__(
        self,
        network: PredictorNetwork,
        encoder: Encoder | torch.Tensor | None,
        popularity: NDArray[np.float32],
        fingerprint: str,
        slots: int,
        comparison: dict[str, Any] | None = None,
        reads_with: dict[str, Any] | None = None,
    ) -> None:
        self.network = network.eval()
        self.encoder = None if encoder is None else as_encoder(encoder)
        self.reads_with = reads_with or (self.encoder.describe() if self.encoder else {})
        self.popularity = popularity
        self.fingerprint = fingerprint
        self.slots = slots
        self.comparison = comparison
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.network.shape[0]

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return self.network.shape[1]

    def predict(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """
        Distribution over the experts of each layer, as the completion will use them.

        Args:
            token_ids: The prompt; an empty one gets the global popularity.

        Returns:
            float32 ``(layers, num_experts)``; each layer sums to 1.

        Raises:
            TokenizerError: an id that the model does not know.
            ModelError: loaded, and not yet bound to a model; an encoder of another width.
        """
        if len(token_ids) == 0:
            return self.popularity.copy()
        if self.encoder is None:
            raise ModelError(
                "the predictor was loaded without the model that it reads prompts for; bind it to "
                "that model"
            )
        with torch.inference_mode():
            features = self.encoder.features([token_ids])
            if features.shape[1] != (width := self.network.hidden.in_features):
                raise ModelError(
                    f"the encoder gives {features.shape[1]} numbers a prompt and the predictor "
                    f"reads {width}; use the encoder that it was fitted with, or fit it again"
                )
            return self.network(features)[0].softmax(-1).numpy()

    def distributions(self, features: torch.Tensor) -> NDArray[np.float64]:
        """As `predict`, of many prompts, from what the encoder gave for them."""
        with torch.inference_mode():
            return self.network(features).softmax(-1).double().numpy()

    def top(self, token_ids: Sequence[int], slots: int | None = None) -> list[list[int]]:
        """
        Name the *slots* likeliest experts of each layer, likeliest first; ready for `prefetch`.

        Those that no completion used that it was fitted to are not named: a layer may have fewer
        experts than others, and then they do not exist.

        Raises:
            TokenizerError, ModelError: as `predict`.
        """
        count = self.slots if slots is None else slots
        return most_wanted(self.predict(token_ids), count, self.popularity > 0)

    def bind(self, model: nn.Module, tokenizer: Any = None) -> None:
        """
        Read prompts for *model*, if it is the one fitted to.

        Checked once per model: binding again to the same object costs nothing.

        Args:
            model: The served one; by default its token embeddings are what reads.
            tokenizer: Its tokenizer, for a predictor whose encoder reads text.

        Raises:
            ModelError: the predictor was fitted to another model, or needs the tokenizer.
            DependencyError: it reads with sentence-transformers, which is not installed.
        """
        if self._model is not None and self._model() is model:
            return
        found = fingerprint(model)
        if found != self.fingerprint:
            raise ModelError(
                f"this predictor was fitted to model {self.fingerprint[:12]}, not to "
                f"{found[:12]}; trace this model and fit a predictor to it"
            )
        # The embeddings are the model's own; a model that reads text is the same for any.
        if self.encoder is None or self.reads_with.get("kind") == EMBEDDINGS:
            self.encoder = encoder_for(self.reads_with, model, tokenizer)
        self._model = weakref.ref(model)

    def save(self, path: str | Path) -> None:
        """
        Write a directory with ``predictor.safetensors`` and ``predictor.json``.

        The encoder's weights stay where they are. Nothing half-written is left behind.

        Raises:
            OutputExistsError: *path* exists and is not an empty directory.
        """
        target = Path(path)
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise OutputExistsError(f"{target} is not empty; name another directory, or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        beside.mkdir()
        try:
            weights = {
                name: value.contiguous() for name, value in self.network.state_dict().items()
            }
            save_file(
                {**weights, "popularity": torch.from_numpy(self.popularity)}, beside / _WEIGHTS
            )
            header = {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "layers": self.num_layers,
                "experts": self.num_experts,
                "slots": self.slots,
                "encoder": self.reads_with,
                "comparison": self.comparison,
            }
            (beside / _HEADER).write_text(json.dumps(header, indent=1) + "\n")
            if target.is_dir():
                target.rmdir()
            os.replace(beside, target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module | None = None, tokenizer: Any = None
    ) -> "Predictor":
        """
        Read what `save` wrote, and bind it to *model* (and *tokenizer*) if one is given.

        Without one, `generate` binds it to the model that it is used with.

        Raises:
            DataError: no predictor there.
            CheckpointError: its files are torn, or of another version.
            ModelError, DependencyError: as `bind`.
        """
        folder = Path(path)
        try:
            header = json.loads((folder / _HEADER).read_text())
            if header["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder} is a predictor of format {header['format']} and this version "
                    f"reads {FORMAT}; fit it again"
                )
            weights = load_file(folder / _WEIGHTS)
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise ValueError("a weight is no number")
            popularity = weights.pop("popularity").numpy().copy()  # the file is mapped
            hidden, features = weights["hidden.weight"].shape
            network = PredictorNetwork(features, hidden, (header["layers"], header["experts"]), 0.0)
            network.load_state_dict(weights)
            found, slots, spec = header["fingerprint"], header["slots"], header["encoder"]
            _check(header, popularity)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} holds no predictor ({Path(error.filename).name} is missing); "
                "make one with `melinoe predictor fit`"
            ) from None
        except (
            AttributeError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"the predictor in {folder} is torn ({str(error).splitlines()[0]}); fit it again"
            ) from error
        predictor = cls(network, None, popularity, found, slots, header.get("comparison"), spec)
        if model is not None:
            predictor.bind(model, tokenizer)
        return predictor


def _check(header: dict[str, Any], popularity: NDArray[np.float32]) -> None:
    """Hold the rest of a header to what it must be; ValueError says what is not."""
    spec, shape = header["encoder"], (header["layers"], header["experts"])
    if not isinstance(spec["kind"], str):
        raise ValueError("its encoder is of no kind")
    if spec["kind"] == SENTENCES and not isinstance(spec.get("name"), str):
        raise ValueError("its encoder has no name")
    if popularity.shape != shape or not np.isfinite(popularity).all():
        raise ValueError("its popularity is of another shape, or no number")
    if not (isinstance(header["fingerprint"], str) and 1 <= header["slots"] <= shape[1]):
        raise ValueError("its model or its slots are not named")
