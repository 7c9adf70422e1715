"""Predictor: the fitted network, with the served model's token embeddings as its eyes."""

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

from melinoe.errors import (
    CheckpointError,
    DataError,
    ModelError,
    OutputExistsError,
    TokenizerError,
)
from melinoe.moe.routing import fingerprint

FORMAT = 1
LAST_TOKENS = 8  # the end of a prompt says what is asked; its mean is the second half of a feature
_WEIGHTS, _HEADER = "predictor.safetensors", "predictor.json"


def pool(embeddings: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """
    Turn a prompt into one vector: the mean embedding of all its tokens and of its last ones.

    Args:
        embeddings: ``(vocabulary, hidden)``, any device and floating type.
        token_ids: At least one id.

    Returns:
        float32 ``(2 * hidden,)`` on the CPU.

    Raises:
        TokenizerError: an id that the vocabulary does not have.
    """
    if min(token_ids) < 0 or max(token_ids) >= embeddings.shape[0]:
        raise TokenizerError(
            f"the prompt has token id {max(token_ids)} but the model knows {embeddings.shape[0]} "
            "tokens; use the model's own tokenizer"
        )
    ids = torch.as_tensor(list(token_ids), device=embeddings.device)
    vectors = embeddings.detach()[ids].float()
    return torch.cat([vectors.mean(0), vectors[-LAST_TOKENS:].mean(0)]).cpu()


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
        comparison: What `melinoe.predictor.compare` found, if it was saved along.
    """

    def __init__(
        self,
        network: PredictorNetwork,
        embeddings: torch.Tensor | None,
        popularity: NDArray[np.float32],
        fingerprint: str,
        slots: int,
        comparison: dict[str, Any] | None = None,
    ) -> None:
        self.network = network.eval()
        self.embeddings = None if embeddings is None else embeddings.detach()
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
            ModelError: loaded, and not yet bound to a model.
        """
        if len(token_ids) == 0:
            return self.popularity.copy()
        if self.embeddings is None:
            raise ModelError(
                "the predictor reads prompts with the model's embeddings; bind it to one"
            )
        with torch.inference_mode():
            logits = self.network(pool(self.embeddings, token_ids)[None])[0]
            return logits.softmax(-1).numpy()

    def top(self, token_ids: Sequence[int], slots: int | None = None) -> list[list[int]]:
        """
        Name the *slots* likeliest experts of each layer, likeliest first; ready for `prefetch`.

        Raises:
            TokenizerError, ModelError: as `predict`.
        """
        count = self.slots if slots is None else slots
        order = np.argsort(-self.predict(token_ids), axis=-1, kind="stable")
        return order[:, :count].tolist()

    def bind(self, model: nn.Module) -> None:
        """
        Read prompts with the token embeddings of *model*, if it is the one fitted to.

        Checked once per model: binding again to the same object costs nothing.

        Raises:
            ModelError: the predictor was fitted to another model.
        """
        if self._model is not None and self._model() is model:
            return
        found = fingerprint(model)
        if found != self.fingerprint:
            raise ModelError(
                f"this predictor was fitted to model {self.fingerprint[:12]}, not to "
                f"{found[:12]}; trace this model and fit a predictor to it"
            )
        self.embeddings = token_embeddings(model).detach()
        self._model = weakref.ref(model)

    def save(self, path: str | Path) -> None:
        """
        Write a directory with ``predictor.safetensors`` and ``predictor.json``.

        The embeddings stay with the model. Nothing half-written is left behind.

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
                "encoder": f"token embeddings, mean of all and of the last {LAST_TOKENS}",
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
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Predictor":
        """
        Read what `save` wrote, and bind it to *model* if one is given.

        Without one, `generate` binds it to the model that it is used with.

        Raises:
            DataError: no predictor there.
            CheckpointError: its files are torn, or of a later version.
            ModelError: it was fitted to another model.
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
            popularity = weights.pop("popularity").numpy()
            hidden, features = weights["hidden.weight"].shape
            network = PredictorNetwork(features, hidden, (header["layers"], header["experts"]), 0.0)
            network.load_state_dict(weights)
            found, slots = header["fingerprint"], header["slots"]
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} holds no predictor ({Path(error.filename).name} is missing); "
                "make one with `melinoe predictor fit`"
            ) from None
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"the predictor in {folder} is torn ({str(error).splitlines()[0]}); fit it again"
            ) from error
        predictor = cls(network, None, popularity, found, slots, header.get("comparison"))
        if model is not None:
            predictor.bind(model)
        return predictor


def token_embeddings(model: nn.Module) -> torch.Tensor:
    """
    The model's input embedding matrix ``(vocabulary, hidden)``, not copied.

    Raises:
        ModelError: the model has none.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None or not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        raise ModelError("the model has no token embeddings to read prompts with; predict nothing")
    return embedding.weight
