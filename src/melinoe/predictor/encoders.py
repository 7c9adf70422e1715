"""
Encoders: a prompt's token ids to the numbers that a predictor reads.

    EmbeddingEncoder   the served model's own token embeddings; the default, nothing to download
    SentenceEncoder    a sentence-transformers model, which reads the prompt's text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from melinoe.errors import DependencyError, ModelError, TokenizerError

LAST_TOKENS = 8  # the end of a prompt says what is asked; its mean is the second half of a feature
EMBEDDINGS, SENTENCES = "embeddings", "sentence-transformers"


@runtime_checkable
class Encoder(Protocol):
    """What a predictor reads prompts with."""

    def features(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids, at least one each, to float32 ``(prompts, features)`` on the CPU."""
        ...

    def describe(self) -> dict[str, Any]:
        """``kind`` and what else is needed to make it again; what a file keeps."""
        ...


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


class EmbeddingEncoder:
    """
    The served model's token embeddings, pooled.

    Args:
        embeddings: ``(vocabulary, hidden)``; not copied.
    """

    def __init__(self, embeddings: torch.Tensor) -> None:
        self.embeddings = embeddings.detach()

    def features(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """
        As `Encoder.features`: ``2 * hidden`` numbers a prompt.

        Raises:
            TokenizerError: an id that the vocabulary does not have.
            ModelError: an embedding that is no number.
        """
        found = torch.stack([pool(self.embeddings, prompt) for prompt in prompts])
        if not found.isfinite().all():
            ids = {id for prompt in prompts for id in prompt}
            bad = min(id for id in ids if not self.embeddings[id].isfinite().all())
            raise ModelError(
                f"the model's token embedding of id {bad} holds NaN or infinity; get the "
                "checkpoint's files again"
            )
        return found

    def describe(self) -> dict[str, Any]:
        """As `Encoder.describe`."""
        return {"kind": EMBEDDINGS, "pooling": f"mean of all and of the last {LAST_TOKENS}"}


class SentenceEncoder:
    """
    A sentence-transformers model beside the served one: a second model in memory.

    Args:
        name: What it was loaded from; kept, so that it can be loaded again.
        tokenizer: The served model's: ids are turned back into text.
        model: Has sentence-transformers' ``encode``; see `load`.

    Source:
        The encoder of arXiv:2602.11192, there BAAI/bge-base-en-v1.5.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any) -> None:
        self.name, self._tokenizer, self._model = name, tokenizer, model

    @classmethod
    def load(cls, name: str, tokenizer: Any, device: str = "cpu") -> SentenceEncoder:
        """
        Load a directory or a model of the hub; safetensors alone, and no code of its own.

        The library falls back to pickled weights where a part of the model has no others; such a
        model is refused before the file is opened. Until it is loaded nobody else in the process
        can call `torch.load`.

        Raises:
            DependencyError: sentence-transformers is not installed.
            ModelError: there is no such model, or none that can be loaded, or its weights are not
                all safetensors.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise DependencyError(
                f"the encoder {name} needs sentence-transformers ({error}); install it with: "
                "pip install 'melinoe[predictor]', or use the model's own embeddings"
            ) from None
        try:
            with _no_pickle(name):
                model = SentenceTransformer(
                    name,
                    device=device,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True},
                )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ModelError(
                f"the encoder {name} cannot be loaded ({reason}); name a sentence-transformers "
                "model of the hub or a directory, or use the model's own embeddings"
            ) from error
        return cls(name, tokenizer, model)

    def features(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """As `Encoder.features`; long texts are cut where that model's context ends."""
        texts = [self._tokenizer.decode(list(p), skip_special_tokens=True) for p in prompts]
        found = self._model.encode(
            texts, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
        )
        return torch.as_tensor(found).float().cpu()

    def describe(self) -> dict[str, Any]:
        """As `Encoder.describe`."""
        return {"kind": SENTENCES, "name": self.name}


@contextmanager
def _no_pickle(name: str) -> Iterator[None]:
    """In the body nothing is read by `torch.load`, which reads pickles whatever it is told."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError(
            f"the encoder {name} keeps weights in a pickle file, which Melinoe never opens; name "
            "one whose weights are all safetensors, or use the model's own embeddings"
        )

    read, torch.load = torch.load, refuse
    try:
        yield
    finally:
        torch.load = read


def as_encoder(given: Encoder | torch.Tensor) -> Encoder:
    """A tensor is a model's token embeddings."""
    return EmbeddingEncoder(given) if isinstance(given, torch.Tensor) else given


def encoder_for(spec: dict[str, Any], model: nn.Module, tokenizer: Any = None) -> Encoder:
    """
    Make the encoder that *spec* describes, for a served model.

    Args:
        spec: What `Encoder.describe` gave.
        model: The served one.
        tokenizer: Its tokenizer; only an encoder of text needs it.

    Raises:
        ModelError: the model has no token embeddings, the tokenizer is missing, or a kind of
            encoder that this version does not know.
        DependencyError: as `SentenceEncoder.load`.
    """
    if spec.get("kind") == EMBEDDINGS:
        return EmbeddingEncoder(token_embeddings(model))
    if spec.get("kind") != SENTENCES:
        raise ModelError(
            f"the predictor reads prompts with {spec.get('kind')!r}, which this version does not "
            f"know; fit it again with {EMBEDDINGS} or a sentence-transformers model"
        )
    if tokenizer is None:
        raise ModelError(
            f"the predictor reads text with {spec['name']}, and no tokenizer was given to make "
            "text of ids; bind it with the model and its tokenizer"
        )
    return SentenceEncoder.load(spec["name"], tokenizer)


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
