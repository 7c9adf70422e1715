"""Predict which experts each layer will use for a prompt, with a small fitted network."""

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from melinoe.cache.prefetch import most_wanted
from melinoe.checkpoint.writing import whole_directory
from melinoe.errors import CheckpointError, DataError, ModelError, TokenizerError
from melinoe.moe.routing import fingerprint
from melinoe.whole_file import parse_json

FORMAT = 2
_WEIGHTS, _HEADER = "predictor.safetensors", "predictor.json"
LAST_TOKENS = 8  # the end of a prompt says what is asked; its mean is the second half of a feature
READS_WITH = {"kind": "embeddings", "pooling": f"mean of all and of the last {LAST_TOKENS}"}


def features_of(embeddings: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Pool each prompt: the mean embedding of all its tokens, and of its last ones.

    From ``(vocabulary, hidden)`` and token ids to float32 ``(prompts, 2 * hidden)`` on the CPU.
    """
    table, pooled = embeddings.detach(), []
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= table.shape[0]:
            raise TokenizerError(
                f"the prompt has token id {max(prompt)} but the model knows {table.shape[0]} "
                "tokens; use the model's own tokenizer"
            )
        vectors = table[torch.as_tensor(list(prompt), device=table.device)].float()
        pooled.append(torch.cat([vectors.mean(0), vectors[-LAST_TOKENS:].mean(0)]).cpu())
    found = torch.stack(pooled)
    if not found.isfinite().all():
        ids = {id for prompt in prompts for id in prompt}
        bad = min(id for id in ids if not table[id].isfinite().all())
        raise ModelError(
            f"the model's token embedding of id {bad} holds NaN or infinity; get the "
            "checkpoint's files again"
        )
    return found


def token_embeddings(model: nn.Module) -> torch.Tensor:
    """Return the model's input embedding matrix ``(vocabulary, hidden)``, not copied."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None or not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        raise ModelError("the model has no token embeddings to read prompts with; predict nothing")
    return embedding.weight


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


@dataclass(eq=False)
class Predictor:
    """A fitted network that names the experts each layer will use for a prompt."""

    network: PredictorNetwork
    embeddings: torch.Tensor | None  # the served model's; None until `bind`
    popularity: NDArray[np.float32]  # (layers, experts), the mean over the fitted sequences
    fingerprint: str  # of the model it was fitted to
    slots: int  # experts per layer that its early stopping looked at
    comparison: dict[str, Any] | None = None  # the record of `compare`
    _model: "weakref.ref[nn.Module] | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.network.eval()

    def predict(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """
        Predict a distribution over the experts of each layer, as the completion will use them.

        float32 ``(layers, num_experts)``; an empty prompt gets the popularity.
        """
        if len(token_ids) == 0:
            return self.popularity.copy()
        if self.embeddings is None:
            raise ModelError(
                "the predictor was loaded without the model that it reads prompts for; bind it to "
                "that model"
            )
        features = features_of(self.embeddings, [token_ids])
        return self.distributions(features)[0].astype(np.float32)

    def distributions(self, features: torch.Tensor) -> NDArray[np.float64]:
        """Predict as `predict` does for many prompts, from their features."""
        with torch.inference_mode():
            return self.network(features).softmax(-1).double().numpy()

    def top(self, token_ids: Sequence[int], slots: int | None = None) -> list[list[int]]:
        """Name the *slots* likeliest experts of each layer that were ever used, likeliest first."""
        count = self.slots if slots is None else slots
        return most_wanted(self.predict(token_ids), count, self.popularity > 0)

    def bind(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Read prompts with *model*'s embeddings; ModelError if it was fitted to another model."""
        if self._model is not None and self._model() is model:
            return
        found = fingerprint(model)
        if found != self.fingerprint:
            raise ModelError(
                f"this predictor was fitted to model {self.fingerprint[:12]}, not to "
                f"{found[:12]}; trace this model and fit a predictor to it"
            )
        self.embeddings = token_embeddings(model)
        self._model = weakref.ref(model)

    def save(self, path: str | Path) -> None:
        """Write a directory with ``predictor.safetensors`` and ``predictor.json``, or nothing."""
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        weights["popularity"] = torch.from_numpy(self.popularity)
        header: dict[str, Any] = {"format": FORMAT, "fingerprint": self.fingerprint}
        header |= dict(zip(("layers", "experts"), self.network.shape, strict=True))
        header |= {"slots": self.slots, "encoder": READS_WITH, "comparison": self.comparison}
        with whole_directory(path) as directory:
            save_file(weights, directory / _WEIGHTS)
            (directory / _HEADER).write_text(json.dumps(header, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Predictor":
        """
        Read what `save` wrote, and bind it to *model*, if it is given.

        DataError: no predictor there. CheckpointError: its files are torn, or of another version.
        """
        folder = Path(path)
        try:
            header = parse_json((folder / _HEADER).read_bytes())
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
            found, slots = header["fingerprint"], header["slots"]
            if header["encoder"]["kind"] != READS_WITH["kind"]:
                raise CheckpointError(
                    f"{folder} reads prompts with {header['encoder']['kind']!r} and this version "
                    "with the model's own embeddings; fit it again"
                )
            if popularity.shape != (header["layers"], header["experts"]):
                raise ValueError("its popularity is of another shape")
            if not (isinstance(found, str) and 1 <= slots <= header["experts"]):
                raise ValueError("its model or its slots are not named")
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
        predictor = cls(network, None, popularity, found, slots, header.get("comparison"))
        if model is not None:
            predictor.bind(model)
        return predictor
