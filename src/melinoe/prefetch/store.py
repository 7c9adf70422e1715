"""Prompts by their embedding, with the experts that their completions used; kept as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from melinoe.cache.ahead import Prompts
from melinoe.cache.tensor_file import FileKind
from melinoe.cache.trace import COMPLETION_ROW, Trace
from melinoe.cache.trace_file import write_whole
from melinoe.errors import DataError, TokenizerError

FORMAT = "melinoe-prompt-store"
VERSION = 1
_HEADER = {"fingerprint": str, "model": str}
_WAY_OUT = "make it again with `melinoe prefetch store`"
_KIND = FileKind(
    FORMAT, (VERSION,), "the stored prompts {} are", "stored prompts", _WAY_OUT, DataError
)


def prompt_embedding(weight: Any, ids: Sequence[int]) -> np.ndarray:
    """
    The mean of a prompt's token embeddings, float32 (hidden,).

    Args:
        weight: The model's token embeddings, a torch tensor (vocabulary, hidden).
        ids: At least one.

    Raises:
        TokenizerError: an id that the vocabulary does not have.
        DataError: no ids.
    """
    if not len(ids):
        raise DataError("an empty prompt is near no other; write a prompt")
    if min(ids) < 0 or max(ids) >= weight.shape[0]:
        raise TokenizerError(
            f"the prompt has token id {max(ids)} but the model knows {weight.shape[0]} tokens; "
            "use the model's own tokenizer"
        )
    return weight.detach()[list(map(int, ids))].float().mean(0).cpu().numpy()


@dataclass(frozen=True, eq=False)
class PromptStore:
    """
    What `melinoe.prefetch.nearest.Nearest` compares a prompt with.

    Attributes:
        embeddings: float32 (prompts, hidden), means of the model's token embeddings.
        uses: uint32 (prompts, layers, num_experts), (token, choice) pairs of the completion.
        fingerprint: Of the model that was traced (`melinoe.moe.routing.fingerprint`).
        model: Its name; for people.

    Raises:
        DataError: the arrays do not fit each other, or there is no prompt.
    """

    embeddings: np.ndarray
    uses: np.ndarray
    fingerprint: str
    model: str = ""

    def __post_init__(self) -> None:
        def refuse(fault: str) -> DataError:
            return DataError(f"the stored prompts are malformed: {fault}; {_WAY_OUT}")

        for name, dtype, dimensions in (("embeddings", np.float32, 2), ("uses", np.uint32, 3)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != dimensions:
                raise refuse(
                    f"{name} is no {np.dtype(dtype).name} array of {dimensions} dimensions"
                )
        if not len(self.embeddings) or len(self.embeddings) != len(self.uses):
            raise refuse(f"{len(self.embeddings)} embeddings and {len(self.uses)} prompts' uses")
        if not np.isfinite(self.embeddings).all():
            raise refuse("an embedding is not finite")

    def __len__(self) -> int:
        return len(self.embeddings)

    @classmethod
    def build(cls, trace: Trace, prompts: Sequence[Sequence[int]], weight: Any) -> PromptStore:
        """
        Store the prompts of a trace; those without a completion are left out.

        Args:
            trace: Of the model that will be served; its sequences are *prompts*, in order.
            prompts: Token ids.
            weight: The model's token embeddings, a torch tensor (vocabulary, hidden).

        Raises:
            TraceError: the prompts are not the trace's.
            TokenizerError: an id that the model does not know.
            DataError: no prompt has a completion.
        """
        Prompts(trace, (1,) * trace.num_layers, prompts)  # refuses other prompts
        rows = trace.kind == COMPLETION_ROW
        sequence, chosen = trace.sequence[rows].astype(np.int64), trace.experts[rows]
        shape = (len(prompts), trace.num_layers, trace.num_experts)
        uses = np.zeros(shape, np.uint32)
        for layer in range(trace.num_layers):
            ids = chosen[:, layer].astype(np.int64)
            known = ids >= 0
            np.add.at(
                uses[:, layer],
                (np.broadcast_to(sequence[:, None], ids.shape)[known], ids[known]),
                1,
            )
        kept = [n for n, prompt in enumerate(prompts) if len(prompt) and uses[n].any()]
        if not kept:
            raise DataError("no prompt of the trace has a completion; trace more new tokens")
        vectors = np.stack([prompt_embedding(weight, prompts[n]) for n in kept])
        return cls(vectors, uses[kept], trace.fingerprint, trace.model)

    def save(self, path: str | os.PathLike) -> None:
        """
        Write one safetensors file, the header as JSON in its metadata; whole or not at all.

        Raises:
            TraceError: the place cannot be written to.
        """
        header = {"version": VERSION, "fingerprint": self.fingerprint, "model": self.model}
        blob = save_tensors(
            {"embeddings": self.embeddings, "uses": self.uses},
            metadata={"format": FORMAT, "header": json.dumps(header)},
        )
        write_whole(path, blob, "prompt store")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PromptStore:
        """
        Read a file that `save` wrote, and check all of it.

        Raises:
            DataError: it is missing, torn, something else, of another version, or inconsistent.
        """
        arrays, header, _ = _KIND.read(path)
        types = {name: type(value) for name, value in header.items()}
        if types != _HEADER or arrays.keys() != {"embeddings", "uses"}:
            raise DataError(
                f"the stored prompts {path} are malformed: other fields than embeddings, uses, "
                f"{', '.join(_HEADER)}; {_WAY_OUT}"
            )
        try:
            return cls(arrays["embeddings"], arrays["uses"], header["fingerprint"], header["model"])
        except DataError as error:
            raise DataError(str(error).replace("prompts are", f"prompts {path} are", 1)) from error
